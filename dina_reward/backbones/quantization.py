"""4-bit weights under a LoRA (QLoRA, arXiv 2305.14314), on the GPU and on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dina_reward.lazy import missing_extra


# What diffusers calls the lists of repeated blocks; everything outside (embedders, output projection) stays dense.
BLOCK_LISTS = (
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "blocks",
    "noise_refiner",
    "context_refiner",
    "down_blocks",
    "mid_block",
    "up_blocks",
)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of a model is stored in other than floating-point numbers."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def quantize_blocks(
    denoiser: nn.Module, *, double_quant: bool = True, compute_dtype: torch.dtype | None = None
) -> list[str]:
    """Replaces the linear layers of a denoiser's blocks by bitsandbytes' 4-bit ones (NF4), in place.

    A weight is stored as 4-bit indices into 16 quantiles of a normal distribution with one scale per 64 elements: 4.5 bits
    per weight (the scales are float32), 4.13 bits when the scales are themselves quantised to 8 bits (``double_quant``).
    Layers outside the block lists (`BLOCK_LISTS`), convolutions, biases and normalisation weights stay as they are. A
    model that is quantised already, e.g. by diffusers' ``BitsAndBytesConfig``, is left alone.

    Afterwards ``denoiser.is_loaded_in_4bit`` is set, from which PEFT chooses its LoRA layers for 4-bit weights, so this has
    to happen before a LoRA is added.

    Args:
        denoiser: a diffusers model or its truncated view, on its device, frozen; float32, bfloat16 or float16.
        double_quant: quantise the scales as well.
        compute_dtype: dtype of the matrix products; that of each layer's weight by default.

    Returns:
        Names of the replaced layers; empty if the model was quantised already.

    Raises:
        ValueError: the model has LoRA layers, or no linear layer inside a block list.
    """
    if is_quantized(denoiser):
        return []
    if getattr(denoiser, "peft_config", None):
        raise ValueError("quantise the denoiser before a LoRA is added; this one has an adapter already")
    names = list(block_linears(denoiser))
    if not names:
        raise ValueError(
            f"{type(denoiser).__name__} has no linear layers in {', '.join(BLOCK_LISTS)}; load the pipeline with a "
            "quantization_config of diffusers instead"
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = denoiser.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(denoiser.get_submodule(parent), child, _quantized_linear(layer, double_quant, compute_dtype))
    denoiser.is_loaded_in_4bit = True  # type: ignore[assignment]
    return names


def is_4bit(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds bitsandbytes' 4-bit indices with their scales."""
    return getattr(parameter, "quant_state", None) is not None


def copy_4bit(parameter: nn.Parameter) -> nn.Parameter:
    """Independent copy of a 4-bit weight; `own_4bit_weight` makes it known to its layer.

    Raises:
        ValueError: bitsandbytes has repacked the weight for sampling on this CPU, or stores it as floating-point numbers.
    """
    state: Any = parameter.quant_state  # type: ignore[attr-defined]
    if getattr(state, "packing_format_for_cpu", False) or parameter.is_floating_point():
        raise ValueError(
            f"cannot copy a 4-bit weight that is stored as {parameter.dtype} or was repacked for sampling on a CPU; load "
            "the generator afresh with bnb_4bit_quant_storage=torch.uint8, or unquantised and pass load_in_4bit=True"
        )
    # The weight refers to its layer, which must not be copied with it.
    return copy.deepcopy(parameter, {id(parameter.module): None})  # type: ignore[attr-defined]


def own_4bit_weight(layer: nn.Module) -> None:
    """Ties a copied 4-bit weight to the layer that now holds it; nothing for other layers."""
    weight: Any = layer._parameters.get("weight")
    if weight is not None and is_4bit(weight):
        weight.module = layer
        layer.quant_state = weight.quant_state
        _keep_trainable(layer)


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters occupy, the scales of 4-bit weights included."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            scales = [state.absmax, state.code] + ([state.state2.absmax, state.state2.code] if state.nested else [])
            total += sum(scale.numel() * scale.element_size() for scale in scales)
    return total


def block_linears(denoiser: nn.Module) -> Iterator[str]:
    """Names of the linear layers that `quantize_blocks` replaces."""
    for block_list in BLOCK_LISTS:
        blocks = getattr(denoiser, block_list, None)
        if isinstance(blocks, nn.Module):
            for name, module in blocks.named_modules(prefix=block_list):
                # Sub-classes have a forward of their own, which a 4-bit layer would not run.
                if type(module) is nn.Linear:
                    yield name


def _quantized_linear(layer: nn.Linear, double_quant: bool, compute_dtype: torch.dtype | None) -> nn.Module:
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ModuleNotFoundError as error:
        raise missing_extra(error, "load_in_4bit") from error

    quantized = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute_dtype or layer.weight.dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    weight: Any = Params4bit(
        layer.weight.detach(),
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=quantized,
    )
    quantized.weight = weight.to(layer.weight.device)
    quantized.bias = layer.bias
    _keep_trainable(quantized)
    quantized.train(layer.training)
    return quantized


def _keep_trainable(layer: Any) -> None:
    # bitsandbytes would repack weights for some CPUs during sampling, and could not train through them afterwards.
    layer.support_avx512bf16_for_cpu = False
