"""Work of one process that the others wait for, and whose errors they raise too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from dina_reward.distill.judges import JudgeError


Result = TypeVar("Result")


class OneProcess:
    """What is asked of an `accelerate.Accelerator`, where there is none."""

    is_main_process = True
    num_processes = 1
    process_index = 0

    def wait_for_everyone(self) -> None:
        """Nobody to wait for."""


def on_main(processes: Any, work: Callable[[], Result]) -> Result:
    """Does some work in the main process and returns its result, which can be pickled, in all of them.

    Raises:
        JudgeError: in every other process too, if the work raised anything in the main one.
    """
    result: Any = None
    error: Exception | None = None
    if processes.is_main_process:
        try:
            result = work()
        except Exception as raised:
            error = raised
    if processes.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        told = [result, None if error is None else f"{type(error).__name__}: {error}"]
        result, fault = broadcast_object_list(told)
        if fault is not None and error is None:
            raise JudgeError(f"the main process failed: {fault}")
    if error is not None:
        raise error
    return cast(Result, result)


def processes_first(processes: Any, work: Callable[[], Result]) -> Result:
    """Work that every process does, the main one first, which may write what the others then read."""
    done: list[Result] = []
    on_main(processes, lambda: done.append(work()))
    return done[0] if done else work()
