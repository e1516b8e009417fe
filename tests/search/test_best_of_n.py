"""Best of N and successive halving: what is chosen, what it costs, when it stops."""

from __future__ import annotations

import pytest
import torch

from dina_reward.search import BestOfN, Halving
from tests.search.helpers import gaussian_run


def test_the_best_of_n_is_the_best_of_n() -> None:
    run = gaussian_run(prompts=3, budget=6)
    particles, scores = BestOfN().run(run)
    (check,) = run.trace
    table = check.scores.view(3, 6)
    assert torch.equal(scores, table.max(dim=1).values)
    torch.testing.assert_close(particles.latents.flatten(), scores)
    assert particles.prompt == [0, 1, 2]
    assert run.generator.calls.rollout == 3 * 6 * 5
    assert run.generator.calls.reward == 3 * 6
    assert [row % 6 for row in check.kept] == table.argmax(dim=1).tolist()


def test_keep_returns_the_best_first_and_more_than_there_are_is_refused() -> None:
    run = gaussian_run(prompts=2, budget=5, keep=2)
    particles, scores = BestOfN().run(run)
    assert torch.equal(scores.view(2, 2), run.trace[0].scores.view(2, 5).topk(2, dim=1).values)
    assert particles.prompt == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="best_of_n ends with 2 samples per prompt at this budget, but keep is 3"):
        BestOfN().run(gaussian_run(budget=2.5, keep=3))


def test_rounds_draw_the_same_samples_and_stop_at_a_threshold() -> None:
    whole, parts = gaussian_run(prompts=3, budget=7), gaussian_run(prompts=3, budget=7)
    _, at_once = BestOfN().run(whole)
    _, in_rounds = BestOfN(round_size=2).run(parts)
    assert torch.equal(at_once, in_rounds)
    assert [len(check.prompt) for check in parts.trace] == [6, 6, 6, 3]
    stopped = gaussian_run(prompts=3, budget=7)
    _, scores = BestOfN(round_size=1, threshold=0.2).run(stopped)
    table = whole.trace[0].scores.view(3, 7)
    needed = [next((i for i, value in enumerate(row) if value >= 0.2), 6) + 1 for row in table.tolist()]
    assert stopped.generator.calls.rollout == 5 * sum(needed) < 5 * 21
    assert all(
        score == max(row[:count]) for score, row, count in zip(scores.tolist(), table.tolist(), needed, strict=True)
    )


def test_stops_when_the_margin_is_beyond_the_uncertainty_of_the_reward() -> None:
    run = gaussian_run(prompts=4, budget=6)
    run.judge.is_calibrated = True  # type: ignore[misc]
    BestOfN(round_size=2, confidence=0.8).run(run)
    table = run.trace[0].scores.view(4, 2).sort(dim=1).values
    sure = torch.special.ndtr(table[:, 1] - table[:, 0]) >= 0.8
    assert 0 < int(sure.sum()) < 4
    assert set(run.trace[1].prompt) == {number for number in range(4) if not sure[number]}
    with pytest.raises(
        ValueError, match="confidence stops by the reward's own uncertainty, which only a LatentReward"
    ):
        BestOfN(confidence=0.8).run(gaussian_run())


def test_costs_of_halving_by_hand() -> None:
    # 10 steps, checks after 4 and 6: 8 * 4 + 4 * 2 + 2 * 4 = 48 calls for eight candidates.
    assert Halving().cost(8, steps=10) == 48
    assert Halving().cost(8, steps=10, keep=3) == 8 * 4 + 4 * 2 + 3 * 4
    # A reward that needs predictions asks for those of all rows; the survivors' are their next step.
    assert Halving().cost(8, steps=10, lookahead=1) == 48 + 4 + 2
    assert Halving(checks=(0.5,), survivors=0.25).cost(5, steps=10) == 5 * 5 + 2 * 5
    assert Halving(checks=(0.01, 0.99)).cost(4, steps=2) == 4 + 2


def test_halving_spends_the_budget_and_keeps_the_best_states() -> None:
    run = gaussian_run(prompts=2, budget=4)
    particles, scores = Halving(checks=(0.4, 0.6)).run(run)
    first, second, last = run.trace
    # 5 steps: N * 2 + ceil(N / 2) + ceil(N / 4) * 2 <= 20
    assert [len(check.prompt) // 2 for check in run.trace] == [6, 3, 2]
    assert run.generator.calls.rollout == 2 * (6 * 2 + 3 + 2 * 2) == 2 * Halving(checks=(0.4, 0.6)).cost(6, 5)
    assert run.generator.calls.reward == 2 * (6 + 3 + 2)
    for number in range(2):
        kept = first.scores[[row for row in first.kept if first.prompt[row] == number]]
        assert torch.equal(kept, first.scores.view(2, 6)[number].topk(3).values)
    assert second.parent == [first.first + row for row in first.kept]
    assert last.parent == [second.first + row for row in second.kept]
    # The analytic state score orders samples as their ends do, so nothing is lost.
    everything = gaussian_run(prompts=2, budget=6)
    BestOfN().run(everything)
    torch.testing.assert_close(scores, everything.trace[0].scores.view(2, 6).max(dim=1).values)
    torch.testing.assert_close(particles.latents.flatten(), scores)


def test_fewer_candidates_than_the_budget_pays_for_and_more() -> None:
    run = gaussian_run(budget=8, steps=10)
    Halving(candidates=8).run(run)
    assert run.generator.calls.rollout == 48
    message = "16 candidates take the denoiser calls of 9.6 samples, and the budget is 8, which pays for 1[0-9]"
    with pytest.raises(ValueError, match=message):
        Halving(candidates=16).run(gaussian_run(budget=8, steps=10))


def test_settled_prompts_give_up_all_but_the_best() -> None:
    run = gaussian_run(prompts=3, budget=4)
    Halving(checks=(0.4, 0.6), threshold=0.5).run(run)
    first = run.trace[0]
    best = first.scores.view(3, -1).max(dim=1).values
    left = [run.trace[1].prompt.count(number) for number in range(3)]
    assert left == [1 if score >= 0.5 else 3 for score in best.tolist()]
    assert set(left) == {1, 3}


@pytest.mark.parametrize("size", [1, 3, 7])
def test_results_do_not_depend_on_the_batch_size(size: int) -> None:
    runs = [gaussian_run(prompts=2, budget=4, batch_size=batch) for batch in (10_000, size)]
    results = [Halving(checks=(0.4, 0.6)).run(run) for run in runs]
    assert torch.equal(results[0][0].latents, results[1][0].latents)
    assert runs[0].generator.calls == runs[1].generator.calls


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checks": ()}, "checks is empty"),
        ({"checks": (0.5, 1.5)}, r"checks must lie in \[0, 1\]"),
        ({"survivors": 1.0}, "survivors must lie strictly between 0 and 1"),
        ({"candidates": 0}, "candidates must lie in"),
        ({"threshold": "high"}, "threshold must be"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Halving(**settings)  # type: ignore[arg-type]
