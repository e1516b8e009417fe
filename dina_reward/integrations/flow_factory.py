"""Flow-Factory: the class for ``reward_model`` in its configuration.

    rewards:
      - name: latent
        reward_model: dina_reward.integrations.flow_factory.LatentRewardModel
        model_path: path/or/id

It scores the final latent where the trajectory has it, else the last state that is there, at the noise level that it
has, and in evaluations, which store no latents, the encoded image.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dina_reward.integrations.scoring import LatentScorer


class FlowFactoryScorer:
    """What `LatentRewardModel` does; that class also has Flow-Factory's own base, without which it is not called.

    Args:
        config: ``model_path``, ``base_model_path``, ``noise_level``, ``seed`` and ``noisy`` (what to do without the final
            latent: ``"score"`` the last state at its level, or encode the ``"image"``) are read from its
            ``extra_kwargs``; ``dtype`` is that of the backbone.
        accelerator: gives the device.
    """

    required_fields = ("prompt",)
    use_tensor_inputs = True
    device: torch.device
    dtype: torch.dtype

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)  # type: ignore[call-arg]
        from dina_reward.integrations.loading import load_reward

        extra = dict(getattr(config, "extra_kwargs", None) or {})
        known = {name: extra.pop(name, None) for name in ("model_path", "base_model_path")}
        self.seed = int(extra.pop("seed", 0))
        self.noisy = extra.pop("noisy", "score")
        if known["model_path"] is None or self.noisy not in ("score", "image"):
            raise ValueError(f"give model_path, and noisy as 'score' or 'image'; got {known} and noisy={self.noisy!r}")
        self.reward = load_reward(**known, device=self.device, dtype=self.dtype)
        self.scorer = LatentScorer(self.reward, self.seed, options=extra)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        all_latents: Sequence[Tensor] | None = None,
        latent_index_map: Sequence[Tensor] | None = None,
        timesteps: Sequence[Tensor] | None = None,
        image: Any = None,
        height: Sequence[int] | None = None,
        width: Sequence[int] | None = None,
    ) -> Tensor:
        """Scores of a batch.

        Args:
            prompt: one per sample.
            all_latents: the stored states of each sample, ``(stored, ...)``.
            latent_index_map: for each of the ``steps + 1`` positions where it is stored, or -1.
            timesteps: of the steps.
            image: pictures in [0, 1], for samples without latents.
            height, width: in pixels, for packed latents.

        Returns:
            `Tensor`: shape ``(batch,)``, float32.

        Raises:
            ValueError: there are neither latents nor images.
        """
        size = {} if not height or not width else {"height": int(height[0]), "width": int(width[0])}
        position, stored = _last_stored(all_latents, latent_index_map)
        if all_latents is not None and stored is not None:
            latents = torch.stack([states[stored] for states in all_latents])
            if position is None:
                return self.scorer(latents, prompt, **self._size(latents, size))
            if timesteps is not None and (self.noisy == "score" or image is None):
                at = torch.stack([steps[position] for steps in timesteps]).float()
                return self.reward.score_noisy(latents, list(prompt), timesteps=at, **self._size(latents, size))
        if image is None:
            raise ValueError(
                "the samples have neither a final latent nor an image: store the last position of the trajectory, or decode"
            )
        images = torch.stack(list(image)) if isinstance(image[0], Tensor) else image
        return self.scorer(self.scorer.encode(images), prompt)

    def _size(self, latents: Tensor, size: dict[str, Any]) -> dict[str, Any]:
        """The size in pixels, which only packed latents need."""
        return size if latents.ndim == 3 else {}


def _last_stored(all_latents: Sequence[Tensor] | None, maps: Sequence[Tensor] | None) -> tuple[int | None, int | None]:
    """The last position that is stored (``None`` for the final one), and where; two times ``None`` if there is none."""
    if not all_latents:
        return None, None
    if not maps:
        return None, -1  # every position is stored
    places = maps[0].tolist()
    stored = [position for position, place in enumerate(places) if place >= 0]
    if not stored:
        return None, None
    last = stored[-1]
    return (None if last == len(places) - 1 else last), places[last]


def __getattr__(name: str) -> Any:
    """`LatentRewardModel`, whose base is the client's and imported when it asks for the class."""
    if name != "LatentRewardModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = import_module("flow_factory.rewards.abc").PointwiseRewardModel
    model_class = type(name, (FlowFactoryScorer, base), {"__module__": __name__})
    globals()[name] = model_class
    return model_class
