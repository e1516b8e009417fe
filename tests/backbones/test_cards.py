"""Structures of published models, built on the meta device: what is counted, against numbers written here."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from dina_reward.backbones.cards import (
    BackboneCard,
    card_of,
    cost_table,
    count_flops,
    meta_pipeline,
    table_row,
    write_table,
)
from dina_reward.backbones.structures import published_models, structures_of_class
from dina_reward.families import Conditioning, families
from dina_reward.modeling import LatentRewardModel, default_lora_config, default_reward_config
from tests.backbones.published import SD35_MEDIUM_512
from tests.families.test_guide import NAME as GUIDE_FAMILY
from tests.families.test_guide import PAGE


MODELS = {model.name: model for model in published_models()}

COUNTS = {
    # name: (blocks, taps, all parameters, those of the backbone, LoRA layers, LoRA parameters, head parameters)
    "FLUX.1-dev": (57, (8, 12, 16, 19), 11_901_408_320, 6_501_842_432, 152, 59_768_832, 245_492_739),
    "FLUX.1-schnell": (57, (8, 12, 16, 19), 11_891_178_560, 6_491_612_672, 152, 59_768_832, 245_492_739),
    "FLUX.2-dev": (56, (9, 19, 28), 32_223_281_152, 18_406_450_176, 84, 128_974_848, 280_862_979),
    "FLUX.2-klein-4B": (25, (4, 8, 12), 3_875_544_576, 2_261_389_568, 47, 29_491_200, 195_928_323),
    "FLUX.2-klein-9B": (32, (5, 11, 16), 9_078_581_248, 5_554_837_504, 72, 54_525_952, 224_239_875),
    "Qwen-Image": (60, (10, 20, 30), 20_430_401_088, 10_216_385_024, 240, 94_371_840, 195_928_323),
    "Sana-1600M-1024px": (20, (3, 7, 10), 1_604_462_752, 825_180_160, 80, 22_937_600, 172_925_187),
    "Sana-600M-1024px": (28, (5, 9, 14), 591_747_872, 302_662_656, 112, 16_515_072, 78_372_291),
    "SD3-Medium": (24, (4, 8, 12), 2_028_328_000, 1_034_425_344, 96, 18_874_368, 139_296_003),
    "SD3.5-Medium": (24, (4, 8, 12), 2_243_171_520, 1_232_739_840, 144, 28_311_552, 139_296_003),
    "SD3.5-Large": (38, (6, 13, 19), 8_056_627_520, 4_074_558_208, 152, 47_316_992, 178_233_603),
    "SD1.5": (5, (1, 2, 3, 4, 5), 859_520_964, 348_712_960, 56, 5_849_088, 145_525_123),
    "SD2.1": (5, (1, 2, 3, 4, 5), 865_910_724, 351_662_080, 56, 6_078_464, 147_163_523),
    "SDXL-base-1.0": (4, (1, 2, 3, 4), 2_567_463_684, 1_243_367_040, 272, 45_613_056, 129_781_763),
    "Wan2.1-T2V-1.3B": (30, (3, 5, 8), 1_418_996_800, 397_199_872, 64, 12_582_912, 139_296_003),
    "Wan2.1-T2V-14B": (40, (3, 5, 8), 14_288_491_584, 3_043_535_872, 64, 41_943_040, 252_551_427),
    "Z-Image-Turbo": (30, (4, 8, 12, 16), 6_154_908_736, 3_620_931_328, 80, 19_660_800, 185_723_907),
}
SHAPES = {
    # name: (spatial latent, the pipeline's, prompt width, pooled width)
    "FLUX.1-dev": ((16, 128, 128), (4096, 64), 4096, 768),
    "FLUX.2-dev": ((128, 64, 64), (4096, 128), 15360, None),
    "Qwen-Image": ((16, 128, 128), (4096, 64), 3584, None),
    "Sana-1600M-1024px": ((32, 32, 32), (32, 32, 32), 2304, None),
    "SD3.5-Medium": ((16, 128, 128), (16, 128, 128), 4096, 2048),
    "SD1.5": ((4, 64, 64), (4, 64, 64), 768, None),
    "SDXL-base-1.0": ((4, 128, 128), (4, 128, 128), 2048, 1280),
    "Wan2.1-T2V-1.3B": ((16, 21, 60, 104), (16, 21, 60, 104), 4096, None),
    "Z-Image-Turbo": ((16, 128, 128), (16, 128, 128), 2560, None),
}
PUBLISHED_REWARDS = {"FLUX.1-dev", "FLUX.1-schnell", "SD3-Medium", "SD3.5-Medium", "Z-Image-Turbo"}
COUNTED_AGAIN = ("SD1.5", "SD3.5-Medium")
"""Rows of the committed table that are counted in this test; the others take more than a few seconds each."""


@cache
def sizes_of(name: str) -> BackboneCard:
    return card_of(MODELS[name], flops=False)


@cache
def costs_of(name: str) -> BackboneCard:
    return card_of(MODELS[name])


def test_every_family_has_a_published_model() -> None:
    assert {model.family.name for model in MODELS.values()} == {f.name for f in families()} - {GUIDE_FAMILY}
    assert set(MODELS) == set(COUNTS)


@pytest.mark.parametrize("name", MODELS)
def test_counts(name: str) -> None:
    card = sizes_of(name)
    counted = (
        card.total_blocks,
        card.taps,
        card.denoiser_parameters,
        card.backbone_parameters,
        card.lora_layers,
        card.lora_parameters,
        card.head_parameters,
    )
    assert counted == COUNTS[name]
    assert card.num_layers == max(card.taps)
    assert card.published_reward == (name in PUBLISHED_REWARDS)
    assert card.lora_rank == (32 if name == "Z-Image-Turbo" else 64)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    card = sizes_of(name)
    assert (card.latent_shape, card.pipeline_latent_shape, card.text_width, card.pooled_text_width) == SHAPES[name]


def test_memory_of_a_reward() -> None:
    card = sizes_of("SD3.5-Medium")
    assert card.shared_bytes == 4 * (28_311_552 + 139_296_003)
    assert card.standalone_bytes == card.shared_bytes + 2 * 1_232_739_840


def test_sd35_medium_is_the_published_reward() -> None:
    """Sizes in parameters and FLOPs as published, with a multiply-add counted as two."""
    small = card_of(MODELS["SD3.5-Medium"], height=512, width=512)
    assert small == SD35_MEDIUM_512  # which other tests take as it is
    assert small.text_tokens == 333
    assert math.isclose(small.lora_parameters, 28.3e6, rel_tol=0.002)
    assert math.isclose(small.head_parameters, 139.3e6, rel_tol=0.002)
    assert math.isclose(small.backbone_parameters, 1.22e9, rel_tol=0.015)  # with the embedders: 1.233e9
    assert small.backbone_flops == 1_372_311_920_640
    assert math.isclose(small.backbone_flops, 1.37e12, rel_tol=0.002)
    assert small.decode_flops is not None
    assert math.isclose(small.decode_flops, 2.51e12, rel_tol=0.002)
    large = costs_of("SD3.5-Medium")
    assert large.backbone_flops is not None
    assert large.decode_flops is not None
    assert math.isclose(large.backbone_flops, 6.63e12, rel_tol=0.002)
    assert math.isclose(large.decode_flops, 10.5e12, rel_tol=0.005)
    assert small.reward_flops is not None
    # A LoRA layer costs 2 x 64 x (1536 + 1536) per token. Every block has 8 of them on 1024 image tokens and 4 on 333 text
    # tokens.
    lora = 2 * 64 * 3072 * 12 * (8 * 1024 + 4 * 333)
    assert small.reward_flops - small.backbone_flops > lora
    assert small.reward_flops - small.backbone_flops - lora < 0.04 * small.backbone_flops  # the head


def test_the_committed_table_is_what_the_command_gives() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in COUNTED_AGAIN:
        assert table_row(costs_of(name)) in page.splitlines()
    rows = [line for line in page.splitlines() if line.startswith(tuple(f"| {name} |" for name in MODELS))]
    assert len(rows) == len(MODELS)
    for name, row in zip(MODELS, rows, strict=True):
        card = sizes_of(name)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == name
        assert cells[3] == f"{card.num_layers} of {card.total_blocks}"
        sizes = (card.backbone_parameters, card.head_parameters, card.lora_parameters)
        assert cells[-3:] == [f"{count / 1e6:,.1f}" for count in sizes]
    assert cost_table([]).splitlines()[0] in page


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no lines <!-- cost table: begin -->"):
        write_table(PAGE.with_name("sd3.py"))


def test_classes_name_their_models() -> None:
    def names(class_name: str) -> list[str]:
        return [model.name for model in structures_of_class(class_name)]

    assert names("FluxPipeline") == names("FluxTransformer2DModel") == ["FLUX.1-dev", "FLUX.1-schnell"]
    assert names("FluxImg2ImgPipeline") == names("FluxPipeline")
    assert names("Flux2KleinPipeline") == ["FLUX.2-klein-4B", "FLUX.2-klein-9B"]
    assert names("UNet2DConditionModel") == ["SD1.5", "SD2.1", "SDXL-base-1.0"]
    with pytest.raises(ValueError, match=r"FooPipeline belongs to no supported.*flux: FluxPipeline, .*z_image"):
        names("FooPipeline")


@pytest.mark.slow
def test_three_levels_of_a_latent_share_next_to_nothing() -> None:
    structure = MODELS["SD3.5-Medium"]
    family, pipeline = structure.family, meta_pipeline(structure)
    config = default_reward_config(pipeline, backbone_config=dict(pipeline.transformer.config))
    with torch.device("meta"):
        backbone = family.build_backbone(
            pipeline.transformer,
            num_layers=config.num_layers,
            visual_taps=config.visual_taps,
            text_taps=config.text_taps or (),
        )
        model = LatentRewardModel(config, family, backbone, default_lora_config(config)).requires_grad_(False).float()
        conditioning = Conditioning(torch.empty(1, structure.text_tokens, 4096), torch.empty(1, 2048))

        def features(levels: int) -> Any:
            rows, index = torch.empty(levels, 16, 64, 64), torch.zeros(levels, dtype=torch.int64)
            return model.features(rows, torch.empty(levels), conditioning, index)

        one, three = (count_flops(lambda levels=levels: features(levels)) for levels in (1, 3))
        seen = features(3)
        head, each = count_flops(lambda: model.head(seen, 3)), count_flops(lambda: model.head(seen))
    assert round((three + head) / (one + each / 3), 2) == 2.99
    assert round((three + head + each) / (one + each / 3), 2) == 3.07
    assert round((3 * one - three) / 2 / (one + each / 3), 3) == 0.003
