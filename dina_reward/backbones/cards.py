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
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dina_reward.backbones.structures import ModelStructure, published_models
from dina_reward.families import Conditioning, FeatureSizes
from dina_reward.modeling import LatentRewardModel, default_lora_config, default_reward_config


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
    family = structure.family
    pipeline = meta_pipeline(structure)
    denoiser = getattr(pipeline, family.denoiser_attribute)
    config = dict(denoiser.config)
    height, width = height or structure.height, width or structure.width
    if height is None or width is None:
        side = _sample_size(pipeline, config)
        height, width = height or side, width or side
    num_frames = num_frames or structure.num_frames
    shape = family.latent_shape(pipeline, height, width, config, num_frames=num_frames)
    text_width, pooled_width = family.text_sizes(config)
    defaults = family.reward_defaults(config)
    reward_config = default_reward_config(pipeline, backbone_config=config)
    taps = reward_config.visual_taps
    backbone = family.build_backbone(
        denoiser, num_layers=reward_config.num_layers, visual_taps=taps, text_taps=reward_config.text_taps or ()
    )
    with torch.device("meta"):
        latents, timestep = torch.empty(1, *shape), torch.empty(1)
        conditioning = _meta_conditioning(structure.text_tokens, text_width, pooled_width)
        counts = {"denoiser": _parameters(denoiser), "backbone": _parameters(backbone)}
        # The LoRA goes into modules that backbone and denoiser share, so what runs without it is counted first.
        jobs: dict[str, Callable[[], Any]] = {
            "backbone": lambda: backbone(latents, timestep, conditioning),
            "step": lambda: family.predict_velocity(denoiser, latents, timestep, conditioning, guidance_scale=1.0),
            "decode": lambda: family.decode_latents(pipeline, latents),
        }
        cost = {job: count_flops(run) if flops else None for job, run in jobs.items()}
        lora_config = default_lora_config(reward_config)
        model = LatentRewardModel(reward_config, family, backbone, lora_config).requires_grad_(False).eval()
        cost["reward"] = count_flops(lambda: model(latents, timestep, conditioning)) if flops else None
    head = _parameters(model.head)
    lora = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    return BackboneCard(
        name=structure.name,
        model_id=structure.model_id,
        family=family.name,
        pipeline_class=structure.pipeline_class,
        denoiser_class=structure.denoiser_class,
        published_reward=defaults.published,
        total_blocks=family.num_blocks(config),
        num_layers=reward_config.num_layers,
        taps=taps,
        height=height,
        width=width,
        num_frames=num_frames,
        latent_shape=shape,
        pipeline_latent_shape=tuple(family.pack_latents(latents).shape[1:]),
        text_tokens=structure.text_tokens,
        text_width=text_width,
        pooled_text_width=pooled_width,
        lora_targets=tuple(family.reward_lora_targets),
        lora_rank=defaults.lora_rank,
        lora_layers=sum(isinstance(module, BaseTunerLayer) for module in model.modules()),
        head_width=model.head.width,
        denoiser_parameters=counts["denoiser"],
        backbone_parameters=counts["backbone"],
        lora_parameters=lora,
        head_parameters=head,
        standalone_bytes=2 * counts["backbone"] + 4 * (lora + head),
        shared_bytes=4 * (lora + head),
        backbone_flops=cost["backbone"],
        reward_flops=cost["reward"],
        step_flops=cost["step"],
        decode_flops=cost["decode"],
    )


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


def _sample_size(pipeline: Any, config: Mapping[str, Any]) -> int:
    if not isinstance(config.get("sample_size"), int):
        raise ValueError("the model's configuration names no image size; give both height and width")
    return int(config["sample_size"]) * int(pipeline.vae_scale_factor)


def _widest(sizes: FeatureSizes) -> int:
    return sizes.hidden if isinstance(sizes.hidden, int) else max(sizes.hidden)


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
