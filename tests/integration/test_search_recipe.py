"""The recipe that compares search methods: its arithmetic, tables and picture, and a miniature run."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from dina_reward.shapes import search_comparison
from dina_reward.shapes.search_comparison import EARLY, METHODS, expected_best


RECIPE = Path(__file__).parents[2] / "recipes" / "compare_search.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_search", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(fit: float, calls: float = 80.0) -> dict[str, float]:
    names = ("cleanness", "score", "diversity", "reward_calls", "decoder_calls", "cpu_seconds", "peak_memory_mb")
    return {"fit": fit, "denoiser_calls": calls, **dict.fromkeys(names, 1.0)}


def run(halving: float, last: float = 0.6) -> dict[str, Any]:
    fits = [0.4, 0.5, 0.6, 0.65, last]
    pool = {"sizes": [1, 4, 8, 16, 32], "fit": fits, "cleanness": fits, "score": fits, "fit_error": [0.01] * 5}
    pool |= {"cpu_seconds_per_sample": 0.02}
    methods = {"halving": {"4": figure(halving), "8": figure(0.61)}, "fk": {"4": figure(0.5)}}
    return {"pool": pool, EARLY: figure(0.595, 42.0), "methods": methods}


def test_the_estimator_of_best_of_n_is_the_mean_over_all_subsets() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    values = torch.tensor([[0.1, 0.9, 0.5, 0.3]])
    for count in (1, 2, 3, 4):
        subsets = list(itertools.combinations(range(4), count))
        best = [values[0, max(subset, key=lambda row: float(scores[0, row]))] for subset in subsets]
        assert float(expected_best(scores, values, count)) == pytest.approx(float(torch.stack(best).mean()), abs=1e-6)


def test_claims_by_hand(recipe: ModuleType) -> None:
    facts = recipe.claims([run(0.54), run(0.55)], [4, 8])
    assert facts["early_gap"] == pytest.approx(0.005)
    assert facts["early_share"] == pytest.approx(0.525)
    assert facts["early_holds"]
    assert (facts["best_method"], facts["best_budget"]) == ("halving", 4)
    assert facts["best_gains"] == pytest.approx([4.0, 5.0])
    assert facts["best_holds"]
    assert facts["sooner"] == 8
    assert recipe.sooner([run(0.61)], "halving", [4, 8]) == 4
    assert recipe.sooner([run(0.5)], "fk", [4, 8]) is None
    assert facts["peak"] == {"n": 16, "fit": 0.65, "last_n": 32, "last_fit": pytest.approx(0.6), "falls": True}
    assert not recipe.claims([run(0.52), run(0.6)], [4])["best_holds"]
    assert not recipe.peak_of([run(0.5, last=0.649)])["falls"]


def test_tables_and_picture(recipe: ModuleType, tmp_path: Path) -> None:
    results = {"flow": [run(0.54), run(0.55)]}
    text = recipe.markdown(results, [4, 8])
    assert "halving among 8 is +0.005 from the best of 8 in oracle fit, at 52 % of its denoiser calls: holds." in text
    assert "| halving | 0.545 (+4.0, +5.0) | 0.610 (+1.0, +1.0) |" in text
    assert "| fk | 0.500 (+0.0, +0.0) |  |" in text
    assert (
        "at 4 samples gains +4.0, +5.0 points over best-of-N: holds. It finds as much as the best of 8 with the calls of 8."
        in text
    )
    assert "| best_of_n | 0.600 | 0.600 | 0.60 |  | 80 | 8 | 0 | 0.160 |  |" in text
    recipe.draw(results, [4, 8], tmp_path / "search.png")
    assert Image.open(tmp_path / "search.png").size[1] > 500


@pytest.mark.slow
def test_a_miniature_of_the_whole(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs in this process, with two methods; the second call finds them done."""
    kept = {name: METHODS[name] for name in ("halving", "fk")}
    monkeypatch.setattr(search_comparison, "METHODS", kept)
    monkeypatch.setattr(search_comparison, "DEAR", {})
    monkeypatch.setattr(search_comparison, "EARLY_SEARCHES", 2)
    done: list[str] = []

    def run_here(jobs: Any, at_once: int) -> None:
        for job in jobs:
            if job.result.is_file():
                continue
            words = [str(word) for word in job.arguments]
            monkeypatch.setattr("sys.argv", ["job", *words[2:]])
            done.append(words[2])
            search_comparison.main()

    monkeypatch.setattr(recipe, "run_jobs", run_here)
    words = ["--output", str(tmp_path), "--generators", "flow", "--seeds", "0", "--prompts", "1", "--budgets", "2"]
    recipe.main([*words, "--pool", "8"])
    printed = capsys.readouterr().out
    assert "### flow" in printed
    report = json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))
    (result,) = report["results"]["flow"]
    assert result["pool"]["sizes"] == [1, 2, 3, 4, 6, 8]
    assert result["methods"]["halving"]["2"]["denoiser_calls"] <= 20
    assert result["methods"]["fk"]["2"]["denoiser_calls"] == 20
    assert result[EARLY]["denoiser_calls"] == 48
    assert result[EARLY]["decoder_calls"] == 0
    recipe.main([*words, "--pool", "8"])
    assert done == ["flow"]
    with pytest.raises(SystemExit, match="--pool must be at least 8"):
        recipe.main([*words, "--pool", "4"])
