"""The worked example of families/README.md, run as a file of its own: a family that is not in the package."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dina_reward.families
from dina_reward.families import families, registry
from tests.families import test_matrix as matrix
from tests.families.row import Row, Setup
from tests.tiny_models import t5_encoder, t5_tokenizer, tiny_vae


PAGE = Path(dina_reward.families.__path__[0], "README.md")
NAME = "aura_flow"


def guide_code() -> str:
    """The first Python block of the guide."""
    guide = PAGE.read_text(encoding="utf-8").split("\n## Add a family\n")[1]
    found = re.search(r"```python\n(.*?)```", guide, re.DOTALL)
    assert found is not None
    return found.group(1)


def tiny_aura_flow_pipeline(seed: int = 0) -> Any:
    """`AuraFlowPipeline` with two joint and two single-stream blocks of width 32."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer()
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=256,
        )
        for block in (*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks):
            block.norm1.linear.weight.data.mul_(5)  # so that blocks change their input enough to see a LoRA
        return AuraFlowPipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
            vae=tiny_vae(4, scaling_factor=0.13025, shift_factor=None),
            text_encoder=t5_encoder(tokenizer, width=32),
            tokenizer=tokenizer,
        )


def block_output(output: Any, setup: Setup) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint blocks return (text, image), single-stream blocks both in one sequence."""
    if isinstance(output, tuple):
        return output
    image_tokens = setup.latents.shape[-2] * setup.latents.shape[-1] // 4
    return output[:, :-image_tokens], output[:, -image_tokens:]


ROW = Row(
    NAME,
    tiny_aura_flow_pipeline,
    latents=(2, 4, 8, 12),
    num_layers=3,
    taps=(1, 2, 3),
    blocks=lambda backbone: [*backbone.joint_transformer_blocks, *backbone.single_transformer_blocks],
    block_output=block_output,
    pixels_per_side=16,
    arguments={"max_sequence_length": 16, "guidance_scale": 1.0},
    guided=(3.5, {"max_sequence_length": 16, "guidance_scale": 3.5}),
)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guide's code as a module in a directory of its own, imported, and forgotten afterwards."""
    directory = tmp_path_factory.mktemp("outside")
    (directory / "guide_family.py").write_text(guide_code(), encoding="utf-8")
    sys.path.insert(0, str(directory))
    importlib.import_module("guide_family")
    yield directory
    sys.path.remove(str(directory))
    del sys.modules["guide_family"], registry._FAMILIES[NAME]


@pytest.fixture(scope="module")
def setup(outside: Path) -> Setup:
    return Setup.of(ROW)


def plain_rollout(setup: Setup) -> None:
    matrix.test_ode_rollout_equals_the_pipelines_own_output(setup, guided=False)


def guided_rollout(setup: Setup) -> None:
    matrix.test_ode_rollout_equals_the_pipelines_own_output(setup, guided=True)


@pytest.mark.parametrize(
    "check",
    [
        matrix.test_found_from_pipeline_and_denoiser,
        matrix.test_backbone_equals_the_full_model_at_the_taps,
        matrix.test_prompt_index_selects_rows,
        matrix.test_gradients_reach_the_latents_with_and_without_checkpointing,
        matrix.test_backbone_compiles_whole,
        matrix.test_more_blocks_than_the_model_has_are_refused,
        matrix.test_decoding_equals_the_pipelines_own,
        matrix.test_images_and_latents_round_trip_in_shape,
        matrix.test_scores_are_deterministic_and_do_not_depend_on_the_batch,
        matrix.test_merging_changes_speed_and_not_scores,
        matrix.test_a_training_step_lowers_the_loss,
        plain_rollout,
        guided_rollout,
        matrix.test_guidance_mixes_two_predictions,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_the_example_is_a_whole_family(setup: Setup, check: Callable[[Setup], None]) -> None:
    check(setup)


@pytest.mark.parametrize(
    "check",
    [
        matrix.test_partial_load_equals_the_full_model,
        matrix.test_shared_reward_agrees_with_its_own_copy_and_spares_the_generator,
        matrix.test_policy_lora_is_read_back_by_the_pipeline,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_the_example_saves_and_loads(setup: Setup, check: Callable[[Setup, Path], None], tmp_path: Path) -> None:
    check(setup, tmp_path)


@torch.no_grad()
def test_the_example_tells_the_grid_of_its_tokens(setup: Setup) -> None:
    features = setup.backbone()(setup.latents, setup.timestep, setup.conditioning)
    assert features.grid == (4, 6)
    assert features.visual[0].shape[1] == 24


def test_the_page_names_every_family_and_its_first_pipeline() -> None:
    table = PAGE.read_text(encoding="utf-8").split("\n## Rules\n")[0]
    for family in families():
        if family.name != NAME:
            assert f"| `{family.name}` | `{family.pipeline_classes[0]}`" in table, family.name
