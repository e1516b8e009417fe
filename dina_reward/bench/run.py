"""Measures all rows of a subject, one after the other, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from dina_reward.bench.machine import measure_machine
from dina_reward.bench.report import BenchReport
from dina_reward.bench.rows import (
    Case,
    Row,
    denoiser_cases,
    pixel_cases,
    score_cases,
    training_cases,
    without_new_lora,
)
from dina_reward.bench.subject import Subject
from dina_reward.checks.values import check_fields


PARTS = ("score", "pixels", "training", "denoiser")
QUICK_BATCH_SIZES, BATCH_SIZES = (1, 4), (1, 4, 8, 32)


@dataclass(frozen=True)
class BenchSettings:
    """What is measured and for how long.

    Args:
        parts: some of `PARTS`.
        batch_sizes: samples per call of scores and denoiser calls; pixels and gradients are measured at the smallest two.
        compile: measure compiled scores too, which takes minutes to compile.
        seconds: time spent on each row, with three calls at least.
        quick: a row that takes longer than ``seconds`` is called once, and pixels are measured at the smallest batch alone.
        num_inference_steps, num_train_timesteps: of the iteration that is put together from the rows.
    """

    parts: tuple[str, ...] = PARTS
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    compile: bool = True
    seconds: float = 2.0
    quick: bool = False
    num_inference_steps: int = 10
    num_train_timesteps: int = 4

    def __post_init__(self) -> None:
        check_fields(
            self,
            batch_sizes=(1, 4096),
            seconds=(0.0, 3600.0),
            num_inference_steps=(1, 1000),
            num_train_timesteps=(1, self.num_inference_steps),
        )
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            raise ValueError(f"parts are {list(self.parts)}; expected some of {', '.join(PARTS)}")
        if not self.batch_sizes:
            raise ValueError("batch_sizes is empty; give one or more, such as (1, 4)")


def run_bench(subject: Subject, settings: BenchSettings | None = None, *, progress: bool = True) -> BenchReport:
    """Measures a subject.

    A row that does not fit into memory is left out, and named with the reason in the report.

    Args:
        subject: see `loaded_subject` and `random_subject`.
        settings: what is measured; everything by default.
        progress: show a progress bar.
    """
    settings = settings or BenchSettings()
    machine = measure_machine(subject.device, subject.dtype, max(settings.seconds / 2, 0.2))
    rows: list[Row] = []
    failed: dict[str, str] = {}
    cases = list(_cases(subject, settings))
    with tqdm(cases, desc="bench", disable=not progress) as bar, without_new_lora(subject):
        for case in bar:
            bar.set_postfix_str(f"{case.what}, batch {case.batch}")
            try:
                rows.append(case.measure(machine, subject.device, settings.seconds, settings.quick))
            except torch.OutOfMemoryError as error:
                failed[case.name] = str(error).splitlines()[0]
                torch.cuda.empty_cache()
    return BenchReport(
        model=subject.name,
        weights=subject.weights,
        height=subject.height,
        width=subject.width,
        machine=machine,
        rows=tuple(rows),
        failed=failed,
        steps=settings.num_inference_steps,
        train_steps=settings.num_train_timesteps,
    )


def _cases(subject: Subject, settings: BenchSettings) -> Iterator[Case]:
    sizes = tuple(sorted(set(settings.batch_sizes)))
    if "score" in settings.parts:
        yield from score_cases(subject, sizes, compiled=settings.compile)
    if "pixels" in settings.parts:
        yield from pixel_cases(subject, sizes[: 1 if settings.quick else 2])
    if "training" in settings.parts:
        yield from training_cases(subject, sizes[:2])
    if "denoiser" in settings.parts:
        # Last: the gradient puts a LoRA into the generator.
        yield from denoiser_cases(subject, sizes[:2])
