"""Batches of one latent shape: order, ranks, resume, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dina_reward.training import LatentRewardTrainer
from dina_reward.training.batching import SequentialBucketSampler, buckets_of, gather_rows, make_batch_sampler
from tests.training.bucketed import BucketedPairs
from tests.training.tiny_reward import tiny_reward, trained_parameters, training_config


class Uneven:
    bucket_of = np.array([1, 0, 1, 1, 2, 0, 1, 1])

    def __len__(self) -> int:
        return 8


def trainer(directory: Path, pipeline: Any, pairs: BucketedPairs | None = None, **overrides: Any) -> Any:
    arguments = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, **overrides}
    return LatentRewardTrainer(
        tiny_reward(pipeline=pipeline),
        training_config(directory, **arguments),
        train_dataset=pairs or BucketedPairs(),
        eval_dataset=BucketedPairs(11, seed=1),
    )


def test_evaluation_order_goes_bucket_by_bucket() -> None:
    sampler = SequentialBucketSampler(Uneven(), 2)
    assert list(sampler) == [[1, 5], [0, 2], [3, 6], [7], [4]]
    assert sampler.first_positions == [0, 2, 4, 6, 7]


def test_ranks_share_the_evaluation_and_repeat_only_what_does_not_go_round() -> None:
    ranks = [SequentialBucketSampler(Uneven(), 2, num_replicas=2, rank=rank) for rank in range(2)]
    assert [list(rank) for rank in ranks] == [[[1, 5], [3, 6], [4]], [[0, 2], [7], [1, 5]]]
    assert ranks[1].first_positions == [2, 6, 0]


def test_gathered_rows_are_sorted_and_unique() -> None:
    rows = torch.tensor([[3.0], [1.0], [2.0], [1.0]])
    assert gather_rows(rows, torch.tensor([7, 0, 4, 0])).tolist() == [[1.0], [2.0], [3.0]]


def test_training_batches_hold_one_bucket_and_ranks_differ() -> None:
    pairs = BucketedPairs(32)
    ranks = [list(make_batch_sampler(pairs, 4, 0, num_replicas=2, rank=rank)) for rank in range(2)]
    for batch in (*ranks[0], *ranks[1]):
        assert len(set(pairs.bucket_of[batch].tolist())) == 1
    seen = sorted(index for rank in ranks for batch in rank for index in batch)
    assert seen == list(range(32))


def test_bucket_numbers_are_checked() -> None:
    class Short(Uneven):
        bucket_of = np.zeros(3)

    with pytest.raises(
        ValueError, match=r"shape \(3,\) and dtype float64; expected one integer for each of its 8 rows"
    ):
        buckets_of(Short())


def test_trains_on_two_shapes_and_sees_every_pair_once_an_epoch(tmp_path: Path, sd3_pipeline: Any) -> None:
    pairs = BucketedPairs()
    run = trainer(tmp_path, sd3_pipeline, pairs, max_steps=-1, num_train_epochs=2, learning_rate=3e-3)
    pairs.read.clear()
    run.train()
    assert run.state.global_step == 20
    first, second = pairs.read[:40], pairs.read[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_inside_an_epoch_equals_the_uninterrupted_run(tmp_path: Path, sd3_pipeline: Any, workers: int) -> None:
    arguments: dict[str, Any] = {
        "max_steps": 13,  # into the second epoch of ten batches, five steps
        "save_strategy": "steps",
        "save_steps": 7,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": workers,
    }
    whole_pairs, resumed_pairs = BucketedPairs(), BucketedPairs()
    whole = trainer(tmp_path, sd3_pipeline, whole_pairs, **arguments)
    whole.train()
    torch.manual_seed(99)
    resumed = trainer(tmp_path, sd3_pipeline, resumed_pairs, **arguments)
    resumed_pairs.read.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    if not workers:
        assert resumed_pairs.read == whole_pairs.read[-len(resumed_pairs.read) :]
    for name, parameter in trained_parameters(whole).items():
        assert torch.equal(trained_parameters(resumed)[name], parameter), name


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path, sd3_pipeline: Any) -> None:
    small, large = (trainer(tmp_path, sd3_pipeline, per_device_eval_batch_size=size) for size in (2, 16))
    one, other = small.evaluate(), large.evaluate()
    for name in ("eval_loss", "eval_margin", "eval_accuracy", "eval_brier"):
        assert one[name] == pytest.approx(other[name], abs=1e-5)
    named = small.evaluate({"x": BucketedPairs(6, seed=2)})
    assert "eval_x_accuracy" in named
