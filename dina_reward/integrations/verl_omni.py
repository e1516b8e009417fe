"""verl-omni in process: ``compute_score`` for ``reward.reward_functions``, with batches made from its single samples.

    reward.reward_functions.latent.path=pkg://dina_reward.integrations.verl_omni
    reward.reward_functions.latent.name=compute_score
    +reward.reward_functions.latent.model_path=path/or/id
    +reward.reward_functions.latent.base_model_path=path/or/id

The roll-out has to hand over latents: ``output_type: latent`` or ``both``. Further keys are those of `compute_score`.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from dina_reward.integrations.scoring import prompt_seeds
from dina_reward.integrations.single_rows import MicroBatcher


_EMBEDDINGS = {"prompt_embeds": 3, "pooled_prompt_embeds": 2}
_loading = threading.Lock()


async def compute_score(
    solution_image: Any,
    ground_truth: Any,
    extra_info: dict[str, Any],
    model_path: str,
    base_model_path: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    noise_level: float | None = None,
    noise_seed: int | None = None,
    score_scale: float = 1.0,
    score_bias: float = 0.0,
    max_batch_size: int = 16,
    max_wait_ms: float = 10.0,
    data_source: Any = None,
) -> dict[str, float]:
    """Scores one sample of the roll-out.

    Args:
        solution_image: the latent, shape ``(channels, height, width)``, unless ``extra_info`` has it.
        ground_truth: the prompt, unless ``extra_info`` has embeddings or a ``raw_prompt``.
        extra_info: ``latents_clean`` (in newer trees ``media_artifacts`` with an ``image_latent``), ``prompt_embeds`` and
            ``pooled_prompt_embeds`` as the roll-out writes them.
        model_path: the reward; it is loaded once per process, and set of these options.
        base_model_path: the diffusers model it runs on. Default: the one that the checkpoint names.
        device: default: cuda if there is one, else cpu.
        dtype: of the backbone.
        noise_level: default: the checkpoint's.
        noise_seed: of the noise of every sample, as the HTTP client has it. Default: one seed per prompt.
        score_scale, score_bias: the score is ``score_scale * raw + score_bias``.
        max_batch_size, max_wait_ms: as for `MicroBatcher`.
        data_source: of the sample, which the client names where this is the only reward function; changes nothing.

    Returns:
        ``score`` and ``raw_score``; the latter is logged.

    Raises:
        ValueError: there are no latents, or neither embeddings nor a prompt.
    """
    with _loading:
        batcher, on = _batcher(model_path, base_model_path, device, dtype, max_batch_size, max_wait_ms)
    tensors = {"latents": _one_row(_latents(solution_image, extra_info), "latents", 4).to(on)}
    prompt = None
    if extra_info.get("prompt_embeds") is not None:
        given = {name: rank for name, rank in _EMBEDDINGS.items() if extra_info.get(name) is not None}
        tensors |= {name: _one_row(extra_info[name], name, rank).to(on) for name, rank in given.items()}
    else:
        prompt = extra_info.get("raw_prompt", ground_truth)
        if not isinstance(prompt, str):
            raise ValueError("extra_info has no prompt_embeds, and neither raw_prompt nor ground_truth is a prompt")
    seed = prompt_seeds([str(prompt or ground_truth)])[0] if noise_seed is None else int(noise_seed)
    raw = await batcher.score_async(tensors, prompt=prompt, seed=seed, noise_level=noise_level)
    return {"score": score_scale * raw + score_bias, "raw_score": raw}


@functools.cache
def _batcher(
    model_path: str, base: str | None, device: str | None, dtype: str, max_batch_size: int, max_wait_ms: float
) -> tuple[MicroBatcher, torch.device]:
    from dina_reward.integrations.loading import load_reward

    reward = load_reward(model_path, base, device=device, dtype=dtype)
    return MicroBatcher(reward, max_batch_size=max_batch_size, max_wait_ms=max_wait_ms), reward.device


def _latents(solution_image: Any, extra_info: dict[str, Any]) -> Any:
    latents = extra_info.get("latents_clean")
    artifact = extra_info.get("media_artifacts", {}).get("image_latent")
    if latents is None and artifact is not None:
        latents = artifact.data
    if latents is None and isinstance(solution_image, Tensor) and solution_image.shape[-3:-2] != (3,):
        latents = solution_image
    if latents is None:
        raise ValueError(
            "the roll-out hands over pictures alone; set its output_type to 'latent' or 'both' so that the clean latents "
            "can be scored"
        )
    return latents


def _one_row(value: Any, name: str, rank: int) -> Tensor:
    value = torch.as_tensor(value).detach()
    value = value[None] if value.ndim == rank - 1 else value
    if value.ndim != rank or len(value) != 1:
        raise ValueError(f"{name} of one sample must have {rank - 1} dimensions, got shape {tuple(value.shape)}")
    return value
