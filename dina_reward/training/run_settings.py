"""What defines a run, written into each of its checkpoints and compared when one of them is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from dina_reward.modeling.content import probe


RUN_SETTINGS_NAME = "run_settings.json"

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
    "run_name",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
    "use_cpu",
    # How a batch is split; `settings_of` has the products that count.
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "steps_per_generation",
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
    return json.loads(json.dumps({**settings, **facts}, default=str))


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings into a checkpoint."""
    (directory / RUN_SETTINGS_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_same_run(directory: Path, settings: Mapping[str, Any]) -> None:
    """Compares the settings of a run with those in a checkpoint, which may be of a version that wrote none, or others.

    Raises:
        ValueError: some differ, each named with both values; or the file is damaged.
    """
    path = directory / RUN_SETTINGS_NAME
    if not path.is_file():
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Resume from an earlier checkpoint") from error
    different = [
        f"{name}: {_shown(stored[name])} there, {_shown(value)} here"
        for name, value in settings.items()
        if name in stored and _canonical(stored[name]) != _canonical(value)
    ]
    if different:
        raise ValueError(
            f"{directory} is a checkpoint of another run; {len(different)} of its settings differ ({'; '.join(different)}). "
            "Resume it with its own settings, or start a new run in another output_dir"
        )


def text_digest(value: Any) -> str:
    """Digest of anything, by its JSON; objects that JSON has no form for count by their type."""
    text = json.dumps(value, sort_keys=True, default=lambda item: type(item).__name__)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """Digest of a few elements of each plain floating-point tensor; the same on every device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta
        if plain and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
            digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(probe(tensor).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
