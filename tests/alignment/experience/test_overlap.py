"""Scoring while sampling goes on changes when rewards are computed, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward.alignment.experience import maker
from dina_reward.alignment.experience.overlap import scoring
from tests.alignment.helpers import closeness, logged, lora_tensors, tiny_trainer


def test_work_waits_for_its_result_or_runs_meanwhile_in_order() -> None:
    done: list[int] = []
    with scoring(overlap=False) as start:
        results = [start(lambda value=value: done.append(value)) for value in range(3)]
        assert done == []
        for result in reversed(results):
            result()
        assert done == [2, 1, 0]
    done.clear()
    ready = threading.Event()
    with scoring(overlap=True) as start:
        results = [start(lambda value=value: done.append(value)) for value in range(3)]
        start(ready.set)
        assert ready.wait(10)
        assert done == [0, 1, 2]
        grad = start(torch.is_grad_enabled)
        assert grad() is False


def test_errors_come_with_the_result_and_end_what_waits() -> None:
    done: list[int] = []

    def run() -> None:
        gate = threading.Event()
        with scoring(overlap=True) as start:
            start(lambda: gate.wait(10))
            failing = start(lambda: 1 / 0)
            start(lambda: done.append(1))
            gate.set()
            failing()

    with pytest.raises(ZeroDivisionError):
        run()

    def interrupted() -> None:
        gate = threading.Event()
        with scoring(overlap=True) as start:
            start(lambda: gate.wait(0.2))
            start(lambda: done.append(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert 2 not in done


def test_runs_are_equal_and_the_first_scores_come_before_the_last_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    scored = threading.Event()
    sample = maker.sample

    def reward(latents: Tensor, seed: list[int]) -> Tensor:
        events.append("score")
        scored.set()
        return closeness(latents) + 1e-9 * sum(seed[:1])

    def sampled(*args: Any, **kwargs: Any) -> Any:
        rollout = sample(*args, **kwargs)
        events.append("sample")
        if overlap and events.count("sample") % 2 == 0:
            assert scored.wait(10)  # the micro-batch before was scored while this one was sampled
        if events.count("sample") % 2 == 1:
            scored.clear()
        return rollout

    monkeypatch.setattr(maker, "sample", sampled)
    runs = []
    for overlap in (False, True):
        events.clear()
        trainer = tiny_trainer(tmp_path / str(overlap), reward_funcs=reward, reward_overlap=overlap, max_steps=4)
        trainer.train()
        runs.append((lora_tensors(trainer), logged(trainer, "reward"), list(events)))
    (weights, rewards, before), (overlapped, same_rewards, after) = runs
    assert weights.keys() == overlapped.keys()
    assert all(torch.equal(weights[name], overlapped[name]) for name in weights)
    assert rewards == same_rewards
    assert before[:4] == ["sample", "sample", "score", "score"]
    assert sorted(before) == sorted(after)


def test_a_failing_reward_stops_the_run(tmp_path: Path) -> None:
    def reward(latents: Tensor) -> Tensor:
        raise OSError("no judge")

    trainer = tiny_trainer(tmp_path, reward_funcs=reward, reward_overlap=True)
    with pytest.raises(ValueError, match="no judge"):
        trainer.train()
