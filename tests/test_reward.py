"""LatentReward: what it returns, what it refuses, what it never depends on."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward, LatentRewardConfig, NonFiniteError
from dina_reward.likelihood import ensemble_level
from dina_reward.modeling import default_lora_config
from dina_reward.noise import LevelSampler
from tests.tiny_models import tiny_sd3_transformer


CONFIG = LatentRewardConfig(family="sd3", num_layers=2, visual_taps=(1, 2), max_sequence_length=16)
PROMPTS = ["a cat", "a dog", "a cat"]


def make_reward(pipeline: Any, *, trained: bool = True, **kwargs: Any) -> LatentReward:
    """A reward whose LoRA is not a no-op, as after training."""
    reward = LatentReward.from_config(CONFIG, pipeline=pipeline, **kwargs)
    if trained:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in reward.model.trainable_state().items():
                if "lora_B" in name or "cond_mlp" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return reward.eval()


@pytest.fixture(scope="module")
def reward(sd3_pipeline: Any) -> LatentReward:
    return make_reward(sd3_pipeline)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))


def test_call_returns_float32_without_gradient(reward: LatentReward, latents: Tensor) -> None:
    for given in (latents.requires_grad_(), latents.detach().bfloat16(), latents.detach().double()):
        scores = reward(given, PROMPTS, seed=0)
        assert scores.shape == (3,)
        assert scores.dtype == torch.float32
        assert not scores.requires_grad


def test_pipeline_output_can_be_scored(sd3_pipeline: Any, reward: LatentReward) -> None:
    latents = sd3_pipeline(
        PROMPTS, height=64, width=64, num_inference_steps=2, max_sequence_length=16, output_type="latent"
    ).images
    assert reward(latents, PROMPTS, seed=0).shape == (3,)


def test_seed_decides_everything(reward: LatentReward, latents: Tensor) -> None:
    first = reward(latents, PROMPTS, seed=3)
    assert torch.equal(first, reward(latents, PROMPTS, seed=3))
    assert not torch.equal(first, reward(latents, PROMPTS, seed=4))
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(
        reward(latents, PROMPTS, generator=generator), reward(latents, PROMPTS, generator=generator)
    )


def test_global_settings_of_torch_change_nothing(reward: LatentReward, latents: Tensor) -> None:
    states = {"noise_level": 0.4}
    expected = (reward(latents, PROMPTS, seed=3), reward.score_noisy(latents, PROMPTS, **states))
    random = torch.Generator("cpu").manual_seed(0)
    torch.manual_seed(0)
    drawn = reward(latents, PROMPTS)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        scores = (reward(latents, PROMPTS, seed=3), reward.score_noisy(latents, PROMPTS, **states))
        levels = LevelSampler("logit_normal").sample(4, generator=random)
        torch.manual_seed(0)
        assert torch.equal(reward(latents, PROMPTS), drawn)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(scores, expected, strict=True))
    assert torch.equal(levels, LevelSampler("logit_normal").sample(4, generator=random.manual_seed(0)))


@pytest.mark.parametrize("ensemble", ["tokens", "mean"])
@pytest.mark.parametrize("noise_level", [0.4, (0.2, 0.5, 0.7)])
def test_batch_split_does_not_matter(reward: LatentReward, latents: Tensor, noise_level: Any, ensemble: Any) -> None:
    arguments = {"noise_level": noise_level, "ensemble": ensemble, "num_noise_samples": 2}
    whole = reward(latents, PROMPTS, seed=5, **arguments)
    for batch_size in (1, 2, 7):
        torch.testing.assert_close(reward(latents, PROMPTS, seed=5, batch_size=batch_size, **arguments), whole)
    seeds = [7, 8, 9]
    whole = reward(latents, PROMPTS, seed=seeds, **arguments)
    rows = [reward(latents[i : i + 1], PROMPTS[i : i + 1], seed=seeds[i : i + 1], **arguments) for i in range(3)]
    torch.testing.assert_close(torch.cat(rows), whole)


@pytest.mark.parametrize("ensemble", ["tokens", "mean"])
def test_noise_of_their_own_for_levels(reward: LatentReward, latents: Tensor, ensemble: Any) -> None:
    options: dict[str, Any] = {"noise_level": (0.2, 0.7), "ensemble": ensemble, "share_noise_across_levels": False}
    whole = reward(latents, PROMPTS, seed=5, num_noise_samples=2, **options)
    assert not torch.allclose(
        whole, reward(latents, PROMPTS, seed=5, num_noise_samples=2, noise_level=(0.2, 0.7), ensemble=ensemble)
    )
    split = reward(latents, PROMPTS, seed=5, num_noise_samples=2, batch_size=2, **options)
    torch.testing.assert_close(split, whole)
    seeds = [7, 8, 9]
    torch.testing.assert_close(
        reward(latents[1:2], PROMPTS[1], seed=seeds[1:2], **options),
        reward(latents, PROMPTS, seed=seeds, **options)[1:2],
    )
    noise = torch.randn(2, 1, *latents.shape)
    given = reward.score(latents, PROMPTS, noise=noise, **options)
    for place, level in enumerate((0.2, 0.7)):
        alone = reward(latents, PROMPTS, noise_level=level, noise=noise[place, 0])
        torch.testing.assert_close(given.level_scores[:, place], alone)
        seeded = reward(latents, PROMPTS, noise_level=level, seed=5, share_noise_across_levels=False)
        torch.testing.assert_close(reward.score(latents, PROMPTS, seed=5, **options).level_scores[:, place], seeded)


def test_score_reports_levels_and_spread(reward: LatentReward, latents: Tensor) -> None:
    levels = (0.2, 0.5, 0.7)
    output = reward.score(latents, PROMPTS, noise_level=levels, ensemble="mean", num_noise_samples=4, seed=0)
    assert output.level_scores.shape == (3, 3)
    torch.testing.assert_close(output.scores, output.level_scores.mean(dim=1))
    torch.testing.assert_close(output.noise_levels, torch.tensor(levels), atol=1e-3, rtol=0)
    torch.testing.assert_close(output.timesteps, 1000 * output.noise_levels)
    for column, level in enumerate(levels):
        alone = reward.score(latents, PROMPTS, noise_level=level, num_noise_samples=4, seed=0)
        torch.testing.assert_close(output.level_scores[:, column], alone.scores)
    draws = torch.stack([reward(latents, PROMPTS, noise_level=0.4, noise=n) for n in torch.randn(3, *latents.shape)])
    assert output.noise_std is not None
    assert output.noise_std.shape == (3,)
    torch.manual_seed(0)
    noise = torch.randn(3, *latents.shape)
    spread = reward.score(latents, PROMPTS, noise_level=0.4, noise=noise, num_noise_samples=3)
    draws = torch.stack([reward(latents, PROMPTS, noise_level=0.4, noise=n) for n in noise])
    torch.testing.assert_close(spread.noise_std, draws.std(dim=0))
    torch.testing.assert_close(spread.scores, draws.mean(dim=0))
    assert reward.score(latents, PROMPTS, seed=0).noise_std is None


def test_token_ensemble_differs_from_mean(reward: LatentReward, latents: Tensor) -> None:
    tokens = reward(latents, PROMPTS, noise_level=(0.2, 0.7), seed=0)
    mean = reward(latents, PROMPTS, noise_level=(0.2, 0.7), seed=0, ensemble="mean")
    assert not torch.allclose(tokens, mean, atol=1e-6)


def test_shared_noise_removes_noise_from_differences(reward: LatentReward, latents: Tensor) -> None:
    same = latents[:1].expand(3, -1, -1, -1)
    scores = reward(same, "a cat", seed=0, share_noise=True)
    torch.testing.assert_close(scores, scores[:1].expand(3))
    assert float(reward(same, "a cat", seed=0).std()) > 0


def test_normalised_score(reward: LatentReward, latents: Tensor) -> None:
    raw = reward(latents, PROMPTS, seed=0)
    torch.testing.assert_close(reward(latents, PROMPTS, seed=0, normalize=True), (raw + 10) / 10)
    output = reward.score(latents, PROMPTS, seed=0, normalize=True)
    torch.testing.assert_close(output.scores, (raw + 10) / 10)
    torch.testing.assert_close(output.level_scores[:, 0], (raw + 10) / 10)


def test_score_is_differentiable_and_matches_finite_differences(reward: LatentReward, latents: Tensor) -> None:
    latents = latents.requires_grad_()
    output = reward.score(latents, PROMPTS, noise_level=(0.2, 0.5), seed=0)
    (gradient,) = torch.autograd.grad(output.scores.sum(), latents)
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2 * direction
    with torch.no_grad():
        plus = reward.score(latents + step, PROMPTS, noise_level=(0.2, 0.5), seed=0).scores.sum()
        minus = reward.score(latents - step, PROMPTS, noise_level=(0.2, 0.5), seed=0).scores.sum()
    torch.testing.assert_close((plus - minus) / 2, (gradient * step).sum(), rtol=2e-2, atol=1e-4)
    assert all(p.grad is None for p in reward.model.parameters())


def test_embeddings_instead_of_prompts(reward: LatentReward, latents: Tensor) -> None:
    conditioning, index = reward.encode_prompts(PROMPTS)
    rows = conditioning[index]
    embeds = {"prompt_embeds": rows.prompt_embeds, "pooled_prompt_embeds": rows.pooled_prompt_embeds}
    torch.testing.assert_close(reward(latents, seed=0, **embeds), reward(latents, PROMPTS, seed=0))
    one = {name: tensor[:1] for name, tensor in embeds.items() if tensor is not None}
    torch.testing.assert_close(reward(latents, seed=0, **one), reward(latents, "a cat", seed=0))


def test_text_stream_runs_once_per_unique_prompt(reward: LatentReward, latents: Tensor) -> None:
    seen: list[int] = []
    embedder = reward.model.backbone.get_base_model().context_embedder
    handle = embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    reward(latents, PROMPTS, seed=0, noise_level=(0.2, 0.5, 0.7), num_noise_samples=2)
    handle.remove()
    assert seen == [2]  # one batched pass, two unique prompts


def test_preference_is_calibrated_thurstone(reward: LatentReward, latents: Tensor) -> None:
    other = latents.flip(0)
    probability = reward.preference(latents, other, "a cat", noise_level=0.4, seed=2)
    margin = reward(latents, "a cat", noise_level=0.4, seed=2) - reward(other, "a cat", noise_level=0.4, seed=2)
    sigma = 0.400293
    expected = torch.special.ndtr(margin / (2 * (2.0 * sigma**2 + 0.05) + 1e-6) ** 0.5)
    torch.testing.assert_close(probability, expected, rtol=1e-4, atol=1e-5)
    swapped = reward.preference(other, latents, "a cat", noise_level=0.4, seed=2)
    torch.testing.assert_close(probability + swapped, torch.ones(3))
    same = reward.preference(latents, latents, "a cat")
    torch.testing.assert_close(same, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"seed": [5, 6, 7]},
        {"seed": 2, "share_noise": True, "noise_level": (0.2, 0.6)},
        {"noise": torch.full((3, 16, 8, 8), 0.5), "ensemble": "mean", "noise_level": (0.2, 0.6)},
        {"noise": torch.full((1, 16, 8, 8), 0.5)},
        {"noise": torch.linspace(-1, 1, 2 * 3 * 16 * 64).view(2, 3, 16, 8, 8), "num_noise_samples": 2},
        {"seed": 2, "num_noise_samples": 2, "batch_size": 2},
    ],
)
def test_preference_scores_both_sides_in_one_pass_under_the_same_noise(
    reward: LatentReward, latents: Tensor, options: dict[str, Any]
) -> None:
    other = latents.flip(0)
    level = reward.noise_process.snap(options.get("noise_level", 0.4)).level
    scores = [reward(side, PROMPTS, **options) for side in (latents, other)]
    expected = reward.preference_model.probability(*scores, ensemble_level(level))
    rows: list[int] = []
    handle = reward.model.head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0].temb)))
    probability = reward.preference(latents, other, PROMPTS, **options)
    handle.remove()
    torch.testing.assert_close(probability, expected, atol=1e-5, rtol=1e-4)
    if "batch_size" not in options:
        assert set(rows) == {6 * len(level) * options.get("num_noise_samples", 1)}


def test_preference_takes_embeddings_by_pair_or_for_all(reward: LatentReward, latents: Tensor) -> None:
    conditioning, index = reward.encode_prompts(PROMPTS)
    rows = conditioning[index]
    embeds = {"prompt_embeds": rows.prompt_embeds, "pooled_prompt_embeds": rows.pooled_prompt_embeds}
    by_prompt = reward.preference(latents, latents.flip(0), PROMPTS, seed=0)
    torch.testing.assert_close(reward.preference(latents, latents.flip(0), seed=0, **embeds), by_prompt)
    one = {name: tensor[:1] for name, tensor in embeds.items() if tensor is not None}
    by_prompt = reward.preference(latents, latents.flip(0), "a cat", seed=0)
    torch.testing.assert_close(reward.preference(latents, latents.flip(0), seed=0, **one), by_prompt)
    both = {name: torch.cat([tensor, tensor]) for name, tensor in embeds.items() if tensor is not None}
    with pytest.raises(ValueError, match="prompt_embeds has 6 rows for 3 pairs"):
        reward.preference(latents, latents.flip(0), **both)


def test_call_and_score_show_the_same_options(reward: LatentReward) -> None:
    # Trainers pass an argument only to functions whose signature names it.
    assert list(inspect.signature(reward).parameters) == list(inspect.signature(reward.score).parameters)
    assert "noise_level" in inspect.signature(reward).parameters
    with pytest.raises(TypeError, match="unexpected keyword argument 'noise_levels'"):
        reward(torch.zeros(1, 16, 8, 8), "a cat", noise_levels=0.4)


def test_merged_and_unmerged_scores_agree(sd3_pipeline: Any, latents: Tensor) -> None:
    reward = make_reward(sd3_pipeline)
    assert reward.merged
    merged = reward(latents, PROMPTS, seed=0)
    reward.train()
    assert not reward.merged
    assert all(p.requires_grad for p in reward.model.trainable_state().values())
    reward.model.eval()
    torch.testing.assert_close(reward(latents, PROMPTS, seed=0), merged, atol=1e-5, rtol=0)
    base = [
        n for n, p in reward.model.named_parameters() if p.requires_grad and n not in reward.model.trainable_state()
    ]
    assert base == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda reward: pickle.loads(pickle.dumps(reward))])
def test_copies_score_the_same_after_prompts_were_encoded(
    reward: LatentReward, latents: Tensor, duplicate: Callable[[LatentReward], LatentReward]
) -> None:
    expected = reward(latents, "a cat", seed=0)
    other = duplicate(reward)
    assert torch.equal(other(latents, "a cat", seed=0), expected)
    assert torch.equal(reward(latents, "a dog", seed=0), other(latents, "a dog", seed=0))


def test_scoring_leaves_the_pipeline_alone(sd3_pipeline: Any, reward: LatentReward, latents: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in sd3_pipeline.transformer.state_dict().items()}
    reward(latents, PROMPTS, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd3_pipeline.transformer.state_dict().items())


def test_bfloat16_backbone_keeps_float32_adapter_and_scores(sd3_pipeline: Any, latents: Tensor) -> None:
    reward = make_reward(sd3_pipeline, torch_dtype=torch.bfloat16)
    assert reward.model.dtype == torch.bfloat16
    assert {p.dtype for p in reward.model.trainable_state().values()} == {torch.float32}
    scores = reward(latents, PROMPTS, seed=0)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, make_reward(sd3_pipeline)(latents, PROMPTS, seed=0), atol=0.05, rtol=0.05)


def test_compiled_scores_agree(sd3_pipeline: Any, latents: Tensor) -> None:
    reward = make_reward(sd3_pipeline)
    eager = reward(latents, PROMPTS, seed=0, noise_level=(0.2, 0.5))
    reward.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(reward(latents, PROMPTS, seed=0, noise_level=(0.2, 0.5)), eager, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing(sd3_pipeline: Any, latents: Tensor) -> None:
    reward = make_reward(sd3_pipeline)
    latents = latents.requires_grad_()
    plain = torch.autograd.grad(reward.score(latents, PROMPTS, seed=0).scores.sum(), latents)[0]
    reward.model.enable_gradient_checkpointing()
    recomputed = torch.autograd.grad(reward.score(latents, PROMPTS, seed=0).scores.sum(), latents)[0]
    assert torch.equal(plain, recomputed)


def test_fresh_rewards_are_reproducible_and_leave_the_global_seed_alone(sd3_pipeline: Any) -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first = make_reward(sd3_pipeline, trained=False, seed=4).model.state_dict()
    assert torch.equal(torch.rand(1), expected)
    second = make_reward(sd3_pipeline, trained=False, seed=4).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_reward(sd3_pipeline, trained=False, seed=5).model.head.query_tokens
    assert not torch.equal(first["head.query_tokens"], other)


def bad_latents(kind: str, latents: Tensor) -> Any:
    nan = latents.clone()
    nan[1, 0, 0, 0] = float("nan")
    return {
        "list": latents.tolist(),
        "integer": (latents * 100).to(torch.uint8),
        "rank": latents[0],
        "packed": torch.zeros(3, 16, 64),
        "channels": latents[:, :4],
        "odd": latents[:, :, :7],
        "large": torch.zeros(1, 16, 128, 8),
        "empty": latents[:0],
        "nan": nan,
        "device": latents.to("meta"),
        "sparse": latents.to_sparse(),
        "float8": latents.to(torch.float8_e4m3fn),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("list", "must be a torch.Tensor, got list"),
        ("integer", "dtype torch.uint8; expected floating-point"),
        ("rank", r"without a batch dimension; pass latents\[None\]"),
        ("packed", "packed latents"),
        ("channels", "4 channels"),
        ("odd", "multiple of 2"),
        ("large", "at most 64"),
        ("empty", "empty batch"),
        ("nan", r"rows \[1\] are not finite"),
        ("device", "latents are on meta but the reward is on cpu"),
        ("sparse", "latents must be dense and of at least 16 bits"),
        ("float8", "latents must be dense and of at least 16 bits"),
    ],
)
def test_wrong_latents_are_refused(reward: LatentReward, latents: Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward(bad_latents(kind, latents), "a cat", seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a", "b"]}, "got 2 prompts for 3 latents"),
        ({}, "either `prompts` or `prompt_embeds`"),
        ({"prompts": "a", "prompt_embeds": torch.zeros(3, 5, 64)}, "either `prompts` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(3, 5, 64)}, "needs pooled_prompt_embeds"),
        (
            {"prompt_embeds": torch.zeros(3, 5, 32), "pooled_prompt_embeds": torch.zeros(3, 64)},
            r"takes \(batch, length, 64\)",
        ),
        ({"prompt_embeds": torch.zeros(3, 5, 64), "pooled_prompt_embeds": torch.zeros(3, 8)}, r"expected \(3, 64\)"),
        ({"prompt_embeds": torch.zeros(6, 5, 64), "pooled_prompt_embeds": torch.zeros(6, 64)}, "6 rows for 3 latents"),
        ({"prompts": "a", "noise_level": 400}, r"must lie in \[0, 1\].*timesteps="),
        ({"prompts": "a", "noise_level": float("nan")}, r"must lie in \[0, 1\]"),
        ({"prompts": "a", "noise_level": ()}, "at least one"),
        ({"prompts": "a", "ensemble": "max"}, "'tokens' or 'mean', got 'max'"),
        ({"prompts": "a", "batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"prompts": "a", "batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
        ({"prompts": "a", "num_noise_samples": True}, "num_noise_samples must be an integer"),
        ({"prompts": "a", "noise_level": "0.4"}, "noise_level must be a number or a sequence of numbers, got '0.4'"),
        ({"prompts": "a", "noise_level": True}, "noise_level must be a number or a sequence of numbers, got 'True'"),
        ({"prompts": "a", "noise_level": {0.4}}, "noise_level must be a number or a sequence of numbers"),
        ({"prompts": "a", "noise": np.zeros((3, 16, 8, 8))}, "noise must be a torch.Tensor, got ndarray"),
        ({"prompts": "a", "generator": 3}, "generator must be a torch.Generator, got int; pass integers as `seed`"),
        ({"prompts": "half \ud800"}, "holds half of a character"),
        ({"prompt_embeds": [1.0]}, "prompt_embeds must be a torch.Tensor, got list"),
        (
            {"prompt_embeds": torch.ones(3, 5, 64, dtype=torch.int64), "pooled_prompt_embeds": torch.ones(3, 64)},
            "prompt_embeds must be floating-point numbers, got torch.int64",
        ),
        (
            {"prompt_embeds": torch.full((3, 5, 64), torch.inf), "pooled_prompt_embeds": torch.ones(3, 64)},
            "prompt_embeds hold NaN or infinite values",
        ),
        ({"prompts": "a", "seed": [1, 2]}, "2 seeds for 3 latents"),
        ({"prompts": "a", "seed": 2**64}, "seeds have 64 bits"),
        ({"prompts": "a", "seed": "12"}, "seed must be an integer or a sequence of integers, got str"),
        ({"prompts": "a", "normalize": "false"}, "normalize must be True or False, got 'false'"),
        ({"prompts": "a", "share_noise": "no"}, "share_noise must be True or False"),
        ({"prompts": "a", "pooled_prompt_embeds": torch.zeros(3, 64)}, "belong to prompt_embeds"),
        ({"prompts": "a", "prompt_embeds_mask": torch.ones(3, 5)}, "belong to prompt_embeds"),
        ({"prompts": "a", "height": "x"}, "height and width must be positive numbers of pixels, got 'x'"),
        ({"prompts": "a", "height": 64, "width": 4096}, "not the shape of an image of 4096 x 64 pixels"),
        ({"prompts": {"a": 1, "b": 2, "c": 3}}, "prompts must be a string or a list of strings, got dict"),
        ({"prompts": {"a", "b", "c"}}, "got set"),
        ({"prompts": np.array(["a", "b", "c"])}, "got ndarray"),
        ({"prompts": 3}, "got int"),
        ({"prompts": iter("abc")}, "list of strings, got .*iterator"),
    ],
)
def test_wrong_arguments_are_refused(
    reward: LatentReward, latents: Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reward(latents, **arguments)


def test_noisy_scoring_needs_to_know_the_noise(reward: LatentReward, latents: Tensor) -> None:
    with pytest.raises(ValueError, match="either `noise_level` or `timesteps`"):
        reward.score_noisy(latents, "a cat")
    with pytest.raises(ValueError, match="got 2 noise levels for 3 latents"):
        reward.score_noisy(latents, "a cat", noise_level=[0.1, 0.2])
    with pytest.raises(ValueError, match="scheduler's range"):
        reward.score_noisy(latents, "a cat", timesteps=2000)
    with pytest.raises(ValueError, match="if these are noise levels, pass them as `noise_level=`"):
        reward.score_noisy(latents, "a cat", timesteps=0.4)
    with pytest.raises(ValueError, match=r"one number or a sequence with at least one, got shape \(1, 2\)"):
        reward.score_noisy(latents, "a cat", timesteps=[[1, 2]])
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            reward.score_noisy(latents, "a cat", noise_level=0.4, batch_size=batch_size)
    per_row = reward.score_noisy(latents, "a cat", noise_level=[0.1, 0.4, 0.7])
    torch.testing.assert_close(per_row[1:2], reward.score_noisy(latents[1:2], "a cat", noise_level=0.4))
    torch.testing.assert_close(
        per_row, reward.score_noisy(latents, "a cat", noise_level=[0.1, 0.4, 0.7], batch_size=2)
    )


def test_preference_refuses_what_would_break_it(reward: LatentReward, latents: Tensor) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        reward.preference(latents, latents[:2], "a cat")
    with pytest.raises(ValueError, match="does not take"):
        reward.preference(latents, latents, "a cat", normalize=True)
    with pytest.raises(ValueError, match="latents must be a torch.Tensor, got ndarray"):
        reward.preference(latents.numpy(), latents.numpy(), "a cat")


def test_non_finite_scores_raise(sd3_pipeline: Any, latents: Tensor) -> None:
    reward = make_reward(sd3_pipeline)
    with torch.no_grad():
        reward.model.head.head.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="scores of rows"):
        reward(latents, "a cat", seed=0)


def test_another_model_size_is_refused(sd3_pipeline: Any) -> None:
    config = replace(CONFIG, backbone_config=dict(sd3_pipeline.transformer.config))
    other = tiny_sd3_transformer(attention_head_dim=16)
    with pytest.raises(ValueError, match="not the one the reward was trained on.*attention_head_dim"):
        LatentReward.from_config(config, transformer=other, scheduler=sd3_pipeline.scheduler)
    with pytest.raises(ValueError, match="reads 9 blocks but this SD3Transformer2DModel has 3"):
        LatentReward.from_config(replace(CONFIG, num_layers=9), pipeline=sd3_pipeline)
    with pytest.raises(ValueError, match="returns no text tokens"):
        LatentReward.from_config(
            replace(CONFIG, num_layers=3, visual_taps=(3,), text_taps=(3,)), pipeline=sd3_pipeline
        )


def test_a_scheduler_is_needed(sd3_pipeline: Any) -> None:
    with pytest.raises(ValueError, match="need a scheduler"):
        LatentReward.from_config(CONFIG, transformer=sd3_pipeline.transformer)
    with pytest.raises(ValueError, match="names no backbone"):
        LatentReward.from_config(CONFIG)


def test_default_lora_skips_unread_text_projections(sd3_pipeline: Any) -> None:
    config = replace(CONFIG, text_taps=(1,))
    reward = LatentReward.from_config(config, pipeline=sd3_pipeline)
    adapted = [name for name in reward.model.trainable_state() if "transformer_blocks.1" in name]
    assert adapted
    assert not [name for name in adapted if "add_" in name]
    lora = default_lora_config(CONFIG)
    assert (lora.r, lora.lora_alpha, lora.exclude_modules) == (64, 128, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"visual_taps": (2, 1)}, "increasing block numbers"),
        ({"visual_taps": (3,)}, "between 1 and num_layers=2"),
        ({"visual_taps": ()}, "visual_taps is empty"),
        ({"text_taps": ()}, "text_taps is empty"),
        ({"score_scale": 0.0}, "score_scale > 0"),
    ],
)
def test_impossible_configs_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **overrides)


def test_config_round_trip_and_unknown_keys() -> None:
    assert LatentRewardConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match=r"unknown keys.*\['num_layer'\]"):
        LatentRewardConfig.from_dict({**CONFIG.to_dict(), "num_layer": 3})
    with pytest.raises(ValueError, match=r"unknown keys in the head configuration"):
        LatentRewardConfig.from_dict({**CONFIG.to_dict(), "head": {"depth": 3}})
    with pytest.raises(ValueError, match="incomplete reward configuration"):
        LatentRewardConfig.from_dict({"family": "sd3"})


def test_latents_for_the_decoder_get_one_warning(sd3_pipeline: Any) -> None:
    config = sd3_pipeline.vae.config
    scaled = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for_decoder = scaled / config.scaling_factor + config.shift_factor
    with pytest.warns(
        UserWarning, match=r"a standard deviation of 0\.6\d; .* near 0\.65: pass the latents as the pipeline"
    ):
        (reward := make_reward(sd3_pipeline))(for_decoder, "a cat", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reward(for_decoder, "a cat", seed=0)
        make_reward(sd3_pipeline)(scaled, "a cat", seed=0)


def test_embeddings_of_another_length_get_one_warning(sd3_pipeline: Any) -> None:
    reward, latents = make_reward(sd3_pipeline), torch.randn(1, 16, 16, 16)
    text = reward.encode_prompts(["a cat"])[0]
    longer = torch.nn.functional.pad(text.prompt_embeds, (0, 0, 0, 3))
    length = text.prompt_embeds.shape[1]
    with pytest.warns(
        UserWarning, match=f"prompt_embeds have {length + 3} tokens; this reward encodes prompts to {length}"
    ):
        reward(latents, prompt_embeds=longer, pooled_prompt_embeds=text.pooled_prompt_embeds, seed=0)
