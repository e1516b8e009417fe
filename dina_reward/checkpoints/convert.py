"""Checkpoints of any readable layout: where they are, what is in them, and the way into native form."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dina_reward.checkpoints.atomic import settled
from dina_reward.checkpoints.native import (
    HEAD_FILE,
    MODEL_TYPE,
    NATIVE_FILES,
    native_config,
    read_native,
    write_checkpoint,
)
from dina_reward.checkpoints.parts import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    Checkpoint,
    CheckpointError,
    check_sizes,
    count_parameters,
    read_json,
)
from dina_reward.checkpoints.published import REFERENCE_ADAPTER_DIRECTORY, REFERENCE_HEAD_FILE, read_published
from dina_reward.modeling import LatentRewardConfig
from dina_reward.shipped import reward_path


def resolve_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Local directory of a checkpoint, also of one that ships with the package (``shapes``); a hub id is downloaded.

    Raises:
        CheckpointError: neither a directory nor a hub repository that can be reached.
    """
    if not isinstance(path_or_id, (str, os.PathLike)) or not str(path_or_id):
        raise CheckpointError(f"a reward is named by a directory or a hub id, got {path_or_id!r:.80}")
    path = settled(Path(reward_path(path_or_id)).expanduser())
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(path_or_id),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[*NATIVE_FILES, f"{REFERENCE_ADAPTER_DIRECTORY}/*", str(REFERENCE_HEAD_FILE)],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{str(path_or_id)!r} is neither a directory here nor a repository that can be downloaded: {error}"
        ) from error


def read_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Reads a native or a reference checkpoint, whichever the directory holds.

    Raises:
        CheckpointError: a part is missing, damaged or unknown.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG_FILE)
    if config.get("model_type") == MODEL_TYPE:
        return check_sizes(read_native(directory, config))
    if isinstance(config.get("model"), dict) and "reward_head" in config["model"]:
        return check_sizes(read_published(directory, config["model"]))
    raise CheckpointError(
        f"{directory / CONFIG_FILE} describes no latent reward: expected model_type {MODEL_TYPE!r} or the published "
        f"reference layout, found keys {sorted(config)[:8]}"
    )


@dataclass(frozen=True)
class CheckpointSummary:
    """What is in a checkpoint, without its tensors.

    Args:
        config: the reward's configuration.
        lora_rank, lora_alpha: of the LoRA.
        lora_parameters, head_parameters: counts.
    """

    config: LatentRewardConfig
    lora_rank: int
    lora_alpha: float
    lora_parameters: int
    head_parameters: int


def summarize_checkpoint(directory: str | os.PathLike[str]) -> CheckpointSummary:
    """Looks into a checkpoint of either layout; of a native one neither tensors nor PEFT are loaded."""
    directory = Path(directory)
    values = read_json(directory / CONFIG_FILE)
    if values.get("model_type") == MODEL_TYPE:
        config, lora = native_config(directory, values), read_json(directory / ADAPTER_CONFIG_FILE)
        counts = [count_parameters(directory / name) for name in (ADAPTER_FILE, HEAD_FILE)]
        return CheckpointSummary(config, lora["r"], lora["lora_alpha"], *counts)
    checkpoint = read_checkpoint(directory)
    counts = [sum(tensor.numel() for tensor in part.values()) for part in (checkpoint.adapter, checkpoint.head)]
    return CheckpointSummary(checkpoint.config, checkpoint.lora_config.r, checkpoint.lora_config.lora_alpha, *counts)


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> LatentRewardConfig:
    """Writes any readable checkpoint in native form and returns its configuration."""
    checkpoint = read_checkpoint(resolve_checkpoint(source))
    write_checkpoint(target, checkpoint)
    return checkpoint.config
