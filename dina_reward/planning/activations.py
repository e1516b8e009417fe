"""Bytes that a forward pass with gradient keeps for its backward pass, counted on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from dina_reward.backbones.cards import count_flops


@dataclass(frozen=True)
class Kept:
    """Bytes kept for a backward pass, linear in rows: ``fixed + rows * per_row``.

    Args:
        fixed, per_row: of everything that is saved.
        checkpointed_fixed, checkpointed_per_row: with activation checkpointing: the inputs of the checkpointed blocks, what
            is saved outside them, and twice the largest one: what it saves when it is computed again, and its gradients.
    """

    fixed: int
    per_row: int
    checkpointed_fixed: int
    checkpointed_per_row: int

    def bytes(self, rows: float, checkpointing: bool) -> int:
        """For so many rows."""
        fixed, each = (self.fixed, self.per_row)
        if checkpointing:
            fixed, each = self.checkpointed_fixed, self.checkpointed_per_row
        return int(fixed + rows * each)


def activations_of(module: nn.Module, run: Callable[[int], Tensor], compute: torch.dtype) -> Kept:
    """Counts what ``run(rows)`` saves with one and with two rows, and extends the line.

    Tensors that share storage count once, parameters do not count. Matrix products compute in ``compute`` and norms in
    float32, as autocast on a GPU does, and attention keeps its inputs, its output and one number per row.

    Args:
        module: on the meta device, with the parameters that are trained requiring gradients.
        run: a forward pass on so many rows, through ``module``.
        compute: dtype of autocast, or of the weights without it.
    """
    one, two = (_counted(module, run, rows, compute) for rows in (1, 2))
    whole, checkpointed = (b - a for a, b in zip(one, two, strict=True))
    return Kept(one[0] - whole, whole, one[1] - checkpointed, checkpointed)


def counted_flops(run: Callable[[], Any], compute: torch.dtype) -> int:
    """FLOPs of a function on the meta device, whose weights may have several dtypes; see `count_flops`."""

    def cast() -> Any:
        with _MixedPrecision(compute, fused=False):
            return run()

    return count_flops(cast)


def saved_bytes(run: Callable[[], Any], besides: nn.Module) -> int:
    """Bytes of the tensors that ``run`` saves for a backward pass, without the parameters of a module; on any device."""
    count = _Count(besides)
    with count:
        run()
    return count.total


def _counted(module: nn.Module, run: Callable[[int], Tensor], rows: int, compute: torch.dtype) -> tuple[int, int]:
    count = _Count(module)
    with _checkpoints(module, count), _MixedPrecision(compute), count:
        run(rows)
    blocks = max(count.blocks, default=0)
    return count.total, count.total - sum(count.blocks) + 2 * blocks + count.inputs


class _Count:
    """Adds up what is saved while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self.total = self.inputs = 0
        self.blocks: list[int] = []
        # Storages are held, so that none of them takes the place of another.
        self._held = {_key(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        self._entered: dict[int, Tensor] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._held:
            self._held[_key(tensor)] = tensor.detach()
            self.total += tensor.untyped_storage().nbytes()
        return tensor

    def block(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for a checkpoint: runs the block and notes its inputs and what it saves."""
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._entered:
                self._entered[_key(tensor)] = tensor.detach()
                self.inputs += tensor.untyped_storage().nbytes()
        before = self.total
        result = call(*args, **kwargs)
        self.blocks.append(self.total - before)
        return result


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _checkpoints(module: nn.Module, count: _Count) -> Iterator[None]:
    """Lets the blocks that diffusers would checkpoint report to a count; nothing for other modules."""
    enable: Any = getattr(module, "enable_gradient_checkpointing", None)
    if enable is None or "gradient_checkpointing_func" not in inspect.signature(enable).parameters:
        yield
        return
    enable(gradient_checkpointing_func=count.block)
    yield
    module.disable_gradient_checkpointing()  # type: ignore[operator]


class _Attention(torch.autograd.Function):
    """Keeps what fused attention keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _MixedPrecision(TorchFunctionMode):
    """What autocast on a GPU does, for tensors of the meta device, which has none."""

    _LOW = (F.linear, torch.matmul, torch.bmm, F.conv1d, F.conv2d, F.conv3d, Tensor.matmul, Tensor.__matmul__)
    _FULL = (F.layer_norm, F.group_norm, F.softmax, torch.softmax)

    def __init__(self, compute: torch.dtype, fused: bool = True) -> None:
        super().__init__()
        self.compute = compute
        self.fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            args = (*(_cast(tensor, self.compute) for tensor in args[:3]), *args[3:])
            return _Attention.apply(*args[:3]) if self.fused else func(*args, **kwargs)
        dtype = self.compute if func in self._LOW else torch.float32 if func in self._FULL else None
        if dtype is None or self.compute is torch.float32:
            return func(*args, **kwargs)
        return func(*(_cast(v, dtype) for v in args), **{name: _cast(v, dtype) for name, v in kwargs.items()})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
