"""`dina-reward eval` with the shipped reward, a tiny CLIP model and small benchmark files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from dina_reward.cli.app import app
from dina_reward.cli.eval_run import EvalRequest, _names, open_dataset
from dina_reward.shapes.preferences import build_pool
from tests.evaluation.tiny_clip import save_tiny_clip


runner = CliRunner()
FAST = ("--levels", "0.2,0.5", "--resamples", "100", "--device", "cpu")


def invoke(*arguments: object) -> Any:
    return runner.invoke(app, ["eval", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module", autouse=True)
def small_pools() -> Iterator[dict[Any, Any]]:
    """The embedded world's pairs come from 16 latents of each source instead of 64, whose sampling takes seconds, once."""
    pools: dict[tuple[str, int], Any] = {}

    def small_pool(pipeline: Any, split: str, count: int, seed: int) -> Any:
        if (split, seed) not in pools:
            pools[split, seed] = build_pool(pipeline, split, 16, seed)
        return pools[split, seed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dina_reward.shapes.preferences.build_pool", small_pool)
        yield pools


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of rising brightness, and the module with rewards that `--function` imports."""
    root = tmp_path_factory.mktemp("benchmark")
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number,) * 3).save(root / f"{number}.png")
    (root / "cli_eval_rewards.py").write_text(
        "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
        "def darkness(images, prompts):\n    return -images.mean(dim=(1, 2, 3))\n"
    )
    return root


@pytest.fixture
def rewards_on_path(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(images))
    sys.modules.pop("cli_eval_rewards", None)


def write_hpdv2(root: Path) -> Path:
    rows = [
        {
            "prompt": "a",
            "image_path": ["0.png", "1.png", "2.png", "3.png"],
            "rank": [4, 3, 1, 2],
            "raw_annotations": [],
        },
        {"prompt": "b", "image_path": ["0.png", "1.png", "2.png"], "rank": [1, 2, 2], "raw_annotations": []},
    ]
    path = root / "test.json"
    path.write_text(json.dumps(rows))
    return path


def write_imagereward(root: Path) -> Path:
    row = {"id": "1", "prompt": "a", "generations": ["0.png", "1.png", "2.png"], "ranking": [5, 2, 2]}
    other = {"id": "2", "prompt": "b", "generations": ["1.png", "3.png"], "ranking": [1, 2]}
    path = root / "imagereward.json"
    path.write_text(json.dumps([row, other]))
    return path


def test_shipped_reward_beside_a_clip_model(tmp_path: Path) -> None:
    clip = save_tiny_clip(tmp_path / "tiny-clip")
    output = tmp_path / "report"
    result = invoke(
        "shapes", "shapes", "--clip", clip, "--max-pairs", 24, "--ensembles", "0.2,0.5,0.7", "--draws", "1,2",
        "--ensemble-kind", "tokens,mean", "--ensemble-advice", "--output", output, "--json", *FAST,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data == json.loads((output / "evaluation.json").read_text())
    reward, other = data["rewards"]
    assert (reward["name"], other["name"]) == ("shapes", "tiny-clip")
    assert {"0.2", "0.5 x2", "0.2+0.5+0.7 tokens", "0.2+0.5+0.7 mean x2"} <= set(reward["settings"])
    headline = reward["settings"]["0.2+0.5+0.7 tokens"]
    assert headline["accuracy"]["value"] > 0.7
    assert headline["accuracy"]["convention"] == data["ties"]["name"] == "half"
    low, high = headline["accuracy"]["interval"]
    assert low < headline["accuracy"]["value"] < high
    assert any(" - " in source for source in headline["by"]["source"])
    assert other["likelihood"] == "bradley_terry"
    assert other["cost"]["prepare_seconds_per_1000"] > 0
    assert data["differences"][0]["value"] < 0
    with Image.open(output / "evaluation.png") as picture:
        assert picture.size[0] > 1500
    assert other["advice"] is None
    advice = reward["advice"]
    assert (advice["draws"], [part["noise_level"] for part in advice["variances"]]) == (4, [0.2, 0.5, 0.7])
    assert all(0 < part["noise_share"] < 1 for part in advice["variances"])
    page = (output / "evaluation.md").read_text()
    assert f"Recommendation: {advice['recommendation']}." in page
    assert "tie convention 'half'" in page


def test_seed_decides_everything(small_pools: dict[Any, Any]) -> None:
    def run(seed: int) -> Any:
        small_pools.clear()  # each run makes its own
        options = ("--max-pairs", 16, "--ensembles", "none", "--seed", seed, "--json", *FAST)
        reward = json.loads(invoke("shapes", "shapes", *options).stdout)["rewards"][0]
        return reward["settings"]

    first = run(0)
    assert run(0) == first
    assert run(1) != first


@pytest.mark.usefixtures("rewards_on_path")
def test_hpdv2_rankings_by_hand(images: Path) -> None:
    # a: brightness orders 0 1 2 3, people 0 1 3 2: one inversion of six. b: people 0 over 1 = 2: two inversions of three.
    result = invoke(write_hpdv2(images), "--function", "cli_eval_rewards.brightness", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    accuracy = data["rewards"][0]["settings"]["score"]["accuracy"]
    assert accuracy["value"] == pytest.approx(((1 - 1 / 6) + (1 - 2 / 3)) / 2)
    assert (accuracy["convention"], accuracy["rankings"], accuracy["pairs"]) == ("hpdv2", 2, 9)
    assert data["rewards"][0]["cost"]["samples"] == 7


@pytest.mark.usefixtures("rewards_on_path")
def test_imagereward_drops_tied_ranks_and_the_convention_can_be_changed(images: Path) -> None:
    # brightness: 0 < 1, 0 < 2 right, 1 = 2 tied, 1 against 3 wrong.
    arguments = [write_imagereward(images), "--function", "cli_eval_rewards.brightness", "--json"]
    accuracy = json.loads(invoke(*arguments).stdout)["rewards"][0]["settings"]["score"]["accuracy"]
    assert (accuracy["convention"], accuracy["counted"], accuracy["target_ties"]) == ("imagereward", 3, 1)
    assert accuracy["value"] == pytest.approx(2 / 3)
    strict = json.loads(invoke(*arguments, "--ties", "dina_lrm").stdout)["rewards"][0]["settings"]["score"]["accuracy"]
    assert strict["value"] == pytest.approx(2 / 4)


@pytest.mark.usefixtures("rewards_on_path")
def test_images_are_encoded_for_latent_rewards_and_rewards_stand_side_by_side(images: Path) -> None:
    result = invoke(
        "shapes", write_imagereward(images), "--function", "cli_eval_rewards.brightness",
        "--function", "cli_eval_rewards.darkness", "--ensembles", "none", *FAST,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("tie convention 'imagereward'", "| shapes ", "| brightness ", "| darkness ", "for the VAE", "paired"):
        assert text in result.output


@pytest.mark.usefixtures("rewards_on_path")
def test_unreadable_image_is_counted_and_its_ranking_goes_on(images: Path) -> None:
    many = [
        {"id": str(n), "prompt": f"p{n}", "generations": ["0.png", "1.png"], "ranking": [2, 1]} for n in range(200)
    ]
    many[3]["generations"] = ["0.png", "gone.png", "1.png"]
    many[3]["ranking"] = [3, 2, 1]
    path = images / "gaps.json"
    path.write_text(json.dumps(many))
    result = invoke(path, "--function", "cli_eval_rewards.brightness", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["pairs"] == 200
    assert "1 of 200 rows are broken" in " ".join(data["notes"])
    limited = json.loads(invoke(path, "--function", "cli_eval_rewards.brightness", "--json", "--max-pairs", 5).stdout)
    assert limited["pairs"] == 5


def test_saved_latents_and_confidence(tmp_path: Path) -> None:
    import torch

    from dina_reward.data import LatentPreferenceDataset

    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 4, 8, 8, 8, generator=generator)
    LatentPreferenceDataset(["a large red circle on a white background"] * 4, chosen, rejected).save(
        tmp_path / "pairs"
    )
    opened = open_dataset(EvalRequest([], str(tmp_path / "pairs"), max_pairs=3), None)
    assert (len(opened.pairs), opened.schema) == (3, "")
    assert len(list(opened.pairs)) == len(list(opened.pairs)) == 3
    everything = open_dataset(EvalRequest([], "shapes", max_pairs=60), None).pairs
    sure = open_dataset(EvalRequest([], "shapes", max_pairs=60, min_confidence=0.84), None).pairs
    assert 0 < len(sure) < len(everything) == 60
    assert all(max(pair.p_a, 1 - pair.p_a) >= 0.84 for pair in sure)


def test_latent_cache(images: Path, tmp_path: Path) -> None:
    from dina_reward.data import Bucket, BucketRule, CacheSettings, Preference, build_cache
    from dina_reward.shapes import load_pipeline

    pictures = [Image.open(images / f"{number}.png") for number in range(4)]
    pairs = [
        Preference(f"prompt {i}", pictures[i], pictures[i + 1], 1.0, source="s", a_name=f"{i}", b_name=f"{i + 1}")
        for i in range(3)
    ]
    settings = CacheSettings(rule=BucketRule(buckets=(Bucket(32, 32),)))
    build_cache(pairs, load_pipeline(), tmp_path / "cache", settings, progress=False)
    result = invoke("shapes", tmp_path / "cache", "--schema", "imagereward", "--ensembles", "none", "--json", *FAST)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["rewards"][0]
    assert report["cost"]["prepare_seconds_per_1000"] == 0
    setting = report["settings"]["0.5"]
    assert setting["accuracy"]["convention"] == "imagereward"
    assert {name: cell["accuracy"]["pairs"] for name, cell in setting["by"]["resolution"].items()} == {"32x32": 3}
    assert list(setting["by"]["source"]) == ["s"]


@pytest.mark.usefixtures("rewards_on_path")
def test_by_columns_of_the_dataset(images: Path) -> None:
    rows = [
        {"prompt": f"p{n}", "path1": f"{n}.png", "path2": f"{n + 1}.png", "confidence": 0.9, "category": category}
        for n, category in enumerate(("animals", "animals", None))
    ]
    path = images / "categories.json"
    path.write_text(json.dumps(rows))
    arguments = (path, "--function", "cli_eval_rewards.darkness", "--ties", "half", "--resamples", 50)
    result = invoke(*arguments, "--by", "category", "--by", "confidence", "--json")
    assert result.exit_code == 0, result.output
    by = json.loads(result.stdout)["rewards"][0]["settings"]["score"]["by"]
    assert {
        name: (c["accuracy"]["value"], c["accuracy"]["pairs"], c["few"]) for name, c in by["category"].items()
    } == {
        "animals": (1.0, 2, True),
        "(no value)": (1.0, 1, True),
    }
    assert list(by["confidence"]) == ["0.9"]
    assert "category, score: 100.0 % overall; no part has 100 pairs" in invoke(*arguments, "--by", "category").stdout
    missing = invoke(*arguments, "--by", "kind").exception
    assert "has no column ['kind']; it has category, confidence, path1, path2, prompt" in str(missing)


def test_by_a_column_of_the_embedded_pairs() -> None:
    result = invoke("shapes", "shapes", "--max-pairs", 16, "--ensembles", "none", "--by", "gap", "--json", *FAST)
    assert result.exit_code == 0, result.output
    by = json.loads(result.stdout)["rewards"][0]["settings"]["0.5"]["by"]
    assert list(by) == ["gap"]
    assert [cell["accuracy"]["pairs"] for cell in by["gap"].values()] == [4, 4, 4, 4]


def test_names_are_short_and_different() -> None:
    assert _names(["runs/a/final/", "runs/b"]) == ["final", "b"]
    assert _names(["runs/a/final", "runs/b/final"]) == ["a/final", "b/final"]
    with pytest.raises(ValueError, match="named twice"):
        _names(["x", "x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes"], "nothing to evaluate: name a checkpoint"),
        (["shapes", "shapes", "--levels", "a,b"], "--levels takes numbers"),
        (["shapes", "shapes", "--levels", "none", "--ensembles", "none"], "nothing to evaluate: give levels"),
        (["shapes", "shapes", "--draws", "1.5"], "--draws takes whole numbers"),
        (["shapes", "shapes", "-o", __file__], "is a file"),
        (["shapes", "shapes", "-o", f"{__file__}/below/it"], "is no directory that can be written to"),
        (["shapes", "shapes", "--draws", "inf"], "--draws takes whole numbers"),
        (["shapes", "shapes", "--tie-threshold", "nan"], "--tie-threshold must be a number of at least 0, got nan"),
        (["shapes", "shapes", "--max-pairs", "2", "--device", "gpu"], "there is no device 'gpu' here"),
        (["shapes", "shapes", "--ensemble-kind", "sum"], "--ensemble-kind takes"),
        (["shapes", "shapes", "--function", "no.such"], "cannot import 'no.such'"),
        (["./no/such/reward", "shapes"], "neither a directory here nor a repository"),
    ],
)
def test_bad_input_says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    assert message in str(result.exception)


def test_dtypes_are_listed() -> None:
    result = invoke("shapes", "shapes", "--dtype", "int8")
    assert result.exit_code == 2
    assert all(name in result.output for name in ("float32", "bfloat16", "float16"))


def test_help() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "[CHECKPOINT]... {DATASET}" in result.output
