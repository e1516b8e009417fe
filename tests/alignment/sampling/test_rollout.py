from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dina_reward.alignment.sampling.rollout import check_sde_window, sample, sde_window, trained_steps
from dina_reward.alignment.sampling.samplers import Sampler, build_sampler
from dina_reward.alignment.sampling.seeding import noise_by_row
from tests.alignment.helpers import LATENT_SHAPE, PIXELS, tiny_pipeline


@pytest.fixture
def sampler() -> Sampler:
    return build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), 6, sde_type="cps", eta=0.8)


def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(latents.float() + timestep[:, None, None, None] / 1000)


def test_without_a_window_it_is_the_pipeline_s_own_sampler():
    pipeline = tiny_pipeline()
    latents = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a dog"]
    expected = pipeline(
        prompts,
        height=PIXELS,
        width=PIXELS,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=8,
        latents=latents,
        output_type="latent",
    ).images
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )

    def policy(latents: Tensor, timestep: Tensor) -> Tensor:
        return pipeline.transformer(latents, embeds, pooled, timestep, return_dict=False)[0]

    rollout = sample(policy, latents, build_sampler(pipeline.scheduler, 4))
    torch.testing.assert_close(rollout.latents, expected)
    assert rollout.trained == rollout.stochastic == ()


def test_only_chosen_steps_are_stochastic_and_recorded(sampler):
    initial = noise_by_row([1, 2, 3], LATENT_SHAPE)
    noise = noise_by_row([4, 5, 6], (2, *LATENT_SHAPE))
    rollout = sample(velocity, initial, sampler, stochastic=range(1, 3), step_noise=noise, keep_means=True)
    assert sorted(rollout.states) == [1, 2, 3]
    assert rollout.trained == rollout.stochastic == (1, 2)
    assert all(values.shape == (3,) for values in rollout.log_probs.values())
    ode = sample(velocity, initial, sampler)
    quiet = sample(velocity, initial, sampler, stochastic=range(1, 3), step_noise=torch.zeros_like(noise))
    assert not torch.equal(rollout.latents, ode.latents)
    assert torch.equal(rollout.states[1], quiet.states[1])
    assert torch.equal(quiet.states[2], rollout.means[1])
    assert not torch.equal(rollout.states[2], quiet.states[2])


def test_clean_predictions_are_kept_while_a_stochastic_step_follows(sampler):
    initial = noise_by_row([1, 2], LATENT_SHAPE)
    noise = noise_by_row([4, 5], (4, *LATENT_SHAPE))
    settings = {"stochastic": (0, 1, 2, 3), "trained": (1, 3), "step_noise": noise}
    rollout = sample(velocity, initial, sampler, keep_clean=True, **settings)
    assert sorted(rollout.states) == [1, 2, 3, 4]
    assert sorted(rollout.clean) == [1, 2, 3]
    for index, clean in rollout.clean.items():
        state = rollout.states[index]
        expected = state - sampler.levels[index] * velocity(state, sampler.timesteps[index].expand(2))
        torch.testing.assert_close(clean, expected)
    assert sample(velocity, initial, sampler, **settings).clean == {}


def test_a_rollout_can_start_at_a_recorded_state(sampler):
    initial = noise_by_row([1, 2], LATENT_SHAPE)
    noise = noise_by_row([4, 5], (2, *LATENT_SHAPE))
    whole = sample(velocity, initial, sampler, stochastic=(1, 2), step_noise=noise)
    rest = sample(velocity, whole.states[2], sampler, start=2, stochastic=(2,), step_noise=noise[:, 1:])
    assert torch.equal(rest.latents, whole.latents)
    assert rest.log_probs.keys() == {2}


def test_stopping_and_going_on_is_the_whole_rollout(sampler):
    initial = noise_by_row([1, 2], LATENT_SHAPE)
    noise = noise_by_row([4, 5], (2, *LATENT_SHAPE))
    whole = sample(velocity, initial, sampler, stochastic=(1, 2), step_noise=noise)
    half = sample(velocity, initial, sampler, stop=2, stochastic=(1,), step_noise=noise[:, :1])
    assert torch.equal(half.latents, whole.states[2])
    rest = sample(velocity, half.latents, sampler, start=2, stochastic=(2,), step_noise=noise[:, 1:])
    assert torch.equal(rest.latents, whole.latents)
    assert torch.equal(sample(velocity, initial, sampler, stop=0).latents, initial)


def test_memory_holds_the_trained_steps_alone(sampler):
    initial = noise_by_row([1, 2], LATENT_SHAPE)
    noise = noise_by_row([4, 5], (5, *LATENT_SHAPE))
    every = sample(velocity, initial, sampler, stochastic=range(5), step_noise=noise)
    some = sample(velocity, initial, sampler, stochastic=range(5), trained=(0, 3), step_noise=noise, offload=True)
    assert torch.equal(some.latents, every.latents)
    assert sorted(some.states) == [0, 1, 3, 4]
    assert some.trained == (0, 3)
    assert some.means == {}
    assert all(torch.equal(some.states[i], every.states[i]) for i in some.states)
    assert all(state.device.type == "cpu" for state in some.states.values())
    with pytest.raises(ValueError, match=r"trained steps \[4\] are not all among the stochastic ones \[0, 1\]"):
        sample(velocity, initial, sampler, stochastic=range(2), trained=[4], step_noise=noise[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_gives_the_recorded_log_prob(sampler, dtype):
    initial = noise_by_row([1, 2], LATENT_SHAPE).to(dtype)
    rollout = sample(
        velocity, initial, sampler, stochastic=range(3), step_noise=noise_by_row([3, 4], (3, *LATENT_SHAPE))
    )
    for index in rollout.trained:
        prediction = velocity(rollout.states[index], sampler.timesteps[index].expand(2))
        replayed = sampler.replay_step(
            index, rollout.states[index], prediction, next_latents=rollout.states[index + 1]
        )
        assert torch.equal(replayed.log_prob, rollout.log_probs[index])


def test_rows_do_not_depend_on_the_batch(sampler):
    seeds, noise_seeds = [11, 12, 13, 14], [21, 22, 23, 24]

    def run(rows: slice) -> Tensor:
        return sample(
            velocity,
            noise_by_row(seeds[rows], LATENT_SHAPE),
            sampler,
            stochastic=range(0, 2),
            step_noise=noise_by_row(noise_seeds[rows], (2, *LATENT_SHAPE)),
        ).latents

    assert torch.equal(run(slice(0, 4)), torch.cat([run(slice(0, 1)), run(slice(1, 4))]))


def test_last_step_is_never_stochastic(sampler):
    initial = noise_by_row([1], LATENT_SHAPE)
    with pytest.raises(ValueError, match="the last of 6 steps ends at the clean latent"):
        sample(velocity, initial, sampler, stochastic=range(4, 6), step_noise=noise_by_row([1], (2, *LATENT_SHAPE)))
    with pytest.raises(ValueError, match="is never trained; the upper end may be at most 9"):
        check_sde_window(10, 3, (0, 10))
    with pytest.raises(ValueError, match="does not fit into sde_window_range"):
        check_sde_window(10, 4, (0, 3))
    with pytest.raises(ValueError, match="does not fit into sde_window_range"):
        check_sde_window(10, 3, (-1, 3))


@pytest.mark.parametrize(("size", "window_range"), [(3, (0, 3)), (1, (4, 5)), (9, (0, 9))])
def test_a_window_may_begin_with_the_first_step_and_fill_its_range(size, window_range):
    check_sde_window(10, size, window_range)


def test_missing_step_noise_is_refused(sampler):
    with pytest.raises(ValueError, match=r"2 stochastic steps need \(1, 2, 16, 4, 4\)"):
        sample(velocity, noise_by_row([1], LATENT_SHAPE), sampler, stochastic=range(0, 2))


def test_random_window_is_a_function_of_seed_and_generation():
    windows = [sde_window(3, generation, 3, (0, 5)) for generation in range(50)]
    assert windows == [sde_window(3, generation, 3, (0, 5)) for generation in range(50)]
    assert {window.start for window in windows} == {0, 1, 2}
    assert all(len(window) == 3 and window.stop <= 5 for window in windows)


def test_fixed_and_sliding_windows():
    assert {sde_window(0, g, 2, (1, 6), "fixed") for g in range(9)} == {range(1, 3)}
    starts = [sde_window(0, g, 2, (1, 6), "sliding", interval=2).start for g in range(10)]
    assert starts == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1]
    assert [sde_window(0, g, 2, (0, 6), "sliding", stride=2).start for g in range(4)] == [0, 2, 4, 1]
    with pytest.raises(ValueError, match="unknown sde_window_schedule 'late'"):
        sde_window(0, 0, 2, (0, 6), "late")


def test_subset_of_steps_is_shared_and_changes_with_the_generation():
    subsets = [trained_steps(5, generation, range(2, 12), 0.6) for generation in range(20)]
    assert subsets == [trained_steps(5, generation, range(2, 12), 0.6) for generation in range(20)]
    assert all(len(subset) == 6 and list(subset) == sorted(set(subset)) for subset in subsets)
    assert len(set(subsets)) > 10
    assert trained_steps(5, 0, range(2, 5), 1.0) == (2, 3, 4)
    assert len(trained_steps(5, 0, range(2, 5), 0.0)) == 1


def test_cps_leaves_no_noise_and_a_late_flow_sde_does():
    # An exact velocity field: x_0 is always zero, so v = x / s and everything left at the end is noise.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shape = (4, 32, 32)

    def exact(latents: Tensor, timestep: Tensor) -> Tensor:
        return latents / (timestep[:, None, None, None] / 1000)

    def residual(sde_type: str, eta: float, stop: int) -> float:
        sampler = build_sampler(scheduler, 10, sde_type=sde_type, eta=eta)
        noise = noise_by_row([3, 4], (stop, *shape))
        rollout = sample(exact, noise_by_row([1, 2], shape), sampler, stochastic=range(stop), step_noise=noise)
        return float((rollout.states[stop].std() / sampler.levels[stop]) - 1)

    assert abs(residual("cps", 0.8, 9)) < 0.02
    assert residual("flow_sde", 0.7, 8) > 0.15


@pytest.mark.parametrize(("fraction", "count"), [(0.6, 2), (0.7, 2), (0.9, 3), (0.1, 1)])
def test_the_trained_share_is_rounded(fraction, count):
    assert len(trained_steps(0, 0, range(3), fraction)) == count


def test_a_window_slides_by_one_in_every_generation_unless_asked():
    assert [sde_window(0, generation, 2, (1, 5), "sliding").start for generation in range(4)] == [1, 2, 3, 1]
