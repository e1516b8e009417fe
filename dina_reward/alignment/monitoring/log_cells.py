"""Which numbers of a run's log lines its terminal shows."""

from __future__ import annotations

from collections.abc import Mapping

from dina_reward.alignment.monitoring.evaluation import HACKING_ALARM
from dina_reward.alignment.monitoring.hacking import REWARD, REWARD_PREFIX
from dina_reward.training.log_table import ALARM, Cells


_HELD_OUT = "eval_"
_NO_JUDGES = (REWARD, HACKING_ALARM, "runtime")


def alignment_cells(logs: Mapping[str, float]) -> Cells:
    """Reward of the samples trained on, reward and judges of held-out ones, and whether the alarm for hacking is raised."""
    held_out = {key.removeprefix(_HELD_OUT): value for key, value in logs.items() if key.startswith(_HELD_OUT)}
    cells: dict[str, float | str] = {"reward": logs.get(REWARD, "")}
    if REWARD in held_out:
        cells["held-out reward"] = held_out[REWARD]
    cells |= {
        name: value
        for name, value in held_out.items()
        if name not in _NO_JUDGES and not name.startswith(REWARD_PREFIX)
    }
    if HACKING_ALARM in held_out:
        cells["alarm"] = ALARM if held_out[HACKING_ALARM] else "no"
    return cells
