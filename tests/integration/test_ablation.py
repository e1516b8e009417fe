"""The ablation recipe: what it tabulates and draws, and one run of it with hardly any training."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image


RECIPE = Path(__file__).parents[2] / "recipes" / "ablate_reward.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablate_reward", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def result(recipe: ModuleType, accuracy: float, gain: float) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "ece": 0.02, "nll": 0.5, "brier": 0.1}
    tokens = {**figures, "accuracy": accuracy - 0.01, "ece": 0.03}
    return {
        "levels": {f"{level:g}": figures for level in recipe.LEVELS},
        "score_std": {f"{level:g}": 2.0 for level in recipe.LEVELS},
        "ensembles": {
            kind: {str(count): values for count in recipe.ENSEMBLES}
            for kind, values in (("mean", figures), ("tokens", tokens))
        },
        "alignment": {"reward": [-1.0, 10 * gain - 1], "fit": [0.4, 0.4 + gain], "cleanness": [0.8, 0.7]},
    }


def test_table_and_picture(recipe: ModuleType, tmp_path: Path) -> None:
    runs = {
        "calibrated": [result(recipe, 0.9, 0.2), result(recipe, 0.8, 0.1)],
        "clean_only": [result(recipe, 0.7, 0.05), result(recipe, 0.7, 0.05)],
    }
    rows = recipe.summary(runs)
    assert [row["variant"] for row in rows] == ["noise-calibrated", "clean only"]
    assert rows[0]["accuracy_by_level"]["0.4"] == pytest.approx([85, 10 / 2**0.5])
    assert rows[0]["accuracy_at_use_level"] == pytest.approx([85, 10 / 2**0.5])
    assert rows[0]["fit_gain"] == pytest.approx([15, 10 / 2**0.5])
    assert rows[0]["reward_gain"] == pytest.approx([0.75, 0.5 / 2**0.5])  # in deviations of 2
    assert rows[1]["use_level"] == 0.0
    page = recipe.markdown(rows)
    assert "| noise-calibrated | 0.4 | 85.0 ± 7.1 | 0.8 ± 0.4 | 15.0 ± 7.1 | -10.0 ± 0.0 |" in page
    assert "| clean only | 70.0 ± 0.0 (0.020) | 70.0 ± 0.0 / 69.0 ± 0.0 (0.020 / 0.030) |" in page
    assert "| clean only | 70.0 / 0.020 |" in page
    recipe.draw(rows, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 1000


def test_degraded_latents_and_negligible_gaps_are_left_out_and_labels_are_single_votes(recipe: ModuleType) -> None:
    from dina_reward.shapes.preferences import SOURCES, PreferencePairs

    source = torch.tensor([SOURCES.index(kind) for kind in ("render", "degraded", "ode", "perturbed", "sde")])
    pairs = PreferencePairs(
        latents=torch.zeros(5, 8, 8, 8),
        chosen=torch.tensor([0, 1, 2, 4, 4]),
        rejected=torch.tensor([2, 0, 3, 4, 0]),
        scenes=torch.zeros(5, 4, dtype=torch.long),
        gap=torch.tensor([0.2, 0.3, 0.4, -0.5, 0.05]),
        source=source,
    )
    kept = recipe.informative(pairs)
    assert kept.gap.tolist() == pytest.approx([0.2, -0.5])
    votes = recipe.SingleVotes(kept)
    assert len(votes) == 2
    assert [row["p_chosen"] for row in votes] == [1.0, 1.0]  # the second labeller was wrong, and his vote stands
    assert kept[1]["p_chosen"] < 1e-6


@pytest.mark.slow
def test_one_run_ends_with_all_its_figures(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"TRAIN_POOL": 64, "TEST_POOL": 16, "TRAIN_PAIRS": 400, "TEST_PAIRS": 120}.items():
        monkeypatch.setattr(recipe, name, size)
    recipe.make_pairs(tmp_path / "pairs")
    recipe.run("frozen", 0, tmp_path, steps=2, iterations=1)
    written = json.loads((tmp_path / "frozen" / "seed-0" / "result.json").read_text())
    assert set(written["levels"]) == {f"{level:g}" for level in recipe.LEVELS}
    assert written["ensembles"]["tokens"]["1"] == written["levels"]["0.4"]
    assert 0 <= written["alignment"]["fit"][1] <= 1
