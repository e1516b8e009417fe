"""A plan: work, hours, whether it fits, and what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dina_reward.planning import DEVICES, Plan, make_plan, rates_of_bench, rates_of_device
from dina_reward.planning.plan import changes_of, joint_timesteps_that_fit, spread_over
from dina_reward.planning.report import memory_table, reward_table, scale_table, summary, work_table
from dina_reward.planning.sizes import RunSizes
from dina_reward.planning.traffic import all_reduce_bytes, gather_bytes, traffic_of
from tests.alignment.helpers import tiny_config
from tests.alignment.tiny_policy import make_policy
from tests.planning.test_activations import forward


RATES = rates_of_device("a test", 1e12, 0.5)


def plan(sizes: RunSizes, gpus: int = 1, memory: int = 2**33, reward: Any = "shared", **settings: Any) -> Plan:
    device = DEVICES["A100-80GB"]
    config = tiny_config("out", **settings)
    return make_plan(
        "tiny", "a model", sizes, config, gpus=gpus, memory=memory, device=device, rates=RATES, weight_bytes=4,
        reward=reward,
    )  # fmt: skip


def test_flops_and_hours_follow_from_calls(sizes: RunSizes) -> None:
    found = plan(sizes, beta=0.1, max_steps=20, reward_noise_level=[0.2, 0.4])
    step, score = sizes.card.step_flops, sizes.reward_flops
    assert step is not None
    assert (found.flops.rollout, found.flops.reward, found.flops.update) == (
        12 * 7 * step,
        12 * 2 * score,
        12 * 2 * 2 * step,
    )
    assert found.seconds.total == pytest.approx(found.flops.total / 5e11)
    assert (found.iterations, found.traffic.total, found.optimizer_steps) == (10, 0, 2)
    assert found.hours == pytest.approx(10 * found.seconds.total / 3600)
    assert plan(sizes, gradient_checkpointing=True).flops.update == 12 * 2 * 3 * step


def test_a_loss_of_a_lora_costs_two_forward_passes_and_attention_once_more(sizes: RunSizes) -> None:
    run = forward(make_policy(), sizes, rows=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run().sum().backward()
    step, counts = sizes.card.step_flops, counter.get_flop_counts()["Global"]
    assert step is not None
    attention = counts[torch.ops.aten.bmm] / 3  # forward, and for each of its inputs
    # The LoRA itself, of rank 2, adds some; the first block's inputs need no gradient.
    assert counter.get_total_flops() == pytest.approx(2 * step + attention, rel=0.15)


def test_ranks_share_the_work_and_send_gradients(sizes: RunSizes) -> None:
    one, two = plan(sizes, num_generations=3), plan(sizes, gpus=2, steps_per_generation=1, num_generations=3)
    assert two.flops == one.flops
    assert two.seconds.total == pytest.approx(one.seconds.total / 2)
    assert two.traffic.gradients == 4 * sizes.policy_lora
    assert two.transfer_seconds == pytest.approx(two.traffic.total / 300e9)
    away = plan(sizes, reward="server")
    assert away.seconds.reward == 0
    assert away.traffic.server == 12 * 4 * sizes.latent_elements


def test_bytes_of_rings() -> None:
    assert (all_reduce_bytes(1000, 1), all_reduce_bytes(1000, 2), all_reduce_bytes(1000, 8)) == (0, 1000, 1750)
    assert (gather_bytes(1000, 1), gather_bytes(1000, 4)) == (0, 750)
    common = {"trained": 25, "optimizer_steps": 2, "denoiser_bytes": 400, "passes": 10, "backward_passes": 4}
    rest = {"samples": 10, "reward_functions": 1, "server_bytes": 0}
    sharded = traffic_of(ranks=4, sharded=True, **common, **rest)  # type: ignore[arg-type]
    assert (sharded.gradients, sharded.weights, sharded.scores) == (2 * 75, 14 * 300, 90)
    assert traffic_of(ranks=4, sharded=False, **common, **rest).weights == 0  # type: ignore[arg-type]


def test_what_does_not_fit_is_told_what_to_change(sizes: RunSizes) -> None:
    wide = plan(sizes)
    enough = plan(sizes, memory=wide.needed)
    assert enough.fits
    assert enough.to_dict()["changes"] == []
    tight = plan(sizes, memory=wide.needed - 1)
    assert not tight.fits
    lines = list(summary(tight))
    assert "does not fit" in lines[0]
    (*_, last) = changes_of(tight) or [None]
    assert last is None or last.needed < wide.needed


def test_changes_add_up_until_it_fits() -> None:
    from dataclasses import replace

    from dina_reward.planning.activations import Kept
    from tests.planning.test_memory import SETUP, SIZES

    base: Any = object.__new__(Plan)
    setup = replace(SETUP, rows=8, eval_rows=0, samples=0)
    sizes = type(SIZES)(
        **{**vars(SIZES), "denoiser_kept": Kept(0, 2**33, 0, 2**31), "denoiser": 2**31, "block_weights": 2**31}
    )
    for name, value in {"setup": setup, "sizes": sizes, "memory": 2**34}.items():
        object.__setattr__(base, name, value)
    found = changes_of(base)
    assert [(c.text.split(":")[0], c.fits) for c in found] == [
        ("gradient_checkpointing", False),
        ("per_device_train_batch_size", True),
    ]
    assert found[-1].text.startswith("per_device_train_batch_size: 4")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(1, (4, 2)), (2, (2, 1)), (4, (1, 1)), (8, (1, 1))],
)
def test_a_batch_is_spread_over_other_numbers(gpus: int, expected: tuple[int, int]) -> None:
    config = tiny_config(
        "out", steps_per_generation=2, gradient_accumulation_steps=1, max_steps=-1, num_train_epochs=1
    )
    spread = spread_over(config, 2, gpus)
    assert (spread["steps_per_generation"], spread["gradient_accumulation_steps"]) == expected


def test_rates_of_a_bench_file_are_those_of_its_largest_batches(tmp_path: Any) -> None:
    from tests.bench.test_report import ROWS, report

    path, _ = report(*ROWS).save(tmp_path)
    rates = rates_of_bench(path)
    assert (rates.rollout, rates.reward, rates.update) == pytest.approx((1e9, 2e9, 1e9 / 3))
    assert rates.source == "measured, SD3.5-Medium in float32 on A CPU, 2 threads"
    path, _ = report(*ROWS[:3]).save(tmp_path / "less")
    with pytest.raises(ValueError, match="lacks rows of scores on the generator's weights"):
        rates_of_bench(path)
    with pytest.raises(ValueError, match="there is no file"):
        rates_of_bench(tmp_path / "none.json")
    with pytest.raises(ValueError, match="give a positive rate, a share"):
        rates_of_device("x", 1e12, 1.5)


def test_tables_say_what_the_plan_says(sizes: RunSizes) -> None:
    found = plan(sizes, gpus=2, steps_per_generation=1, num_generations=3)
    header, _, *rows = memory_table(found).splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        "DDP *",
        "DDP, ckpt",
        "FSDP2",
        "FSDP2, ckpt",
        "4-bit",
        "4-bit, ckpt",
    ]
    assert rows[-1].count("yes") == 6
    assert f"{12 * 5:,}" in work_table(found)
    assert len(scale_table([found, found]).splitlines()) == 4
    assert "a server" in reward_table(found)
    assert torch.get_default_dtype() is torch.float32


def test_timesteps_that_fit_into_a_pass_are_told(sizes: RunSizes) -> None:
    window: dict[str, Any] = {"sde_window_size": 4, "num_inference_steps": 6}
    apart = plan(sizes, memory=2**40, **window)
    together = plan(sizes, memory=2**40, timesteps_per_forward=4, **window)
    assert together.setup.graphs == 4 * apart.setup.graphs
    assert together.calls.gradient_passes == apart.calls.gradient_passes / 4
    assert (together.calls.rollout, together.calls.update) == (apart.calls.rollout, apart.calls.update)
    assert (joint_timesteps_that_fit(apart), joint_timesteps_that_fit(together)) == (4, 4)
    half = plan(sizes, timesteps_per_forward=2, **window)
    assert together.needed > half.needed
    assert joint_timesteps_that_fit(plan(sizes, memory=together.needed - 1, **window)) == 2
    assert any(line.startswith("timesteps_per_forward: 4 fits, too: so many of the 4") for line in summary(apart))
    assert not any(line.startswith("timesteps_per_forward") for line in summary(together))
    nothing = plan(sizes, memory=1, **window)
    assert joint_timesteps_that_fit(nothing) == 0
    assert together.to_dict()["timesteps_per_forward_that_fit"] == 4
