"""A generator that is sampled: a diffusers pipeline's denoiser as a function of latents and timestep, with counted calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.alignment.costs import CallCounter
from dina_reward.alignment.sampling.rollout import PredictFunction
from dina_reward.alignment.sampling.samplers import Sampler, build_sampler
from dina_reward.alignment.sampling.steps import SDEType
from dina_reward.backbones.wrappers import check_not_offloaded, unwrap
from dina_reward.checks.values import check_number, checked_int
from dina_reward.families import Conditioning, ModelFamily, family_of


_LONGEST_PROMPT = 32_768  # tokens
_LARGEST_SIDE = 65_536  # pixels, or frames


class Generator:
    """A diffusers pipeline whose denoiser is called step by step; nothing in it is altered.

    Every prediction is counted in `calls`, a `CallCounter`.

    Examples:
        >>> generator = Generator(pipe)
        >>> predict = generator.bind(generator.encode(["a cat"], device), generator.encode_negative(device))
        >>> velocity = predict(latents, timestep)  # (batch, ...), float32

    Args:
        pipeline: a text-to-image or text-to-video pipeline of a supported family, flow-matching or DDPM.
        guidance_scale (`float`): classifier-free guidance runs above 1.
        max_sequence_length (`int`, *optional*): length that prompts are encoded to.

    Raises:
        ValueError: a pipeline that samples in a way its family does not support, or whose denoiser is offloaded; numbers out
            of range.
    """

    def __init__(self, pipeline: Any, *, guidance_scale: float = 1.0, max_sequence_length: int | None = None) -> None:
        check_number("guidance_scale", guidance_scale, 0.0)
        if max_sequence_length is not None:
            checked_int("max_sequence_length", max_sequence_length, 1, _LONGEST_PROMPT)
        self.pipeline = pipeline
        self.family: ModelFamily = family_of(pipeline)
        self.family.check_pipeline(pipeline)
        # Never a wrapper: names in files, averages and checkpoints are those of the model, compiled or not.
        self.denoiser: nn.Module = unwrap(getattr(pipeline, self.family.denoiser_attribute))
        check_not_offloaded(self.denoiser)
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.calls = CallCounter()

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype in which latents are kept between steps: that of the denoiser, as in the pipeline itself."""
        dtype: torch.dtype = self.denoiser.dtype  # type: ignore[assignment]
        return dtype

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """Shape of one latent without its batch dimension, in the family's spatial layout."""
        for name, value in (("height", height), ("width", width), ("num_frames", num_frames)):
            checked_int(name, value, 1, _LARGEST_SIDE)
        config: Any = self.denoiser.config
        return self.family.latent_shape(self.pipeline, height, width, config, num_frames)

    def sampler(
        self,
        num_inference_steps: int,
        latent_shape: Sequence[int],
        *,
        sde_type: SDEType | None = None,
        eta: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> Sampler:
        """Sampler on the grid that the pipeline itself would use for latents of this shape; see `build_sampler`."""

        def set_timesteps(scheduler: Any, steps: int) -> None:
            self.family.set_timesteps(scheduler, steps, latent_shape)

        scheduler = self.pipeline.scheduler
        return build_sampler(
            scheduler, num_inference_steps, sde_type=sde_type, eta=eta, device=device, set_timesteps=set_timesteps
        )

    def encode(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """Encodes prompts in one call, cast to the denoiser's dtype."""
        conditioning = self.family.encode_prompts(
            self.pipeline, prompts, max_sequence_length=self.max_sequence_length, device=device
        )
        return conditioning.to(device, self.storage_dtype)

    def encode_negative(self, device: torch.device, guidance_scale: float | None = None) -> Conditioning | None:
        """The empty prompt, one row, where sampling at ``guidance_scale`` (by default the generator's own) needs it."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        config: Any = self.denoiser.config
        if not self.family.uses_negative_prompt(config, scale):
            return None
        conditioning = self.family.encode_negative(
            self.pipeline, max_sequence_length=self.max_sequence_length, device=device
        )
        return conditioning.to(device, self.storage_dtype)

    def bind(
        self,
        conditioning: Conditioning,
        negative: Conditioning | None,
        model: nn.Module | None = None,
        guidance_scale: float | None = None,
    ) -> PredictFunction:
        """What the denoiser says about a batch of prompts, as a function of latents and timesteps.

        Args:
            conditioning: one row per latent.
            negative: the single row of `encode_negative`; ignored where sampling at this scale takes none.
            model: the denoiser as wrapped for training (DDP, FSDP); the bare one by default.
            guidance_scale: overrides the generator's own, e.g. for evaluation or for a loss without guidance.

        Returns:
            ``predict(latents, timestep) -> prediction``: latents of shape ``(batch, ...)``, scheduler timesteps of shape
            ``(batch,)``, prediction (velocity, epsilon or v) in float32 of the shape of the latents.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        expanded = None if negative is None else negative[[0] * len(conditioning)]
        config: Any = self.denoiser.config
        evaluations = 2 if self.family.uses_negative_prompt(config, scale) else 1

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            self._before_call()
            self.calls.count_denoiser(len(latents), evaluations)
            return self.family.predict_velocity(
                self.denoiser if model is None else model,
                latents,
                timestep,
                conditioning,
                negative_conditioning=expanded,
                guidance_scale=scale,
            )

        return predict

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1] of clean latents, by the pipeline's VAE; counted.

        Args:
            latents: spatial layout, shape ``(batch, ...)``.

        Returns:
            `Tensor`: shape ``(batch, 3, height, width)``; of videos ``(batch, frames, 3, height, width)``.
        """
        self.calls.count_decodes(len(latents))
        return self.family.decode_latents(self.pipeline, latents)

    def _before_call(self) -> None:
        """What has to be done before the denoiser runs; nothing, unless a subclass says otherwise."""
