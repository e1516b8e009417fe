from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dina_reward.alignment.objectives.policy_gradient import (
    ObjectiveSettings,
    check_objective_fits,
    get_objective,
    step_kl,
)
from dina_reward.alignment.sampling.steps import transition


SETTINGS = ObjectiveSettings(epsilon=0.1, epsilon_high=0.2)


def ppo(log_prob, advantages, settings=SETTINGS, old=0.0):
    log_prob = torch.tensor(log_prob, requires_grad=True)
    tensors = {
        "log_prob": log_prob,
        "old_log_prob": torch.full_like(log_prob, old).detach(),
        "advantages": torch.tensor(advantages),
    }
    output = get_objective("ppo_clip")(tensors, settings)
    output.loss.backward()
    return output, log_prob.grad


def test_on_policy_ppo_is_the_policy_gradient():
    output, gradient = ppo([0.0, 0.0], [1.0, -2.0])
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 1.0]))
    assert output.loss.item() == 0.5
    assert float(output.metrics["ratio/mean"]) == 1
    assert float(output.metrics["clip_frac"]) == 0


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.15, 1.0, True), (0.25, 1.0, False), (0.25, -1.0, True), (-0.15, 1.0, True), (-0.15, -1.0, False)],
)
def test_clip_stops_only_moves_that_went_far_enough(log_ratio, advantage, moves):
    output, gradient = ppo([log_ratio], [advantage])
    assert bool(gradient != 0) is moves
    assert float(output.metrics["approx_kl"]) == pytest.approx(log_ratio**2 / 2)


def test_clip_frac_counts_both_sides():
    output, _ = ppo([-0.2, 0.0, 0.15, 0.3], [1.0] * 4)
    assert float(output.metrics["clip_frac"]) == 0.5


def test_advantages_are_clamped():
    output, _ = ppo([0.0], [50.0])
    assert output.loss.item() == -5


def test_policy_gradient_objective():
    tensors = {"log_prob": torch.tensor([1.0, 3.0]), "advantages": torch.tensor([2.0, -1.0])}
    assert float(get_objective("policy_gradient")(tensors, SETTINGS).loss) == 0.5


def test_missing_tensors_and_unknown_names_are_named():
    with pytest.raises(ValueError, match="missing: old_log_prob, advantages"):
        get_objective("ppo_clip")({"log_prob": torch.zeros(2)}, SETTINGS)
    with pytest.raises(
        ValueError, match="unknown loss_type 'dpo'; choose one of grpo_guard, policy_gradient, ppo_clip"
    ):
        get_objective("dpo")


@pytest.mark.parametrize(("sde_type", "eta"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8)])
def test_step_kl_is_the_kl_of_the_step_distributions(sde_type, eta):
    latents, velocity, reference = torch.randn((3, 4, 2, 3, 3), generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor(0.8), torch.tensor(0.6)
    policy = transition(sde_type, latents, velocity, *sigmas, eta)
    other = transition(sde_type, latents, reference, *sigmas, eta)
    common = {
        "mean": policy.mean,
        "reference_mean": other.mean,
        "velocity": velocity,
        "reference_velocity": reference,
        "std": policy.std,
        "diffusion": policy.diffusion,
    }
    exact = kl_divergence(Normal(policy.mean, policy.std), Normal(other.mean, other.std)).flatten(1).mean(1)
    torch.testing.assert_close(step_kl("step", **common), exact)
    ratio = 1.0 if sde_type == "cps" else 0.2
    torch.testing.assert_close(step_kl("flow_grpo", **common), exact * ratio)
    torch.testing.assert_close(step_kl("velocity", **common), ((velocity - reference) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize("kind", ["step", "velocity", "flow_grpo"])
def test_gradient_flows_through_the_kl(kind):
    velocity = torch.randn(2, 3, requires_grad=True)
    kl = step_kl(
        kind,
        mean=velocity * 2,
        reference_mean=torch.zeros(2, 3),
        velocity=velocity,
        reference_velocity=torch.zeros(2, 3),
        std=torch.tensor(0.5),
        diffusion=torch.tensor(0.7),
    )
    kl.sum().backward()
    assert float(velocity.grad.abs().sum()) > 0


def test_unknown_kl_kind():
    with pytest.raises(ValueError, match="unknown kl_kind 'k3'"):
        step_kl(
            "k3",
            mean=torch.zeros(1, 1),
            reference_mean=torch.zeros(1, 1),
            velocity=torch.zeros(1, 1),
            reference_velocity=torch.zeros(1, 1),
            std=torch.ones(()),
            diffusion=torch.ones(()),
        )


def guard(log_ratio, shift, std=0.5, delta=0.1, advantages=(1.0,), settings=SETTINGS):
    log_prob = torch.tensor(log_ratio, requires_grad=True)
    tensors = {
        "log_prob": log_prob,
        "old_log_prob": torch.zeros_like(log_prob).detach(),
        "advantages": torch.tensor(advantages),
        "mean_shift": torch.tensor(shift),
        "std": torch.tensor(std),
        "delta": torch.tensor(delta),
    }
    output = get_objective("grpo_guard")(tensors, settings)
    output.loss.backward()
    return output, log_prob.grad


def test_guard_by_hand():
    output, gradient = guard([0.1], [0.02])
    ratio = torch.exp(torch.tensor((0.1 + 0.02 / (2 * 0.25)) * 0.5))
    torch.testing.assert_close(output.metrics["ratio/mean"], ratio)
    torch.testing.assert_close(output.loss.detach(), -ratio / 0.1)
    torch.testing.assert_close(gradient, -ratio[None] * 0.5 / 0.1)


def test_guard_centres_the_ratio_of_a_gaussian_step():
    # Under the sampling policy the plain log-ratio has mean -b, so most ratios fall below 1; Guard's do not.
    torch.manual_seed(0)
    std, shift = 0.3, 0.03
    noise = torch.randn(200000)
    log_ratio = -((std * noise - shift) ** 2 - (std * noise) ** 2) / (2 * std**2)
    assert float(log_ratio.mean()) == pytest.approx(-(shift**2) / (2 * std**2), abs=1e-3)
    output, _ = guard(log_ratio.tolist(), [shift**2] * 200000, std, 1.0, [0.0] * 200000)
    assert float(output.metrics["ratio/mean"]) == pytest.approx(1, abs=1e-3)


def test_guard_fits_gaussian_flow_steps_only():
    check_objective_fits("grpo_guard", "flow_sde")
    check_objective_fits("ppo_clip", "ddim")
    with pytest.raises(ValueError, match="defined for sde_type flow_sde and dance_sde only, got 'ddim'"):
        check_objective_fits("grpo_guard", "ddim")


@pytest.mark.parametrize("name", ["ppo_clip", "policy_gradient", "grpo_guard"])
def test_rows_of_weight_zero_do_not_count(name):
    tensors = {
        "log_prob": torch.tensor([0.01, 7.0, -0.02]),
        "old_log_prob": torch.zeros(3),
        "advantages": torch.tensor([1.0, 5.0, -1.0]),
        "mean_shift": torch.tensor([0.01, 9.0, 0.01]),
        "std": torch.tensor(0.5),
        "delta": torch.tensor(0.1),
    }
    weighted = get_objective(name)({**tensors, "weights": torch.tensor([1.5, 0.0, 1.5])}, SETTINGS).loss
    kept = {key: value[[0, 2]] if value.ndim else value for key, value in tensors.items()}
    torch.testing.assert_close(weighted, get_objective(name)(kept, SETTINGS).loss)


def test_weights_multiply_and_are_not_normalised():
    tensors = {"log_prob": torch.zeros(2), "old_log_prob": torch.zeros(2), "advantages": torch.tensor([1.0, 3.0])}
    loss = get_objective("ppo_clip")({**tensors, "weights": torch.tensor([0.5, 0.25])}, SETTINGS).loss
    torch.testing.assert_close(loss, torch.tensor(-(0.5 * 1 + 0.25 * 3) / 2))
