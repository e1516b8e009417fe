"""Model cards of backbones: sizes and costs of a reward on a model, counted without allocating a weight.

A model is built on the meta device, truncated as a reward truncates it, given its LoRA and head, and run once. FLOPs
are those of `torch.utils.flop_counter.FlopCounterMode`: matrix products, attention and convolutions, where one
multiply-add counts as two. One sample, one prompt, no guidance.

    python -m dina_reward.backbones.cards            # the table of all published models
    python -m dina_reward.backbones.cards --write    # writes it into families/README.md
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dina_reward.backbones.structures import ModelStructure, published_models
from dina_reward.families import Conditioning, ModelFamily
from dina_reward.modeling import LatentRewardConfig, LatentRewardModel, default_lora_config, default_reward_config


README = Path(__file__).parents[1] / "families" / "README.md"
MARKERS = ("<!-- cost table: begin -->", "<!-- cost table: end -->")


@dataclass(frozen=True)
class BackboneCard:
    """A published model as the backbone of a reward of default size.

    Args:
        name, model_id, family: of the model.
        pipeline_class, denoiser_class: names of diffusers classes.
        published_reward: whether the reward's shape is a published one rather than this package's rule.
        total_blocks: blocks that the model has.
        num_layers: blocks that the reward runs.
        taps: 1-based numbers of the blocks that the head reads.
        height, width, num_frames: of an image or video, in pixels.
        latent_shape: one latent in the spatial layout.
        pipeline_latent_shape: the same latent as the pipeline returns it.
        text_tokens, text_width: shape of an encoded prompt.
        pooled_text_width: of the pooled embedding, if the model takes one.
        lora_targets: suffixes of the adapted layers' names.
        lora_rank: of the LoRA.
        lora_layers: number of adapted layers.
        head_width: channels inside the head.
        denoiser_parameters: of the whole model.
        backbone_parameters: of the blocks that run and the embedders before them.
        lora_parameters, head_parameters: of the reward; all that is trained.
        standalone_bytes: a reward with weights of its own: backbone in bfloat16, LoRA and head in float32.
        shared_bytes: a reward on a generator's weights: LoRA and head in float32.
        backbone_flops: one pass of the backbone alone, without LoRA.
        reward_flops: one score: backbone with LoRA, and head.
        step_flops: one call of the whole denoiser, without guidance.
        decode_flops: one latent through the VAE's decoder.
    """

    name: str
    model_id: str | None
    family: str
    pipeline_class: str
    denoiser_class: str
    published_reward: bool
    total_blocks: int
    num_layers: int
    taps: tuple[int, ...]
    height: int
    width: int
    num_frames: int
    latent_shape: tuple[int, ...]
    pipeline_latent_shape: tuple[int, ...]
    text_tokens: int
    text_width: int
    pooled_text_width: int | None
    lora_targets: tuple[str, ...]
    lora_rank: int
    lora_layers: int
    head_width: int
    denoiser_parameters: int
    backbone_parameters: int
    lora_parameters: int
    head_parameters: int
    standalone_bytes: int
    shared_bytes: int
    backbone_flops: int | None
    reward_flops: int | None
    step_flops: int | None
    decode_flops: int | None

    @property
    def reward_per_step(self) -> float | None:
        """FLOPs of one score over those of one generator step."""
        return self.reward_flops / self.step_flops if self.reward_flops and self.step_flops else None


def card_of(
    structure: ModelStructure,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    flops: bool = True,
) -> BackboneCard:
    """Card of a model.

    Args:
        height, width, num_frames: size in pixels; default: the structure's.
        flops: count FLOPs too, which runs the model on the meta device (seconds).

    Raises:
        ValueError: a size that the model does not take, or a variant that its family does not support.
    """
    family, pipeline, num_frames = structure.family, meta_pipeline(structure), num_frames or structure.num_frames
    config = dict(getattr(pipeline, family.denoiser_attribute).config)
    height, width = _image_size(structure, pipeline, config, height, width)
    text_width, pooled_width = family.text_sizes(config)
    defaults, reward_config = family.reward_defaults(config), default_reward_config(pipeline, backbone_config=config)
    with torch.device("meta"):
        latents = torch.empty(1, *family.latent_shape(pipeline, height, width, config, num_frames=num_frames))
        conditioning = _meta_conditioning(structure.text_tokens, text_width, pooled_width)
        size = _measure(family, pipeline, reward_config, latents, conditioning, flops)
    return BackboneCard(
        name=structure.name,
        model_id=structure.model_id,
        family=family.name,
        pipeline_class=structure.pipeline_class,
        denoiser_class=structure.denoiser_class,
        published_reward=defaults.published,
        total_blocks=family.num_blocks(config),
        num_layers=reward_config.num_layers,
        taps=reward_config.visual_taps,
        height=height,
        width=width,
        num_frames=num_frames,
        latent_shape=tuple(latents.shape[1:]),
        pipeline_latent_shape=tuple(family.pack_latents(latents).shape[1:]),
        text_tokens=structure.text_tokens,
        text_width=text_width,
        pooled_text_width=pooled_width,
        lora_targets=tuple(family.reward_lora_targets),
        lora_rank=defaults.lora_rank,
        lora_layers=size.lora_layers,
        head_width=size.head_width,
        standalone_bytes=2 * size.parameters["backbone"] + size.trained_bytes,
        shared_bytes=size.trained_bytes,
        denoiser_parameters=size.parameters["denoiser"],
        backbone_parameters=size.parameters["backbone"],
        lora_parameters=size.parameters["lora"],
        head_parameters=size.parameters["head"],
        backbone_flops=size.flops["backbone"],
        reward_flops=size.flops["reward"],
        step_flops=size.flops["step"],
        decode_flops=size.flops["decode"],
    )


@dataclass(frozen=True)
class _Size:
    parameters: dict[str, int]
    flops: dict[str, int | None]
    lora_layers: int
    head_width: int

    @property
    def trained_bytes(self) -> int:
        return 4 * (self.parameters["lora"] + self.parameters["head"])


def _measure(
    family: ModelFamily,
    pipeline: Any,
    config: LatentRewardConfig,
    latents: Tensor,
    conditioning: Conditioning,
    flops: bool,
) -> _Size:
    """Counts parameters of a reward and its generator, and runs both once, all on the meta device."""
    denoiser, timestep = getattr(pipeline, family.denoiser_attribute), torch.empty(1)
    backbone = family.build_backbone(
        denoiser, num_layers=config.num_layers, visual_taps=config.visual_taps, text_taps=config.text_taps or ()
    )

    def cost(run: Callable[[], Any]) -> int | None:
        return count_flops(run) if flops else None

    # The LoRA goes into modules that backbone and denoiser share, so what runs without it is counted first.
    parameters = {"denoiser": _parameters(denoiser), "backbone": _parameters(backbone)}
    costs = {
        "backbone": cost(lambda: backbone(latents, timestep, conditioning)),
        "step": cost(lambda: family.predict_velocity(denoiser, latents, timestep, conditioning, guidance_scale=1.0)),
        "decode": cost(lambda: family.decode_latents(pipeline, latents)),
    }
    model = LatentRewardModel(config, family, backbone, default_lora_config(config)).requires_grad_(False).eval()
    costs["reward"] = cost(lambda: model(latents, timestep, conditioning))
    parameters["lora"] = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    parameters["head"] = _parameters(model.head)
    layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    return _Size(parameters, costs, layers, model.head.width)


def _image_size(
    structure: ModelStructure, pipeline: Any, config: Mapping[str, Any], height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels: as asked for, else the structure's, else the model's sample size."""
    height, width = height or structure.height, width or structure.width
    if height is not None and width is not None:
        return height, width
    if not isinstance(config.get("sample_size"), int):
        raise ValueError("the model's configuration names no image size; give both height and width")
    side = int(config["sample_size"]) * int(pipeline.vae_scale_factor)
    return height or side, width or side


def meta_pipeline(structure: ModelStructure) -> Any:
    """The diffusers pipeline with denoiser, VAE and scheduler alone, its weights on the meta device.

    Raises:
        ValueError: the installed diffusers does not have the classes, or they do not take the settings.
    """
    family = structure.family
    with torch.device("meta"):
        parts = {
            family.denoiser_attribute: _built(structure.denoiser_class, structure.denoiser_config),
            "vae": _built(structure.vae_class, structure.vae_config),
        }
    for part in parts.values():
        part.requires_grad_(False).eval()
    parts["scheduler"] = _built(structure.scheduler_class, structure.scheduler_config)
    pipeline_class = _diffusers_class(structure.pipeline_class)
    parameters = inspect.signature(pipeline_class.__init__).parameters
    absent = {name: None for name, p in parameters.items() if name != "self" and p.default is inspect.Parameter.empty}
    flags = {"requires_safety_checker": False} if "requires_safety_checker" in parameters else {}
    return pipeline_class(**{**absent, **flags, **parts})


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of a function's matrix products, attention and convolutions; a multiply-add counts as two."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def cost_table(cards: Sequence[BackboneCard]) -> str:
    """Markdown table of costs, one row per card."""
    columns = (
        "model",
        "size",
        "text tokens",
        "blocks run",
        "reward, TFLOPs",
        "generator step",
        "VAE decode",
        "reward / step",
        "backbone, M parameters",
        "head",
        "LoRA",
    )
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---|' * 3}{'---:|' * (len(columns) - 4)}"]
    return "\n".join([*lines, *map(table_row, cards)]) + "\n"


def table_row(card: BackboneCard) -> str:
    """A card's row of `cost_table`."""
    size = f"{card.width} x {card.height}" + (f" x {card.num_frames}" if card.num_frames > 1 else "")
    cells = (
        card.name,
        size,
        str(card.text_tokens),
        f"{card.num_layers} of {card.total_blocks}",
        *(tera(flops) for flops in (card.reward_flops, card.step_flops, card.decode_flops)),
        "" if card.reward_per_step is None else f"{card.reward_per_step:.2f}",
        *(f"{n / 1e6:,.1f}" for n in (card.backbone_parameters, card.head_parameters, card.lora_parameters)),
    )
    return f"| {' | '.join(cells)} |"


def tera(flops: int | None) -> str:
    """FLOPs in units of 10^12, three digits."""
    if flops is None:
        return ""
    value = flops / 1e12
    return f"{value:.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f}"


def table_cards() -> list[BackboneCard]:
    """Cards of all published models at their own sizes."""
    return [card_of(structure) for structure in published_models()]


def write_table(path: Path = README) -> None:
    """Puts the table of all published models between the markers of a page.

    Raises:
        ValueError: the page has no markers.
    """
    page = path.read_text(encoding="utf-8")
    begin, end = (page.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise ValueError(f"{path} has no lines {MARKERS[0]} and {MARKERS[1]}")
    table = cost_table(table_cards())
    path.write_text(f"{page[: begin + len(MARKERS[0])]}\n\n{table}\n{page[end:]}", encoding="utf-8")


def _built(class_name: str, config: Any) -> Any:
    model_class = _diffusers_class(class_name)
    try:
        return model_class.from_config(dict(config))
    except TypeError as error:
        raise ValueError(f"{class_name} does not take this configuration: {error}") from error


def _diffusers_class(name: str) -> Any:
    import diffusers

    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise ValueError(f"the installed diffusers {diffusers.__version__} has no class {name}") from None


def _meta_conditioning(tokens: int, width: int, pooled_width: int | None) -> Conditioning:
    return Conditioning(torch.empty(1, tokens, width), None if pooled_width is None else torch.empty(1, pooled_width))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the cost table of all published models, or writes it into the page on model families."""
    parser = argparse.ArgumentParser(prog="python -m dina_reward.backbones.cards", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the table into {README.name} of the families")
    if parser.parse_args(arguments).write:
        write_table()
    else:
        print(cost_table(table_cards()), end="")


if __name__ == "__main__":
    main()
