"""The one door to a model for rewards, policies and averages: out of its wrappers, and fit for the LoRA it will get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def unwrap(model: nn.Module, *, adapters: bool = True) -> Any:
    """The model inside `torch.compile`, DistributedDataParallel and PEFT wrappers; its parameters have their own names.

    Args:
        adapters: whether a `PeftModel` is a wrapper too; its layers keep their adapters in any case.

    Raises:
        ValueError: parts of the model are compiled wrappers, so that their parameters have other names.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    model = innermost(model, adapters=adapters)
    compiled = [name for name, module in model.named_modules() if isinstance(module, OptimizedModule)]
    if compiled:
        raise ValueError(
            f"{len(compiled)} parts of the {type(model).__name__} were replaced by torch.compile ({compiled[0]!r} is the "
            "first), which renames their weights; compile parts in place instead: `block.compile()` or "
            "`compile_repeated_blocks()`"
        )
    return model


def innermost(model: nn.Module, *, adapters: bool = True) -> nn.Module:
    """As `unwrap`, of any module and without a look at its parts."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    while True:
        inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
        if adapters and isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner


def check_not_offloaded(model: nn.Module) -> None:
    """Refuses weights that are somewhere else until a layer runs, which can neither be moved nor trained.

    Raises:
        ValueError: naming the first of them.
    """
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ValueError(
            f"the {type(model).__name__}'s weight {absent!r} is offloaded (enable_sequential_cpu_offload, or a device_map); "
            "load the pipeline without offloading"
        )


def check_separate_projections(model: nn.Module) -> None:
    """Refuses fused query, key and value projections, past which a LoRA on the separate ones has no effect.

    Raises:
        ValueError: some attention layer's projections are fused.
    """
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError(
            "the generator's query, key and value projections are fused, so LoRA layers on them would have no effect; call "
            "`unfuse_qkv_projections()` first"
        )


def check_lora_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuses LoRA targets that match no layer; PEFT itself is content if one of them does.

    Args:
        targets: names of layers, or what they end in after a dot.

    Raises:
        ValueError: naming the targets without a layer; or a text instead of a list.
    """
    if isinstance(targets, str) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"LoRA targets must be a list of names of layers, such as ['to_q', 'to_v'], got {targets!r}")
    names = [f".{name}" for name, _ in model.named_modules()]
    absent = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    if absent:
        found = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ValueError(
            f"the LoRA targets {absent} match no layer of this {type(model).__name__}; its linear layers are named "
            f"{', '.join(found[:24])}"
        )
