"""The two roofs, and the timing of calls."""

from __future__ import annotations

import time

import torch

from dina_reward.bench import Machine, measure_machine
from dina_reward.bench.machine import durations, spread


def test_the_lower_roof_counts() -> None:
    machine = Machine("a device", "cpu", 1, "float32", matrix_rate=100.0, memory_rate=10.0, torch="2")
    assert machine.attainable(flops=1000, bytes_read=10) == 100
    assert machine.attainable(flops=1000, bytes_read=1000) == 10


def test_a_machine_is_measured() -> None:
    machine = measure_machine(torch.device("cpu"), torch.bfloat16, seconds=0.01)
    assert (machine.device_type, machine.dtype, machine.threads) == ("cpu", "bfloat16", torch.get_num_threads())
    assert machine.matrix_rate > 1e6
    assert machine.memory_rate > 1e6


def test_calls_are_timed_after_one_that_warms_up() -> None:
    calls: list[int] = []
    assert len(durations(lambda: calls.append(1), torch.device("cpu"), 0.0, least=4)) == 4
    assert len(calls) == 5
    assert len(durations(lambda: None, torch.device("cpu"), 10.0, most=6)) == 6


def test_fast_calls_warm_up_longer_and_slow_ones_need_not_be_repeated() -> None:
    calls: list[int] = []

    def slow() -> None:
        calls.append(1)
        time.sleep(0.02)

    assert len(durations(slow, torch.device("cpu"), 0.01, slow_once=True)) == len(calls) == 1
    calls.clear()
    assert len(durations(slow, torch.device("cpu"), 0.09)) >= 3
    assert len(calls) >= 3 + 3  # 0.045 seconds of warming up


def test_two_calls_have_no_spread() -> None:
    assert spread([1.0, 2.0]) is None


def test_the_spread_is_half_the_distance_between_quartiles() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0
