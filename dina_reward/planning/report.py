"""Plans as tables: the memory of a rank, an iteration, one row per number of GPUs, and where the reward should live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dina_reward.evaluation.markdown import markdown
from dina_reward.planning.memory import RewardHome, Setup, memory_parts, total_bytes
from dina_reward.planning.plan import GIB, Plan, changes_of, joint_timesteps_that_fit


def memory_table(plan: Plan) -> str:
    """Memory of a rank in GiB under DDP, under FSDP2 and in 4 bits, with and without checkpointing; a star as configured."""
    columns = [(f"{name} *" if setup == plan.setup else name, setup) for name, setup in _alternatives(plan)]
    parts = [memory_parts(plan.sizes, setup) for _, setup in columns]
    rows = [[one.name, *(_gib(each[i].bytes) for each in parts)] for i, one in enumerate(parts[0])]
    totals = [total_bytes(plan.sizes, setup) for _, setup in columns]
    rows.append(["sum", *map(_gib, totals)])
    rows.append([f"fits in {_gib(plan.memory)}", *("yes" if total <= plan.memory else "no" for total in totals)])
    return markdown(["GiB per GPU", *(name for name, _ in columns)], rows)


def work_table(plan: Plan) -> str:
    """An iteration: calls, FLOPs, seconds and bytes."""
    calls, flops, seconds, sent = plan.calls, plan.flops, plan.seconds, plan.traffic
    rows = [
        ["rollout", f"{plan.samples * calls.rollout:,.0f}", _peta(flops.rollout), _seconds(seconds.rollout)],
        ["reward", f"{plan.samples * calls.reward:,.0f}", _peta(flops.reward), _seconds(seconds.reward)],
        ["update", f"{plan.samples * calls.update:,.0f}", _peta(flops.update), _seconds(seconds.update)],
        [f"sending {_size(sent.total)} per GPU", "", "", _seconds(plan.transfer_seconds)],
        ["iteration", "", _peta(flops.total), _seconds(plan.iteration_seconds)],
    ]
    return markdown(["iteration", "calls", "PFLOPs", "seconds"], rows)


def summary(plan: Plan) -> Iterator[str]:
    """Lines in words."""
    setup = plan.setup
    verdict = "fits" if plan.fits else "does not fit"
    yield (
        f"{plan.name}, {plan.model}, {setup.gpus} x {_gib(plan.memory)} GiB: {verdict} "
        f"({_gib(plan.needed)} GiB per GPU)"
    )
    yield f"Rates: {plan.rates.source}"
    yield (
        f"{plan.samples:,} samples per iteration, {plan.micro_batches} micro-batches of {setup.rows} per GPU, "
        f"{plan.optimizer_steps:g} optimizer steps; {plan.samples_per_second:,.2f} samples/s"
    )
    if plan.hours is not None:
        yield f"{plan.iterations:,.0f} iterations in {plan.hours:,.1f} hours, without evaluations"
    together = joint_timesteps_that_fit(plan)
    if together > plan.together:
        yield (
            f"timesteps_per_forward: {together} fits, too: so many of the {plan.timesteps} timesteps that a sample is "
            f"trained at share a pass (now {plan.together})"
        )
    if not plan.fits:
        changes = changes_of(plan)
        yield (
            "To change, each on top of those before it:" if changes else "Nothing here makes it fit: a smaller model."
        )
        for change in changes:
            yield f"  {change.text} -> {_gib(change.needed)} GiB{', fits' if change.fits else ''}"


def scale_table(plans: Sequence[Plan]) -> str:
    """One row per number of GPUs."""
    columns = [
        "GPUs",
        "samples",
        "micro-batches",
        "GiB per GPU",
        "s/iteration",
        "samples/s",
        "sent per GPU",
        "sending, %",
    ]
    rows = [
        [
            str(plan.setup.gpus),
            f"{plan.samples:,}",
            f"{plan.micro_batches} of {plan.setup.rows}",
            _gib(plan.needed),
            _seconds(plan.iteration_seconds),
            f"{plan.samples_per_second:,.2f}",
            _size(plan.traffic.total),
            f"{100 * plan.transfer_seconds / plan.iteration_seconds:.2f}",
        ]
        for plan in plans
    ]
    return markdown(columns, rows)


def reward_table(plan: Plan) -> str:
    """Where the reward may live: memory in every GPU, share of its time, bytes that it is sent, GPUs of its own."""
    homes: tuple[tuple[str, RewardHome], ...] = (
        ("shared weights", "shared"),
        ("a copy", "own"),
        ("a server", "server"),
    )
    share = plan.flops.reward / plan.rates.reward
    others = plan.flops.rollout / plan.rates.rollout + plan.flops.update / plan.rates.update
    latents = int(plan.samples * plan.calls.reward * plan.sizes.latent_elements * plan.setup.weight_bytes)
    rows = []
    for name, home in homes:
        setup = replace(plan.setup, reward=home)
        part = next(part for part in memory_parts(plan.sizes, setup) if part.name == "reward")
        away = home == "server"
        rows.append(
            [
                name,
                _gib(part.bytes),
                "0.00" if away else f"{100 * share / (share + others):.2f}",
                _size(latents) if away else "0 B",
                f"{plan.setup.gpus * share / others:.2f}" if away else "0.00",
            ]
        )
    return markdown(["the reward on", "GiB per GPU", "% of the time", "sent per iteration", "GPUs of its own"], rows)


def _alternatives(plan: Plan) -> Iterator[tuple[str, Setup]]:
    """DDP, FSDP2 and QLoRA with the configured checkpointing and with the other."""
    setup = plan.setup
    home: RewardHome = "own" if setup.reward == "shared" else setup.reward
    ways = [("DDP", {"strategy": "ddp", "four_bit": False})]
    if setup.gpus > 1:
        ways.append(("FSDP2", {"strategy": "fsdp2", "four_bit": False, "reward": home}))
    if not setup.full:
        ways.append(("4-bit", {"strategy": "ddp", "four_bit": True}))
    for name, fields in ways:
        for checkpointing in (False, True):
            tried = replace(setup, **fields, checkpointing=checkpointing)  # type: ignore[arg-type]
            yield f"{name}, ckpt" if checkpointing else name, tried


def _gib(count: float) -> str:
    return f"{count / GIB:,.2f}"


def _peta(flops: float) -> str:
    return f"{flops / 1e15:,.4g}"


def _seconds(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _size(count: float) -> str:
    unit = next((u for u in ("B", "kB", "MB", "GB") if count < 1000 ** ("B", "kB", "MB", "GB").index(u) * 1000), "TB")
    power = ("B", "kB", "MB", "GB", "TB").index(unit)
    return f"{count / 1000**power:.3g} {unit}"
