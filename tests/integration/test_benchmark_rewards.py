"""The benchmark recipe on two small benchmark files: one table, reports that are kept, reports that are made anew."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dina_reward.recipes.arguments import ConfigParser
from dina_reward.recipes.configs import recipe_dataclasses


RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark_rewards.py"
BENCHMARKS = ("HPDv2", "ImageReward")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number in range(3):
        Image.new("RGB", (32, 32), (60 * number,) * 3).save(tmp_path / f"{number}.png")
    images = [f"{number}.png" for number in range(3)]
    hpdv2 = [{"prompt": "a", "image_path": images, "rank": [3, 2, 1], "raw_annotations": []}]
    hpdv2 += [{"prompt": "b", "image_path": images, "rank": [1, 2, 2], "raw_annotations": []}]
    imagereward = [{"id": "1", "prompt": "a", "generations": images, "ranking": [2, 1, 1]}]
    for name, rows in zip(BENCHMARKS, (hpdv2, imagereward), strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "benchmark_rewards_module.py").write_text(
        "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("benchmark_rewards_module", None)
    return tmp_path


def run(root: Path, *more: str) -> list[dict[str, Any]]:
    places = [f"{name}={root / name}.json" for name in BENCHMARKS]
    options = ["--benchmarks", *places, "--functions", "benchmark_rewards_module.brightness", "--use_cpu", "true"]
    options += ["--resamples", "50", "--output_dir", str(root / "out"), *more]
    specification = importlib.util.spec_from_file_location("benchmark_rewards", RECIPE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    module.main(*ConfigParser((module.BenchmarkArguments,)).parse_args_and_config(options))
    return json.loads((root / "out" / "benchmark.json").read_text())


def test_table_by_hand_and_what_is_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(root)
    # HPDv2: no inversion; two of three, since a tie is correct. ImageReward: the tied pair is dropped, the others are right.
    assert row["accuracy"] == pytest.approx({"HPDv2": (1 + 1 / 3) / 2, "ImageReward": 1})
    assert row["average"] == pytest.approx((2 / 3 + 1) / 2)
    printed = capsys.readouterr().out
    assert "tie convention 'hpdv2'" in printed
    assert "tie convention 'imagereward'" in printed
    reports = [root / "out" / name / "evaluation.png" for name in BENCHMARKS]
    made = [path.stat().st_mtime_ns for path in reports]
    run(root)
    assert [path.stat().st_mtime_ns for path in reports] == made
    run(root, "--seed", "1")
    assert all(path.stat().st_mtime_ns > before for path, before in zip(reports, made, strict=True))


def test_changed_data_and_functions_are_evaluated_again(root: Path) -> None:
    (first,) = run(root)
    data = root / "ImageReward.json"
    data.write_text(data.read_text().replace("[2, 1, 1]", "[1, 2, 2]"))
    (second,) = run(root)
    assert second["accuracy"] == pytest.approx({**first["accuracy"], "ImageReward": 0})
    module = root / "benchmark_rewards_module.py"
    module.write_text(module.read_text().replace("return images", "return -images"))
    sys.modules.pop("benchmark_rewards_module")
    (third,) = run(root)
    assert third["accuracy"]["ImageReward"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "a=b"], "nothing to evaluate"),
        (["--benchmarks", "a", "--clip", "m"], "benchmarks must be NAME=PATH with different names"),
        (["--benchmarks", "a=b", "a=c", "--clip", "m"], "benchmarks must be NAME=PATH with different names"),
        (["--clip", "m"], "the following arguments are required: --benchmarks"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConfigParser(recipe_dataclasses(RECIPE)).parse_args_and_config(options)


def test_a_run_that_is_interrupted_goes_on_where_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dina_reward.cli import eval_run

    whole, asked = eval_run.run_evaluation, []

    def until_the_second(request: Any, entrants: Any) -> Any:
        asked.append(request.dataset)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(request, entrants)

    monkeypatch.setattr(eval_run, "run_evaluation", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(root)
    assert not (root / "out" / "benchmark.json").exists()
    (row,) = run(root)
    assert asked == [str(root / f"{name}.json") for name in (*BENCHMARKS, BENCHMARKS[1])]
    assert row["accuracy"].keys() == set(BENCHMARKS)
