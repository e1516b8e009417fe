from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dina_reward.alignment.sampling.rollout import sample
from dina_reward.alignment.sampling.samplers import build_sampler
from dina_reward.alignment.trainers.forward_process import ForwardProcess, TrainingNoise
from dina_reward.alignment.trainers.nft import DiffusionNFTConfig
from dina_reward.noise import FlowMatchingNoise, LevelSampler, NoisePoint, VariancePreservingNoise
from tests.alignment.trainers.forward_helpers import DDPM_SETTINGS, dpo_trainer, forward_settings, nft_trainer
from tests.tiny_models import tiny_sd_pipeline


FLOW = FlowMatchingNoise.from_scheduler_config({"shift": 3.0})
DDPM = VariancePreservingNoise.from_scheduler_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
PROCESSES = [
    ForwardProcess(FLOW, "velocity"),
    *(ForwardProcess(DDPM, kind) for kind in ("epsilon", "sample", "v_prediction")),
]
SHAPE = (3, 2, 2)


def draws(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, *SHAPE), generator=generator), torch.randn((rows, *SHAPE), generator=generator)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.prediction_type)
@settings(max_examples=25, deadline=None)
@given(levels=st.lists(st.floats(0, 1), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_the_target_leads_back_to_the_clean_latents(process, levels, seed):
    point = process.noise_process.snap(levels)
    latents, noise = draws(len(levels), seed)
    noisy = process.noisy(latents, noise, point)
    clean = process.predict_clean(noisy, process.target(latents, noise, point), point)
    torch.testing.assert_close(clean, latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.prediction_type)
def test_formulas_at_one_level(process):
    # At timestep 500 of this schedule abar is 0.2766; the flow-matching level of the grid is chosen to be 0.75.
    point = process.noise_process.from_timesteps([750.0 if process.prediction_type == "velocity" else 500.0])
    sigma = point.level.item()
    signal = 1 - sigma if process.prediction_type == "velocity" else (1 - sigma**2) ** 0.5
    assert sigma == pytest.approx(0.75 if process.prediction_type == "velocity" else (1 - 0.2766) ** 0.5, abs=1e-3)
    latents, noise = draws(1)
    torch.testing.assert_close(process.noisy(latents, noise, point), signal * latents + sigma * noise)
    expected = {
        "velocity": noise - latents,
        "epsilon": noise,
        "sample": latents,
        "v_prediction": signal * noise - sigma * latents,
    }[process.prediction_type]
    torch.testing.assert_close(process.target(latents, noise, point), expected)


def test_everything_is_float32_and_differentiable():
    process, point = PROCESSES[3], DDPM.snap([0.5, 0.9])
    latents, noise = (tensor.bfloat16() for tensor in draws(2))
    noisy = process.noisy(latents, noise, point)
    prediction = process.target(latents, noise, point).requires_grad_()
    clean = process.predict_clean(noisy, prediction, point)
    assert noisy.dtype == prediction.dtype == clean.dtype == torch.float32
    clean.sum().backward()
    torch.testing.assert_close(prediction.grad[:, 0, 0, 0], -point.level)


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="unknown prediction_type 'score'"):
        ForwardProcess(DDPM, "score")


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_process_of_a_policy_is_that_of_its_scheduler(tmp_path, kind):
    trainer = nft_trainer(tmp_path, pipeline=tiny_sd_pipeline(prediction_type=kind), **DDPM_SETTINGS)
    assert trainer.forward_process.prediction_type == kind
    assert isinstance(trainer.forward_process.noise_process, VariancePreservingNoise)
    # The grid of the rollout and that of the training scheduler speak of the same levels.
    point = trainer.training_noise.points(0, 0, 0, range(8))
    snapped = trainer.forward_process.noise_process.from_timesteps(point.timestep)
    torch.testing.assert_close(point.level, snapped.level)


def test_draws_depend_on_their_keys_alone():
    noises = [
        TrainingNoise(DDPM, levels, seed=3)
        for levels in (LevelSampler("uniform"), build_sampler(tiny_sd_pipeline().scheduler, 5))
    ]
    for noise in noises:
        whole, parts = noise.points(1, 0, 2, range(8)), [noise.points(1, 0, 2, [row]) for row in range(8)]
        for name in ("level", "timestep"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
        drawn = noise.noise(1, 0, 2, range(8), SHAPE)
        assert torch.equal(drawn[3:6], noise.noise(1, 0, 2, range(3, 6), SHAPE))
        others = [noise.noise(*at, range(8), SHAPE) for at in ((0, 0, 2), (1, 1, 2), (1, 0, 1))]
        assert not any(torch.equal(drawn, other) for other in others)
        assert len({tuple(row.flatten().tolist()) for row in torch.cat([drawn, *others])}) == 32
    uniform = noises[0]
    assert len(set(uniform.points(1, 0, 2, range(64)).level.tolist())) > 50
    levels = [uniform.points(*at, range(8)).level for at in ((1, 0, 2), (0, 0, 2), (1, 1, 2), (1, 0, 1))]
    assert len(set(torch.cat(levels).tolist())) > 25


def test_levels_of_the_sampler_are_taken_once_each():
    sampler = build_sampler(tiny_sd_pipeline().scheduler, 5)
    noise = TrainingNoise(DDPM, sampler, seed=0)
    points = [noise.points(0, 0, position, range(6)) for position in range(10)]
    timesteps = torch.stack([point.timestep for point in points])
    levels = torch.stack([point.level for point in points])
    for row in range(6):
        for cycle in (slice(0, 5), slice(5, 10)):
            assert torch.equal(timesteps[cycle, row].sort(descending=True).values, sampler.timesteps)
            assert torch.equal(levels[cycle, row].sort(descending=True).values, sampler.levels[:-1])
    assert len({tuple(order.tolist()) for order in timesteps.T}) > 1
    assert not torch.equal(timesteps[:5], timesteps[5:])


@pytest.mark.parametrize("build", [nft_trainer, dpo_trainer])
def test_losses_do_not_depend_on_the_split_of_the_batch(tmp_path, build):
    whole = build(tmp_path, per_device_train_batch_size=16, steps_per_generation=1)
    split = build(tmp_path, per_device_train_batch_size=4, steps_per_generation=4, max_steps=4)
    expected, _ = whole.make_experience(0)
    actual, _ = split.make_experience(0)
    assert (len(expected), len(actual)) == (1, 4)
    for position in range(2):
        reference = whole.step_loss(whole.model, expected[0], position).loss
        parts = torch.stack([split.step_loss(split.model, part, position).loss for part in actual])
        torch.testing.assert_close(parts.mean(), reference)
        assert parts.std() > 0 or build is dpo_trainer


def test_passes_over_a_generation_have_noise_of_their_own(tmp_path):
    trainer, seen = nft_trainer(tmp_path, num_iterations=2, max_steps=4), []
    draw = trainer.draw

    def recording(experience, position, keys):
        noise, point = draw(experience, position, keys)
        seen.append(noise)
        return noise, point

    trainer.draw = recording
    trainer.train()
    rows = [tuple(row.flatten().tolist()) for noise in seen for row in noise]
    assert len(rows) == len(set(rows)) == 2 * 2 * 16


def test_levels_can_come_from_a_distribution(tmp_path):
    settings = {"train_level_distribution": "logit_normal", "train_level_mean": 1.5, "train_level_std": 1e-3}
    trainer = nft_trainer(tmp_path, **settings)
    experience, _ = trainer.make_experience(0)
    _, point = trainer.draw(experience[0], [0], range(8))
    assert isinstance(point, NoisePoint)
    torch.testing.assert_close(point.level, torch.full((8,), 1.5).sigmoid(), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_level_distribution": "normal"}, "unknown train_level_distribution 'normal'"),
        ({"train_level_distribution": "logit_normal", "train_level_std": 0.0}, "std must be positive"),
        ({"solver_order": 3}, "solver_order must be 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer of at least 1"),
        ({"num_generations": 1}, "num_generations must be an integer of at least 2"),
    ],
)
def test_bad_settings_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        DiffusionNFTConfig(**forward_settings(tmp_path, **overrides))


@pytest.mark.parametrize("build", [nft_trainer, dpo_trainer])
def test_rollouts_are_of_the_order_that_is_set(build, tmp_path):
    trainer = build(tmp_path, solver_order=2, num_inference_steps=4)
    maker = trainer.experience_maker
    experience = maker.make(0, trainer.plan(0))[0][0]
    predict = trainer.policy.bind(experience.conditioning[experience.prompt_index], experience.negative)
    initial = maker.initial_latents(0, experience.rows)
    first, second = (sample(predict, initial, trainer.sampler, solver_order=order).latents for order in (1, 2))
    torch.testing.assert_close(experience.rollout.latents, second)
    assert not torch.allclose(first, second, atol=1e-4)
