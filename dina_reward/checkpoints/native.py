"""The native format of a checkpoint, one directory:

| file | content |
|---|---|
| ``config.json`` | `LatentRewardConfig`, format version, SHA-256 of the weight files |
| ``adapter_config.json``, ``adapter_model.safetensors`` | LoRA, as PEFT writes it |
| ``head.safetensors`` | state dict of the `RewardHead` |
| ``README.md`` | model card |
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dina_reward.checkpoints.atomic import atomic_directory, atomic_files, settled
from dina_reward.checkpoints.model_card import CARD_HEADER, model_card
from dina_reward.checkpoints.parts import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    Checkpoint,
    CheckpointError,
    existing,
    parsed_config,
    read_json,
    read_lora_config,
    read_safetensors,
)
from dina_reward.checks.stored import file_digest
from dina_reward.modeling import LatentRewardConfig


FORMAT_VERSION = 1
MODEL_TYPE = "dina_latent_reward"
HEAD_FILE = "head.safetensors"
CARD_FILE = "README.md"
_EDITABLE = {
    "backbone_model_id",
    "noise_level",
    "score_scale",
    "score_shift",
    "spread_scale",
    "variance_offset",
    "variance_scale",
}
NATIVE_FILES = (CONFIG_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE, CARD_FILE)


def read_native(directory: Path, values: Mapping[str, Any]) -> Checkpoint:
    """Reads the native format, whose ``config.json`` holds ``values``."""
    return Checkpoint(
        config=native_config(directory, values),
        lora_config=read_lora_config(directory),
        adapter=read_safetensors(directory / ADAPTER_FILE),
        head=read_safetensors(directory / HEAD_FILE),
    )


def native_config(directory: Path, values: Mapping[str, Any]) -> LatentRewardConfig:
    """The reward's configuration, once the format's version and the digests of the other files are right."""
    values = dict(values)
    values.pop("model_type")
    version, digests = values.pop("format_version", None), values.pop("sha256", None)
    digests = digests if isinstance(digests, dict) else {}
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has checkpoint format version {version}; this dina_reward reads version {FORMAT_VERSION}. "
            "Upgrade dina_reward."
        )
    config = parsed_config(values, directory / CONFIG_FILE)
    if digests.get(CONFIG_FILE, _config_digest(values)) != _config_digest(values):
        raise CheckpointError(
            f"{directory / CONFIG_FILE} was changed after it was saved, beyond the settings that may be edited by hand "
            f"({', '.join(sorted(_EDITABLE))}); the weights would mean something else. Save the checkpoint again"
        )
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE):
        path = existing(directory / name)
        if digests.get(name) != file_digest(path):
            raise CheckpointError(
                f"{path} is not the file that was saved with {CONFIG_FILE} (its SHA-256 differs): truncated, or "
                "changed afterwards. Copy the checkpoint again, or save it again from its source."
            )
    return config


def write_checkpoint(directory: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Writes the native format.

    A new directory appears whole or not at all; in one that exists, the files are replaced together, and others stay, a
    model card that was written by hand among them.

    Raises:
        ValueError: the directory holds files of others that would have to be overwritten.
    """
    target = Path(directory)
    names = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    _refuse_files_of_others(target, names)
    with atomic_files(target) if target.is_dir() else atomic_directory(target) as staging:
        _write_files(staging, checkpoint)
        if _is_hand_written(target / CARD_FILE):
            shutil.copyfile(target / CARD_FILE, staging / CARD_FILE)


def _refuse_files_of_others(directory: Path, names: set[str]) -> None:
    taken = sorted(names & {CONFIG_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE})
    config = settled(directory / CONFIG_FILE)
    if taken and not (config.is_file() and read_json(config).get("model_type") == MODEL_TYPE):
        raise ValueError(
            f"{directory} holds {', '.join(taken)} of another model, which a reward would overwrite; choose another "
            "directory"
        )


def _is_hand_written(card: Path) -> bool:
    return card.is_file() and CARD_HEADER not in card.read_text(encoding="utf-8", errors="replace")


def _write_files(directory: Path, checkpoint: Checkpoint) -> None:
    checkpoint.lora_config.save_pretrained(str(directory))
    _sort_sets(directory / ADAPTER_CONFIG_FILE)
    save_file(_contiguous(checkpoint.adapter), directory / ADAPTER_FILE, metadata={"format": "pt"})
    save_file(_contiguous(checkpoint.head), directory / HEAD_FILE, metadata={"format": "pt"})
    (directory / CARD_FILE).write_text(model_card(checkpoint.config, checkpoint.lora_config), encoding="utf-8")
    digests = {name: file_digest(directory / name) for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE)}
    digests[CONFIG_FILE] = _config_digest(checkpoint.config.to_dict())
    values = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **checkpoint.config.to_dict()}
    text = json.dumps({**values, "sha256": digests}, indent=2, default=list) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def _sort_sets(path: Path) -> None:
    """Equal configurations give equal bytes: PEFT writes sets in the order that this process happens to have them in."""
    values = read_json(path)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _config_digest(values: Mapping[str, Any]) -> str:
    """Digest of those settings without which the weights mean something else."""
    bound = {name: value for name, value in values.items() if name not in _EDITABLE}
    return hashlib.sha256(json.dumps(bound, sort_keys=True, default=list).encode()).hexdigest()


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
