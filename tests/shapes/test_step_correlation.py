"""Scores inside the sampler against how samples end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dina_reward.shapes.step_correlation import Groups, credit_signal, pearson, predictiveness, spearman, study


def test_correlations_are_taken_inside_groups() -> None:
    first = torch.tensor([1.0, 2.0, 3.0, 101.0, 102.0, 103.0, 5.0, 5.0, 5.0])
    second = torch.tensor([2.0, 4.0, 6.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0])
    for measure in (pearson, spearman):
        torch.testing.assert_close(
            measure(first, second, 3), torch.tensor([1.0, -1.0, torch.nan]).double(), equal_nan=True
        )


def test_ranks_of_equal_values_are_shared() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert float(spearman(torch.tensor([0.0, 7.0, 7.0, 9.0]), torch.arange(4.0), 4)) == pytest.approx(4.5 / 22.5**0.5)
    assert float(spearman(torch.arange(4.0).exp(), torch.arange(4.0), 4)) == pytest.approx(1.0)


def groups() -> Groups:
    """One group of three rows, window of steps 1 and 2, whose predicted clean latents are scored without error."""
    values = torch.tensor([[0.0, 1.0, 4.0], [0.0, -2.0, -1.0], [0.0, 3.0, 2.0]])
    noise = torch.tensor([[9.0, 1.0, 3.0, 8.0, 2.0], [1.0, 5.0, -7.0, 0.0, 1.0], [3.0, -4.0, 2.0, 6.0, 0.0]])
    reward = values[:, 2]
    return Groups(
        window=range(1, 3),
        state_scores=noise,
        clean_scores=torch.stack([values[:, 0], values[:, 0], values[:, 1], values[:, 2]], dim=1),
        final={"reward": reward, "quality": reward, "fit": -reward},
        ends={1: values[:, :1].expand(3, 4), 2: values[:, 1:2].expand(3, 4), 3: reward[:, None]},
    )


def test_effects_and_credits_by_hand() -> None:
    part = groups()
    for first, second in (part.effects(1), part.effects(2)):
        assert torch.equal(first, second)
    assert part.effects(1)[0].tolist() == [1.0, -2.0, 3.0]
    assert part.effects(2)[0].tolist() == [3.0, 1.0, -1.0]
    assert part.credits(1)["terminal"].tolist() == part.credits(2)["terminal"].tolist() == [4.0, -1.0, 2.0]
    assert part.credits(1)["state_gain"].tolist() == [2.0, -12.0, 6.0]
    assert part.credits(1)["clean_gain"].tolist() == [1.0, -2.0, 3.0]
    assert part.credits(1)["clean_baseline"].tolist() == [4.0, -1.0, 2.0]
    assert part.credits(2)["clean_gain"].tolist() == part.credits(2)["clean_baseline"].tolist() == [3.0, 1.0, -1.0]


def test_tables_of_a_perfect_value() -> None:
    signal = credit_signal([groups(), groups()], members=3)
    assert [row["step"] for row in signal] == [1, 2]
    for row in signal:
        assert row["clean_gain"] == pytest.approx([1.0, 0.0], abs=1e-6)
        assert row["ceiling"] == pytest.approx(1.0)
    assert signal[1]["terminal"][0] == pytest.approx(4 / (114 / 9 * 8) ** 0.5)
    rows = predictiveness([groups(), groups()], [1.0, 0.7, 0.4, 0.1, 0.0], members=3)
    assert [(row["scorer"], row["step"]) for row in rows[4:6]] == [("state", 4), ("clean", 0)]
    last = rows[-1]
    assert (last["level"], last["reward_pearson"][0], last["fit_spearman"][0]) == pytest.approx((0.1, 1.0, -1.0))


@pytest.mark.slow
def test_command_on_the_shipped_world(tmp_path: Path) -> None:
    report = study(tmp_path, prompts=2, members=3, continuations=2, seed=0)
    assert json.loads((tmp_path / "step_correlation.json").read_text()) == report
    assert (tmp_path / "step_correlation.png").stat().st_size > 10_000
    rows = {(row["scorer"], row["step"]): row for row in report["predictiveness"]}
    # Near the end the score of a state is nearly that of the sample.
    assert rows["clean", 9]["reward_pearson"][0] > 0.9
    assert [row["step"] for row in report["credit"]] == [0, 1, 2, 3, 4]
    table = (tmp_path / "step_correlation.md").read_text()
    assert table.count("\n| ") == 11 + 1 + 5
    with pytest.raises(ValueError, match="even number of continuations, got 3, 1"):
        study(tmp_path, prompts=1, members=3, continuations=1, seed=0)
