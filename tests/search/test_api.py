"""`search` on a real pipeline with a latent reward: counts, seeds, batches, rewards of all kinds, and wrong input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dina_reward.alignment.generator import Generator
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.alignment.sampling.seeding import Stream, noise_by_row
from dina_reward.data.records import PreferencePair
from dina_reward.noise.draws import fold_seed
from dina_reward.search import FKSteering, SearchResult, search
from dina_reward.search.api import METHODS, check_steppable, default_steps, image_size
from tests.search.helpers import CPU, STEPS, TINY, closeness, tiny


PROMPTS = ["a cat", "a dog"]


def run(reward: Any = None, prompts: Any = PROMPTS, **options: Any) -> SearchResult:
    pipeline, latent = tiny()
    return search(pipeline, latent if reward is None else reward, prompts, **{**TINY, **options})


def test_one_sample_is_the_samplers_own_and_nothing_is_altered() -> None:
    pipeline, _ = tiny()
    before = {name: parameter.clone() for name, parameter in pipeline.transformer.named_parameters()}
    result = run(closeness, method="best_of_n", budget=1, seed=5)
    generator = Generator(pipeline, max_sequence_length=8)
    seeds = [fold_seed(5, Stream.INITIAL_LATENTS, number, 0) for number in range(2)]
    predict = generator.bind(generator.encode(PROMPTS, CPU), None)
    expected = sample(predict, noise_by_row(seeds, (16, 4, 4)), generator.sampler(STEPS, (16, 4, 4))).latents
    assert torch.equal(result.latents, expected)
    torch.testing.assert_close(result.scores, closeness(expected))
    assert all(torch.equal(before[name], parameter) for name, parameter in pipeline.transformer.named_parameters())
    assert not getattr(pipeline.transformer, "peft_config", {})


# Two prompts, five steps: denoiser calls, reward calls.
HAND_COUNTED = [
    ("best_of_n", 3, {}, 2 * 3 * 5, 2 * 3),
    ("halving", 3, {"checks": (0.4, 0.6)}, 2 * (4 * 2 + 2 * 1 + 1 * 2), 2 * (4 + 2 + 1)),
    ("fk", 3, {"checks": (0.4, 0.6)}, 2 * 3 * 5, 2 * 3 * 3),
    ("stepwise", 2, {"branches": 3, "window": (0.0, 0.6)}, 2 * 2 * 5, 2 * 2 * (3 * 3 + 1)),
    ("zero_order", 3, {"neighbours": 2}, 2 * 3 * 5, 2 * 3),
    ("paths", 3, {"start": 0.4, "back": 0.2, "ahead": 0.4}, 2 * 1 * (2 + 2 * 2 + 2 * 2 + 1), 2 * (2 + 2 + 1)),
    ("guidance", 2, {"window": (0.0, 0.99)}, 2 * 2 * 5, 2 * 2 * (4 + 1)),
    ("noise_optimization", 2, {}, 2 * 2 * 5, 2 * (2 + 1)),
]


@pytest.mark.parametrize(("method", "budget", "settings", "denoiser", "reward"), HAND_COUNTED)
def test_calls_by_hand(method: str, budget: float, settings: dict[str, Any], denoiser: int, reward: int) -> None:
    result = run(method=method, budget=budget, **settings)
    assert (result.denoiser_calls, result.reward_calls, result.decoder_calls) == (denoiser, reward, 0)
    assert denoiser <= 2 * budget * STEPS
    assert result.latents.shape == (2, 16, 4, 4)
    assert bool(result.scores.isfinite().all())
    assert result.prompts == PROMPTS


def test_every_method_is_counted() -> None:
    assert {row[0] for row in HAND_COUNTED} == METHODS.keys()


def test_guidance_of_the_model_counts_twice() -> None:
    assert run(closeness, method="best_of_n", budget=2, guidance_scale=3.0).denoiser_calls == 2 * 2 * 2 * STEPS


@pytest.mark.parametrize("method", ["halving", "fk", "stepwise"])
def test_same_seed_same_result_whatever_the_batch(method: str) -> None:
    whole, again, split, other = (run(method=method, budget=3, **o) for o in ({}, {}, {"batch_size": 2}, {"seed": 1}))
    assert torch.equal(whole.latents, again.latents)
    assert whole.nodes == split.nodes
    torch.testing.assert_close(whole.latents, split.latents, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole.latents, other.latents, atol=1e-2)


def test_rewards_that_cannot_read_states_see_predictions_and_pay_for_them() -> None:
    result = run(closeness, method="halving", budget=3, checks=(0.4, 0.6))
    # Four are begun, and those given up were asked once more: 4 * 2 + 2, 2 * 1 + 1, 1 * 2.
    assert result.denoiser_calls == 2 * (4 * 2 + 2 + 2 * 1 + 1 + 1 * 2)
    assert result.decoder_calls == 0
    levels = [check.noise_level for check in result.trace]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == 0


def test_pixel_rewards_decode_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    def brightness(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 32, 32)
        return images.mean(dim=(1, 2, 3))

    result = run(brightness, method="best_of_n", budget=3)
    assert result.decoder_calls == 6
    images = result.images()
    assert result.decoder_calls == 8
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), result.scores)
    assert result.images() is images


def test_several_rewards_are_weighted_and_may_not_apply() -> None:
    def dogs_alone(latents: torch.Tensor, prompts: list[str]) -> list[float | None]:
        return [float(row.mean()) if "dog" in prompt else None for row, prompt in zip(latents, prompts, strict=True)]

    result = run([closeness, dogs_alone], method="best_of_n", budget=2, reward_weights=[2.0, -1.0])
    expected = 2 * closeness(result.latents)
    expected[1] -= result.latents[1].mean()
    torch.testing.assert_close(result.scores, expected)
    mixed = run([tiny()[1], closeness], method="halving", budget=2, checks=(0.6,))
    assert mixed.denoiser_calls <= 2 * 2 * STEPS


def test_states_are_scored_at_their_own_level_or_as_predictions() -> None:
    state, clean = (run(method="halving", budget=2, checks=(0.6,), score_as=kind) for kind in ("state", "clean"))
    assert [result.denoiser_calls for result in (state, clean)] == [2 * (2 * 3 + 2), 2 * (2 * 3 + 1 + 2)]
    assert not torch.equal(state.trace[0].scores[:2], clean.trace[0].scores[:2])


def test_lineage_leads_from_the_first_check_to_the_sample() -> None:
    result = run(closeness, method="halving", budget=4, checks=(0.4, 0.6))
    for row in range(2):
        line = result.lineage(row)
        assert [ancestor.step for ancestor in line] == [2, 3, 5]
        assert line[-1].score == float(result.scores[row])
        assert line[-1].rank == 0
        survivors = [round(len(check.prompt) / 2) for check in result.trace[1:]]
        assert all(ancestor.rank < count for ancestor, count in zip(line, survivors, strict=False))
    assert [line["scored"] for line in result.check_table()] == [len(check.prompt) for check in result.trace]


def test_pairs_are_of_one_prompt_at_one_level_and_train() -> None:
    result = run(method="halving", budget=4, checks=(0.4,), return_pairs=True)
    noisy, clean = ([pair for pair in result.pairs if bool(pair.noise_level) is kind] for kind in (True, False))
    assert noisy
    assert clean
    assert {pair.prompt for pair in noisy} == set(PROMPTS)
    assert all(0.5 < pair.p_chosen <= 1 for pair in result.pairs)
    with pytest.raises(ValueError, match="training rows hold clean latents"):
        noisy[0].training_row()
    rows = [PreferencePair.from_record(pair.training_row()) for pair in clean]
    _, latent = tiny()
    sides = [torch.stack([getattr(row, name) for row in rows]) for name in ("chosen", "rejected")]
    chosen, rejected = (latent(side, [row.prompt for row in rows], share_noise=True, seed=0) for side in sides)
    assert float((chosen - rejected).mean()) > 0
    assert run(method="halving", budget=2).pairs == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "beam"}, "unknown method 'beam'; choose one of best_of_n, halving, fk"),
        ({"method": "fk", "branches": 2}, "fk has no option 'branches'; it takes potential, strength"),
        ({"method": FKSteering(), "strength": 2.0}, r"\['strength'\] are given besides a FKSteering; set them in it"),
        ({"budget": 0.5}, "budget must be a number of samples of at least 1 and at most 1000000, got 0.5"),
        ({"budget": float("nan")}, "budget must be a number of samples"),
        ({"keep": 0}, "keep must be an integer of at least 1, got 0"),
        ({"keep": 9, "budget": 3}, "but keep is 9"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"prompts": []}, r"prompts must be a string or a list of at least one, got \[\]"),
        ({"prompts": [1]}, "prompts: each must be text, got int: 1"),
        ({"prompts": {"a", "b"}}, "prompts must be a string or a list"),
        ({"score_as": "noise"}, "unknown score_as 'noise'; choose one of state, clean"),
        ({"reward": lambda: None}, "the rewards apply to none of the samples"),
        ({"reward": []}, "reward"),
        ({"reward": "pickscore"}, "reward must be one function or a list of functions"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 entries for 1 reward functions"),
        (
            {"method": "fk", "eta": 0.0},
            "eta is 0.0, but fk needs stochastic steps, or successors of a state would all be",
        ),
        ({"method": "halving", "eta": 0.7}, "halving takes deterministic steps; leave eta and sde_type away"),
        ({"method": "stepwise", "sde_type": "ddim"}, "sde_type is 'ddim' but FlowMatchEulerDiscreteScheduler"),
        ({"method": "stepwise", "num_inference_steps": 1}, "stepwise needs at least two denoising steps"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1"),
        ({"height": 30}, "must be divisible by 16"),
        ({"method": "guidance", "reward": closeness, "budget": 1}, "closeness cannot score a noisy state"),
    ],
)
def test_wrong_input_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_offloaded_pipelines_are_refused() -> None:
    pipeline, _ = tiny()
    offloaded = torch.nn.Linear(1, 1)
    offloaded._hf_hook = SimpleNamespace(offload=True)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the pipeline's text_encoder is offloaded .*use SearchCallback"):
        check_steppable(SimpleNamespace(components={"scheduler": None, "text_encoder": offloaded}))
    with pytest.raises(ValueError, match="weight 'weight' is offloaded"):
        check_steppable(SimpleNamespace(components={"unet": torch.nn.Linear(1, 1, device="meta")}))
    check_steppable(pipeline)


def test_sizes_and_steps_of_the_pipeline_itself() -> None:
    pipeline, _ = tiny()
    assert default_steps(pipeline) == 28
    generator = Generator(pipeline)
    assert image_size(pipeline, generator, None, None) == (128, 128)
    assert image_size(pipeline, generator, 64, None) == (64, 128)
    bare: Any = SimpleNamespace(vae_scale_factor=8)
    unsized: Any = SimpleNamespace(denoiser=SimpleNamespace(config={}))
    with pytest.raises(ValueError, match="states no size of its own; give height and width"):
        image_size(bare, unsized, None, 64)
