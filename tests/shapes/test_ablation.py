"""The runs of the ablation: their pairs, their labels, and one of them with hardly any training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from dina_reward.evaluation import DrawMargins
from dina_reward.likelihood import ThurstoneModel
from dina_reward.shapes import ablation
from dina_reward.shapes.preferences import LABEL_NOISE, SOURCES, PreferencePairs


def made_pairs() -> PreferencePairs:
    """Pairs of five latents, one of each source but the last: a right vote, and errors."""
    kinds = ("render", "degraded", "ode", "perturbed", "sde")
    return PreferencePairs(
        latents=torch.zeros(5, 8, 8, 8),
        chosen=torch.tensor([0, 1, 2, 4, 4]),
        rejected=torch.tensor([2, 0, 3, 4, 0]),
        scenes=torch.tensor([[0, 0, 0, 0]] * 2 + [[1, 0, 0, 0]] * 3),
        gap=torch.tensor([0.2, 0.3, 0.4, -0.5, 0.05]),
        source=torch.tensor([SOURCES.index(kind) for kind in kinds]),
        indices=torch.zeros(5, 4, dtype=torch.long),
        cleanness=torch.tensor([1.0, 0.8, 0.5, 1.0, 0.9]),
    )


def test_degraded_latents_and_negligible_gaps_are_left_out_and_labels_are_single_votes() -> None:
    kept = ablation.informative(made_pairs())
    assert kept.gap.tolist() == pytest.approx([0.2, -0.5])
    votes = ablation.LabelledRows(kept)
    assert len(votes) == 2
    assert [row["p_chosen"] for row in votes] == [1.0, 1.0]  # the second labeller was wrong, and his vote stands
    assert kept[1]["p_chosen"] < 1e-6


def test_an_uneven_labeller_errs_more_where_there_is_less_to_see() -> None:
    # Small, less clean latent .5; small, .8; large, .5; large, .9; large, .9.
    factors = [2 * 2, 2 * 1.4, 2, 1.2, 1.2]
    deviation = ablation.uneven_deviation(made_pairs())
    assert deviation.tolist() == pytest.approx([LABEL_NOISE * factor for factor in factors])
    assert ablation.even_deviation(made_pairs()).tolist() == pytest.approx([LABEL_NOISE] * 5)
    rows = ablation.LabelledRows(made_pairs(), deviation)
    assert rows[0]["p_chosen"] == pytest.approx(NormalDist().cdf(0.2 / (4 * LABEL_NOISE)), abs=1e-5)


def test_new_votes_are_right_as_often_as_they_should_be() -> None:
    many = replace(
        made_pairs(),
        chosen=torch.tensor([0, 2]).repeat_interleave(4000),
        rejected=torch.tensor([2, 0]).repeat_interleave(4000),
        scenes=torch.zeros(8000, 4, dtype=torch.long),
        gap=torch.tensor([0.1, -0.1]).repeat_interleave(4000),
    )
    voted = ablation.vote_again(many, torch.full((8000,), 0.2), seed=1)
    assert float((voted.gap > 0).float().mean()) == pytest.approx(NormalDist().cdf(0.5), abs=0.02)
    assert set(voted.chosen[voted.gap > 0].tolist()) == {0}
    assert set(voted.rejected[voted.gap < 0].tolist()) == {0}
    assert torch.equal(voted.gap, ablation.vote_again(many, torch.full((8000,), 0.2), seed=1).gap)


def test_ensembles_by_hand() -> None:
    margins = torch.tensor([[[1.0, 2.0, 6.0]] * 7, [[-1.0, 4.0, 3.0]] * 7])
    tokens = {(levels, shared): torch.ones(2, 3) for levels in ablation.TOKEN_ENSEMBLES for shared in (True, False)}
    made = DrawMargins(ablation.LEVELS, margins, tokens, torch.ones(2), ["p", "q"], ThurstoneModel())
    found = ablation._ensembles(made)
    assert found["3 draws"][1].tolist() == [[3.0], [2.0]]
    assert found["(0.1, 0.4, 0.7), shared noise, mean"][1].tolist() == margins[:, 0].tolist()
    assert found["(0.1, 0.4, 0.7), own noise, mean"][1].tolist() == [[3.0] * 3, [2.0] * 3]
    assert len(found) == 2 + 2 + 4
    # Two of three draws of the second pair are right, and all of the first one's.
    figures = ablation._figures(ThurstoneModel(), margins[:, 0], made.labels, (0.4,))
    assert figures["accuracy"] == pytest.approx(5 / 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "uneven_fixed"])
def test_one_run_ends_with_all_its_figures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, size in {"TRAIN_POOL": 64, "TEST_POOL": 16, "TRAIN_PAIRS": 600, "TEST_PAIRS": 240}.items():
        monkeypatch.setattr(ablation, setting, size)
    ablation.make_pairs(tmp_path / "pairs")
    ablation.run_variant(name, 0, tmp_path, steps=2, iterations=1)
    written = json.loads((tmp_path / name / "seed-0" / ablation.RESULT_NAME).read_text())
    assert list(written["levels"]) == [f"{level:g}" for level in ablation.LEVELS]
    assert list(written["noise_share"]) == list(written["levels"])
    assert written["noise_share"]["0"] == pytest.approx(0, abs=1e-6)
    assert 0 < written["noise_share"]["0.4"] < written["noise_share"]["0.8"] < 1
    assert len(written["ensembles"]) == 8
    assert written["pairs"] > 20
    if written["fitted"] is not None:  # scores after two steps may say nothing about the labels
        assert written["fitted"]["variance_offset"] > 0
        assert list(written["fitted"]["ece"]) == list(written["levels"])
    assert written["score_std"] > 0
    if name == "uneven_fixed":
        assert written["alignment"] is None
        return
    assert 0 <= written["alignment"]["fit"][1] <= 1
    assert len(written["alignment"]["reward"]) == 2
