"""What GPUs can do: data sheets, and the rates that a `dina-reward bench` file attained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dina_reward.bench.rows import CALL, GRADIENT, SCORE
from dina_reward.checks.stored import read_json


RANKS_PER_NODE = 8
"""GPUs that are linked to each other; beyond them the network counts."""


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet; nothing of it was measured here.

    Args:
        name: of the GPU.
        memory: GiB.
        rate: dense bfloat16 FLOP/s of its tensor cores with float32 sums.
        link: bytes/s that it sends to its neighbours in a node.
        network: bytes/s that it sends to other nodes, with one network card per GPU.
    """

    name: str
    memory: float
    rate: float
    link: float
    network: float


DEVICES = {
    device.name: device
    for device in (
        Device("RTX-4090", 24, 165e12, 32e9, 12.5e9),
        Device("L40S", 48, 362e12, 32e9, 25e9),
        Device("A100-40GB", 40, 312e12, 300e9, 25e9),
        Device("A100-80GB", 80, 312e12, 300e9, 25e9),
        Device("H100", 80, 989e12, 450e9, 50e9),
        Device("H200", 141, 989e12, 450e9, 50e9),
        Device("B200", 180, 2250e12, 900e9, 50e9),
    )
}
"""Data sheets of NVIDIA; ``link`` is NVLink in one direction, or PCIe where there is none."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s that a run attains in its three parts.

    Args:
        source: where they come from, for people.
        rollout, reward, update: denoiser calls without gradient, scores, and losses with their backward passes.
    """

    source: str
    rollout: float
    reward: float
    update: float


def rates_of_device(source: str, rate: float, share: float) -> Rates:
    """The same share of a device's rate in all parts.

    Raises:
        ValueError: a rate that is not positive, or a share outside (0, 1].
    """
    if not rate > 0 or not 0 < share <= 1:
        raise ValueError(
            f"a rate of {rate:g} FLOP/s and a share of {share:g}: give a positive rate, a share in (0, 1]"
        )
    attained = rate * share
    return Rates(f"{100 * share:g} % of {rate / 1e12:,.4g} TFLOP/s ({source})", attained, attained, attained)


def rates_of_bench(path: Path) -> Rates:
    """Rates of the file that `dina-reward bench` writes, each at the largest batch that was measured.

    Raises:
        ValueError: no such file, no file of `dina-reward bench`, or one without scores, calls and gradients.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; `dina-reward bench` writes one into outputs/bench")
    values = read_json(path)
    rows = values.get("rows") if isinstance(values, Mapping) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} has no rows; expected the JSON that `dina-reward bench` writes")
    found = [_rate(rows, what, mode) for what, mode in ((CALL, ""), (SCORE, "shared"), (GRADIENT, ""))]
    if None in found:
        raise ValueError(
            f"{path} lacks rows of scores on the generator's weights, of denoiser calls or of gradients; measure them with "
            "`dina-reward bench --parts score,denoiser`"
        )
    machine = values["machine"]
    return Rates(f"measured, {values['model']} in {machine['dtype']} on {machine['device']}", *found)  # type: ignore[arg-type]


def _rate(rows: list[Mapping[str, Any]], what: str, mode: str) -> float | None:
    fitting = [r for r in rows if (r["what"], r["mode"], r["levels"], r["compiled"]) == (what, mode, 1, False)]
    if not fitting:
        return None
    row = max(fitting, key=lambda r: r["batch"])
    return row["flops"] / row["seconds"]
