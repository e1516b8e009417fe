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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dina_reward.checkpoints.atomic import atomic_directory
from dina_reward.checkpoints.model_card import model_card
from dina_reward.checkpoints.parts import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    Checkpoint,
    CheckpointError,
    existing,
    read_lora_config,
    read_safetensors,
)
from dina_reward.modeling import LatentRewardConfig


FORMAT_VERSION = 1
MODEL_TYPE = "dina_latent_reward"
HEAD_FILE = "head.safetensors"
CARD_FILE = "README.md"
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
    version, digests = values.pop("format_version", None), values.pop("sha256", {})
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has checkpoint format version {version}; this dina_reward reads version {FORMAT_VERSION}. "
            "Upgrade dina_reward."
        )
    config = LatentRewardConfig.from_dict(values)
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE):
        path = existing(directory / name)
        if digests.get(name) != _sha256(path):
            raise CheckpointError(
                f"{path} is not the file that was saved with {CONFIG_FILE} (its SHA-256 differs): truncated, or "
                "changed afterwards. Copy the checkpoint again, or save it again from its source."
            )
    return config


def write_checkpoint(directory: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Writes the native format.

    A new directory, or one that replaces an older checkpoint, appears whole or not at all. An empty directory, and one
    that also holds other files, may be in use by others: there each file is replaced atomically, ``config.json`` with
    its digests last, so that a mixture of old and new files is refused when read.
    """
    target = Path(directory)
    names = {entry.name for entry in target.iterdir()} if target.is_dir() else None
    if names is not None and (not names or names - set(NATIVE_FILES)):
        staging = target / f".reward-{os.getpid()}"
        staging.mkdir(exist_ok=True)
        _write_files(staging, checkpoint)
        for name in (*[name for name in NATIVE_FILES if name != CONFIG_FILE], CONFIG_FILE):
            os.replace(staging / name, target / name)
        staging.rmdir()
        return
    with atomic_directory(target) as staging:
        _write_files(staging, checkpoint)


def _write_files(directory: Path, checkpoint: Checkpoint) -> None:
    checkpoint.lora_config.save_pretrained(str(directory))
    save_file(_contiguous(checkpoint.adapter), directory / ADAPTER_FILE, metadata={"format": "pt"})
    save_file(_contiguous(checkpoint.head), directory / HEAD_FILE, metadata={"format": "pt"})
    (directory / CARD_FILE).write_text(model_card(checkpoint.config, checkpoint.lora_config), encoding="utf-8")
    digests = {name: _sha256(directory / name) for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE)}
    values = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **checkpoint.config.to_dict()}
    text = json.dumps({**values, "sha256": digests}, indent=2, default=list) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
