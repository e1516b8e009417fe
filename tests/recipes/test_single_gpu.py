"""The recipe for one GPU of 24 GB: its arithmetic is that of the models, and its settings run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dina_reward.backbones.cards import meta_pipeline
from dina_reward.backbones.structures import ModelStructure, published_models
from dina_reward.recipes import align
from dina_reward.recipes.configs import Launch, check_config, find_config, parse_config
from tests.alignment.tiny_policy import tiny_pipeline
from tests.backbones.published import SD35_MEDIUM_512
from tests.training.tiny_reward import tiny_reward


RECIPES = Path(__file__).parents[2] / "recipes"
CONFIG = find_config("flow_grpo_sd35_medium_24gb", RECIPES)
HEADER = "\n".join(CONFIG.header)
GIB = 2**30


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def text_encoders() -> int:
    """Parameters of the text encoders of Stable Diffusion 3, from their published shapes."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    large = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    big = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    xxl = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        models = (CLIPTextModelWithProjection(large), CLIPTextModelWithProjection(big), T5EncoderModel(xxl))
        return sum(map(parameters, models))


@pytest.fixture(scope="module")
def structure() -> ModelStructure:
    return next(model for model in published_models() if model.name == "SD3.5-Medium")


@pytest.fixture(scope="module")
def arguments() -> tuple[Any, Any]:
    launch = CONFIG.launch
    assert launch is not None
    return parse_config(CONFIG, launch, directory=RECIPES)  # type: ignore[return-value]


def header_row(name: str) -> tuple[float, float]:
    """Millions of parameters and GiB that the header gives for a part."""
    found = re.search(rf"^{re.escape(name)}.*?([\d,.]+) M x .*?(\d+\.\d\d)(?:\s|$)", HEADER, re.MULTILINE)
    assert found is not None, name
    return float(found[1].replace(",", "")), float(found[2])


def test_header_counts_the_memory_of_every_part(structure: ModelStructure, arguments: tuple[Any, Any]) -> None:
    from peft import LoraConfig

    card, pipeline = SD35_MEDIUM_512, meta_pipeline(structure)
    pipeline.transformer.requires_grad_(False)
    rank = arguments[1].lora_rank
    targets = list(structure.family.policy_lora_targets)
    with torch.device("meta"):
        pipeline.transformer.add_adapter(LoraConfig(r=rank, target_modules=targets))
    lora = sum(p.numel() for p in pipeline.transformer.parameters() if p.requires_grad)
    counted = {
        "transformer": (card.denoiser_parameters, 2),
        "text encoders": (text_encoders(), 2),
        "VAE": (parameters(pipeline.vae), 2),
        "reward": (card.lora_parameters + card.head_parameters, 4),
        "policy LoRA": (lora, 4 + 4 + 2 + 4),
    }
    for name, (number, size) in counted.items():
        assert header_row(name) == (round(number / 1e6, 1), pytest.approx(number * size / GIB, abs=0.006)), name
    total = sum(number * size for number, size in counted.values()) / GIB
    assert f"{total:.2f}" == re.search(r"^sum\s+([\d.]+)$", HEADER, re.MULTILINE)[1]  # type: ignore[index]
    assert f"{24 - total:.1f} GiB remain" in HEADER


def test_header_counts_activations_and_compute(arguments: tuple[Any, Any]) -> None:
    config = arguments[1]
    card = SD35_MEDIUM_512
    assert (config.height, config.width) == (card.height, card.width)
    assert card.step_flops is not None
    assert card.reward_flops is not None
    tokens = (config.height // 16) ** 2 + 77 + config.max_sequence_length
    kept = config.per_device_train_batch_size * card.total_blocks * tokens * 1536 * 2
    assert f"2 bytes = {kept / GIB:.2f} GiB" in HEADER
    passes = config.num_inference_steps + config.sde_window_size * 4  # forward, again, backward, and the reference
    flops = config.geometry().rows * (passes * card.step_flops + card.reward_flops)
    assert f"{card.step_flops / 1e12:.2f} TFLOPs + {card.reward_flops / 1e12:.2f} for the score" in HEADER
    assert f"= {flops / 1e15:.1f} PFLOPs an iteration" in HEADER


def test_it_is_the_published_run_in_a_smaller_batch(arguments: tuple[Any, Any]) -> None:
    published = find_config("flow_grpo_sd35_medium", RECIPES)
    assert published.launch is not None
    other = parse_config(published, published.launch, directory=RECIPES)[1]
    config = arguments[1]
    same = ("learning_rate", "sde_type", "eta", "sde_window_size", "sde_window_range", "epsilon", "beta", "lora_rank")
    assert [getattr(config, name) for name in same] == [getattr(other, name) for name in same]
    assert (config.optim, config.gradient_checkpointing, config.bf16) == ("adamw_bnb_8bit", True, True)
    assert "1 process x 4 x 48 = 192 samples = 16 groups of 12, 2 optimizer steps" in check_config(
        CONFIG, directory=RECIPES
    )


def test_its_settings_run_on_a_tiny_model(tmp_path: Path) -> None:
    from dina_reward.alignment import DiffusionGRPOTrainer

    pipeline = tiny_pipeline(num_layers=3, dual_attention_layers=(0,))
    pipeline.save_pretrained(tmp_path / "pipeline")
    tiny_reward(pipeline=pipeline).save_pretrained(tmp_path / "reward")
    (tmp_path / "train.txt").write_text("a cat\na dog\n", encoding="utf-8")
    (tmp_path / "test.txt").write_text("a bird\n", encoding="utf-8")
    overrides = {
        "model_name_or_path": tmp_path / "pipeline", "reward_model_path": tmp_path / "reward", "dataset_name": tmp_path,
        "output_dir": tmp_path / "out", "height": 16, "width": 16, "max_sequence_length": 8, "steps_per_generation": 6,
        "gradient_accumulation_steps": 3, "max_steps": 2, "eval_num_inference_steps": 2, "save_strategy": "no",
        "lora_rank": 128, "learning_rate": 1e-3,
    }  # fmt: skip
    options = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    arguments, config = parse_config(CONFIG, Launch("flow_grpo", 1, ()), options, RECIPES)
    trainer = align(DiffusionGRPOTrainer, arguments, config)
    assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
    assert trainer.state.global_step == 2
    lora = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
