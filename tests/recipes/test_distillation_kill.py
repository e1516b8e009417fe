"""A distillation that is killed while its judge is asked, or while its reward is trained, ends as one that was not."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from dina_reward.recipes import distillation as run
from dina_reward.training import LatentRewardTrainer
from tests.recipes import test_distillation as judged
from tests.recipes.test_distillation import options, parsed, place  # noqa: F401


pytestmark = pytest.mark.slow
SAVING = ("--save_strategy", "steps", "--save_steps", "4", "--resume_from_checkpoint", "true")


def in_a_process(place: Path, output: str, prepare: Callable[[], None] = lambda: None) -> int:  # noqa: F811
    """Distils in a forked process; 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            run.distill(*parsed(options(place, output, *SAVING)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def while_labelling() -> None:
    """At the third call of the judge."""

    class Counted(list[int]):
        def append(self, count: int) -> None:
            super().append(count)
            if len(self) == 3:
                die()

    judged.CALLS = Counted()


def while_training() -> None:
    """In the seventh step, after a checkpoint at the fourth."""
    compute, steps = LatentRewardTrainer.compute_loss, [0]

    def counted(self: LatentRewardTrainer, *args: object, **kwargs: object) -> object:
        steps[0] += 1
        if steps[0] == 7:
            die()
        return compute(self, *args, **kwargs)  # type: ignore[arg-type]

    LatentRewardTrainer.compute_loss = counted  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:  # noqa: F811
    assert in_a_process(place, "whole") == 0
    return place / "whole"


@pytest.mark.parametrize("moment", [while_labelling, while_training])
def test_nothing_is_lost(place: Path, whole: Path, moment: Callable[[], None]) -> None:  # noqa: F811
    output = place / moment.__name__
    assert in_a_process(place, output.name, moment) == -signal.SIGKILL
    assert not (output / run.EVALUATION_NAME).exists()
    assert (output / "checkpoint-4").exists() == (moment is while_training)
    assert in_a_process(place, output.name) == 0
    files = {path.relative_to(whole) for path in whole.rglob("*.safetensors")}
    assert files
    assert all((output / name).read_bytes() == (whole / name).read_bytes() for name in files)
    ours, expected = run.read_distillation(output), run.read_distillation(whole)
    assert ours["evaluation"]["accuracy"] == expected["evaluation"]["accuracy"]
    assert {**ours["labels"], "seconds": 0} == {**expected["labels"], "seconds": 0}
