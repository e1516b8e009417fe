"""A judge distilled into a reward of the tiny pipeline, from the command line to the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward import LatentReward
from dina_reward.recipes import distillation as run
from dina_reward.recipes.arguments import ConfigParser
from dina_reward.training.checkpointing import AtomicCheckpointMixin
from tests.alignment.helpers import tiny_pipeline


PROMPTS = ["a cat", "a dog", "red", "blue", "one", "two"]
CALLS: list[int] = []


def shade(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The judge."""
    CALLS.append(len(prompts))
    return latents[:, :4].flatten(1).mean(1)


def constant(latents: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(latents))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distil")
    tiny_pipeline().save_pretrained(directory / "pipeline")
    (directory / "prompts.txt").write_text("\n".join([*PROMPTS, "red"]) + "\n")
    return directory


def options(place: Path, output: str, *more: str, judge: str = "shade") -> list[str]:
    values = {
        "model_name_or_path": place / "pipeline", "judge": f"tests.recipes.test_distillation:{judge}",
        "prompts": place / "prompts.txt", "budget": 48, "height": 32, "width": 32, "num_inference_steps": 2,
        "sample_batch_size": 16, "max_sequence_length": 8, "num_layers": 2, "lora_r": 2, "lora_alpha": 4, "max_steps": 12,
        "per_device_train_batch_size": 16, "learning_rate": 3e-3, "use_cpu": "true", "disable_tqdm": "true",
        "output_dir": place / output, "save_strategy": "no",
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*words, "--visual_taps", "1", "2", "--text_taps", "1", "--eval_noise_levels", "0.1", "0.4", *more]


def parsed(words: list[str]) -> Any:
    return ConfigParser((run.DistillArguments, run.DistillTrainingConfig)).parse_args_and_config(words)


@pytest.fixture(scope="module")
def distilled(place: Path) -> dict[str, Any]:
    CALLS.clear()
    result = run.distill(*parsed(options(place, "reward")))
    return {"result": result, "calls": sum(CALLS), "directory": place / "reward"}


def test_a_judge_becomes_a_reward(distilled: dict[str, Any]) -> None:
    result, directory = distilled["result"], distilled["directory"]
    assert distilled["calls"] == result.labels.calls + result.eval_labels.calls <= 48
    assert result.evaluation.accuracy["0.1"].value > 0.5
    assert result.cost_ratio > 0
    stored = run.read_distillation(directory)
    assert stored["evaluation"]["accuracy"]["0.1"]["value"] == result.evaluation.accuracy["0.1"].value
    card = (directory / "README.md").read_text()
    for text in (
        "library_name: dina_reward",
        "## Distilled from a judge",
        "test_distillation:shade",
        "Held out:",
        "to 1.",
    ):
        assert text in card
    reward = LatentReward.from_pretrained(directory, pipeline=tiny_pipeline())
    latents = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(reward(latents, PROMPTS[:4], seed=0)).all()


def test_held_out_prompts_are_not_trained_on(distilled: dict[str, Any]) -> None:
    labels = distilled["directory"] / "labels"
    train, test = (
        set(json.loads((labels / name / "samples.json").read_text())["prompts"]) for name in ("train", "test")
    )
    assert train | test == set(PROMPTS)
    assert not train & test


@pytest.mark.slow
def test_started_again_the_judge_is_not_asked(place: Path, distilled: dict[str, Any]) -> None:
    CALLS.clear()
    result = run.distill(*parsed(options(place, "reward")))
    assert CALLS == []
    assert result.evaluation.accuracy == distilled["result"].evaluation.accuracy


@pytest.mark.slow
def test_from_a_reward_the_informative_samples_are_judged(place: Path, distilled: dict[str, Any]) -> None:
    more = ("--reward_model_path", str(distilled["directory"]), "--loss_type", "gaussian", "--group_size", "2")
    result = run.distill(*parsed(options(place, "further", *more, "--candidates", "5")))
    assert result.labels.samples == 5 * result.labels.groups
    assert result.labels.judged == 2 * result.labels.groups
    assert str(distilled["directory"]) in (place / "further" / "README.md").read_text()


def test_a_judge_of_no_use_trains_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_training(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(AtomicCheckpointMixin, "train", no_training)
    with pytest.raises(ValueError, match="so nothing can be learned from it"):
        run.distill(*parsed(options(place, "nothing", judge="constant")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval_share", "0"), "eval_share must lie in"),
        (("--group_size", "1"), "group_size must lie in"),
        (("--judgee", "x"), "unknown option --judgee; did you mean --judge?"),
    ],
)
def test_settings_that_do_not_fit(place: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(options(place, "x", *more))


def test_prompts_in_common_are_refused(place: Path) -> None:
    (place / "held_out.txt").write_text("red\ngreen\n")
    arguments, _ = parsed(options(place, "x", "--eval_prompts", str(place / "held_out.txt")))
    with pytest.raises(ValueError, match="1 of the eval_prompts are trained on, such as 'red'"):
        run.split_prompts(arguments, 0)


def test_the_command_names_its_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from dina_reward.cli.app import app

    seen: list[list[str]] = []
    monkeypatch.setattr(run, "main", seen.append)
    CliRunner().invoke(app, ["distill", "my/pipeline", "--judge", "a:b", "--budget", "10"], catch_exceptions=False)
    CliRunner().invoke(app, ["distill", "--config", "x.yaml"], catch_exceptions=False)
    assert seen == [
        ["--model_name_or_path", "my/pipeline", "--judge", "a:b", "--budget", "10"],
        ["--config", "x.yaml"],
    ]
    assert "--budget 2000" in CliRunner().invoke(app, ["distill"]).output
