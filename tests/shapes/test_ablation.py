"""The runs of the ablation: their pairs, their labels, and one of them with hardly any training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dina_reward.shapes import ablation
from dina_reward.shapes.preferences import SOURCES, PreferencePairs


def test_degraded_latents_and_negligible_gaps_are_left_out_and_labels_are_single_votes() -> None:
    source = torch.tensor([SOURCES.index(kind) for kind in ("render", "degraded", "ode", "perturbed", "sde")])
    pairs = PreferencePairs(
        latents=torch.zeros(5, 8, 8, 8),
        chosen=torch.tensor([0, 1, 2, 4, 4]),
        rejected=torch.tensor([2, 0, 3, 4, 0]),
        scenes=torch.zeros(5, 4, dtype=torch.long),
        gap=torch.tensor([0.2, 0.3, 0.4, -0.5, 0.05]),
        source=source,
    )
    kept = ablation.informative(pairs)
    assert kept.gap.tolist() == pytest.approx([0.2, -0.5])
    votes = ablation.SingleVotes(kept)
    assert len(votes) == 2
    assert [row["p_chosen"] for row in votes] == [1.0, 1.0]  # the second labeller was wrong, and his vote stands
    assert kept[1]["p_chosen"] < 1e-6


@pytest.mark.slow
def test_one_run_ends_with_all_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"TRAIN_POOL": 64, "TEST_POOL": 16, "TRAIN_PAIRS": 600, "TEST_PAIRS": 240}.items():
        monkeypatch.setattr(ablation, name, size)
    ablation.make_pairs(tmp_path / "pairs")
    ablation.run_variant("frozen", 0, tmp_path, steps=2, iterations=1)
    written = json.loads((tmp_path / "frozen" / "seed-0" / ablation.RESULT_NAME).read_text())
    assert list(written["levels"]) == [f"{level:g}" for level in ablation.LEVELS]
    assert written["ensembles"]["tokens"]["1"] == written["levels"]["0.4"]
    assert written["pairs"] > 20
    assert written["fitted"]["variance_offset"] > 0
    assert list(written["fitted"]["ece"]) == list(written["levels"])
    assert all(value > 0 for value in written["score_std"].values())
    assert 0 <= written["alignment"]["fit"][1] <= 1
    assert len(written["alignment"]["reward"]) == 2
