from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dina_reward.noise import FlowMatchingNoise, LevelSampler, VariancePreservingNoise, is_flow_matching


SD3_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}
FLUX_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True}
SD15_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
DRAWS = 20_000
OTHER_PROCESSES = [
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "ScoreSdeVeScheduler",
    "SCMScheduler",
]


@pytest.fixture(scope="module")
def flow() -> FlowMatchingNoise:
    return FlowMatchingNoise.from_scheduler_config(SD3_SCHEDULER)


@pytest.mark.parametrize(
    ("wanted", "level", "timestep"),
    [
        (0.1, 0.100746, 100.7),
        (0.4, 0.400293, 400.3),
        (0.7, 0.700426, 700.4),
        (0.0, 0.002994, 2.99),
        (1.0, 1.0, 1000.0),
    ],
)
def test_sd3_levels_snap_to_the_published_grid(
    flow: FlowMatchingNoise, wanted: float, level: float, timestep: float
) -> None:
    point = flow.snap(wanted)
    assert point.level.item() == pytest.approx(level, abs=1e-6)
    assert point.timestep.item() == pytest.approx(timestep, abs=0.06)


def test_flux_grid_is_linear() -> None:
    point = FlowMatchingNoise.from_scheduler_config(FLUX_SCHEDULER).snap([0.1, 0.4])
    torch.testing.assert_close(point.level, torch.tensor([0.1, 0.4]), atol=1e-6, rtol=0)
    torch.testing.assert_close(point.timestep, torch.tensor([100.0, 400.0]), atol=1e-3, rtol=0)


def test_grid_does_not_depend_on_an_inference_schedule(flow: FlowMatchingNoise) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**SD3_SCHEDULER)
    scheduler.set_timesteps(4)
    again = FlowMatchingNoise.from_scheduler_config(scheduler.config)
    assert torch.equal(again.levels, flow.levels)


def test_flow_noise_interpolates(flow: FlowMatchingNoise) -> None:
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, 0.25, 1.0])
    noisy = flow.add_noise(latents, noise, level)
    assert torch.equal(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    assert torch.equal(noisy[2], noise[2])


def test_variance_preserving_noise_matches_the_scheduler() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SD15_SCHEDULER)
    process = VariancePreservingNoise.from_scheduler_config(scheduler.config)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 400, 999])
    point = process.from_timesteps(timesteps)
    torch.testing.assert_close(point.timestep, timesteps.float())
    torch.testing.assert_close(
        process.add_noise(latents, noise, point.level),
        scheduler.add_noise(latents, noise, timesteps),
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(process.signal(point.level) ** 2 + point.level**2, torch.ones(3))


def test_snap_is_the_identity_on_the_grid(flow: FlowMatchingNoise) -> None:
    point = flow.snap(flow.levels)
    assert torch.equal(point.level, flow.levels)
    assert torch.equal(flow.from_timesteps(point.timestep).level, flow.levels)


def test_noisy_latents_keep_their_dtype(flow: FlowMatchingNoise) -> None:
    latents = torch.zeros(2, 4, 2, 2, dtype=torch.bfloat16)
    assert flow.add_noise(latents, torch.ones(2, 4, 2, 2), torch.tensor([0.1, 0.2])).dtype == torch.bfloat16


@pytest.mark.parametrize("level", [-0.1, 1.5, 400.0, float("nan")])
def test_levels_outside_the_unit_interval_are_refused(flow: FlowMatchingNoise, level: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*timesteps="):
        flow.snap(level)


@pytest.mark.parametrize("timestep", [-1.0, 2000.0])
def test_timesteps_outside_the_grid_are_refused(flow: FlowMatchingNoise, timestep: float) -> None:
    with pytest.raises(ValueError, match="timesteps must lie in the scheduler's range"):
        flow.from_timesteps(timestep)


def draw(sampler: LevelSampler, seed: int = 0) -> Tensor:
    return sampler.sample(DRAWS, generator=torch.Generator().manual_seed(seed))


def quantiles(values: Tensor) -> list[float]:
    return torch.quantile(values, torch.tensor([0.1, 0.5, 0.9])).tolist()


def mode_levels(scale: float) -> Tensor:
    u = torch.linspace(0, 1, DRAWS, dtype=torch.float64)
    return (1 - u - scale * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)).clamp(0, 1)


def beta_levels(alpha: float, beta: float) -> Tensor:
    """Quantiles of Beta(2, 5) at equally spaced probabilities, from its distribution function."""
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = x ** (alpha - 1) * (1 - x) ** (beta - 1)
    cumulative = density.cumsum(0) / density.sum()
    return x[torch.searchsorted(cumulative, torch.linspace(0.00005, 0.99995, DRAWS, dtype=torch.float64))]


UNIFORM = torch.linspace(0, 1, DRAWS, dtype=torch.float64)
NORMAL = torch.special.ndtri(torch.linspace(0.00005, 0.99995, DRAWS, dtype=torch.float64))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (LevelSampler(), UNIFORM),
        (LevelSampler("logit_normal", mean=0.5, std=1.5), torch.sigmoid(0.5 + 1.5 * NORMAL)),
        (LevelSampler("mode", mode_scale=1.29), mode_levels(1.29)),
        (LevelSampler("mode", mode_scale=-0.5), mode_levels(-0.5)),
        (LevelSampler("power", exponent=3.0), UNIFORM**3),
        (LevelSampler("beta", alpha=2.0, beta=5.0), beta_levels(2.0, 5.0)),
        (LevelSampler("constant", value=0.3), torch.full((DRAWS,), 0.3, dtype=torch.float64)),
    ],
    ids=lambda value: value.distribution if isinstance(value, LevelSampler) else "",
)
def test_level_distributions(sampler: LevelSampler, expected: Tensor) -> None:
    levels = draw(sampler)
    assert levels.shape == (DRAWS,)
    assert levels.dtype == torch.float32
    assert 0 <= levels.min() <= levels.max() <= 1
    assert levels.mean().item() == pytest.approx(expected.mean().item(), abs=0.01)
    assert levels.std().item() == pytest.approx(expected.std().item(), abs=0.01)
    assert quantiles(levels) == pytest.approx(quantiles(expected.float()), abs=0.015)


@pytest.mark.parametrize("name", ["uniform", "logit_normal", "mode", "power", "beta"])
def test_levels_depend_on_the_generator_alone(name: Any) -> None:
    sampler = LevelSampler(name)
    assert torch.equal(draw(sampler, seed=1), draw(sampler, seed=1))
    assert not torch.equal(draw(sampler, seed=1), draw(sampler, seed=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distribution": "gamma"}, "unknown level distribution 'gamma'; choose one of uniform"),
        ({"std": 0.0}, "std must be positive"),
        ({"exponent": -1.0}, "exponent must be positive"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"value": 1.2}, r"value must lie in \[0, 1\]"),
    ],
)
def test_bad_distributions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LevelSampler(**arguments)


@pytest.mark.parametrize("name", OTHER_PROCESSES)
def test_schedulers_of_other_processes_are_refused(name: str) -> None:
    config = getattr(diffusers, name)().config
    for read in (
        is_flow_matching,
        FlowMatchingNoise.from_scheduler_config,
        VariancePreservingNoise.from_scheduler_config,
    ):
        with pytest.raises(ValueError, match="neither DDPM nor flow matching"):
            read(config)


def test_the_other_known_process_is_refused() -> None:
    with pytest.raises(ValueError, match="this model is a flow-matching one, but the scheduler is a DDPM's"):
        FlowMatchingNoise.from_scheduler_config(diffusers.DDIMScheduler().config)
    with pytest.raises(ValueError, match="this model is a DDPM, but the scheduler is a flow-matching one"):
        VariancePreservingNoise.from_scheduler_config(diffusers.FlowMatchEulerDiscreteScheduler().config)


def test_the_shift_of_multistep_solvers_counts() -> None:
    solver = {"use_flow_sigmas": True, "num_train_timesteps": 1000, "beta_schedule": "linear"}
    grids = {shift: FlowMatchingNoise.from_scheduler_config({**solver, "flow_shift": shift}) for shift in (1.0, 3.0)}
    for shift, grid in grids.items():
        plain = torch.arange(1000, 0, -1) / 1000
        torch.testing.assert_close(grid.levels, shift * plain / (1 + (shift - 1) * plain))
    for unshifted in (solver, {**solver, "flow_shift": None}):
        torch.testing.assert_close(FlowMatchingNoise.from_scheduler_config(unshifted).levels, grids[1.0].levels)


def test_timesteps_up_to_one_beyond_the_grid_are_its_end() -> None:
    """Samplers whose steps are offset by one name the last step so."""
    ddpm = VariancePreservingNoise.from_scheduler_config(SD15_SCHEDULER)
    assert ddpm.from_timesteps(1000.0).timestep.tolist() == [999.0]
    with pytest.raises(ValueError, match=r"range \[0, 999\]"):
        ddpm.from_timesteps(1000.5)


def test_one_is_a_timestep_and_less_is_taken_for_a_level() -> None:
    ddpm = VariancePreservingNoise.from_scheduler_config(SD15_SCHEDULER)
    assert ddpm.from_timesteps([0.0, 1.0]).timestep.tolist() == [0.0, 1.0]
    assert ddpm.from_timesteps(1.0).timestep.tolist() == [1.0]
    with pytest.raises(ValueError, match="if these are noise levels, pass them as"):
        ddpm.from_timesteps(0.99)


def test_defaults_of_the_distributions() -> None:
    def levels(sampler: LevelSampler) -> Tensor:
        return sampler.sample(4, torch.Generator().manual_seed(0))

    for short, written in (
        (LevelSampler("power"), LevelSampler("power", exponent=2.0)),
        (LevelSampler("beta"), LevelSampler("beta", alpha=2.0, beta=2.0)),
        (LevelSampler("constant"), LevelSampler("constant", value=0.4)),
        (LevelSampler("mode"), LevelSampler("mode", mode_scale=1.29)),
        (LevelSampler("logit_normal"), LevelSampler("logit_normal", mean=0.0, std=1.0)),
    ):
        assert torch.equal(levels(short), levels(written))


def test_levels_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    u, n = torch.rand(4, generator=generator), torch.randn(4, generator=generator)
    drawn = LevelSampler("logit_normal", mean=0.5, std=2.0).sample(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, torch.sigmoid(0.5 + 2 * n))
    assert torch.equal(LevelSampler("power", exponent=3.0).sample(4, torch.Generator().manual_seed(0)), u**3)


def test_pure_noise_is_a_level(flow: FlowMatchingNoise) -> None:
    assert flow.snap(1.0).level.tolist() == [1.0]


@pytest.mark.parametrize("shapes", [((3,), (2,)), ((2, 2), (2, 2))])
def test_grids_are_one_dimensional_and_of_one_length(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="must be 1-D and of one length"):
        FlowMatchingNoise(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
