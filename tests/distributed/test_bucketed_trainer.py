"""Two gloo processes train and evaluate on pairs of two shapes; `work` is a job of together.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_reward.training import LatentRewardTrainer
from tests.tiny_models import tiny_sd3_pipeline
from tests.training.bucketed import BucketedPairs
from tests.training.tiny_reward import tiny_reward, trained_parameters, training_config


JOB = "bucketed"


def make_trainer(directory: Path, pairs: BucketedPairs, **overrides: Any) -> LatentRewardTrainer:
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "max_steps": 8, "save_strategy": "steps",
        "save_steps": 4, **overrides,
    }  # fmt: skip
    return LatentRewardTrainer(
        tiny_reward(pipeline=tiny_sd3_pipeline()),
        training_config(directory, **arguments),
        train_dataset=pairs,
        eval_dataset=BucketedPairs(13, seed=1),
    )


@pytest.fixture(scope="module")
def two_ranks(two_processes: Callable[[str], Path]) -> tuple[Path, list[dict[str, Any]]]:
    directory = two_processes(JOB)
    return directory, [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
def test_ranks_train_on_different_pairs_and_miss_none(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (rank["read"] for rank in two_ranks[1])
    epoch = 24  # 20 pairs of a bucket are completed to 3 steps of 2 ranks x 4 pairs, for each of 2 buckets
    assert set(first[:epoch] + second[:epoch]) == set(range(40))
    for start in range(0, len(first), 4):
        assert not set(first[start : start + 4]) & set(second[start : start + 4])
    assert first[epoch : epoch + 8] != first[:8]


@pytest.mark.distributed
def test_resume_inside_an_epoch_continues_with_the_same_pairs(two_ranks) -> None:
    directory, ranks = two_ranks
    for rank in ranks:
        assert rank["resumed"] == rank["read"][16:]
    whole, resumed = (load_file(directory / f"{name}.safetensors") for name in ("whole", "resumed"))
    for name, parameter in whole.items():
        torch.testing.assert_close(resumed[name], parameter, rtol=0, atol=1e-7)


@pytest.mark.distributed
def test_evaluation_equals_that_of_one_process(two_ranks, tmp_path: Path) -> None:
    directory, ranks = two_ranks
    trainer = make_trainer(tmp_path, BucketedPairs(), per_device_eval_batch_size=5)
    trainer.reward.load_weights(directory / "final")
    expected = trainer.evaluate()
    for rank in ranks:
        for name in ("eval_loss", "eval_accuracy", "eval_margin"):
            assert rank["metrics"][name] == pytest.approx(expected[name], abs=1e-4)


def work(directory: Path) -> None:
    pairs = BucketedPairs()
    trainer = make_trainer(directory, pairs, ddp_backend="gloo")
    pairs.read.clear()
    trainer.train()
    read, metrics = list(pairs.read), trainer.evaluate()
    trainer.save_model(str(directory / "final"))
    parameters = trained_parameters(trainer)

    resumed = make_trainer(directory, pairs, ddp_backend="gloo")
    pairs.read.clear()
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-4"))
    rank = trainer.args.process_index
    if rank == 0:
        save_file(parameters, directory / "whole.safetensors")
        save_file(trained_parameters(resumed), directory / "resumed.safetensors")
    content = {"read": read, "resumed": list(pairs.read), "metrics": metrics}
    (directory / f"rank{rank}.json").write_text(json.dumps(content))
