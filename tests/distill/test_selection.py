from __future__ import annotations

import torch

from dina_reward.distill.selection import informativeness, select
from dina_reward.likelihood import BradleyTerryModel


CANDIDATES = [list(range(0, 6)), list(range(6, 12))]


def test_doubt_is_informative():
    p, spread = torch.tensor([0.5, 0.9, 0.999, 0.9]), torch.tensor([0.0, 0.0, 0.0, 2.0])
    worth = informativeness(p, spread)
    assert worth[0] == 1
    assert worth[0] > worth[1] > worth[2]
    torch.testing.assert_close(worth[3] - worth[1], torch.tensor(0.5, dtype=torch.float64))
    assert torch.isfinite(informativeness(torch.tensor([0.0, 1.0]), torch.zeros(2))).all()


def test_close_scores_are_judged_first():
    scores = torch.tensor([0.0, 5.0, 9.0, 9.01, -7.0, 20.0, 1.0, 1.0, 4.0, 8.0, 12.0, 16.0])
    for model in (None, BradleyTerryModel()):
        chosen = select(CANDIDATES, scores, torch.zeros(12), group_size=2, exploration=0, seed=0, model=model)
        assert chosen.groups == [[2, 3], [6, 7]]
        assert chosen.pairs == [(6, 7), (2, 3)] or chosen.pairs == [(2, 3), (6, 7)]


def test_noisy_scores_are_judged_before_sure_ones():
    scores, spreads = torch.tensor([0.0, 9.0, 18.0, 27.0]), torch.tensor([0.0, 0.0, 0.3, 0.3])
    chosen = select([[0, 1, 2, 3]], scores, spreads, group_size=2, exploration=0, seed=0)
    assert chosen.groups == [[2, 3]]


def test_all_prompts_come_before_a_second_pair_of_one():
    chosen = select(CANDIDATES, torch.arange(12.0), torch.zeros(12), group_size=3, exploration=0, seed=0)
    assert len(chosen.pairs) == 6
    assert [pair[0] < 6 for pair in chosen.pairs] == [True, False] * 3
    assert chosen.samples == [sample for group in chosen.groups for sample in group]


def test_exploration_draws_at_random_by_seed():
    scores = torch.arange(12.0)
    drawn = [select(CANDIDATES, scores, torch.zeros(12), group_size=3, exploration=1, seed=s) for s in range(4)]
    blind = [select(CANDIDATES, None, None, group_size=3, exploration=0, seed=s) for s in range(4)]
    assert len({str(chosen.groups) for chosen in drawn}) > 1
    assert [chosen.groups for chosen in drawn] == [chosen.groups for chosen in blind]
    again = select(CANDIDATES, None, None, group_size=3, exploration=0, seed=0)
    assert again == blind[0]
    assert all(len(group) == 3 for group in again.groups)
