"""What defines a run, written into each of its checkpoints and compared when one of them is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from dina_reward.checks.stored import check_same, file_digest, read_json
from dina_reward.modeling.content import probe


RUN_SETTINGS_NAME = "run_settings.json"
DIGESTS_NAME = "checkpoint_files.json"

_MAY_CHANGE_PREFIXES = (
    "accelerator_",
    "dataloader_",
    "ddp_",
    "deepspeed",
    "do_",
    "eval_",
    "fsdp",
    "hacking_",
    "hub_",
    "include_",
    "log",
    "push_to_hub",
    "save_",
    "torch_compile",
    "trackio",
    "_",
)
_MAY_CHANGE = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "debug",
    "disable_tqdm",
    "enable_jit_checkpoint",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "greater_is_better",
    "load_best_model_at_end",
    "local_rank",
    "max_steps",
    "metric_for_best_model",
    "num_train_epochs",
    "offload_trajectories",
    "output_dir",
    "parallelism_config",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "reward_overlap",
    "run_name",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
    "use_cpu",
    # How a batch is split; `settings_of` has the products that count.
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "rollout_batch_size",
    "steps_per_generation",
    "timesteps_per_forward",
}


def settings_of(args: TrainingArguments, **facts: Any) -> dict[str, Any]:
    """Those training arguments that decide what is computed, with further facts of the run, as JSON has them.

    Args:
        facts: anything that JSON can hold.
    """
    settings = {
        name: value
        for name, value in args.to_dict().items()
        if name not in _MAY_CHANGE and not name.startswith(_MAY_CHANGE_PREFIXES)
    }
    batch = args.per_device_train_batch_size * args.world_size
    settings["samples per optimizer step"] = batch * args.gradient_accumulation_steps
    chunks = getattr(args, "steps_per_generation", None)
    if chunks is not None:
        settings["samples per generation"] = batch * chunks
    return json.loads(json.dumps({"configuration": type(args).__name__, **settings, **facts}, default=str))


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings into a checkpoint."""
    (directory / RUN_SETTINGS_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_same_run(directory: Path, settings: Mapping[str, Any]) -> None:
    """Compares the settings of a run with those in a checkpoint, which may be of a version that wrote none, or others.

    Raises:
        ValueError: some differ, each named with both values; or the file is damaged.
    """
    path = directory / RUN_SETTINGS_NAME
    if path.is_file():
        check_same(
            _read_record(path),
            settings,
            f"{directory} is a checkpoint of another run",
            "Resume it with its own settings, or start a new run in another output_dir",
        )


def write_digests(directory: Path) -> None:
    """Writes down which files a finished checkpoint consists of."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != DIGESTS_NAME)
    digests = {path.relative_to(directory).as_posix(): file_digest(path) for path in files}
    (directory / DIGESTS_NAME).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def check_digests(directory: Path) -> None:
    """Compares the files of a checkpoint with those it was written with; a version that wrote no digests is not checked.

    Raises:
        ValueError: naming the files that are missing or were changed.
    """
    path = directory / DIGESTS_NAME
    if not path.is_file():
        return
    faults = []
    for name, digest in _read_record(path).items():
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()):
            faults.append(f"{name} lies outside it")
        elif not file.is_file() or file_digest(file) != digest:
            faults.append(f"{name} {'was changed or cut off' if file.is_file() else 'is missing'}")
    if faults:
        raise ValueError(f"{directory} is damaged: {', '.join(faults)}. Resume from an earlier checkpoint")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        stored = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Resume from an earlier checkpoint") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object. Resume from an earlier checkpoint")
    return stored


def dataset_digest(dataset: Any) -> str | None:
    """Digest of a preference dataset: its own ``fingerprint()``, or else that of up to 256 evenly spaced records.

    ``None`` for streams, which have no length.
    """
    if hasattr(dataset, "fingerprint"):
        return str(dataset.fingerprint())
    if not hasattr(dataset, "__len__"):
        return None
    digest = hashlib.sha256(str(len(dataset)).encode())
    for row in range(0, len(dataset), max(1, len(dataset) // 256)):
        record = dataset[row]
        digest.update(text_digest([record.get(name) for name in ("prompt", "p_chosen", "weight")]).encode())
        for latent in (record["chosen"], record["rejected"]):
            known = tensor_digest([latent]) if isinstance(latent, Tensor) else text_digest(np.asarray(latent).tolist())
            digest.update(known.encode())
    return digest.hexdigest()[:16]


def text_digest(value: Any) -> str:
    """Digest of anything, by its JSON; of tensors and arrays by their values, of other objects by their type."""
    text = json.dumps(value, sort_keys=True, default=_json_form)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _json_form(item: Any) -> str:
    if isinstance(item, Tensor) and item.layout == torch.strided and not item.is_meta:
        kind, shape = item.dtype, tuple(item.shape)
        item = item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(item, np.ndarray) and item.dtype != object:
        kind, shape = item.dtype, item.shape
    else:
        return type(item).__name__
    return f"{kind} {shape} {hashlib.sha256(item.tobytes()).hexdigest()}"


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """Digest of a few elements of each plain floating-point tensor; the same on every device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta
        if plain and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
            digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(probe(tensor).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
