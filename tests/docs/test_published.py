"""The table of memory and compute says what the configurations and the models' sizes give."""

from __future__ import annotations

from typing import Any

import pytest

from dina_reward.recipes.configs import find_config, parse_config
from tests.backbones.published import SD35_MEDIUM_512
from tests.docs.pages import ROOT


RECIPES = ROOT / "recipes"
TEXT_ENCODERS, VAE, POLICY_LORA = 5_580_620_800, 83_819_683, 18_776_064  # counted in tests/recipes/test_single_gpu.py


def rows() -> list[list[str]]:
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    table = page.split("| recipe |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_row_follows_from_the_configuration(row: list[str]) -> None:
    card = SD35_MEDIUM_512
    name, gpus, weights, samples, petaflops, iterations, hours = row
    recipe = find_config(name, RECIPES)
    assert recipe.launch is not None
    config: Any = parse_config(recipe, recipe.launch, directory=RECIPES)[1]
    assert gpus.startswith(str(recipe.launch.num_processes))
    batch = config.geometry()
    assert (samples, iterations) == (
        f"{batch.rows:,}",
        f"{config.max_steps / config.optimizer_steps_per_generation:,.0f}",
    )

    moments = 2 if config.optim == "adamw_bnb_8bit" else 8
    frozen = 2 * (card.denoiser_parameters + TEXT_ENCODERS + VAE) + card.shared_bytes
    assert weights == f"{(frozen + POLICY_LORA * (4 + 4 + moments + 4)) / 2**30:.2f}"

    assert card.step_flops is not None
    assert card.reward_flops is not None
    trained = 2 + bool(config.gradient_checkpointing) + (config.beta > 0)
    passes = config.num_inference_steps + config.sde_window_size * trained
    flops = batch.rows * (passes * card.step_flops + card.reward_flops)
    assert petaflops == f"{flops / 1e15:.1f}"
    assert hours == f"{flops * config.max_steps / config.optimizer_steps_per_generation / 1e14 / 3600:.0f}"
