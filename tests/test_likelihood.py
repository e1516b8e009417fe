from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dina_reward.likelihood import (
    PreferenceLoss,
    PreferenceLossName,
    ThurstoneModel,
    ensemble_level,
    log_ndtr,
    preference_model,
    thurstone_preference,
)


LOSSES = [name for name in get_args(PreferenceLossName) if name != "gaussian"]
EXTREME_MARGINS = torch.tensor([-1e4, -300.0, -40.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 40.0, 300.0, 1e4])

scores = st.floats(-50, 50, allow_nan=False, width=32)
levels = st.floats(0, 1, width=32)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("loss_thurstone", {}),
        ("loss_thurstone_constant", {"thurstone": ThurstoneModel(variance_scale=0.0, variance_offset=0.5)}),
        ("loss_bt", {"name": "bradley_terry"}),
        ("loss_bt_margin", {"name": "bradley_terry", "margin": 1.0}),
    ],
)
def test_reference_losses(parity_cases: dict[str, Tensor], name: str, arguments: dict[str, Any]) -> None:
    chosen, rejected = (parity_cases[f"loss_score_{side}"].flatten() for side in ("chosen", "rejected"))
    loss = PreferenceLoss(**arguments)(chosen, rejected, parity_cases["loss_sigma"])
    torch.testing.assert_close(loss, parity_cases[name].squeeze(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("level", "expected"), [(0.0, 0.316), (0.1, 0.374), (0.4, 0.860), (0.7, 1.435), (1.0, 2.025)])
def test_denominator_of_the_published_model(level: float, expected: float) -> None:
    z = ThurstoneModel().standardized_margin(torch.ones(1), torch.zeros(1), torch.tensor([level]))
    assert 1 / z.item() == pytest.approx(expected, abs=6e-4)


def test_probability_numbers() -> None:
    thurstone = ThurstoneModel(variance_scale=0.0, variance_offset=0.5)
    probability = thurstone.probability(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor(0.3))
    torch.testing.assert_close(probability, torch.tensor([0.8413447, 0.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        thurstone_preference(torch.tensor([1.0]), torch.tensor(0.5)), probability[:1], atol=0, rtol=0
    )


@given(a=scores, b=scores, level=levels)
def test_probabilities_of_both_orders_sum_to_one(a: float, b: float, level: float) -> None:
    model, sigma = ThurstoneModel(), one(level)
    forward, backward = model.probability(one(a), one(b), sigma), model.probability(one(b), one(a), sigma)
    assert (forward + backward).item() == pytest.approx(1, abs=1e-12)
    assert 0 <= forward.item() <= 1


@given(margin=st.floats(0.01, 3), level=st.floats(0, 0.9))
def test_probability_grows_with_the_margin_and_shrinks_with_noise(margin: float, level: float) -> None:
    model = ThurstoneModel()
    base = model.probability(one(margin), one(0), one(level)).item()
    assert model.probability(one(2 * margin), one(0), one(level)).item() >= base > 0.5
    assert 0.5 < model.probability(one(margin), one(0), one(level + 0.1)).item() <= base


@given(a=scores, b=scores, level=levels, q=st.floats(0, 1))
@pytest.mark.parametrize("name", LOSSES)
def test_swapping_sides_and_label_changes_nothing(name: Any, a: float, b: float, level: float, q: float) -> None:
    loss = PreferenceLoss(name)
    first = loss(one(a), one(b), one(level), one(q))
    second = loss(one(b), one(a), one(level), one(1 - q))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


@given(a=scores, b=scores, level=levels)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_falls_when_the_chosen_score_rises(name: Any, a: float, b: float, level: float) -> None:
    loss = PreferenceLoss(name)
    assert loss(one(a + 1), one(b), one(level)).item() <= loss(one(a), one(b), one(level)).item() + 1e-12


@given(q=st.floats(0.05, 0.95), level=levels)
@settings(max_examples=30)
@pytest.mark.parametrize("name", LOSSES)
def test_soft_targets_are_met_at_the_minimum(name: Any, q: float, level: float) -> None:
    loss = PreferenceLoss(name)
    margins = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    sigma, zeros = torch.full_like(margins, level), torch.zeros_like(margins)
    best = margins[loss.per_pair(margins, zeros, sigma, torch.full_like(margins, q)).argmin()]
    assert loss.probability(best[None], zeros[:1], sigma[:1]).item() == pytest.approx(q, abs=2e-3)


@given(pi=st.floats(0.1, 0.9), level=levels)
@settings(max_examples=30)
@pytest.mark.parametrize("name", LOSSES)
def test_single_votes_make_fidelity_too_sure_and_no_other_loss(name: Any, pi: float, level: float) -> None:
    loss = PreferenceLoss(name)
    margins = torch.linspace(-12, 12, 30001, dtype=torch.float64)
    sigma, zeros = torch.full_like(margins, level), torch.zeros_like(margins)
    votes = [loss.per_pair(margins, zeros, sigma, torch.full_like(margins, vote)) for vote in (1, 0)]
    best = margins[(pi * votes[0] + (1 - pi) * votes[1]).argmin()]
    expected = pi**2 / (pi**2 + (1 - pi) ** 2) if name == "thurstone_fidelity" else pi
    assert loss.probability(best[None], zeros[:1], sigma[:1]).item() == pytest.approx(expected, abs=3e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_ties_pull_the_scores_together(name: Any) -> None:
    chosen = torch.tensor([2.0], requires_grad=True)
    PreferenceLoss(name)(chosen, torch.zeros(1), torch.full((1,), 0.5), torch.tensor([0.5])).backward()
    assert chosen.grad is not None
    assert chosen.grad.item() > 0


def test_fidelity_limits() -> None:
    loss = PreferenceLoss()
    zeros = torch.zeros(1)
    assert loss(torch.tensor([1e4]), zeros, zeros).item() == pytest.approx(0, abs=1e-6)
    assert loss(torch.tensor([-1e4]), zeros, zeros).item() == pytest.approx(1 - 1e-3, abs=1e-6)
    assert loss(zeros, zeros, zeros).item() == pytest.approx(1 - math.sqrt(0.5 + 1e-6), abs=1e-6)


def test_nll_of_an_extreme_margin_is_its_asymptote() -> None:
    loss = PreferenceLoss("thurstone_nll", ThurstoneModel(0.0, 0.5))
    z = 1e4 / math.sqrt(1 + 1e-6)
    expected = z**2 / 2 + math.log(z * math.sqrt(2 * math.pi))
    assert loss(torch.tensor([-1e4]), torch.zeros(1), torch.zeros(1)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_extreme_margins_have_the_gradients_of_float64(name: Any, target: float, level: float) -> None:
    loss = PreferenceLoss(name)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        chosen = EXTREME_MARGINS.to(dtype).requires_grad_()
        sigma, q = torch.full_like(chosen, level), torch.full_like(chosen, target)
        losses = loss.per_pair(chosen, torch.zeros_like(chosen), sigma, q)
        assert bool(losses.isfinite().all())
        (gradient,) = torch.autograd.grad(losses.sum(), chosen)
        assert bool(gradient.isfinite().all())
        gradients.append(gradient.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-4, atol=1e-6)


def test_log_ndtr_gradient_far_out_in_float32() -> None:
    z = torch.tensor([-1e5, -3.2e4, -1e4, -50.0, 0.0, 50.0], requires_grad=True)
    log_ndtr(z).sum().backward()
    expected = torch.tensor([1e5, 3.2e4, 1e4, 50.02, math.sqrt(2 / math.pi), 0.0])
    torch.testing.assert_close(z.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (3 * torch.randn(2, 8, generator=generator, dtype=torch.float64)).requires_grad_()
    sigma, target = torch.rand(2, 8, generator=generator, dtype=torch.float64)
    target[0], target[1] = 0.0, 1.0
    loss = PreferenceLoss(name)
    assert torch.autograd.gradcheck(lambda a, b: loss.per_pair(a, b, sigma, target), (chosen, rejected))


def test_gradcheck_of_log_ndtr() -> None:
    z = torch.tensor([-30.0, -3.0, -0.1, 0.0, 1.5, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_ndtr, (z,))
    assert torch.autograd.gradgradcheck(log_ndtr, (z,))


def test_weights_multiply() -> None:
    chosen, rejected, sigma = torch.tensor([1.0, -1.0]), torch.zeros(2), torch.tensor([0.2, 0.8])
    loss = PreferenceLoss("thurstone_nll")
    first, second = loss.per_pair(chosen, rejected, sigma)
    assert loss(chosen, rejected, sigma, weight=torch.tensor([0.0, 3.0])).item() == pytest.approx(
        3 * second.item() / 2
    )
    assert loss(chosen, rejected, sigma).item() == pytest.approx((first + second).item() / 2)


def test_half_precision_scores_are_compared_in_float32() -> None:
    chosen = torch.tensor([1.0], dtype=torch.bfloat16)
    losses = PreferenceLoss().per_pair(chosen, torch.zeros_like(chosen), torch.tensor([0.4]))
    assert losses.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreferenceLoss("hinge"), "unknown preference loss 'hinge'; choose one of thurstone_fidelity"),  # type: ignore[arg-type]
        (lambda: PreferenceLoss(thurstone=2.0), "thurstone must be a ThurstoneModel, got 2.0"),  # type: ignore[arg-type]
        (lambda: PreferenceLoss(margin=1.0), "belongs to the loss 'bradley_terry'"),
        (lambda: PreferenceLoss("bradley_terry", margin=-1.0), "must not be negative"),
        (lambda: ThurstoneModel(variance_scale=-1.0), "variance_scale >= 0"),
        (lambda: ThurstoneModel(variance_offset=0.0), "variance_offset > 0"),
        (lambda: PreferenceLoss()(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3)), r"got \(3, 1\) and \(3,\)"),
        (lambda: PreferenceLoss()(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3)), r"got \(3, 1\) and \(3, 1\)"),
        (
            lambda: PreferenceLoss()(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.ones(2)),
            r"target must have one value per pair, shape \(3,\), got \(2,\)",
        ),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_preference_model_is_chosen_by_name() -> None:
    a, b, level = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 0.0]), torch.tensor(0.4)
    thurstone = preference_model("thurstone", 1.0, 0.1)
    assert thurstone == ThurstoneModel(1.0, 0.1)
    bradley_terry = preference_model("bradley_terry", 1.0, 0.1)
    assert bradley_terry.likelihood == "bradley_terry"
    expected = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))]
    assert bradley_terry.probability(a, b, level).tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(
        bradley_terry.probability(a, b, torch.tensor(0.9)), bradley_terry.probability(a, b, level)
    )
    with pytest.raises(ValueError, match="unknown likelihood 'probit'; choose one of thurstone, bradley_terry"):
        preference_model("probit")  # type: ignore[arg-type]


def test_the_level_of_an_ensemble_has_the_mean_variance() -> None:
    levels, model = torch.tensor([0.2, 0.5, 0.7]), ThurstoneModel()
    torch.testing.assert_close(model.variance(ensemble_level(levels)), model.variance(levels).mean())
    assert ensemble_level(torch.tensor([0.3])).item() == pytest.approx(0.3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_names_the_likelihood_that_it_fits(name: PreferenceLossName) -> None:
    loss = PreferenceLoss(name)
    assert loss.likelihood == name.removesuffix("_fidelity").removesuffix("_nll")
    arguments = torch.tensor([0.7]), torch.tensor([0.2]), torch.tensor([0.5])
    assert torch.equal(loss.probability(*arguments), preference_model(loss.likelihood).probability(*arguments))


@pytest.mark.parametrize(
    ("target", "expected"),
    [(1.0, math.log1p(math.exp(-0.5))), (0.5, math.log1p(math.exp(-0.5)) + 0.25), (0.25, 0.849077)],
)
def test_bradley_terry_with_soft_labels_by_hand(target: float, expected: float) -> None:
    loss = PreferenceLoss("bradley_terry").per_pair(
        torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.4]), torch.tensor([target])
    )
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_bradley_terry_asks_each_side_for_the_margin() -> None:
    loss = PreferenceLoss("bradley_terry", margin=1.0)
    scores = torch.tensor([2.0]), torch.tensor([0.5])
    found = loss.per_pair(*scores, torch.tensor([0.4]), torch.tensor([0.25]))
    expected = 0.25 * math.log1p(math.exp(1 - 1.5)) + 0.75 * math.log1p(math.exp(1 + 1.5))
    assert found.item() == pytest.approx(expected)


def test_regression_has_the_variance_of_the_preferences():
    loss = PreferenceLoss("gaussian", ThurstoneModel(2.0, 0.05))
    chosen, rejected, level = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.0]), torch.tensor([0.4, 0.0])
    judged = torch.tensor([[2.0, 0.0], [0.5, -1.0]])
    found = loss.per_pair(chosen, rejected, level, judged=judged)
    torch.testing.assert_close(found, torch.tensor([1 / (2 * 0.37), 1 / (2 * 0.05)]), atol=0, rtol=1e-4)
    weighted = loss(chosen, rejected, level, weight=torch.tensor([1.0, 0.0]), judged=judged)
    torch.testing.assert_close(weighted, found[0] / 2)
    assert loss.likelihood == "thurstone"
    assert loss.of_preferences().name == "thurstone_nll"
    assert PreferenceLoss().of_preferences() == PreferenceLoss()
    with pytest.raises(
        ValueError, match="needs a judge's scores of both sides of every pair, shape \\(2, 2\\), got none"
    ):
        loss(chosen, rejected, level)


def test_the_margin_is_divided_by_what_the_formula_says() -> None:
    # sqrt(2 x 1e-6 + 1e-6): with so small a variance the last term counts.
    z = ThurstoneModel(0.0, 1e-6).standardized_margin(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.5]))
    assert float(z) == pytest.approx(1 / math.sqrt(3e-6), rel=1e-6)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (
            "noise_level",
            torch.tensor([0.4, 0.4]),
            r"noise_level must have one value per pair, shape \(3,\), got \(2,\)",
        ),
        ("noise_level", torch.full((3,), 1.5), r"noise_level must be finite and lie in \[0, 1\], got 1.5 at \[0\]"),
        ("noise_level", None, "noise_level must be a torch.Tensor, got NoneType"),
        ("target", torch.tensor([1.0, math.nan, 1.0]), r"target must be finite and lie in \[0, 1\], got nan at \[1\]"),
        ("target", torch.ones(3, dtype=torch.bool), "target must be real numbers, got torch.bool"),
        ("weight", torch.tensor([1.0, 1.0, -1.0]), r"weight must be finite and lie in \[0, inf\], got -1 at \[2\]"),
        ("weight", torch.tensor([1.0]), r"weight must have one value per pair, shape \(3,\), got \(1,\)"),
        ("score_chosen", torch.full((3,), math.inf), "scores must be finite, got inf"),
        ("score_chosen", torch.ones(1), r"both have shape \(pairs,\), got \(1,\) and \(3,\)"),
    ],
)
@pytest.mark.parametrize("name", get_args(PreferenceLossName)[:3])
def test_wrong_tensors_are_refused(name: PreferenceLossName, argument: str, value: Any, message: str) -> None:
    right = {"score_chosen": torch.ones(3), "score_rejected": torch.zeros(3), "noise_level": torch.tensor(0.4)}
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(name)(**{**right, argument: value})


def test_a_variance_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"both finite in float32 \(at most 1e\+30\)"):
        ThurstoneModel(variance_offset=1e39)
