"""`dina-reward info`: a reward checkpoint, or a generator as the backbone of a reward; no weight is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dina_reward.cli.console import print_table
from dina_reward.cli.options import JsonOption
from dina_reward.shipped import WORLDS


TargetArgument = Annotated[
    str,
    typer.Argument(
        help="A reward (directory, hub id or 'shapes'); a diffusers pipeline (directory or hub id); a diffusers class "
        "such as FluxPipeline; or a published model such as SD3.5-Medium, which is not read from the hub."
    ),
]


def info(
    target: TargetArgument,
    height: Annotated[int | None, typer.Option(min=1, help="Image height in pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Image width in pixels. Default: the model's.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video. Default: the model's.")] = None,
    flops: Annotated[bool, typer.Option(help="Count FLOPs, which takes seconds per model.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Shows what a reward is, or what a reward on a generator would be and cost, without loading weights."""
    structures = _structures(target)
    if structures is None:
        sizes = {"--height": height, "--width": width, "--num-frames": num_frames}
        given = [name for name, size in sizes.items() if size is not None]
        if given:
            raise ValueError(f"{target} is a reward checkpoint; {', '.join(given)} apply to pipelines and classes")
        _show_reward(target, as_json)
        return
    from dina_reward.backbones.cards import card_of

    size: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames}
    cards = [card_of(each, **size, flops=flops) for each in structures]
    if as_json:
        print(json.dumps([asdict(card) for card in cards], indent=2))
        return
    for card in cards:
        print_table(f"{card.name} ({card.model_id})", ("", ""), _rows(card))


def _structures(target: str) -> tuple[Any, ...] | None:
    """Structures of a pipeline, class or published model; ``None`` for what can only be a reward."""
    if target in WORLDS:
        return None
    from dina_reward.backbones.structures import (
        is_pipeline,
        published_as,
        structure_of_repository,
        structures_of_class,
    )

    directory = Path(target).expanduser()
    if directory.is_dir():
        return (structure_of_repository(target),) if (directory / "model_index.json").is_file() else None
    if known := published_as(target):
        return known
    if target.isidentifier():
        return structures_of_class(target)
    return (structure_of_repository(target),) if is_pipeline(target) else None


def _rows(card: Any) -> list[tuple[str, str]]:
    rule = "published reward" if card.published_reward else "this package's rule"
    size = f"{card.width} x {card.height} pixels" + (f", {card.num_frames} frames" if card.num_frames > 1 else "")
    packed = (
        "" if card.pipeline_latent_shape == card.latent_shape else f", the pipeline's {card.pipeline_latent_shape}"
    )
    pooled = "" if card.pooled_text_width is None else f", pooled {card.pooled_text_width}"
    rows = [
        ("family", card.family),
        ("classes", f"{card.pipeline_class}, {card.denoiser_class}"),
        ("blocks", f"{card.num_layers} of {card.total_blocks}, taps {card.taps} ({rule})"),
        ("size", size),
        ("latents", f"{card.latent_shape}{packed}"),
        ("prompt", f"{card.text_tokens} tokens of width {card.text_width}{pooled}"),
        ("parameters of the model", f"{card.denoiser_parameters:,}"),
        ("of the reward's backbone", f"{card.backbone_parameters:,}"),
        ("LoRA", f"rank {card.lora_rank}, {card.lora_layers} layers, {card.lora_parameters:,} parameters"),
        ("LoRA targets", ", ".join(card.lora_targets)),
        ("head", f"width {card.head_width}, {card.head_parameters:,} parameters"),
        (
            "memory of a reward",
            f"{_scaled(card.standalone_bytes, 1024, 'iB')} on weights of its own (backbone in bfloat16)",
        ),
        ("", f"{_scaled(card.shared_bytes, 1024, 'iB')} on the generator's weights"),
    ]
    if card.reward_per_step is not None:
        score, step, decode = (
            _scaled(flops, 1000, "FLOPs") for flops in (card.reward_flops, card.step_flops, card.decode_flops)
        )
        rows += [
            ("one score", f"{score} ({card.reward_per_step:.2f} of a generator step)"),
            ("one generator step", f"{step}, without guidance"),
            ("one VAE decode", decode),
        ]
    return rows


def _scaled(value: int, base: int, unit: str) -> str:
    power = min(4, int(math.log(max(value, 1), base)))
    return f"{value / base**power:.2f} {'_KMGT'[power] if power else ''}{unit}"


def _show_reward(target: str, as_json: bool) -> None:
    from dina_reward.checkpoints import resolve_checkpoint, summarize_checkpoint

    directory = resolve_checkpoint(target)
    found = summarize_checkpoint(directory)
    config = found.config
    if as_json:
        card = {
            "directory": str(directory),
            **config.to_dict(),
            "lora": {"rank": found.lora_rank, "alpha": found.lora_alpha},
            "parameters": {"LoRA": found.lora_parameters, "head": found.head_parameters},
        }
        print(json.dumps([card], indent=2))
        return
    likelihood = "Bradley-Terry"
    if config.likelihood == "thurstone":
        likelihood = f"Thurstone, variance {config.variance_scale} sigma^2 + {config.variance_offset}"
    head = f"{config.head.num_queries} queries" if config.head.kind == "query" else config.head.kind
    lora = f"rank {found.lora_rank}, alpha {found.lora_alpha}"
    rows = [
        ("family", config.family),
        ("backbone", config.backbone_model_id or "not recorded"),
        ("blocks", f"{config.num_layers}, image taps {config.visual_taps}, text taps {config.text_taps}"),
        ("LoRA", f"{lora}, {found.lora_parameters:,} parameters"),
        ("head", f"{head}, {found.head_parameters:,} parameters"),
        ("default noise level", str(config.noise_level)),
        ("likelihood", likelihood),
        ("normalised score", f"(raw + {config.score_shift}) / {config.score_scale}"),
        ("max sequence length", str(config.max_sequence_length or "the pipeline's")),
    ]
    print_table(str(directory), ("", ""), rows)
