"""The comparison recipe: figures at the budget, table, verdicts and pictures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from dina_reward.recipes.configs import RecipeConfig, parse_config


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_algorithms", RECIPES / "compare_algorithms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def point(calls: float, fit: float, cleanness: float = 0.8) -> dict[str, float]:
    return {
        "fit": fit,
        "cleanness": cleanness,
        "reward": 10 * fit,
        "reward_spread": 2.0,
        "denoiser_calls": calls,
        "denoiser_calls/update": calls / 4,
        "reward_calls": calls / 10,
        "train_seconds": calls / 50,
    }


def runs(*gains: float, cleanness: float = 0.8) -> list[dict[str, Any]]:
    """One run per gain in fit from .4 on, with a budget of 1000 calls."""
    return [
        {
            "curve": [point(0, 0.4), point(600, 0.4 + gain / 2), point(1100, 0.4 + gain, cleanness)],
            "at_budget": point(1000, 0.4 + gain, cleanness),
            "fit_gain_by_prompt": [gain, gain + 0.02, gain - 0.02, gain],
            "cpu_seconds": 30.0,
            "peak_memory_mb": 700.0,
            "hacking_alarms": 1,
        }
        for gain in gains
    ]


def test_figures_at_the_budget_are_interpolated(recipe: ModuleType, tmp_path: Path) -> None:
    history, scores = [], []
    for calls, fit in ((0, [0.0, 0.5]), (600, [0.5, 0.5]), (1100, [1.0, 0.5])):
        metrics = {"fit": sum(fit) / 2, "cleanness": 0.8, "reward": 5.0, "rewards/latentreward": -1.0 + calls}
        costs = {name: value for name, value in point(calls, 0.0).items() if "calls" in name or "seconds" in name}
        history.append({"metrics": metrics, "costs": costs, "hacking": [{}] if calls == 600 else []})
        scores.append({"scores": {"fit": fit, "reward": [5.0, 5.0], "rewards/latentreward": [0.0, 2.0]}})
    for name, lines in (("evaluation_history.jsonl", history), ("evaluation_scores.jsonl", scores)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    result = recipe.summary(tmp_path, 1000)
    assert result["at_budget"]["fit"] == pytest.approx(0.5 + 0.25 * 0.8)
    assert result["at_budget"]["denoiser_calls"] == 1000
    assert result["at_budget"]["train_seconds"] == pytest.approx(20.0)
    # The null run has two rewards; the latent one is of interest.
    assert result["at_budget"]["reward"] == pytest.approx(999.0)
    assert result["curve"][0]["reward_spread"] == 1.0
    assert result["fit_gain_by_prompt"] == pytest.approx([0.9, 0.0])
    assert result["hacking_alarms"] == 1


def test_table(recipe: ModuleType) -> None:
    table = recipe.rows({"ReFL": runs(0.1, 0.3), "GRPO-Guard": runs(0.2, 0.2)})
    assert table[0]["gains"] == pytest.approx([10, 30])
    assert table[0]["reward_gain"] == pytest.approx(1.0)
    # Variances 200 and 0 over two seeds.
    assert recipe.error_of_a_mean(table) == pytest.approx(50**0.5)
    text = recipe.markdown(table, 1000)
    assert "| ReFL | 0.400 → 0.600 | +20.0 (+10.0, +30.0) | +0.000 | +1.00 | 25 % | 100 | 20 (30) | 2 |" in text
    assert "the standard error of a mean gain is 7.1 points." in text
    assert "standard error" not in recipe.markdown(recipe.rows({"ReFL": runs(0.1)}), 1000)


def test_verdicts(recipe: ModuleType) -> None:
    results = {
        "ReFL": runs(0.4, 0.4, cleanness=0.77),
        "GRPO-Guard": runs(0.3, 0.32),
        "DiffusionNFT": runs(0.29, 0.31),
        "Online DPO": runs(0.1, 0.1),
        "DDPO, score function": runs(0.2, 0.2, cleanness=0.7),
        "GRPO (UNet, DDIM)": runs(0.1, 0.1, cleanness=0.75),
    }
    table = recipe.rows(results)
    flow, ddpm = (recipe.recommendation(table, world) for world in ("flow", "DDPM"))
    assert flow.startswith("flow generator: take GRPO-Guard (fit 0.400 → 0.710")
    assert "are ties: DiffusionNFT." in flow
    assert "Higher fit, but less clean: ReFL" in flow
    assert "no algorithm keeps cleanness; GRPO (UNet, DDIM) loses least" in ddpm
    alone = recipe.rows({name: part[:1] for name, part in results.items()})
    assert "With one seed nothing is known" in recipe.recommendation(alone, "flow")
    assert recipe.null_verdict(runs(0.001, -0.002)).endswith("zero within twice its error.")
    assert "NOT zero" in recipe.null_verdict(runs(0.05, 0.06))


def test_report(recipe: ModuleType, tmp_path: Path) -> None:
    results = {name: runs(0.1 + 0.01 * place, 0.12) for place, name in enumerate(recipe.ENTRIES)}
    text = recipe.write_report(results, recipe.Budget(1000, 2), 2, tmp_path)
    assert text.count("generator: take") == 2
    assert "null run gained" in text
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert len(report["table"]) == 15
    assert report["denoiser_calls"] == 1000
    for name in ("comparison.png", "comparison_runs.png"):
        assert Image.open(tmp_path / name).width > 1000


def test_every_entry_is_a_valid_run(recipe: ModuleType) -> None:
    budget = recipe.Budget(30_000, 5)
    for entry in recipe.ENTRIES.values():
        options: list[str] = []
        for name, value in {**budget.options, **entry.overrides}.items():
            options += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
        config = RecipeConfig(RECIPES / "configs" / f"{entry.config}.yaml")
        arguments, settings = parse_config(config, config.launch, options, RECIPES)
        assert config.launch.recipe == entry.recipe
        assert (arguments.model_name_or_path == "shapes-ddpm") == (entry.world == "DDPM")
        assert (settings.max_denoiser_calls, settings.eval_denoiser_calls) == (30_000, 6_000)
        assert settings.max_steps == 1_000_000


def test_complete_runs_of_the_same_settings_are_kept(recipe: ModuleType, tmp_path: Path) -> None:
    entry, budget = recipe.ENTRIES[recipe.NULL], recipe.Budget(1000, 2)
    settings = json.loads(json.dumps({"seed": 1, **vars(budget), **entry.overrides}))
    (tmp_path / "result.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    recipe.run(entry, 1, budget, tmp_path, 1)
    assert json.loads((tmp_path / "result.json").read_text()) == {"settings": settings}
    broken = recipe.Entry("no_such_recipe", "flow_grpo_shapes", "black")
    with pytest.raises(RuntimeError, match="see .*log.txt"):
        recipe.run(broken, 1, budget, tmp_path, 1)
    assert not (tmp_path / "result.json").exists()
