"""A few elements of many tensors, by which it shows that their contents changed, however that was done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


_PROBED = 32
_CAPTURING = "transformers.utils.output_capturing"
_CAPTURES = "_output_capturing_hooks_installed"


def probe(tensor: Tensor) -> Tensor:
    """A view of up to 32 elements that steps through all long dimensions at once, whatever the memory layout is."""
    length = min(_PROBED, max(tensor.shape, default=1))
    stride = sum(size // length * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((length,), (stride,), tensor.storage_offset())


class TextEncoderState:
    """What the encoding of a prompt depends on besides the prompt: text encoders, their adapters and tokenizers.

    Args:
        pipeline: a diffusers pipeline, whose attributes ``text_encoder*`` and ``tokenizer*`` are looked at.
    """

    def __init__(self, pipeline: Any) -> None:
        self._structure = _structure(pipeline)
        self._content = _content(text_encoders(pipeline))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TextEncoderState)
            and self._structure == other._structure
            and torch.equal(self._content, other._content)
        )

    __hash__ = None  # type: ignore[assignment]


def _parts(pipeline: Any, prefix: str) -> list[Any]:
    attributes = sorted(getattr(pipeline, "__dict__", {}).items())
    return [part for name, part in attributes if name.startswith(prefix) and part is not None]


def text_encoders(pipeline: Any) -> list[nn.Module]:
    """The attributes ``text_encoder*`` of a pipeline that are modules."""
    return [part for part in _parts(pipeline, "text_encoder") if isinstance(part, nn.Module)]


def remove_capturing_hooks(pipeline: Any) -> None:
    """Takes transformers' own hooks off the text encoders: they cannot be pickled, and come back with the next call."""
    for encoder in text_encoders(pipeline):
        for module in encoder.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", "") == _CAPTURING]:
                del hooks[key]
            if getattr(module, _CAPTURES, False):
                setattr(module, _CAPTURES, False)


def _structure(pipeline: Any) -> list[Any]:
    """Identities, vocabulary sizes, counts of changes in place, and how strong which adapters are."""
    facts: list[Any] = [(id(part), len(part)) for part in _parts(pipeline, "tokenizer") if hasattr(part, "__len__")]
    for encoder in text_encoders(pipeline):
        # Training one token's embedding changes a single row, which probes may miss.
        facts.append((id(encoder), sum(p._version for p in encoder.parameters() if not p.is_inference())))
        for layer in encoder.modules():
            if isinstance(layer, BaseTunerLayer):
                facts.append(
                    (list(layer.active_adapters), layer.disable_adapters, dict(getattr(layer, "scaling", {})))
                )
    return facts


def _content(modules: Sequence[nn.Module]) -> Tensor:
    """Probes of all plain parameters, float32, on the CPU; offloaded ones (meta device) cannot be read."""
    by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for module in modules:
        for parameter in module.parameters():
            if type(parameter) is nn.Parameter and not parameter.is_meta:
                by_device[parameter.device, parameter.dtype].append(probe(parameter))
    return torch.cat(
        [
            torch.empty(0, device="cpu", dtype=torch.float32),
            *(torch.cat(views).float().cpu() for views in by_device.values()),
        ]
    )
