"""Rows: FLOPs are counted, cost grows as it should, and nothing is left behind in the generator."""

from __future__ import annotations

import pytest
import torch

from dina_reward.backbones.cards import count_flops
from dina_reward.bench import BenchReport, BenchSettings, Subject, run_bench
from dina_reward.bench.rows import CALL, DECODE, GRADIENT, SCORE, TRAIN, Row, counted_flops


@pytest.fixture(scope="module")
def report(subject: Subject) -> BenchReport:
    parts = ("score", "training", "denoiser")
    settings = BenchSettings(parts=parts, batch_sizes=(1, 2), compile=False, seconds=0.0, num_train_timesteps=2)
    return run_bench(subject, settings, progress=False)


def only(report: BenchReport, what: str, mode: str = "", batch: int = 1, levels: int = 1) -> Row:
    (row,) = [r for r in report.rows if (r.what, r.mode, r.batch, r.levels) == (what, mode, batch, levels)]
    return row


def test_products_of_a_backward_pass_are_counted() -> None:
    weight, inputs = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7)
    assert counted_flops(lambda: inputs @ weight.T) == 2 * 3 * 5 * 7
    assert counted_flops(lambda: (inputs @ weight.T).sum().backward()) == 2 * (2 * 3 * 5 * 7)


def test_every_row_is_there_once(report: BenchReport) -> None:
    scores = [
        (SCORE, mode, levels, batch) for mode in ("standalone", "shared") for levels in (1, 3) for batch in (1, 2)
    ]
    others = [
        (what, mode, 1, batch)
        for what, mode in ((TRAIN, "standalone"), (CALL, ""), (GRADIENT, ""))
        for batch in (1, 2)
    ]
    assert [(r.what, r.mode, r.levels, r.batch) for r in report.rows] == scores + others
    assert not report.failed


def test_flops_of_a_score_are_those_of_the_reward_on_its_own(report: BenchReport, subject: Subject) -> None:
    reward, latents, text = subject.reward(False), subject.latents(1), subject.conditioning(1)
    alone = count_flops(lambda: reward.model(latents, torch.tensor([400.0]), text))
    assert only(report, SCORE, "standalone").flops == alone
    assert only(report, SCORE, "shared").flops > alone  # its LoRA is not merged


def test_flops_are_linear_in_samples_and_a_gradient_costs_more_than_a_call(report: BenchReport) -> None:
    for what, mode in ((SCORE, "standalone"), (CALL, ""), (TRAIN, "standalone")):
        assert only(report, what, mode, batch=2).flops == 2 * only(report, what, mode, batch=1).flops
    assert 1.9 < only(report, GRADIENT).flops / only(report, CALL).flops < 4
    assert 2.9 < only(report, SCORE, "standalone", levels=3).flops / only(report, SCORE, "standalone").flops < 4


def test_rates_are_shares_of_the_roofs(report: BenchReport) -> None:
    for row in report.rows:
        assert row.samples_per_second == pytest.approx(row.batch / row.seconds)
        assert row.rate_share == pytest.approx(row.flops / row.seconds / report.machine.matrix_rate)
        assert row.roof_share >= row.rate_share > 0
        assert row.peak_memory > 0


def test_the_generator_is_left_as_it_was(report: BenchReport, subject: Subject) -> None:
    assert not getattr(subject.denoiser, "peft_config", None)
    assert not any("lora" in name for name, _ in subject.denoiser.named_parameters())


def test_pixels_are_decoded_and_looked_at(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 56,
    }
    monkeypatch.setattr("dina_reward.bench.rows.TOWER", small)
    settings = BenchSettings(parts=("pixels",), batch_sizes=(1, 2), seconds=0.0, quick=True)
    rows = run_bench(subject, settings, progress=False).rows
    assert [(row.what, row.batch) for row in rows] == [(DECODE, 1), ("CLIP-H image tower", 1)]
    patches, width = (224 // 56) ** 2, 16
    products = (patches + 1) * (4 * width * width + 2 * width * width) + 2 * (patches + 1) ** 2 * width
    assert rows[1].flops == 2 * (products + patches * 3 * 56 * 56 * width)


def test_a_row_without_memory_is_named_and_the_others_go_on(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Subject, share_backbone: bool) -> None:
        raise torch.OutOfMemoryError("no memory left\nand more")

    monkeypatch.setattr(Subject, "reward", fail)
    settings = BenchSettings(parts=("score", "denoiser"), batch_sizes=(1,), compile=False, seconds=0.0)
    report = run_bench(subject, settings, progress=False)
    assert report.failed[f"{SCORE}, standalone, batch 1"] == "no memory left"
    assert [row.what for row in report.rows] == [CALL, GRADIENT]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("scores",)}, r"parts are \['scores'\]; expected some of score, pixels"),
        ({"batch_sizes": (0,)}, "batch_sizes must lie in"),
        ({"batch_sizes": ()}, "batch_sizes is empty"),
        ({"num_train_timesteps": 11}, "num_train_timesteps must lie in"),
        ({"seconds": float("nan")}, "seconds must be finite float"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchSettings(**settings)  # type: ignore[arg-type]
