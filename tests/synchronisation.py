"""Counts what would make the host wait for a GPU, on a CPU: reads of numbers that come from a model's tensors."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


READS = {
    "aten::_local_scalar_dense",  # item(), bool(), float(), int(), tolist() of one element
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",  # its shape depends on the values; so does that of what is indexed by a mask
    "aten::_unique2",
    "aten::unique_dim",
}


COPIES = ("tolist", "numpy", "cpu")
"""Methods that copy to the host; on a CPU no operation is called for them."""

MASKED = {"aten::index", "aten::index_put_", "aten::index_put"}


class Synchronisations(TorchDispatchMode):
    """Follows tensors through every operation, and counts reads of any that come from them.

    Tensors that live on the host anyway, such as levels and seeds, do not come from them and count nothing.

    Args:
        roots: what would be on the GPU: weights, latents.
    """

    def __init__(self, roots: Iterable[Tensor]) -> None:
        super().__init__()
        self.places: list[str] = []
        self._storages: dict[int, Any] = {}
        for tensor in roots:
            self._follow(tensor)

    @property
    def count(self) -> int:
        return len(self.places)

    def __enter__(self) -> Synchronisations:
        self._patches = [patch.object(Tensor, name, self._watched(getattr(Tensor, name))) for name in COPIES]
        for each in self._patches:
            each.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for each in self._patches:
            each.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        followed = [tensor for tensor in given if self._is_followed(tensor)]
        name = func._schema.name
        if (followed and name in READS) or (name in MASKED and any(t.dtype == torch.bool for t in followed)):
            self._count(name)
        result = func(*args, **(kwargs or {}))
        if followed:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._follow(leaf)
        return result

    def _watched(self, method: Any) -> Any:
        def copy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._is_followed(tensor):
                self._count(method.__name__)
            return method(tensor, *args, **kwargs)

        return copy

    def _count(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "dina_reward/" in frame.filename]
        self.places.append(f"{name} at {frames[-1].filename}:{frames[-1].lineno}" if frames else name)

    def _is_followed(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage  # kept, so that its address is not given to another
