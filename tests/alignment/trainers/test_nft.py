from __future__ import annotations

import os

import pytest
import torch

from dina_reward.alignment.trainers.forward_process import ForwardProcess
from dina_reward.alignment.trainers.nft import OLD_POLICY_DIRECTORY, DiffusionNFTConfig, nft_loss
from dina_reward.noise import FlowMatchingNoise, VariancePreservingNoise
from tests.alignment.trainers.forward_helpers import (
    DDPM_SETTINGS,
    check_only_the_lora_is_trained,
    embedded_run,
    forward_settings,
    logged,
    nft_trainer,
    perturb,
    predictions,
    trained_tensors,
)
from tests.tiny_models import tiny_sd_pipeline


FLOW = ForwardProcess(FlowMatchingNoise.from_scheduler_config({"shift": 3.0}), "velocity")
DDPM = ForwardProcess(
    VariancePreservingNoise.from_scheduler_config(
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ),
    "epsilon",
)
ROWS = 4


def example(process=FLOW):
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction, old = (torch.randn((ROWS, 2, 3), generator=generator) for _ in range(4))
    point = process.noise_process.snap([0.2, 0.5, 0.7, 0.9])
    return {
        "latents": latents,
        "noisy": process.noisy(latents, noise, point),
        "point": point,
        "prediction": prediction.requires_grad_(),
        "old_prediction": old,
        "weights": torch.tensor([1.0, 1.0, 0.0, 2.0]),
    }


@pytest.mark.parametrize("nft_beta", [0.1, 1.0])
def test_loss_is_the_published_formula(nft_beta):
    values, advantages, expected = example(), [1.0, -7.0, 0.5, 2.0], 0.0
    output = nft_loss(FLOW, **values, advantages=torch.tensor(advantages), nft_beta=nft_beta)
    for row in range(ROWS):
        r = min(max(advantages[row], -5), 5) / 10 + 0.5
        new, old = values["prediction"][row], values["old_prediction"][row]
        total = 0.0
        for share, v in (
            (r, (1 - nft_beta) * old + nft_beta * new),
            (1 - r, (1 + nft_beta) * old - nft_beta * new),
        ):
            error = values["noisy"][row] - values["point"].level[row] * v - values["latents"][row]
            total = total + share * (error**2).mean() / error.abs().mean() / nft_beta
        expected = expected + values["weights"][row] * total / ROWS
    torch.testing.assert_close(output.loss, expected)


def test_errors_below_the_published_floor_are_divided_by_it():
    # Where the prediction is right up to rounding, its gradient does not grow without bound.
    process = ForwardProcess(DDPM.noise_process, "sample")
    latents = torch.zeros(ROWS, 2, 3)
    values = {**example(process), "latents": latents, "weights": torch.ones(ROWS)}
    values |= {"prediction": latents + 4e-6, "old_prediction": latents + 4e-6}
    output = nft_loss(process, **values, advantages=torch.zeros(ROWS), nft_beta=1.0)
    assert float(output.loss) == pytest.approx((4e-6) ** 2 / 1e-5)


@pytest.mark.parametrize("process", [FLOW, DDPM])
def test_certainly_good_samples_are_regressed_onto(process):
    # r = 1 and b = 1: the loss is the model's own training loss, up to a weight per row.
    values = example(process)
    output = nft_loss(process, **values, advantages=torch.full((ROWS,), 5.0), nft_beta=1.0)
    (gradient,) = torch.autograd.grad(output.loss, values["prediction"])
    level, signal = values["point"].level[:, None, None], process.noise_process.signal(values["point"].level)
    noise = (values["noisy"] - signal[:, None, None] * values["latents"]) / level
    target = process.target(values["latents"], noise, values["point"])
    difference = values["prediction"] - target
    # x_0 hat moves by -level (flow) or -level / signal (epsilon) times the prediction.
    slope = level if process is FLOW else level / signal[:, None, None]
    errors = slope**2 * difference**2
    scale = (slope * difference).abs().mean(dim=(1, 2))
    plain = (values["weights"] * errors.mean(dim=(1, 2)) / scale.detach()).mean()
    torch.testing.assert_close(output.loss, plain, rtol=1e-3, atol=1e-4)
    (expected,) = torch.autograd.grad(plain, values["prediction"])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_on_policy_gradient_is_weighted_by_the_advantage():
    values = example()
    values["old_prediction"] = values["prediction"].detach().clone()
    gradients = {}
    for advantage in (5.0, 2.0, 0.0, -5.0):
        for nft_beta in (0.1, 1.0):
            output = nft_loss(FLOW, **values, advantages=torch.full((ROWS,), advantage), nft_beta=nft_beta)
            (gradients[advantage, nft_beta],) = torch.autograd.grad(output.loss, values["prediction"])
    full = gradients[5.0, 1.0]
    assert full.abs().max() > 0
    for (advantage, _), gradient in gradients.items():
        torch.testing.assert_close(gradient, full * advantage / 5, atol=1e-6, rtol=1e-4)


def test_left_out_rows_and_the_old_policy_get_no_gradient():
    values = example()
    values["old_prediction"].requires_grad_()
    nft_loss(FLOW, **values, advantages=torch.ones(ROWS), nft_beta=0.5).loss.backward()
    assert values["old_prediction"].grad is None
    per_row = values["prediction"].grad.abs().sum(dim=(1, 2))
    assert per_row[2] == 0
    assert (per_row[[0, 1, 3]] > 0).all()


def test_clip_range_sets_what_counts_as_certain():
    values = example()
    wide, narrow = (
        nft_loss(FLOW, **values, advantages=torch.full((ROWS,), a), nft_beta=1.0, advantage_clip=c).loss
        for a, c in ((2.0, 5.0), (0.4, 1.0))
    )
    torch.testing.assert_close(wide, narrow)


def test_defaults_are_the_published_ones(tmp_path):
    config = DiffusionNFTConfig(str(tmp_path), use_cpu=True)
    assert (config.old_policy_decay_rate, config.old_policy_decay_max, config.advantage_clip) == (0.001, 0.5, 5.0)


def test_the_old_policy_samples(tmp_path):
    trainer = nft_trainer(tmp_path)
    before, _ = trainer.make_experience(0)
    trainer.old_policy.restore(trainer.policy.snapshot())
    perturb(trainer)
    moved = trained_tensors(trainer)
    after, _ = trainer.make_experience(0)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.rollout.latents, new.rollout.latents)
        assert not new.rollout.states
    assert all(torch.equal(trained_tensors(trainer)[name], tensor) for name, tensor in moved.items())
    trainer.old_policy.restore(trainer.policy.snapshot())
    own, _ = trainer.make_experience(0)
    assert not torch.equal(own[0].rollout.latents, before[0].rollout.latents)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_step_loss_uses_old_weights_and_reference(tmp_path, guidance_scale):
    trainer = nft_trainer(tmp_path, beta_kl=0.25, nft_beta=0.3, guidance_scale=guidance_scale)
    trainer.tightness = 2.0  # after an alarm the penalty counts twice
    (experience, *_), _ = trainer.make_experience(0)
    noise, point = trainer.draw(experience, [1], experience.rows)
    latents = experience.rollout.latents
    noisy = trainer.forward_process.noisy(latents, noise, point)
    reference = predictions(trainer, experience, noisy, point.timestep)
    perturb(trainer, 0.1)
    trainer.old_policy.restore(trainer.policy.snapshot())
    old = predictions(trainer, experience, noisy, point.timestep)
    perturb(trainer, 0.2)
    new = predictions(trainer, experience, noisy, point.timestep)
    expected = nft_loss(
        trainer.forward_process,
        latents=latents,
        noisy=noisy,
        point=point,
        prediction=new,
        old_prediction=old,
        advantages=experience.advantages,
        weights=experience.weights,
        nft_beta=0.3,
    ).loss
    kl = (new - reference).square().mean()
    output = trainer.step_loss(trainer.model, experience, 1)
    torch.testing.assert_close(output.metrics["kl"], kl)
    torch.testing.assert_close(output.loss, expected + 0.5 * kl)
    torch.testing.assert_close(output.metrics["nft/old_policy_distance"], (new - old).square().mean())


def test_no_reference_without_a_penalty(tmp_path):
    trainer = nft_trainer(tmp_path)

    def refuse():
        raise AssertionError("the reference was evaluated")

    trainer.policy.reference = refuse
    trainer.train()
    assert "kl" not in trainer.state.log_history[0]


def test_the_old_policy_follows_after_each_generation(tmp_path):
    trainer = nft_trainer(tmp_path, max_steps=6, old_policy_decay_rate=0.2, old_policy_decay_max=0.3)
    after, before = [], trainer.policy.snapshot()
    update = trainer.old_policy.on_step_end

    def recording(args, state, control, **kwargs):
        update(args, state, control, **kwargs)
        after.append((trainer.policy.snapshot(), [tensor.clone() for tensor in trainer.old_policy._tensors]))

    trainer.old_policy.on_step_end = recording
    trainer.train()
    old = before
    for step, (weights, actual) in enumerate(after, start=1):
        if step % 2 == 0:
            decay = min(0.2 * (step // 2), 0.3)
            old = [decay * o + (1 - decay) * w for o, w in zip(old, weights, strict=True)]
        for mine, theirs in zip(old, actual, strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-7, rtol=1e-5)
    assert any(not torch.equal(o, w) for o, w in zip(old, after[-1][0], strict=True))
    decays = [line["old_policy_decay"] for line in trainer.state.log_history if "old_policy_decay" in line]
    assert decays == pytest.approx([0.0, 0.2, 0.3])


def test_on_policy_sampling(tmp_path):
    trainer = nft_trainer(tmp_path, max_steps=2, old_policy_decay_max=0.0)
    trainer.train()
    for old, new in zip(trainer.old_policy._tensors, trainer.policy.snapshot(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(("train_full_model", "decay"), [(False, 0.3), (True, 0.3), (False, 0.0)])
def test_resume_is_bit_exact(tmp_path, train_full_model, decay):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "old_policy_decay_rate": decay,
        "train_full_model": train_full_model,
        "learning_rate": 1e-3,
    }
    straight = nft_trainer(tmp_path / "straight", **settings)
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    names = {path.name for path in (checkpoint / OLD_POLICY_DIRECTORY).rglob("*.safetensors")}
    assert len(names) == 1
    resumed = nft_trainer(tmp_path / "resumed", **settings)
    torch.rand(5)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected, actual = trained_tensors(straight), trained_tensors(resumed)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    for old, other in zip(straight.old_policy._tensors, resumed.old_policy._tensors, strict=True):
        assert torch.equal(old, other)
    same = all(map(torch.equal, resumed.old_policy._tensors, resumed.policy.snapshot()))
    assert same == resumed.old_policy.is_current == (decay == 0)
    for name in ("reward", "loss", "grad_norm", "old_policy_decay"):
        assert logged(straight, name)[-1:] == logged(resumed, name)[-1:]


def test_a_checkpoint_without_old_policy_is_refused(tmp_path):
    trainer = nft_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2" / OLD_POLICY_DIRECTORY
    for path in folder.iterdir():
        os.remove(path)
    with pytest.raises(ValueError, match="old_policy.* is missing"):
        nft_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_kept_rows_train_like_all_rows_with_the_others_at_weight_zero(tmp_path):
    # Groups of 4 lie across micro-batches of 6, so these keep different numbers of rows.
    settings = {"per_device_train_batch_size": 6, "keep_per_group": 2, "beta_kl": 0.1}
    trainer = nft_trainer(tmp_path, **settings)
    parts, _ = trainer.make_experience(0)
    weights = torch.cat([part.weights for part in parts])
    assert sorted(weights.tolist()) == [0.0] * 6 + [2.0] * 6
    chosen = torch.cat([part.advantages for part in parts]).view(3, 4)
    best = torch.stack([chosen.argmax(dim=1), chosen.argmin(dim=1)], dim=1) + 4 * torch.arange(3)[:, None]
    assert weights.nonzero()[:, 0].tolist() == sorted(best.flatten().tolist())
    perturb(trainer, 0.1)
    for part in parts:
        kept = part.without_unused()
        assert len(kept.rows) == int((part.weights > 0).sum()) == len(kept.prompts)
        full, short = (trainer.step_loss(trainer.model, each, 1).loss for each in (part, kept))
        torch.testing.assert_close(short, full)


def test_kept_rows_alone_are_computed(tmp_path):
    spent = {}
    for keep in (None, 2):
        trainer = nft_trainer(tmp_path, keep_per_group=keep)
        trainer.train()
        spent[keep] = trainer.costs.costs().as_metrics()
    assert spent[2]["denoiser_calls/update"] == spent[None]["denoiser_calls/update"] / 2
    assert spent[2]["reward_calls"] == spent[None]["reward_calls"]


@pytest.mark.parametrize(("decay", "evaluations"), [(0.0, [0, 1, 0, 1]), (0.3, [0, 1, 1, 1])])
def test_an_old_policy_that_is_the_trained_one_is_not_evaluated(tmp_path, decay, evaluations):
    # Whether a step's losses evaluate the old policy: two optimizer steps to a generation.
    trainer = nft_trainer(tmp_path, max_steps=4, num_train_timesteps=1, old_policy_decay_rate=decay)
    step_loss, spent = trainer.step_loss, []

    def counting(*args):
        before = trainer.policy.calls.rollout
        output = step_loss(*args)
        spent.append((trainer.policy.calls.rollout - before) // 8)
        if not spent[-1]:
            assert trainer.old_policy.is_current
            assert all(map(torch.equal, trainer.old_policy._tensors, trainer.policy.snapshot()))
        return output

    trainer.step_loss = counting
    trainer.train()
    assert spent == evaluations


def test_the_final_model_has_no_old_policy(tmp_path):
    trainer = nft_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / OLD_POLICY_DIRECTORY).exists()


def test_reward_rises(tmp_path):
    trainer = nft_trainer(tmp_path, **embedded_run())
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert after > before + 0.3


def test_only_the_lora_of_a_ddpm_pipeline_is_trained(tmp_path):
    check_only_the_lora_is_trained(nft_trainer(tmp_path, pipeline=tiny_sd_pipeline(), **DDPM_SETTINGS))


@pytest.mark.parametrize(
    "name", ["nft_beta", "advantage_clip", "old_policy_decay_rate", "old_policy_decay_max", "beta_kl"]
)
def test_bad_settings_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        DiffusionNFTConfig(**forward_settings(tmp_path, **{name: -0.1}))
