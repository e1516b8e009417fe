"""Checkpoints on disk: the native format, a reader of the published reference format, and the conversion.

Native format, one directory:

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
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dina_reward.atomic import atomic_directory
from dina_reward.families import families
from dina_reward.head import RewardHeadConfig
from dina_reward.model_card import model_card
from dina_reward.modeling import LatentRewardConfig


FORMAT_VERSION = 1
MODEL_TYPE = "dina_latent_reward"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
CARD_FILE = "README.md"
NATIVE_FILES = (CONFIG_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE, CARD_FILE)
REFERENCE_ADAPTER_DIRECTORY = Path("checkpoint", "backbone_lora")
REFERENCE_HEAD_FILE = Path("checkpoint", "rm_head.pt")
_SAFE_LORA_INITS = (True, False, "gaussian", "orthogonal")


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or does not fit; the message says which part."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a reward checkpoint.

    Args:
        config: the reward's configuration; ``backbone_config`` is empty when the format does not record it.
        lora_config: PEFT configuration of the adapter.
        adapter: LoRA tensors under PEFT's keys (``base_model.model....lora_A.weight``).
        head: state dict of the head.
    """

    config: LatentRewardConfig
    lora_config: LoraConfig
    adapter: dict[str, Tensor]
    head: dict[str, Tensor]


def resolve_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Local directory of a checkpoint; a hub id is downloaded.

    Raises:
        CheckpointError: neither a directory nor a hub repository that can be reached.
    """
    path = Path(path_or_id).expanduser()
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
    config = _read_json(directory / CONFIG_FILE)
    if config.get("model_type") == MODEL_TYPE:
        return _read_native(directory, config)
    if isinstance(config.get("model"), dict) and "reward_head" in config["model"]:
        return _read_reference(directory, config["model"])
    raise CheckpointError(
        f"{directory / CONFIG_FILE} describes no latent reward: expected model_type {MODEL_TYPE!r} or the published "
        f"reference layout, found keys {sorted(config)[:8]}"
    )


def _read_native(directory: Path, values: dict[str, Any]) -> Checkpoint:
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
        path = _existing(directory / name)
        if digests.get(name) != _sha256(path):
            raise CheckpointError(
                f"{path} is not the file that was saved with {CONFIG_FILE} (its SHA-256 differs): truncated, or "
                "changed afterwards. Copy the checkpoint again, or save it again from its source."
            )
    return Checkpoint(
        config=config,
        lora_config=_read_lora_config(directory),
        adapter=_read_safetensors(directory / ADAPTER_FILE),
        head=_read_safetensors(directory / HEAD_FILE),
    )


def _read_reference(directory: Path, model: dict[str, Any]) -> Checkpoint:
    adapter_directory = directory / REFERENCE_ADAPTER_DIRECTORY
    lora_config = _read_lora_config(adapter_directory)
    return Checkpoint(
        config=_reference_config(model, _read_json(adapter_directory / ADAPTER_CONFIG_FILE)),
        lora_config=lora_config,
        adapter=_read_safetensors(adapter_directory / ADAPTER_FILE),
        head=_read_pickled_head(directory / REFERENCE_HEAD_FILE),
    )


def _reference_config(model: dict[str, Any], adapter_config: dict[str, Any]) -> LatentRewardConfig:
    head = dict(model["reward_head"])
    unsupported = {
        "use_t_embed": (model.get("use_t_embed", True), True),
        "use_lora": (model.get("use_lora", True), True),
        "reward_head.out_dim": (head.get("out_dim", 1), 1),
    }
    for key, (found, needed) in unsupported.items():
        if found != needed:
            raise CheckpointError(f"reference checkpoint with {key}={found!r}; only {needed!r} is supported")
    backbone_class = (adapter_config.get("auto_mapping") or {}).get("base_model_class")
    classes = {family.name: family.reference_backbone_class for family in families()}
    by_class = {backbone: name for name, backbone in classes.items() if backbone is not None}
    if backbone_class not in by_class:
        raise CheckpointError(
            f"reference checkpoint with backbone class {backbone_class!r}; supported are {sorted(by_class)}"
        )
    width = head.get("width", -1)
    return LatentRewardConfig(
        family=by_class[backbone_class],
        num_layers=model["num_transformer_layers"],
        visual_taps=tuple(model["visual_head_idx"]),
        text_taps=tuple(model["text_head_idx"] or ()),
        backbone_model_id=model.get("backbone_model_id"),
        head=RewardHeadConfig(
            width=None if width in (None, -1) else width,
            num_queries=head.get("num_queries", 4),
            num_attention_heads=head.get("num_attn_heads", 8),
            project_inputs=head.get("use_proj_in", False),
            use_text_features=model.get("use_text_features", True),
            dropout=head.get("dropout", 0.0),
            squash=model.get("use_logistic", False),
        ),
    )


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


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> LatentRewardConfig:
    """Writes any readable checkpoint in native form and returns its configuration."""
    checkpoint = read_checkpoint(resolve_checkpoint(source))
    write_checkpoint(target, checkpoint)
    return checkpoint.config


def check_state(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], part: str) -> None:
    """Compares keys, shapes and finiteness of a loaded state dict with the live one.

    Raises:
        CheckpointError: missing or surplus keys, other shapes, or values that are not finite.
    """
    missing, surplus = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or surplus:
        raise CheckpointError(
            f"the checkpoint's {part} does not fit: {len(missing)} keys missing {missing[:4]}, {len(surplus)} keys "
            f"surplus {surplus[:4]}. It belongs to another configuration or backbone."
        )
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"the checkpoint's {part} has {key} of shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[key].shape)}. It belongs to another configuration or backbone."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"the checkpoint's {part} has values that are not finite in {key}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"the checkpoint is incomplete: {path} is missing")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_existing(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(_existing(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error


def _read_pickled_head(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(_existing(path), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is truncated or holds more than tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must hold a state dict of tensors")
    return state


def _read_lora_config(directory: Path) -> LoraConfig:
    values = _read_json(directory / ADAPTER_CONFIG_FILE)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory} holds a {values.get('peft_type')} adapter; a reward needs LORA")
    if values.get("init_lora_weights", True) not in _SAFE_LORA_INITS:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG_FILE} has init_lora_weights={values['init_lora_weights']!r}, which alters base "
            "weights; convert the adapter to a plain LoRA with PEFT first"
        )
    known = {f.name for f in fields(LoraConfig)}
    surplus = {key: value for key, value in values.items() if key not in known and value not in (None, False, {}, [])}
    if surplus.keys() - {"peft_version", "qalora_group_size", "megatron_core"}:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG_FILE} sets options that the installed PEFT does not know: {sorted(surplus)}"
        )
    return LoraConfig(**{key: value for key, value in values.items() if key in known and key != "auto_mapping"})


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
