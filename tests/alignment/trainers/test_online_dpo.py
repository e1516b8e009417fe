from __future__ import annotations

import math

import pytest
import torch

from dina_reward.alignment.trainers.online_dpo import OnlineDPOConfig, dpo_loss, form_pairs
from dina_reward.likelihood import ThurstoneModel
from tests.alignment.trainers.forward_helpers import (
    DDPM_SETTINGS,
    check_only_the_lora_is_trained,
    dpo_trainer,
    embedded_run,
    forward_settings,
    logged,
    perturb,
    predictions,
    trained_tensors,
)
from tests.tiny_models import tiny_sd_pipeline


NAN = float("nan")


def test_best_against_worst():
    rewards = torch.tensor([0.0, 3.0, 1.0, 2.0, 10.0, 7.0, 9.0, 8.0])
    pairs = form_pairs(rewards, 4, num_pairs=2)
    assert pairs.chosen.tolist() == [1, 3, 4, 6]
    assert pairs.rejected.tolist() == [0, 2, 5, 7]
    assert pairs.kept.tolist() == [1.0] * 4
    # The std of each group is 1.291: margins are 3 and 1, which is 2.32 and 0.77 of it.
    assert form_pairs(rewards, 4, num_pairs=2, min_margin=0.8).kept.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert form_pairs(rewards, 4, num_pairs=2, min_margin=0.77).kept.tolist() == [1.0] * 4
    assert form_pairs(rewards, 4, min_margin=2.33).kept.tolist() == [0.0, 0.0]


def test_equal_and_missing_rewards_make_no_pairs():
    equal = form_pairs(torch.full((4,), 2.0), 4, num_pairs=2)
    assert equal.kept.tolist() == [0.0, 0.0]
    pairs = form_pairs(torch.tensor([NAN, 1.0, 2.0, 3.0, NAN, NAN, NAN, 1.0]), 4, num_pairs=2)
    # Three valid rows give one pair, a single one none.
    assert pairs.kept.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert (pairs.chosen[0], pairs.rejected[0]) == (3, 1)
    # Missing rows count nothing in the std either: that of 1, 2, 3 is 1.
    rewards = torch.tensor([NAN, 1.0, 2.0, 3.0])
    assert form_pairs(rewards, 4, min_margin=1.999).kept.tolist() == [1.0]
    assert form_pairs(rewards, 4, min_margin=2.001).kept.tolist() == [0.0]


def test_pairs_need_whole_groups():
    with pytest.raises(ValueError, match="rewards of shape .5,."):
        form_pairs(torch.zeros(5), 4)
    with pytest.raises(ValueError, match="at least 6 rows"):
        form_pairs(torch.zeros(8), 4, num_pairs=3)


def errors():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, generator=generator) for _ in range(4)]


def test_sigmoid_loss_is_the_published_formula():
    chosen, rejected, reference_chosen, reference_rejected = errors()
    weights = torch.tensor([1.0, 2.0, 0.0])
    output = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, weights=weights, beta_dpo=20.0)
    expected, margins = 0.0, []
    for i in range(3):
        inside = -20 / 2 * ((chosen[i] - reference_chosen[i]) - (rejected[i] - reference_rejected[i])).item()
        margins.append(inside)
        expected += weights[i].item() * math.log(1 + math.exp(-inside)) / 3
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.metrics["dpo/margin"].item() == pytest.approx(sum(margins[:2]) / 2, rel=1e-4)
    assert output.metrics["dpo/accuracy"].item() == sum(margin > 0 for margin in margins[:2]) / 2


def test_labels_and_ipo():
    chosen, rejected, reference_chosen, reference_rejected = errors()
    weights = torch.ones(3)
    logits = -5 * ((chosen - reference_chosen) - (rejected - reference_rejected))
    labels = torch.tensor([0.9, 0.6, 0.5])
    settings = {"weights": weights, "beta_dpo": 10.0}
    output = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, labels=labels, **settings)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(output.loss, expected)
    output = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, loss_type="ipo", **settings)
    torch.testing.assert_close(output.loss, 100 * ((logits / 10 - 1 / 20) ** 2).mean())


def test_gradient_lowers_the_chosen_and_raises_the_rejected_error():
    chosen, rejected = (torch.full((2,), 0.5, requires_grad=True) for _ in range(2))
    reference = torch.full((2,), 0.5)
    dpo_loss(chosen, rejected, reference, reference, weights=torch.tensor([1.0, 0.0]), beta_dpo=8.0).loss.backward()
    # beta / 2 * sigmoid(0) / pairs = 1.
    assert chosen.grad.tolist() == [1.0, 0.0]
    assert rejected.grad.tolist() == [-1.0, 0.0]


def test_metrics_without_pairs_are_missing():
    output = dpo_loss(*errors(), weights=torch.zeros(3))
    assert output.loss == 0
    assert output.metrics["dpo/accuracy"].isnan()
    assert output.metrics["dpo/margin"].isnan()


def test_loss_starts_at_log_two_and_falls(tmp_path):
    trainer = dpo_trainer(tmp_path, max_steps=8, num_iterations=4, beta_dpo=200.0, learning_rate=3e-3)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < math.log(2) - 0.01
    assert logged(trainer, "dpo/accuracy")[-1] > 0.7
    assert logged(trainer, "dpo/margin")[-1] > 0
    assert logged(trainer, "dpo/skipped_pairs") == [0.0] * 8


@pytest.mark.parametrize("loss_type", ["sigmoid", "soft"])
def test_step_loss_compares_both_sides_under_the_same_noise(tmp_path, loss_type):
    trainer = dpo_trainer(tmp_path, num_pairs=2, beta_dpo=25.0, loss_type=loss_type, label_smoothing=0.1)
    trainer.tightness = 2.0  # after an alarm beta counts twice
    (_, experience), _ = trainer.make_experience(0)
    pairs = form_pairs(experience.rewards, 4, num_pairs=2)
    # The second micro-batch begins with group 2, which is pair 4.
    noise, point = trainer.draw(experience, [1], range(4, 8))
    process, sides = trainer.forward_process, []
    for adapted in (False, True):
        if adapted:
            perturb(trainer, 0.1)
        for rows in (pairs.chosen, pairs.rejected):
            noisy, timestep = experience.rollout.latents.clone(), torch.full((8,), 500.0)
            clean = experience.rollout.latents[rows]
            noisy[rows], timestep[rows] = process.noisy(clean, noise, point), point.timestep
            prediction = predictions(trainer, experience, noisy, timestep)[rows]
            sides.append((prediction - process.target(clean, noise, point)).square().mean(dim=(1, 2, 3)))
    labels = torch.ones(4)
    if loss_type == "soft":
        scores = experience.rewards
        labels = ThurstoneModel().probability(scores[pairs.chosen], scores[pairs.rejected], torch.tensor(0.4))
        assert (labels > 0.5).all()
        assert (labels < 1).all()
    labels = 0.9 * labels + 0.1 * (1 - labels)
    expected = dpo_loss(sides[2], sides[3], sides[0], sides[1], weights=torch.ones(4), labels=labels, beta_dpo=50.0)
    output = trainer.step_loss(trainer.model, experience, 1)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in trainer.policy.trainable_parameters().values())


def test_skipped_pairs_are_counted_and_give_no_gradient(tmp_path):
    trainer = dpo_trainer(tmp_path, min_margin=100.0)
    before = trained_tensors(trainer)
    trainer.args.weight_decay = 0.0
    trainer.train()
    assert logged(trainer, "dpo/skipped_pairs") == [1.0, 1.0]
    assert logged(trainer, "grad_norm") == [0.0, 0.0]
    assert all(torch.equal(trained_tensors(trainer)[name], tensor) for name, tensor in before.items())


def test_reward_rises(tmp_path):
    trainer = dpo_trainer(tmp_path, **embedded_run(num_pairs=4, beta_dpo=10.0))
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert after > before + 0.2


def test_only_the_lora_of_a_ddpm_pipeline_is_trained(tmp_path):
    check_only_the_lora_is_trained(dpo_trainer(tmp_path, pipeline=tiny_sd_pipeline(), **DDPM_SETTINGS))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"per_device_train_batch_size": 6},
            "6 is not a multiple of num_generations 4.*to 4 or 8, or num_generations to 2 or 3 or 6",
        ),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 4}, "to 4, or num_generations to 2$"),
        ({"num_pairs": 3}, "num_pairs 3 needs groups of at least 6.*at most 2"),
        ({"loss_type": "hinge"}, "unknown loss_type 'hinge'"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "not defined for loss_type 'ipo'"),
        ({"label_smoothing": 0.5}, "label_smoothing must be a number"),
        ({"beta_dpo": 0}, "beta_dpo must be a number"),
        ({"min_margin": -1}, "min_margin must be a number"),
    ],
)
def test_bad_settings_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        OnlineDPOConfig(**forward_settings(tmp_path, **overrides))


def test_variance_of_soft_labels(tmp_path):
    args = OnlineDPOConfig(**forward_settings(tmp_path, reward_noise_level=[0.0, 0.4]))
    assert args.soft_label_variance() == pytest.approx(0.05 + 2 * 0.4**2 / 2)
    assert OnlineDPOConfig(**forward_settings(tmp_path, preference_variance=0.3)).soft_label_variance() == 0.3
