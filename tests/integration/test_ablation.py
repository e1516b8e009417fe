"""The ablation recipe: what it tabulates and draws."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from dina_reward.shapes.ablation import LEVELS


RECIPE = Path(__file__).parents[2] / "recipes" / "ablate_reward.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablate_reward", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(accuracy: float, gain: float | None) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "ece": 0.02, "nll": 0.5, "brier": 0.1}
    alignment = None
    if gain is not None:
        alignment = {"reward": [-1.0, 10 * gain - 1], "fit": [0.4, 0.4 + gain], "cleanness": [0.8, 0.7]}
    return {
        "levels": {f"{level:g}": figures for level in LEVELS},
        "noise_share": {f"{level:g}": level / 2 for level in LEVELS},
        "fitted": {"variance_scale": 4.0, "variance_offset": 0.1, "ece": {f"{level:g}": 0.015 for level in LEVELS}},
        "score_std": 2.0,
        "ensembles": {
            "3 draws": {**figures, "accuracy": accuracy + 0.01, "nll": 0.48},
            "(0.2, 0.4, 0.6), own noise, mean": {**figures, "accuracy": accuracy - 0.01},
        },
        "alignment": alignment,
    }


def test_table_and_picture(recipe: ModuleType, tmp_path: Path) -> None:
    runs = {
        "calibrated": [result(0.9, 0.2), result(0.8, 0.1)],
        "clean_only": [result(0.7, 0.05), result(0.7, 0.05)],
        "uneven_fixed": [result(0.6, None), result(0.6, None)],
    }
    rows = recipe.summary(runs)
    assert [row["variant"] for row in rows] == ["noise-calibrated", "clean only", "fixed variance, uneven labels"]
    assert rows[0]["accuracy_by_level"]["0.4"] == pytest.approx([85, 10 / 2**0.5])
    assert rows[0]["accuracy_at_use_level"] == pytest.approx([85, 10 / 2**0.5])
    assert rows[0]["gains"]["fit"] == pytest.approx([15, 10 / 2**0.5])
    assert rows[0]["gains"]["reward"] == pytest.approx([0.75, 0.5 / 2**0.5])  # in deviations of 2
    assert rows[0]["noise_share_by_level"]["0.8"] == pytest.approx([40, 0])
    assert rows[0]["ensembles"]["3 draws"]["gain"] == pytest.approx([1, 0])
    assert (rows[1]["use_level"], rows[2]["gains"]) == (0.0, None)
    page = recipe.markdown(rows)
    assert "| noise-calibrated | 0.4 | 85.0 ± 7.1 | +0.8 ± 0.4 | +15.0 ± 7.1 | -10.0 ± 0.0 |" in page
    assert "| 3 draws | +1.0 ± 0.0 (+0.020) | +1.0 ± 0.0 (+0.020) |" in page
    assert "| (0.2, 0.4, 0.6), own noise, mean | -1.0 ± 0.0 (+0.000) |" in page
    assert "| clean only | 70.0 / 0.020 |" in page
    assert "| clean only | 0.015 | 0.015 |" in page
    assert "| clean only | 0.0 ± 0.0 | 5.0 ± 0.0 |" in page
    assert "| fixed variance, uneven labels | 0.4 |" not in page
    runs["bradley_terry"] = [{**values, "fitted": None} for values in runs["clean_only"]]
    assert "| Bradley-Terry | 0.015" not in recipe.markdown(recipe.summary(runs))
    recipe.draw(rows, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 1000
