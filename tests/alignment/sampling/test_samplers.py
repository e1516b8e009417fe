from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from dina_reward.alignment.sampling.samplers import DDIMSampler, FlowSampler, build_sampler


SD_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def ddim_scheduler(**config):
    return DDIMScheduler(clip_sample=False, **{**SD_CONFIG, **config})


def test_flow_grid_is_copied_from_a_fresh_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(3)
    before = scheduler.sigmas.clone()
    sampler = build_sampler(scheduler, 4)
    assert isinstance(sampler, FlowSampler)
    assert sampler.sde_type == "cps"
    torch.testing.assert_close(sampler.levels, torch.tensor([1, 0.8577, 0.6022, 0.0089, 0]), atol=1e-4, rtol=0)
    assert torch.equal(scheduler.sigmas, before)
    assert len(sampler) == 4


def test_kind_and_scheduler_must_fit():
    with pytest.raises(ValueError, match="sde_type is 'ddim' but FlowMatchEulerDiscreteScheduler is a flow-matching"):
        build_sampler(FlowMatchEulerDiscreteScheduler(), 4, sde_type="ddim", eta=1.0)
    with pytest.raises(ValueError, match="sde_type is 'cps' but DDIMScheduler is a DDPM scheduler; use ddim"):
        build_sampler(ddim_scheduler(), 4, sde_type="cps", eta=0.8)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        build_sampler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)
    with pytest.raises(ValueError, match="ddim takes 0 < eta <= 1"):
        build_sampler(ddim_scheduler(), 4, eta=1.5)
    with pytest.raises(ValueError, match="eta is nan: a deterministic step has no log-probability"):
        build_sampler(ddim_scheduler(), 4, eta=float("nan"))


@pytest.mark.parametrize("kind", ["cps", "ddim", None])
def test_samplers_of_edm_models_are_refused_by_name(kind):
    with pytest.raises(
        ValueError, match="EDMEulerScheduler belongs to models that are neither DDPM nor flow matching"
    ):
        build_sampler(EDMEulerScheduler(), 4, sde_type=kind, eta=0.8)


def test_grids_that_cannot_be_stepped_on_are_refused_with_advice():
    with pytest.raises(ValueError, match="28 DDIM steps.*'trailing'.*such as 25 or 40"):
        build_sampler(ddim_scheduler(timestep_spacing="trailing"), 28)
    assert len(build_sampler(ddim_scheduler(timestep_spacing="trailing"), 40)) == 40
    with pytest.raises(ValueError, match="'linspace'.*use timestep_spacing 'leading' or 'trailing'"):
        build_sampler(ddim_scheduler(timestep_spacing="linspace"), 28)
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="rescale_betas_zero_snr.*predicts epsilon"):
        build_sampler(ddim_scheduler(**zero_snr), 20)
    build_sampler(ddim_scheduler(**zero_snr, prediction_type="v_prediction"), 20)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_equal_the_scheduler_s(prediction_type, eta):
    scheduler = ddim_scheduler(prediction_type=prediction_type)
    sampler = build_sampler(scheduler, 8, eta=eta)
    assert isinstance(sampler, DDIMSampler)
    scheduler.set_timesteps(8)
    assert torch.equal(sampler.timesteps, scheduler.timesteps.float())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, 4, 6, 6), generator=generator)
    for index, timestep in enumerate(scheduler.timesteps):
        output, noise = torch.randn((2, 2, 4, 6, 6), generator=generator)
        expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise if eta else None)
        if eta == 0:
            actual = sampler.step(index, latents, output)
        else:
            actual = sampler.take_step(index, latents, output, noise=noise, dtype=torch.float32).next_latents
        torch.testing.assert_close(actual, expected.prev_sample, rtol=1e-4, atol=1e-5)
        clean = sampler.predict_clean(index, latents, output)
        torch.testing.assert_close(clean, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        latents = expected.prev_sample


def test_ddim_grid_of_another_ddpm_scheduler():
    sampler = build_sampler(PNDMScheduler(skip_prk_steps=True, **SD_CONFIG), 10)
    assert torch.equal(sampler.timesteps, build_sampler(ddim_scheduler(), 10).timesteps)
    alphas = ddim_scheduler().alphas_cumprod
    torch.testing.assert_close(sampler.levels[0], (1 - alphas[901]).sqrt())
    torch.testing.assert_close(sampler.levels[-1], (1 - alphas[0]).sqrt())
    assert bool((sampler.levels[:-1] > sampler.levels[1:]).all())


def test_steps_without_noise_have_no_log_prob():
    scheduler = ddim_scheduler(set_alpha_to_one=True)
    sampler, latents = build_sampler(scheduler, 5, eta=1.0), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="DDIM step 4 of 5 adds no noise"):
        sampler.transition(4, latents, latents)
    with pytest.raises(ValueError, match="no log-probability"):
        build_sampler(scheduler, 5).transition(0, latents, latents)
    with pytest.raises(ValueError, match="do not lead from each timestep to the next"):
        build_sampler(ddim_scheduler(timestep_spacing="trailing"), 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ddim_replay_gives_the_recorded_log_prob(dtype):
    sampler = build_sampler(ddim_scheduler(), 5, eta=1.0)
    latents, output, noise = torch.randn((3, 2, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    latents = latents.to(dtype)
    taken = sampler.take_step(1, latents, output, noise=noise, dtype=dtype)
    assert taken.next_latents.dtype == dtype
    replayed = sampler.replay_step(1, latents, output, next_latents=taken.next_latents)
    assert torch.equal(replayed.log_prob, taken.log_prob)
    exact = sampler.log_prob(taken.transition, taken.transition.mean + taken.transition.std * noise)
    assert torch.equal(exact, taken.log_prob) is (dtype == torch.float32)


@pytest.mark.parametrize("prediction_type", ["flow", "epsilon", "sample", "v_prediction"])
def test_moved_predictions_predict_moved_clean_latents(prediction_type):
    flow = prediction_type == "flow"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else ddim_scheduler(prediction_type=prediction_type)
    sampler = build_sampler(scheduler, 10)
    latents, prediction, shift = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = sampler.move_clean(4, prediction, shift)
    before, after = (sampler.predict_clean(4, latents, output) for output in (prediction, moved))
    torch.testing.assert_close(after - before, shift, atol=1e-4, rtol=1e-4)


def test_ddim_is_deterministic_unless_asked():
    sampler = DDIMSampler(torch.tensor([0.1, 0.5, 1.0]), torch.tensor([900.0, 400.0]))
    assert sampler.eta == 0.0
    assert sampler.levels.tolist() == pytest.approx([0.9**0.5, 0.5**0.5, 0.0], abs=1e-7)
    flow = FlowSampler(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1000.0, 500.0]))
    assert (flow.eta, flow.sde_type) == (0.0, "cps")


def test_a_ddim_step_is_deterministic_whatever_eta():
    steps = [DDIMSampler.from_scheduler(DDIMScheduler(), 4, eta=eta) for eta in (0.0, 1.0)]
    latents, prediction = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(steps[0].step(1, latents, prediction), steps[1].step(1, latents, prediction))
