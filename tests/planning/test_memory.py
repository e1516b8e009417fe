"""Memory of a rank: against what a real run allocates, and against the published table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dina_reward.backbones.structures import published_models
from dina_reward.planning.activations import Kept
from dina_reward.planning.memory import Setup, denoiser_bytes, memory_parts, stored_bytes, total_bytes
from dina_reward.planning.sizes import RunSizes, text_encoder_parameters
from tests.alignment.helpers import tiny_trainer
from tests.backbones.published import SD35_MEDIUM_512


SETUP = Setup(
    gpus=1,
    strategy="ddp",
    weight_bytes=2,
    four_bit=False,
    full=False,
    checkpointing=False,
    reward="shared",
    moment_bytes=8,
    averages=1,
    rows=4,
    graphs=1,
    reward_rows=0,
    stored=10,
    samples=8,
    offload=False,
    eval_rows=0,
)
SIZES: Any = SimpleNamespace(
    card=SimpleNamespace(backbone_parameters=500),
    denoiser=1000,
    text_encoders=300,
    vae=200,
    block_weights=800,
    largest_block=100,
    outside_blocks=50,
    policy_lora=40,
    reward_trained=30,
    denoiser_kept=Kept(100, 10, 50, 1),
    reward_kept=Kept(7, 1, 7, 1),
    decode_bytes=60,
)


def parts(setup: Setup, sizes: Any = SIZES) -> dict[str, int]:
    return {part.name: part.bytes for part in memory_parts(sizes, setup)}


def test_a_rank_holds_every_part() -> None:
    assert list(parts(SETUP).values())[:-1] == [2000, 600, 400, 120, 160, 40 * 16, 0, 80, 140]
    assert total_bytes(SIZES, SETUP) == sum(parts(SETUP).values())


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"gpus": 2}, "buckets of DDP", 160),
        ({"gpus": 4, "strategy": "fsdp2"}, "denoiser", 2 * (250 + 200 + 50)),
        ({"gpus": 4, "strategy": "fsdp2"}, "trained weights", 40),
        ({"gpus": 4, "strategy": "fsdp2"}, "buckets of DDP", 0),
        ({"four_bit": True}, "denoiser", int(2 * 200 + 800 * 4.127 / 8)),
        ({"full": True}, "denoiser", 4000),
        ({"full": True}, "gradients, optimizer, averages", 16_000),
        ({"reward": "own"}, "reward", 1120),
        ({"reward": "server"}, "reward", 0),
        ({"checkpointing": True}, "activations", 54),
        ({"graphs": 2}, "activations", 180),
        ({"reward_rows": 3}, "activations", 140 + 7 + 12),
        ({"eval_rows": 16}, "activations", 960),
        ({"offload": True}, "stored rollouts", 0),
        ({"moment_bytes": 2}, "gradients, optimizer, averages", 40 * 10),
    ],
)
def test_what_a_setting_changes(changes: dict[str, Any], name: str, expected: int) -> None:
    assert parts(replace(SETUP, **changes))[name] == expected


def test_4_bit_weights_take_what_bitsandbytes_takes() -> None:
    from dina_reward.backbones.quantization import block_linears, quantize_blocks, weight_bytes
    from tests.tiny_models import tiny_sd3_transformer

    denoiser = tiny_sd3_transformer().requires_grad_(False)
    names = set(block_linears(denoiser))
    blocks = sum(m.weight.numel() for name, m in denoiser.named_modules() if name in names)
    sizes = SimpleNamespace(denoiser=sum(p.numel() for p in denoiser.parameters()), block_weights=blocks)
    planned = denoiser_bytes(sizes, replace(SETUP, weight_bytes=4, four_bit=True))  # type: ignore[arg-type]
    quantize_blocks(denoiser)
    # So small a layer has a code book and an offset of its own beside its scales.
    assert weight_bytes(denoiser) - len(names) * 4 * (16 + 256 + 1) == pytest.approx(planned, rel=0.03)


def test_a_real_run_stores_and_trains_what_is_planned(tmp_path: Path, sizes: RunSizes) -> None:
    trainer = tiny_trainer(tmp_path, beta=0.1, max_steps=2)
    experience, _ = trainer.make_experience(0)
    elements = experience[0].rollout.latents[0].numel()
    tensors = [
        tensor
        for part in experience
        for tensor in (part.rollout.latents, *part.rollout.states.values(), *part.reference.values())
    ]
    held = {tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    assert sum(held.values()) == 12 * stored_bytes(elements, 4, trained=2, means=False, reference=True)

    trainer.train()
    parameters = trainer.policy.trainable_parameters().values()
    assert sum(p.numel() for p in parameters) == sizes.policy_lora
    moments = [t for state in trainer.optimizer.optimizer.state.values() for t in state.values() if t.ndim]
    assert sum(t.numel() * t.element_size() for t in moments) == 8 * sizes.policy_lora
    denoiser = trainer.policy.denoiser
    assert sum(p.numel() for p in denoiser.parameters()) == sizes.denoiser + sizes.policy_lora


TEXT_ENCODERS = {
    "SD1.5": 123_060_480,
    "SD2.1": 340_387_840,
    "SDXL-base-1.0": 123_060_480 + 694_659_840,
    "SD3.5-Medium": 123_650_304 + 694_659_840 + 4_762_310_656,
    "FLUX.1-dev": 123_060_480 + 4_762_310_656,
    "FLUX.2-dev": 24_011_361_280,
    "FLUX.2-klein-4B": 4_022_468_096,
    "Qwen-Image": 8_292_166_656,
    "Sana-1600M-1024px": 2_614_341_888,
    "Wan2.1-T2V-14B": 5_680_910_336,
    "Z-Image-Turbo": 4_022_468_096,
}


def test_text_encoders_have_their_published_sizes() -> None:
    models = {model.name: model for model in published_models()}
    assert {name: text_encoder_parameters(models[name]) for name in TEXT_ENCODERS} == TEXT_ENCODERS
    assert all(model.text_encoders for model in models.values())


def test_weights_of_the_published_recipe_are_those_of_its_table() -> None:
    card = SD35_MEDIUM_512
    sizes: Any = SimpleNamespace(**vars(SIZES))
    sizes.card, sizes.denoiser, sizes.text_encoders = card, card.denoiser_parameters, TEXT_ENCODERS["SD3.5-Medium"]
    sizes.vae, sizes.policy_lora = 83_819_683, 18_776_064
    sizes.reward_trained = card.lora_parameters + card.head_parameters
    found = parts(SETUP, sizes)
    weights = ("denoiser", "text encoders", "VAE", "reward", "trained weights", "gradients, optimizer, averages")
    assert f"{sum(found[name] for name in weights) / 2**30:.2f}" == "15.70"  # docs/published.md


def test_sizes_are_those_of_the_loaded_pipeline(sizes: RunSizes) -> None:
    from tests.alignment.tiny_policy import tiny_pipeline

    pipeline = tiny_pipeline()
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    assert sizes.text_encoders == sum(p.numel() for encoder in encoders for p in encoder.parameters())
    assert sizes.vae == sum(p.numel() for p in pipeline.vae.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in pipeline.transformer.transformer_blocks]
    assert sizes.largest_block == max(blocks)
    assert sizes.outside_blocks == sizes.denoiser - sum(blocks)
    assert sizes.latent_elements == torch.Size(sizes.card.latent_shape).numel()
