"""What `dina-reward score` does: load a reward with its pipeline, read files, score them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from dina_reward.backbones.pipelines import load_pipeline as open_pipeline
from dina_reward.checkpoints import read_checkpoint, resolve_checkpoint
from dina_reward.checks.stored import read_tensors
from dina_reward.data.files import decode_image
from dina_reward.noise.draws import fold_seed
from dina_reward.quiet import no_loading_bars
from dina_reward.reward import LatentReward


IMAGE_NOISE_LEVEL = 0.1
"""Level for images that come from disk; freshly generated latents use the checkpoint's."""


@dataclass(frozen=True)
class _Item:
    name: str
    prompt: str
    latents: Tensor
    from_image: bool


def score_files(
    inputs: Sequence[Path],
    prompts: Sequence[str],
    reward: str,
    pipeline: str | None = None,
    *,
    device: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Scores every image and every stored latent; rows keep the order of the inputs.

    Args:
        inputs: image files, and ``.safetensors`` files with a tensor ``latents``.
        prompts: one for all inputs, or one each.
        reward, pipeline, device, dtype: see `locate_reward` and `load_pipeline`.
        seed: of the noise; every row has a stream of its own.
        options: for `LatentReward.score`.

    Returns:
        One dictionary per latent: ``input``, ``prompt``, ``score``, ``level_scores``, ``noise_levels``, ``noise_std``.

    Raises:
        ValueError: files that cannot be read, another number of prompts than inputs, latents that do not fit.
    """
    if len(prompts) not in (1, len(inputs)):
        raise ValueError(f"got {len(prompts)} prompts for {len(inputs)} inputs; give one for all or one each")
    prompts = prompts if len(prompts) == len(inputs) else [prompts[0]] * len(inputs)
    directory, model_id = locate_reward(reward, pipeline)
    loaded = load_pipeline(model_id, device=device, dtype=dtype)
    scorer = LatentReward.from_pretrained(directory, pipeline=loaded, share_backbone=True)
    items = [
        item for path, prompt in zip(inputs, prompts, strict=True) for item in _read(path, prompt, scorer, loaded)
    ]
    groups: dict[tuple[torch.Size, bool], list[int]] = defaultdict(list)
    for position, item in enumerate(items):
        groups[(item.latents.shape, item.from_image)].append(position)
    rows: dict[int, dict[str, Any]] = {}
    for (_, from_image), positions in groups.items():
        level = {"noise_level": options.get("noise_level") or (IMAGE_NOISE_LEVEL if from_image else None)}
        seeds = [fold_seed(seed, position) for position in positions]
        rows.update(zip(positions, _score(scorer, [items[p] for p in positions], seeds, options | level), strict=True))
    return [rows[position] for position in range(len(items))]


def locate_reward(reward: str, pipeline: str | None) -> tuple[Path, str]:
    """Directory of a reward, and path or id of its pipeline: the one given, or the backbone that the checkpoint names."""
    directory = resolve_checkpoint(reward)
    model_id = pipeline or read_checkpoint(directory).config.backbone_model_id
    if model_id is None:
        raise ValueError("the checkpoint names no backbone; give the pipeline with --pipeline")
    if model_id.startswith(".") and pipeline is None:
        model_id = str((directory / model_id).resolve())
    return directory, model_id


def load_pipeline(model_id: str, *, device: str | None = None, dtype: str = "float32") -> Any:
    """A diffusers pipeline without progress bar, on the given device or on the GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {device!r} here: {str(error).splitlines()[0]}") from error
    try:
        with no_loading_bars():
            pipeline = open_pipeline(model_id, dtype=getattr(torch, dtype)).to(device)
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"cannot load the pipeline {model_id!r}: {error}. Give another one with --pipeline"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _read(path: Path, prompt: str, reward: LatentReward, pipeline: Any) -> list[_Item]:
    if path.suffix == ".safetensors":
        latents = _read_latents(path).to(reward.device)
        return [_Item(f"{path.name}[{i}]", prompt, row, False) for i, row in enumerate(latents)]
    if not path.is_file():
        raise ValueError(f"{path} is no file; give images, or .safetensors files with latents")
    latents = reward.family.encode_images(pipeline, [decode_image(path, str(path))])
    return [_Item(path.name, prompt, latents[0], True)]


def _read_latents(path: Path) -> Tensor:
    tensors = read_tensors(path)
    if "latents" not in tensors:
        raise ValueError(f"{path} has no tensor 'latents', only {sorted(tensors)}")
    latents = tensors["latents"]
    if latents.ndim < 2 or not len(latents):
        raise ValueError(f"{path} has latents of shape {tuple(latents.shape)}; expected a batch with at least one")
    return latents


@torch.no_grad()
def _score(
    reward: LatentReward, items: Sequence[_Item], seeds: Sequence[int], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of latents of one shape."""
    latents, prompts = torch.stack([item.latents for item in items]), [item.prompt for item in items]
    output = reward.score(latents, prompts, seed=seeds, **options)
    return [
        {
            "input": item.name,
            "prompt": item.prompt,
            "score": float(output.scores[i]),
            "level_scores": output.level_scores[i].tolist(),
            "noise_levels": output.noise_levels.tolist(),
            "noise_std": None if output.noise_std is None else float(output.noise_std[i]),
        }
        for i, item in enumerate(items)
    ]
