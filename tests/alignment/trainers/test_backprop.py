from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward.alignment.sampling.rollout import sample
from dina_reward.alignment.sampling.samplers import FlowSampler, build_sampler
from dina_reward.alignment.trainers.backprop import (
    GradientPlan,
    draft_plan,
    drtune_plan,
    refl_plan,
    reward_loss,
    sample_with_gradient,
)
from tests.tiny_models import tiny_sd3_pipeline, tiny_sd_pipeline


STEPS = 5
PLANS = {
    "refl": GradientPlan((3,), stop=3),
    "draft-1": draft_plan(STEPS, 1),
    "draft-3": draft_plan(STEPS, 3),
    "draft-all": draft_plan(STEPS, STEPS),
    "drtune": GradientPlan((0, 2), stop=3, detach_input=True),
}


class DoubleFlowSampler(FlowSampler):
    """The same formulas in float64, for finite differences."""

    def step(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        return latents + (self.levels[index + 1] - self.levels[index]).double() * prediction

    def predict_clean(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        return latents - self.levels[index].double() * prediction


def double_sampler() -> DoubleFlowSampler:
    return DoubleFlowSampler(torch.linspace(1, 0, STEPS + 1), torch.linspace(1000, 200, STEPS))


@cache
def ddim_sampler() -> Any:
    return build_sampler(tiny_sd_pipeline().scheduler, STEPS)


def toy_predict(weights: Tensor, sampler: Any) -> Any:
    """A model with two weights of its own for every step, nonlinear in latents and weights."""

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        scale, shift = weights[int((sampler.timesteps == timestep[0]).nonzero())]
        return torch.tanh(scale * latents) + shift * latents.cos()

    return predict


def toy_weights() -> Tensor:
    return 0.3 * torch.randn(STEPS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


def toy_latents(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def toy_reward(latents: Tensor) -> Tensor:
    return (latents.sin() - 0.1 * latents**2).flatten(1).sum(1)


def rewarded_by_definition(weights: Tensor, fixed: Tensor, plan: GradientPlan, sampler: Any) -> Tensor:
    """Reward where ``weights`` act at the gradient steps alone, on states of the fixed weights with `detach_input`."""
    predict, frozen = toy_predict(weights, sampler), toy_predict(fixed, sampler)
    latents = seen = toy_latents()
    for index in range(plan.stop + 1):
        timestep = sampler.timesteps[index].expand(3)
        model = predict if index in plan.steps else frozen
        prediction = model(seen if plan.detach_input else latents, timestep)
        if index == plan.stop:
            return toy_reward(sampler.predict_clean(index, latents, prediction)).mean()
        latents = sampler.step(index, latents, prediction)
        seen = sampler.step(index, seen, frozen(seen, timestep))
    raise AssertionError


@pytest.mark.parametrize("name", PLANS)
def test_gradient_equals_finite_differences(name: str) -> None:
    plan, sampler = PLANS[name], double_sampler()
    weights = toy_weights().requires_grad_()
    clean = sample_with_gradient(toy_predict(weights, sampler), toy_latents(), sampler, plan).latents
    value = toy_reward(clean).mean()
    fixed = toy_weights()
    torch.testing.assert_close(value, rewarded_by_definition(fixed, fixed, plan, sampler), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value, weights)
    for element in range(weights.numel()):
        step = torch.zeros(weights.numel(), dtype=torch.float64)
        step[element] = 1e-5
        upper, lower = (
            rewarded_by_definition(fixed + sign * step.view_as(fixed), fixed, plan, sampler) for sign in (1, -1)
        )
        assert float(gradient.flatten()[element]) == pytest.approx(float(upper - lower) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["flow", "ddim"])
def test_gradient_is_truncated_exactly(name: str, kind: str) -> None:
    plan, sampler = PLANS[name], double_sampler() if kind == "flow" else ddim_sampler()
    weights, calls = toy_weights().float().requires_grad_(), []
    model = toy_predict(weights, sampler)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        calls.append((torch.is_grad_enabled(), latents.requires_grad))
        return model(latents, timestep)

    clean = sample_with_gradient(predict, toy_latents().float(), sampler, plan).latents
    (gradient,) = torch.autograd.grad(toy_reward(clean).mean(), weights)
    assert [i for i in range(STEPS) if bool(gradient[i].abs().min() > 0)] == list(plan.steps)
    assert bool((gradient[[i for i in range(STEPS) if i not in plan.steps]] == 0).all())
    assert len(calls) == plan.stop + 1
    assert [i for i, (enabled, _) in enumerate(calls) if enabled] == list(plan.steps)
    later = [] if plan.detach_input else list(plan.steps[1:])
    assert [i for i, (_, attached) in enumerate(calls) if attached] == later


@pytest.mark.parametrize("pipeline", [tiny_sd3_pipeline, tiny_sd_pipeline])
def test_scored_latents_are_those_of_the_deterministic_rollout(pipeline: Any) -> None:
    sampler = build_sampler(pipeline().scheduler, STEPS)
    predict, initial = toy_predict(toy_weights().float(), sampler), toy_latents().float()
    final = sample(predict, initial, sampler).latents
    clean = sample_with_gradient(predict, initial, sampler, draft_plan(STEPS, 2)).latents
    last = final if isinstance(sampler, FlowSampler) else None
    if last is None:
        # DDIM ends at the level of the last grid point, its x0 prediction at 0.
        before = sample_with_gradient(predict, initial, sampler, draft_plan(STEPS, 1)).latents
        alpha = sampler.alphas_cumprod[-1]
        noise = (final - alpha.sqrt() * before) / (1 - alpha).sqrt()
        last = (final - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    torch.testing.assert_close(clean, last, rtol=1e-5, atol=1e-6)


def test_states_are_rounded_to_the_storage_dtype() -> None:
    sampler, seen = build_sampler(tiny_sd3_pipeline().scheduler, STEPS), []

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        seen.append(latents.dtype)
        return latents.float().tanh()

    sample_with_gradient(predict, toy_latents().bfloat16(), sampler, PLANS["draft-3"])
    assert seen == [torch.bfloat16] * STEPS


@pytest.mark.parametrize("name", PLANS)
def test_penalty_is_the_mean_squared_distance_with_states_held_constant(name: str) -> None:
    plan, sampler = PLANS[name], double_sampler()
    weights, other = toy_weights().requires_grad_(), toy_weights() + 0.2
    model, reference, visited = toy_predict(weights, sampler), toy_predict(other, sampler), {}

    def trained(latents: Tensor, timestep: Tensor) -> Tensor:
        visited[int((sampler.timesteps == timestep[0]).nonzero())] = latents.detach()
        return model(latents, timestep)

    penalty = sample_with_gradient(
        toy_predict(weights, sampler),
        toy_latents(),
        sampler,
        plan,
        trained_predict=trained,
        reference_predict=reference,
    ).penalty
    assert penalty is not None
    distances = [
        ((model(x, sampler.timesteps[i][None]) - reference(x, sampler.timesteps[i][None])) ** 2).flatten(1).mean(1)
        for i, x in visited.items()
    ]
    expected = torch.stack(distances).mean(0)
    torch.testing.assert_close(penalty, expected)
    gradients = [torch.autograd.grad(value.sum(), weights)[0] for value in (penalty, expected)]
    torch.testing.assert_close(*gradients)
    assert sorted(visited) == list(plan.steps)


def test_plans_stay_in_their_ranges_and_reach_everything() -> None:
    drawn = [refl_plan(0, generation, (30, 40)) for generation in range(200)]
    assert {plan.stop for plan in drawn} == set(range(30, 40))
    assert all(plan.steps == (plan.stop,) and not plan.detach_input for plan in drawn)
    assert drawn == [refl_plan(0, generation, (30, 40)) for generation in range(200)]
    assert drawn != [refl_plan(1, generation, (30, 40)) for generation in range(200)]
    assert draft_plan(10, 3) == GradientPlan((7, 8, 9), stop=9)
    tuned = [drtune_plan(0, generation, 3, (6, 10)) for generation in range(400)]
    assert {plan.stop for plan in tuned} == {6, 7, 8, 9}
    assert {step for plan in tuned for step in plan.steps} == set(range(10))
    for plan in tuned:
        gaps = {b - a for a, b in zip(plan.steps, plan.steps[1:], strict=False)}
        assert len(plan.steps) == 3
        assert plan.steps[-1] <= plan.stop
        assert gaps == {(plan.stop + 1) // 3}
        assert plan.detach_input


def test_reward_losses() -> None:
    rewards = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    assert float(reward_loss(rewards.detach(), "linear")) == pytest.approx(-2.5 / 3)
    assert float(reward_loss(rewards.detach(), "hinge", margin=1.0)) == pytest.approx(2.5 / 3)
    (gradient,) = torch.autograd.grad(reward_loss(rewards, "hinge", margin=1.0), rewards)
    torch.testing.assert_close(gradient, torch.tensor([-1 / 3, -1 / 3, 0.0]))
