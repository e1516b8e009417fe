from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dina_reward.alignment.rollout import Schedule, check_sde_window, draw_sde_window, sample
from dina_reward.alignment.seeding import noise_by_row
from tests.alignment.helpers import LATENT_SHAPE, PIXELS, tiny_pipeline


@pytest.fixture
def schedule() -> Schedule:
    return Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 6)


def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(latents.float() + timestep[:, None, None, None] / 1000)


def test_schedule_is_copied_from_a_fresh_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(3)
    before = scheduler.sigmas.clone()
    schedule = Schedule.from_scheduler(scheduler, 4)
    torch.testing.assert_close(schedule.sigmas, torch.tensor([1, 0.8577, 0.6022, 0.0089, 0]), atol=1e-4, rtol=0)
    assert torch.equal(scheduler.sigmas, before)
    assert len(schedule) == 4


def test_schedule_refuses_other_schedulers():
    with pytest.raises(ValueError, match="DDIMScheduler is not a flow-matching scheduler"):
        Schedule.from_scheduler(DDIMScheduler(), 4)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


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

    rollout = sample(policy, latents, Schedule.from_scheduler(pipeline.scheduler, 4))
    torch.testing.assert_close(rollout.latents, expected)
    assert rollout.log_probs.shape == (2, 0)


def test_only_steps_of_the_window_are_stochastic_and_recorded(schedule):
    initial = noise_by_row([1, 2, 3], LATENT_SHAPE)
    noise = noise_by_row([4, 5, 6], (2, *LATENT_SHAPE))
    rollout = sample(velocity, initial, schedule, window=range(1, 3), step_noise=noise)
    assert rollout.trajectory.shape == (3, 3, *LATENT_SHAPE)
    assert rollout.log_probs.shape == (3, 2)
    ode = sample(velocity, initial, schedule)
    quiet = sample(velocity, initial, schedule, window=range(1, 3), step_noise=torch.zeros_like(noise))
    assert not torch.equal(rollout.latents, ode.latents)
    assert torch.equal(rollout.trajectory[:, 0], quiet.trajectory[:, 0])
    assert not torch.equal(rollout.trajectory[:, 1], quiet.trajectory[:, 1])


def test_rows_do_not_depend_on_the_batch(schedule):
    seeds, noise_seeds = [11, 12, 13, 14], [21, 22, 23, 24]

    def run(rows: slice) -> Tensor:
        return sample(
            velocity,
            noise_by_row(seeds[rows], LATENT_SHAPE),
            schedule,
            window=range(0, 2),
            step_noise=noise_by_row(noise_seeds[rows], (2, *LATENT_SHAPE)),
        ).latents

    assert torch.equal(run(slice(0, 4)), torch.cat([run(slice(0, 1)), run(slice(1, 4))]))


def test_last_step_is_never_in_the_window(schedule):
    initial = noise_by_row([1], LATENT_SHAPE)
    with pytest.raises(ValueError, match="includes the last of 6 steps"):
        sample(velocity, initial, schedule, window=range(4, 6), step_noise=noise_by_row([1], (2, *LATENT_SHAPE)))
    with pytest.raises(ValueError, match="is never trained; the upper end may be at most 9"):
        check_sde_window(10, 3, (0, 10))
    with pytest.raises(ValueError, match="does not fit into sde_window_range"):
        check_sde_window(10, 4, (0, 3))


def test_missing_step_noise_is_refused(schedule):
    with pytest.raises(ValueError, match=r"a window of 2 steps needs \(1, 2, 16, 4, 4\)"):
        sample(velocity, noise_by_row([1], LATENT_SHAPE), schedule, window=range(0, 2))


def test_window_is_a_function_of_seed_and_generation():
    windows = [draw_sde_window(3, generation, 3, (0, 5)) for generation in range(50)]
    assert windows == [draw_sde_window(3, generation, 3, (0, 5)) for generation in range(50)]
    assert {window.start for window in windows} == {0, 1, 2}
    assert all(len(window) == 3 and window.stop <= 5 for window in windows)


def test_cps_leaves_no_noise_and_a_late_flow_sde_does():
    # An exact velocity field: x_0 is always zero, so v = x / s and everything left at the end is noise.
    schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    shape = (4, 32, 32)

    def exact(latents: Tensor, timestep: Tensor) -> Tensor:
        return latents / (timestep[:, None, None, None] / 1000)

    def residual(sde_type: str, eta: float, stop: int) -> float:
        rollout = sample(
            exact,
            noise_by_row([1, 2], shape),
            schedule,
            window=range(stop),
            step_noise=noise_by_row([3, 4], (stop, *shape)),
            sde_type=sde_type,
            eta=eta,
        )
        return float((rollout.trajectory[:, -1].std() / schedule.sigmas[stop]) - 1)

    assert abs(residual("cps", 0.8, 9)) < 0.02
    assert residual("flow_sde", 0.7, 8) > 0.15
