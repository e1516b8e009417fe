"""Finds the backbone a reward needs (a generator in memory, or weights on disk) and builds the truncated view of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import nn

from dina_reward.backbones.quantization import is_quantized, quantize_blocks
from dina_reward.backbones.sharing import SharedTensors, copy_module_tree, share_module_tree
from dina_reward.backbones.wrappers import check_separate_projections, unwrap
from dina_reward.families import Backbone, ModelFamily, family_of, get_family
from dina_reward.modeling import LatentRewardConfig
from dina_reward.noise import NoiseProcess
from dina_reward.quiet import dtype_option


@dataclass(frozen=True)
class BackboneSource:
    """Where a reward's backbone comes from: a generator in memory, or else the model named in its configuration.

    Args:
        pipeline: diffusers pipeline.
        transformer: its denoiser alone (transformer or UNet); wins over the pipeline's.
        scheduler: training scheduler, or its configuration, whose grid noise levels snap to; default: the one in the
            reward's configuration, else the pipeline's, else the one beside the loaded weights.
        share_backbone: use the generator's tensors instead of a copy.
        backbone: hub id or path of the diffusers model to load when no generator is given.
        torch_dtype: dtype the backbone computes in; default: the generator's, or float32.
        device: default: the generator's, or the CPU.
        load_in_4bit: store the blocks' weights in 4 bits (NF4); not for a shared backbone.
        directory: checkpoint directory that relative model paths refer to.
        hub_options: ``revision`` aside, options for the hub such as ``token`` and ``cache_dir``.
    """

    pipeline: Any | None = None
    transformer: nn.Module | None = None
    scheduler: Any | None = None
    share_backbone: bool = False
    backbone: str | None = None
    torch_dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    load_in_4bit: bool = False
    directory: Path | None = None
    hub_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttachedBackbone:
    """A truncated view with what was learned on the way.

    Args:
        backbone: the view, on its device and in its dtype.
        config: the reward's configuration with the backbone's and scheduler's filled in.
        noise_process: grid of the training scheduler.
        shared: link to the generator's tensors in shared mode.
    """

    backbone: Backbone
    config: LatentRewardConfig
    noise_process: NoiseProcess
    shared: SharedTensors | None


def attach_backbone(config: LatentRewardConfig, source: BackboneSource) -> AttachedBackbone:
    """Builds the truncated backbone for a reward configuration.

    Raises:
        ValueError: a generator of another family or size, nothing to load from, or sharing that cannot be right.
    """
    family = get_family(config.family)
    generator = _generator(family, source)
    if generator is None and source.share_backbone:
        raise ValueError("share_backbone=True needs the generator: pass `pipeline=` or `transformer=`")
    if source.share_backbone and source.load_in_4bit:
        raise ValueError(
            "load_in_4bit=True would alter the generator's weights when they are shared; use share_backbone=False"
        )
    model_id = None if generator is not None else _model_id(config, source)
    denoiser = generator if generator is not None else _load_denoiser(family, config, source, str(model_id))
    config = _with_backbone_config(family, config, dict(denoiser.config))
    scheduler_config = _scheduler_config(config, source, model_id)
    noise_process = family.noise_process(scheduler_config)
    config = replace(config, scheduler_config=_plain(scheduler_config))
    view = family.build_backbone(
        denoiser, num_layers=config.num_layers, visual_taps=config.visual_taps, text_taps=config.text_taps or ()
    )
    shared = None
    if source.share_backbone:
        _check_shared_placement(denoiser, source)
        view, shared = share_module_tree(view, denoiser)
    elif generator is not None:
        view = copy_module_tree(view)
    if shared is None:
        view = view.to(device=source.device)
        if source.torch_dtype is not None:
            _cast(view, source.torch_dtype, float32=getattr(denoiser, "_keep_in_fp32_modules", None) or ())
        if source.load_in_4bit:
            quantize_blocks(view)
        # PEFT chooses its LoRA layers for 4-bit weights by this attribute.
        view.is_loaded_in_4bit = is_quantized(view)  # type: ignore[assignment]
    return AttachedBackbone(view.eval(), config, noise_process, shared)


def _generator(family: ModelFamily, source: BackboneSource) -> Any:
    model = source.transformer
    if model is None and source.pipeline is not None:
        model = getattr(source.pipeline, family.denoiser_attribute, None)
        if model is None:
            raise ValueError(
                f"the reward is for family {family.name!r} ({', '.join(family.pipeline_classes)}), but the "
                f"{type(source.pipeline).__name__} has no {family.denoiser_attribute!r}"
            )
    if model is None:
        return None
    model = unwrap(model)
    check_separate_projections(model)
    found = family_of(model)
    if found is not family:
        raise ValueError(
            f"the reward is for family {family.name!r} ({', '.join(family.denoiser_classes)}), got a "
            f"{type(model).__name__} of family {found.name!r}"
        )
    return model


def _model_id(config: LatentRewardConfig, source: BackboneSource) -> str:
    model_id = source.backbone or config.backbone_model_id
    if model_id is None:
        raise ValueError(
            "the checkpoint names no backbone; pass `pipeline=`, `transformer=`, or `backbone=` with a model id or path"
        )
    relative = Path(source.directory or ".", model_id)
    return str(relative) if model_id.startswith(".") and source.backbone is None else model_id


def _load_denoiser(family: ModelFamily, config: LatentRewardConfig, source: BackboneSource, model_id: str) -> Any:
    try:
        return family.load_denoiser(
            model_id,
            num_layers=config.num_layers,
            subfolder=family.denoiser_attribute,
            **dtype_option(source.torch_dtype or torch.float32),
            **source.hub_options,
        )
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"cannot load the backbone {model_id!r} that the reward names: {error}. Pass `pipeline=`, `transformer=`, "
            "or `backbone=` with another id or a local path."
        ) from error


def _with_backbone_config(
    family: ModelFamily, config: LatentRewardConfig, found: dict[str, Any]
) -> LatentRewardConfig:
    if config.backbone_config:
        wanted_signature = family.backbone_signature(config.backbone_config, config.num_layers)
        found_signature = family.backbone_signature(found, config.num_layers)
        different = {
            key: (wanted, found_signature[key])
            for key, wanted in wanted_signature.items()
            if _plain(wanted) != _plain(found_signature[key])
        }
        if different:
            details = ", ".join(f"{key}: reward {a}, backbone {b}" for key, (a, b) in different.items())
            raise ValueError(f"the backbone is not the one the reward was trained on ({details})")
        return config
    found.pop("quantization_config", None)  # how the generator happens to be loaded
    return replace(config, backbone_config=_plain({k: v for k, v in found.items() if not k.startswith("_")}))


def _scheduler_config(config: LatentRewardConfig, source: BackboneSource, model_id: str | None) -> Mapping[str, Any]:
    if source.scheduler is not None:
        return getattr(source.scheduler, "config", source.scheduler)
    if config.scheduler_config:
        return config.scheduler_config
    if source.pipeline is not None:
        return source.pipeline.scheduler.config
    if model_id is not None:
        from diffusers import DDPMScheduler

        # Only reads scheduler_config.json; which scheduler class reads it makes no difference.
        return DDPMScheduler.load_config(model_id, subfolder="scheduler", **source.hub_options)
    raise ValueError("the noise levels need a scheduler: pass `scheduler=` (or its config) along with `transformer=`")


def _check_shared_placement(denoiser: nn.Module, source: BackboneSource) -> None:
    parameter = next(denoiser.parameters())
    if source.torch_dtype not in (None, parameter.dtype):
        raise ValueError(
            f"share_backbone=True computes in the generator's dtype {parameter.dtype}, got torch_dtype={source.torch_dtype}"
        )
    if source.device is not None and torch.empty(0, device=source.device).device != parameter.device:
        raise ValueError(
            f"share_backbone=True lives on the generator's device {parameter.device}, got device={source.device}"
        )


def _cast(view: nn.Module, dtype: torch.dtype, float32: Iterable[str]) -> None:
    """Casts weights, except those of the modules that the model's class keeps in float32 when it is loaded."""
    kept = set(float32)
    for name, tensor in (*view.named_parameters(), *view.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & set(name.split(".")) else dtype)


def _plain(value: Any) -> Any:
    """JSON-like copy: tuples become lists, mappings become dictionaries."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not str(key).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
