"""The examples run as a newcomer runs them, from an empty directory."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


EXAMPLES = Path(__file__).parents[2] / "examples"


RunExample = Callable[..., str]


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[RunExample]:
    """Runs an example in this process, whose libraries are imported already; what it prints."""
    state = torch.random.get_rng_state()

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.random.set_rng_state(state)


def test_every_example_is_short_and_tested_here() -> None:
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == [
        "01_score_latents.py",
        "02_train_a_reward.py",
        "03_align_with_flow_grpo.py",
        "04_swap_into_your_loop.py",
        "05_two_rewards_and_a_held_out_judge.py",
        "06_backprop_the_reward.py",
        "07_from_images_to_an_evaluation.py",
        "08_better_samples_without_training.py",
        "09_distill_a_judge_and_refresh.py",
    ]
    for name in names:
        assert len((EXAMPLES / name).read_text().splitlines()) < (104 if name.startswith("04") else 65)


def check_scores(output: str) -> None:
    rows = re.findall(r"^ +(\d) +(-?\d+\.\d+) +(-?\d+\.\d+) +(\d+\.\d+) +(\d\.\d+)$", output, re.MULTILINE)
    assert sorted(int(row[0]) for row in rows) == list(range(8))
    ensemble = [float(row[2]) for row in rows]
    assert ensemble == sorted(ensemble, reverse=True)
    probability = float(output.rsplit("= ", 1)[1])
    assert 0.5 < probability <= 1


def test_score_latents(run_example: RunExample) -> None:
    check_scores(run_example("01_score_latents.py"))


@pytest.mark.slow
def test_score_latents_as_a_newcomer_does(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "01_score_latents.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    check_scores(result.stdout)


@pytest.mark.slow
def test_train_a_reward(tmp_path: Path, run_example: RunExample) -> None:
    output = run_example("02_train_a_reward.py", "2")
    assert "ensemble" in output
    assert (tmp_path / "outputs" / "my_reward" / "head.safetensors").is_file()


@pytest.mark.slow
def test_align_with_flow_grpo(tmp_path: Path, run_example: RunExample) -> None:
    run_example("03_align_with_flow_grpo.py", "1")
    output = tmp_path / "outputs" / "my_alignment"
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((output / "pictures").glob("step-*.png"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-reward"]])
def test_swap_into_your_loop(run_example: RunExample, options: list[str]) -> None:
    output = run_example("04_swap_into_your_loop.py", "--rounds", "1", *options)
    (reward_before, fit_before), (reward_after, _) = re.findall(r"reward (-?\d+\.\d+), oracle fit (0\.\d+)", output)
    assert 0.3 < float(fit_before) < 0.6
    assert reward_before != reward_after


@pytest.mark.slow
def test_the_swapped_in_reward_makes_the_generator_hear_more(run_example: RunExample) -> None:
    """A third of the rounds; a standard error of the fit of 144 samples is 0.02."""
    output = run_example("04_swap_into_your_loop.py", "--rounds", "10")
    (reward_before, fit_before), (reward_after, fit_after) = re.findall(
        r"reward (-?\d+\.\d+), oracle fit (0\.\d+)", output
    )
    assert float(reward_after) > float(reward_before) + 1
    assert float(fit_after) > float(fit_before) + 0.04


def test_the_reward_takes_four_marked_lines() -> None:
    lines = (EXAMPLES / "04_swap_into_your_loop.py").read_text().splitlines()
    assert sum(line.endswith("# + reward") for line in lines) == 4


@pytest.mark.slow
def test_two_rewards_and_a_held_out_judge(tmp_path: Path, run_example: RunExample) -> None:
    output = run_example("05_two_rewards_and_a_held_out_judge.py", "1")
    assert output.count("{'step'") == 2
    assert len(list((tmp_path / "outputs" / "two_rewards" / "pictures").glob("step-*.png"))) == 2


@pytest.mark.slow
def test_backprop_the_reward(tmp_path: Path, run_example: RunExample) -> None:
    run_example("06_backprop_the_reward.py", "2")
    assert (tmp_path / "outputs" / "my_backprop" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_from_images_to_an_evaluation(tmp_path: Path, run_example: RunExample) -> None:
    output = run_example("07_from_images_to_an_evaluation.py")
    assert "119 of 120 pairs" in output
    assert "lost.png does not exist" in output
    accuracy = dict(re.findall(r"^\| (?:shapes|colourfulness) +\| +(\S.*?) +\| +(\d+\.\d+) \[", output, re.MULTILINE))
    assert set(accuracy) == {"0.1", "0.4", "0.2+0.4+0.6 tokens", "score"}
    assert float(accuracy["0.4"]) > 90 > float(accuracy["score"])
    assert (tmp_path / "outputs" / "images_to_evaluation" / "evaluation.png").is_file()


@pytest.mark.slow
def test_better_samples_without_training(tmp_path: Path, run_example: RunExample) -> None:
    output = run_example("08_better_samples_without_training.py", "6")
    calls = re.findall(r"^(\S.*?) +fit 0\.\d+  cleanness 0\.\d+  (\d+) denoiser calls", output, re.MULTILINE)
    found = {name: int(count) for name, count in calls}
    assert found["one sample"] == 10
    assert found["best of 8, at the end"] == 80
    assert found["best of 8, early"] == 48
    assert 70 < found["halving, same calls"] <= 80
    assert found["stepwise, same calls"] == 80
    assert "after step 10" in output
    assert (tmp_path / "better_samples.png").is_file()
    assert (tmp_path / "better_samples_report.png").is_file()


@pytest.mark.parametrize("name", ["README.md", "recipes/README.md"])
def test_readme_commands_name_existing_files(name: str) -> None:
    text = (EXAMPLES.parent / name).read_text()
    for path in re.findall(r"(?:recipes|examples|docs|tests)/[\w/.]+\.(?:py|yaml|png)", text):
        assert (EXAMPLES.parent / path).is_file(), path


@pytest.mark.slow
def test_distill_a_judge_and_refresh(tmp_path: Path, run_example: RunExample) -> None:
    output = run_example("09_distill_a_judge_and_refresh.py", "4", "6")
    assert re.search(r"\d+ judgements of \d+ of \d+ samples made \d+ pairs", output)
    assert re.search(r"\d+ judgements in 1 refreshes", output)
    assert (tmp_path / "outputs" / "distilled" / "alignment" / "refresh" / "round-000" / "record.json").is_file()
