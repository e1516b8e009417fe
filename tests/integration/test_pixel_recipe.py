"""The recipe that compares a latent with a pixel reward: its jobs, tables and picture, and a miniature run."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from dina_reward.shapes import build_pool, load_pipeline, sample_pairs
from dina_reward.shapes.jobs import write_result
from dina_reward.shapes.pixel_comparison import CELLS


RECIPE = Path(__file__).parents[2] / "recipes" / "compare_pixel_reward.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_pixel_reward", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluation(accuracy: float, decode_ms: float) -> dict[str, Any]:
    names = ("overall", *CELLS)
    return {
        "parameters": 2000,
        "trained_parameters": 700,
        "accuracy": dict.fromkeys(names, accuracy),
        "standard_error": dict.fromkeys(names, 0.01),
        "pairs": {**dict.fromkeys(names, 100), "cleanness": 0},
        "ece": 0.021,
        "cost": {"score_ms": 0.5 + decode_ms, "decode_ms": decode_ms, "peak_memory_mb": 12.3},
    }


def run(gain: float, seconds: float, decoder_calls: int) -> dict[str, Any]:
    history = [
        {
            "step": step,
            "fit": 0.4 + gain * step / 4,
            "cleanness": 0.8 - 0.01 * step,
            "train_seconds": 1.5 * seconds * step / 4,
            "train_cpu_seconds": seconds * step / 4,
            "denoiser_calls": 1000 * step,
            "reward_calls": 100 * step,
            "decoder_calls": decoder_calls * step,
        }
        for step in (0, 2, 4)
    ]
    costs = {"reward_share": 0.05, "peak_memory_mb": 700.0, "cpu_seconds": 2 * seconds}
    return {"history": history, "hacking_alarms": 1, **costs}


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "train": {},
        "latent": {"evaluation": evaluation(0.9, 0.0), "runs": [run(0.2, 80, 0), run(0.4, 80, 0)]},
        "pixel": {"evaluation": evaluation(0.95, 0.25), "runs": [run(0.3, 120, 100), run(0.3, 120, 100)]},
    }


def test_where_a_fit_is_reached(recipe: ModuleType) -> None:
    history = run(0.4, 80, 0)["history"]  # fit .4, .6, .8 at 0, 40, 80 seconds
    assert recipe.reached(history, 0.7, "train_cpu_seconds") == pytest.approx(60)
    assert recipe.reached(history, 0.3, "train_cpu_seconds") == 0
    assert recipe.reached(history, 0.8, "denoiser_calls") == pytest.approx(4000)
    assert recipe.reached(history, 0.9, "train_cpu_seconds") is None


def test_tables_and_picture(recipe: ModuleType, results: dict[str, Any], tmp_path: Path) -> None:
    rows = recipe.summary(results)
    assert rows["fit_level"] == pytest.approx(0.6)
    assert rows["latent"]["gains"] == pytest.approx([20, 40])
    assert rows["latent"]["seconds_to_level"] == pytest.approx([60, 20 * 2**0.5])
    assert rows["pixel"]["calls_to_level"][0] == pytest.approx(4000 * 2 / 3)
    page = recipe.markdown(results, rows)
    assert "| latent | 90.0 ± 1.0 | 90.0 ± 1.0 | 90.0 ± 1.0 | 90.0 ± 1.0 | 90.0 ± 1.0 | no pairs | 0.021 |" in page
    assert "| pixel | 2,000 (700) | 0.75 | 0.25 | 12 |" in page
    assert "CPU seconds to fit 0.600" in page
    assert (
        "| +20.0, +40.0 | 0.800 → 0.760 ± 0.000 | 120 (80 ± 0) | 5.0 % | 60 ± 28 | 3,000 ± 1,414 | 0 | 700 |" in page
    )
    recipe.draw(results, tmp_path / "pixel.png")
    with Image.open(tmp_path / "pixel.png") as picture:
        assert picture.width > 1000


def test_jobs_wait_for_what_they_need(recipe: ModuleType, tmp_path: Path) -> None:
    arguments = Namespace(output=tmp_path, seeds=[3, 4], iterations=7, steps=5, world=None)
    rounds = recipe.jobs_of(arguments)
    assert [[str(job.result.parent.relative_to(tmp_path)) for job in jobs] for jobs in rounds] == [
        ["pairs"],
        ["train", "evaluate-latent", "align-latent/seed-3", "align-latent/seed-4"],
        ["evaluate-pixel", "align-pixel/seed-3", "align-pixel/seed-4"],
    ]
    words = [[str(word) for word in job.arguments[2:]] for jobs in rounds for job in jobs]
    ending = ["--world", str(tmp_path / "world"), "--output", str(tmp_path)]
    assert words[1] == ["train", "--steps", "5", *ending]
    assert words[-1] == ["align", "pixel", "--seed", "4", "--iterations", "7", *ending[2:]]
    arguments.world = tmp_path / "build"
    assert tmp_path / "build" in recipe.jobs_of(arguments)[0][0].arguments


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_miniature_run_ends_with_all_its_figures(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, world = load_pipeline(), tmp_path / "world" / "flow-preferences"
    places = {"train": world / "train", "held_out": world / "held_out", "fresh": tmp_path / "pairs" / "fresh"}
    for seed, path in enumerate(places.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        split = "held_out" if path.name == "held_out" else "train"
        sample_pairs(build_pool(pipeline, split, 24, seed), split, 300, seed).save(f"{path}.safetensors")
    write_result(tmp_path / "pairs", {})  # instead of an hour's work
    options = ["--output", str(tmp_path), "--seeds", "0", "--jobs", "2", "--iterations", "1", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["compare_pixel_reward.py", *options])
    recipe.main()
    report = json.loads((tmp_path / "pixel.json").read_text())
    assert set(report["results"]) == {"train", "latent", "pixel"}
    for kind, decoded in (("latent", 0), ("pixel", 192)):
        (aligned,) = report["results"][kind]["runs"]
        ends = [aligned["history"][place] for place in (0, -1)]
        assert [end["denoiser_calls"] for end in ends] == [0, 192 * 13]
        assert ends[1]["decoder_calls"] == decoded
        assert 0 < aligned["reward_share"] < 1
        assert report["results"][kind]["evaluation"]["pairs"]["overall"] > 30
    assert report["results"]["pixel"]["evaluation"]["cost"]["decode_ms"] > 0
    page = (tmp_path / "pixel.md").read_text()
    assert page in capsys.readouterr().out
    monkeypatch.setattr("dina_reward.shapes.jobs.subprocess.run", None)  # nothing is run again
    recipe.main()
