"""A second module tree over a generator's tensors, so that a reward can ride on it without touching it.

`clone_module_tree` copies module *objects* and either shares or copies their tensors. LoRA layers of the generator are
replaced by their base layers, hooks are left behind, and parameters are new `nn.Parameter` objects: their storage is
the generator's, their ``requires_grad`` flag is their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dina_reward.backbones.quantization import copy_4bit, is_4bit, own_4bit_weight
from dina_reward.checks.late import LateChecks
from dina_reward.modeling.content import probe


Module = TypeVar("Module", bound=nn.Module)

_HOOK_SUFFIXES = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_WRAPPED_CALL_ATTRIBUTES = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")


class SharedBackboneError(ValueError):
    """The reward cannot share the generator's tensors; the message says why."""


@dataclass(frozen=True)
class _Link:
    name: str
    view: Tensor
    source: nn.Parameter
    version: int


class SharedTensors:
    """Remembers which tensor of the second tree belongs to which tensor of the generator, and what it held.

    `check` is called before scoring. It follows the generator to another device or dtype, and refuses to score when its
    base weights are others than at the start, are being trained, or have a LoRA fused into them. Much of what rewrites
    weights (``parameter.data``, `EMAModel.copy_to`, a LoRA that is fused and unloaded) leaves no trace beside the
    numbers, so these are compared each time: a few evenly spaced elements of every tensor, all at once.
    """

    def __init__(self, generator: nn.Module, links: list[_Link]) -> None:
        self._generator = generator
        self._links = links
        self._remember([probe(link.view) for link in links])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SharedBackboneError(
            "a reward that shares its generator's tensors cannot be copied or pickled; load it again with "
            "`from_pretrained`, or with share_backbone=False"
        )

    def check(self, late: LateChecks) -> bool:
        """Follows the generator's tensors to where they are now.

        Args:
            late: takes the comparison of what they hold, which waits for the device.

        Returns:
            Whether any had moved.

        Raises:
            SharedBackboneError: the tensors no longer are the weights the reward was attached to; also by ``late``.
        """
        moved = False
        _refuse_merged(self._generator)
        for link in self._links:
            _refuse_trained(link.name, link.source, self._generator)
            if link.source._version != link.version:
                raise _changed(link.name)
            if link.view.data_ptr() != link.source.data_ptr():
                _refuse_unshareable(link.name, link.source)
                link.view.data = link.source.data
                moved = True
        if moved:
            self._follow()
        same = (torch.cat(self._probes).float() - self._content).abs() <= self._tolerance
        late.add(same, lambda: _changed(self._links[int(self._owners()[~same.cpu()][0])].name))
        return moved

    def _owners(self) -> Tensor:
        return torch.cat([torch.full((len(view),), i) for i, view in enumerate(self._probes)])

    def _follow(self) -> None:
        """What the tensors have to hold where they are now: the same, rounded to another dtype if need be."""
        parts = self._content.split([len(view) for view in self._probes])
        now = [probe(link.view) for link in self._links]
        self._remember(now, [part.to(view.device, view.dtype) for part, view in zip(parts, now, strict=True)])

    def _remember(self, probes: list[Tensor], content: list[Tensor] | None = None) -> None:
        content = probes if content is None else content
        self._probes = probes
        self._content = torch.cat(content).float()
        # A LoRA that was fused and taken out again leaves rounding errors, which count where they are large.
        slack = [
            16 * torch.finfo(torch.float32).eps * part.abs().max() * (part.dtype == torch.float32) for part in content
        ]
        self._tolerance = torch.cat([s.float().expand(len(part)) for s, part in zip(slack, content, strict=True)])


def _changed(name: str) -> SharedBackboneError:
    return SharedBackboneError(
        f"the generator's base weight {name!r} no longer is the one that the reward was attached to: it was trained, "
        "loaded or averaged over, or a LoRA was fused into it (unloading a fused LoRA does not take it out again, and "
        "unfusing one in 16 bits leaves rounding errors). A shared reward would drift with it: load the reward with "
        "share_backbone=False."
    )


def share_module_tree(tree: Module, generator: nn.Module) -> tuple[Module, SharedTensors]:
    """Second tree over the tensors of ``tree``, whose modules belong to ``generator``.

    Raises:
        SharedBackboneError: parameters are sharded (FSDP, ZeRO-3), quantised, offloaded, trained in full, or carry a
            merged (fused) LoRA.
    """
    links: list[_Link] = []
    _refuse_merged(tree)
    for name, parameter in _base_parameters(tree):
        _refuse_unshareable(name, parameter)
        _refuse_trained(name, parameter, generator)

    def view(name: str, parameter: nn.Parameter) -> nn.Parameter:
        shared = nn.Parameter(parameter.detach(), requires_grad=False)
        links.append(_Link(name, shared, parameter, parameter._version))
        return shared

    clone = _clone(tree, "", view, lambda buffer: buffer)
    return clone, SharedTensors(generator, links)


def copy_module_tree(tree: Module) -> Module:
    """Independent copy of a module tree without LoRA layers and hooks.

    Raises:
        SharedBackboneError: as for `share_module_tree`, except that trained weights and 4-bit ones may be copied.
        ValueError: 4-bit weights in a form that cannot be copied.
    """
    _refuse_merged(tree)
    for name, parameter in _base_parameters(tree):
        if not is_4bit(parameter):
            _refuse_unshareable(name, parameter)
    return _clone(tree, "", lambda _, parameter: _copy(parameter), lambda buffer: buffer.detach().clone())


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    if is_4bit(parameter):
        return copy_4bit(parameter)
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)


def _clone(
    module: nn.Module,
    name: str,
    view: Callable[[str, nn.Parameter], nn.Parameter],
    copy_buffer: Callable[[Tensor], Tensor],
) -> Any:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    clone = module.__new__(type(module))
    clone.__dict__ = dict(module.__dict__)
    for key in _WRAPPED_CALL_ATTRIBUTES:
        clone.__dict__.pop(key, None)
    for key in clone.__dict__:
        if key.endswith(_HOOK_SUFFIXES):
            clone.__dict__[key] = OrderedDict()
    clone.__dict__["_compiled_call_impl"] = None
    prefix = f"{name}." if name else ""
    clone._parameters = {k: None if p is None else view(prefix + k, p) for k, p in module._parameters.items()}
    clone._buffers = {k: None if b is None else copy_buffer(b) for k, b in module._buffers.items()}
    clone._modules = {
        k: None if child is None else _clone(child, prefix + k, view, copy_buffer)
        for k, child in module._modules.items()
    }
    own_4bit_weight(clone)
    clone.training = False
    return clone


def _base_parameters(tree: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a tree without those of its LoRA layers' adapters."""
    for name, parameter in tree.named_parameters():
        if not any(part.startswith("lora_") for part in name.split(".")):
            yield name, parameter


def _refuse_merged(tree: nn.Module) -> None:
    for name, module in tree.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise SharedBackboneError(
                f"the generator has a LoRA fused into its weights (layer {name!r}), so its base weights are not the "
                "ones the reward was trained on. Call unfuse_lora() on the pipeline first (before unload_lora_weights(), "
                "which leaves what was fused)."
            )


def _refuse_unshareable(name: str, parameter: nn.Parameter) -> None:
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or "flat_param" in name:
        raise SharedBackboneError(
            f"the generator's parameters are sharded by FSDP or ZeRO-3 ({name!r}), so no rank holds whole tensors. "
            "Load the reward without `pipeline`/`transformer`, or before the generator is sharded, with "
            "share_backbone=False."
        )
    if parameter.is_meta:
        raise SharedBackboneError(
            f"the generator's parameter {name!r} is offloaded (meta device). Load the reward with its own weights: "
            "share_backbone=False and no `pipeline`/`transformer`."
        )
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        raise SharedBackboneError(
            f"the generator's parameter {name!r} is quantised ({type(parameter).__name__}, {parameter.dtype}). Load "
            "the reward with its own weights: share_backbone=False, and no `pipeline`/`transformer` unless they are in "
            "bitsandbytes' 4 bits."
        )
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SharedBackboneError(
            f"the generator's parameter {name!r} is stored as {parameter.dtype}; the reward computes in float32, "
            "bfloat16 or float16. Load the reward with its own weights: share_backbone=False and no `pipeline`."
        )


def _refuse_trained(name: str, parameter: nn.Parameter, generator: nn.Module) -> None:
    if parameter.requires_grad and (generator.training or parameter.grad is not None):
        raise SharedBackboneError(
            f"the generator's base weight {name!r} is being trained (full fine-tuning), so a reward on the same tensor "
            "would change with it. Load the reward with share_backbone=False, or freeze the generator and train a LoRA."
        )
