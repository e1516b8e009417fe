from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dina_reward import LatentReward, LatentRewardConfig
from dina_reward.alignment.trainers.backprop import (
    RewardBackpropConfig,
    RewardBackpropTrainer,
    sample_with_gradient,
)
from tests.tiny_models import tiny_sd3_pipeline, tiny_sd_pipeline


STEPS = 5
PROMPTS = ["a cat", "a dog", "red", "blue", "one", "two"]


def test_default_ranges_are_the_last_quarter(tmp_path: Path) -> None:
    config = RewardBackpropConfig(str(tmp_path), use_cpu=True, num_inference_steps=40, guidance_scale=4.5)
    assert config.grad_step_range == config.early_stop_range == [30, 40]
    assert config.grad_guidance_scale == 4.5
    assert config.num_generations == config.steps_per_generation == 1
    assert all(30 <= config.plan(generation).stop < 40 for generation in range(50))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "refel"}, "unknown method 'refel'; choose one of refl, draft, drtune"),
        ({"loss_type": "relu"}, "unknown loss_type 'relu'; choose one of linear, hinge"),
        ({"grad_step_range": [3, 6]}, r"grad_step_range \[3, 6\) must be a non-empty part of the steps \[0, 5\)"),
        ({"grad_step_range": [3, 3]}, r"grad_step_range \[3, 3\) must be a non-empty part"),
        ({"early_stop_range": [-1, 3]}, r"early_stop_range \[-1, 3\) must be a non-empty part"),
        ({"grad_step_range": 3}, r"grad_step_range must be two integers \[low, high\), got 3"),
        ({"draft_k": 6}, "draft_k is 6, but a rollout has 5 steps"),
        ({"draft_k": 0}, "draft_k must be an integer of at least 1, got 0"),
        ({"method": "drtune", "num_grad_steps": 4, "early_stop_range": [2, 5]}, "stops at step 2 has only 3"),
        ({"num_iterations": 2}, "num_iterations must be 1, got 2"),
        ({"beta": -1.0}, "beta must be a number in"),
        ({"margin": float("nan")}, "margin must be a number in"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardBackpropConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "num_inference_steps": 5, **overrides})


def closeness(latents: Tensor) -> Tensor:
    """Reward that is highest for latents whose elements are all 0.5."""
    return -((latents.float() - 0.5) ** 2).flatten(1).mean(1)


def noisy_closeness(latents: Tensor, seed: list[int]) -> Tensor:
    """The same after noise of the rows' own seeds, so that wrong seeds show."""
    noise = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(row)) for row in seed]
    return closeness(latents + 0.5 * torch.stack(noise))


def tiny_pipeline() -> Any:
    pipeline = tiny_sd3_pipeline(num_layers=2, dual_attention_layers=())
    pipeline.tokenizer_max_length = 8
    return pipeline


def tiny_trainer(
    output_dir: Path, reward_funcs: Any = closeness, pipeline: Any = None, **overrides: Any
) -> RewardBackpropTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "num_inference_steps": STEPS,
        "num_grad_steps": 2,
        "draft_k": 2,
        "grad_step_range": [1, STEPS],
        "early_stop_range": [2, STEPS],
        "height": 32,
        "width": 32,
        "max_sequence_length": 8,
        "lora_rank": 2,
        "lora_alpha": 4,
        "ema_update_every": 1,
        "eval_num_inference_steps": STEPS,
        "eval_num_images": 0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 7,
    }
    pipeline = tiny_pipeline() if pipeline is None else pipeline
    config = RewardBackpropConfig(**{**settings, **overrides})
    return RewardBackpropTrainer(pipeline, reward_funcs, config, PROMPTS, eval_dataset=PROMPTS)


def trained_tensors(trainer: RewardBackpropTrainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.policy.denoiser.parameters() if p.requires_grad]


def logged(trainer: RewardBackpropTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def randomise(trainer: RewardBackpropTrainer) -> None:
    """Moves the LoRA away from its start, where it changes nothing and half of its gradient is 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.policy.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = [p.grad.clone() for p in model.parameters() if p.requires_grad]


def gradients_of_one_step(output_dir: Path, **overrides: Any) -> list[Tensor]:
    trainer = tiny_trainer(output_dir, **{"max_steps": 1, "max_grad_norm": 0.0, "ema_decay": None, **overrides})
    randomise(trainer)
    callback = Gradients()
    trainer.add_callback(callback)
    trainer.train()
    return callback.seen


@pytest.mark.parametrize("method", ["refl", "draft", "drtune"])
def test_batch_split_does_not_change_the_gradient(tmp_path: Path, method: str) -> None:
    common = {"method": method, "reward_funcs": noisy_closeness, "beta": 0.1, "num_generations": 2}
    whole = gradients_of_one_step(tmp_path, **common)
    split = {"per_device_train_batch_size": 2, "steps_per_generation": 3, "gradient_accumulation_steps": 3}
    for actual, expected in zip(gradients_of_one_step(tmp_path, **common, **split), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in whole) > 1e-3


def test_gradient_checkpointing_does_not_change_the_gradient(tmp_path: Path) -> None:
    common = {"method": "draft", "beta": 0.1, "per_device_train_batch_size": 2}
    kept, again = (gradients_of_one_step(tmp_path, **common, gradient_checkpointing=value) for value in (False, True))
    for actual, expected in zip(again, kept, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("method", ["refl", "draft", "drtune"])
def test_gradient_is_that_of_the_whole_graph(tmp_path: Path, method: str) -> None:
    """The trainer cuts the graph between policy and reward; nothing may get lost there."""
    settings = {"method": method, "reward_funcs": [closeness, noisy_closeness], "reward_weights": [1.0, 0.5]}
    trainer = tiny_trainer(tmp_path, **settings)
    randomise(trainer)
    maker, plan = trainer.experience_maker, trainer.args.plan(0)
    conditioning, _, index = maker.encode(0, range(6))
    predict = trainer.policy.bind(conditioning[index], None)
    clean = sample_with_gradient(predict, maker.initial_latents(0, range(6)), trainer.sampler, plan).latents
    rewards = closeness(clean) + 0.5 * noisy_closeness(clean, maker.reward_seeds(0, range(6)))
    margin = float(rewards.detach().sort().values[2:4].mean())
    parameters = list(trainer.policy.trainable_parameters().values())
    expected = torch.autograd.grad((margin - rewards).clamp(min=0).mean(), parameters)
    seen = gradients_of_one_step(tmp_path, **settings, loss_type="hinge", margin=margin)
    for actual, gradient in zip(seen, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_runs_repeat_and_resume_bit_for_bit(tmp_path: Path) -> None:
    common = {
        "method": "drtune",
        "per_device_train_batch_size": 3,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "beta": 0.1,
    }
    straight, again, resumed = (
        tiny_trainer(tmp_path / name, noisy_closeness, **common) for name in ("straight", "again", "resumed")
    )
    straight.train()
    torch.rand(5)
    again.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for other in (again, resumed):
        assert all(map(torch.equal, trained_tensors(other), trained_tensors(straight)))
        with straight.averaged_policy(), other.averaged_policy():
            assert all(map(torch.equal, trained_tensors(other), trained_tensors(straight)))
        for name in ("reward", "loss", "grad_norm", "grad_step"):
            assert logged(other, name)[-2:] == logged(straight, name)[-2:]
    assert straight.state.global_step == 4


@pytest.mark.parametrize("method", ["refl", "draft", "drtune"])
def test_reward_rises_and_nothing_is_decoded(tmp_path: Path, method: str) -> None:
    trainer = tiny_trainer(tmp_path, method=method, max_steps=15, per_device_train_batch_size=4, ema_decay=None)
    before = trainer.evaluate()["eval_reward"]
    trainer.policy.pipeline.vae.decode = refuse_to_decode
    frozen = [p.detach().clone() for p in trainer.policy.denoiser.parameters() if not p.requires_grad]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.2
    kept = [p for p in trainer.policy.denoiser.parameters() if not p.requires_grad]
    assert all(map(torch.equal, frozen, kept))
    steps = logged(trainer, "grad_step")
    assert set(steps) <= set({"refl": range(1, 5), "draft": [3], "drtune": range(5)}[method])
    assert logged(trainer, "reward_calls") == [*range(4, 64, 4), 60, 60]  # summary and evaluation at the end


def refuse_to_decode(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the VAE was decoded in training")


@pytest.mark.parametrize("share_backbone", [True, False])
def test_a_latent_reward_rises_and_stays_as_it_is(tmp_path: Path, share_backbone: bool) -> None:
    pipeline = tiny_pipeline()
    settings = LatentRewardConfig(family="sd3", num_layers=1, visual_taps=(1,), max_sequence_length=8)
    reward = LatentReward.from_config(settings, pipeline=pipeline, share_backbone=share_backbone).eval()
    weights = [p.detach().clone() for p in reward.model.parameters()]
    trainer = tiny_trainer(
        tmp_path, reward, pipeline, method="draft", max_steps=10, per_device_train_batch_size=4, ema_decay=None
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.05
    assert all(p.grad is None for p in reward.model.parameters())
    assert all(map(torch.equal, weights, reward.model.parameters()))


def test_reward_parameters_get_no_gradient(tmp_path: Path) -> None:
    layer = nn.Linear(16 * 4 * 4, 1)

    def learned(latents: Tensor) -> Tensor:
        return layer(latents.flatten(1))[:, 0]

    tiny_trainer(tmp_path, learned).train()
    assert layer.weight.grad is None


def test_rewards_without_gradient_are_refused(tmp_path: Path) -> None:
    def counted(latents: Tensor) -> list[float]:
        return latents.mean(dim=(1, 2, 3)).tolist()

    def frozen(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return closeness(latents)

    def pixels(images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    for function in (counted, frozen):
        with pytest.raises(ValueError, match=f"{function.__name__} returned scores without a gradient"):
            tiny_trainer(tmp_path, function).train()
    with pytest.raises(ValueError, match="pixels takes images, but reward back-propagation stays in latent space"):
        tiny_trainer(tmp_path, [closeness, pixels])


@pytest.mark.parametrize(
    ("method", "prediction_type"), [("refl", "epsilon"), ("draft", "v_prediction"), ("drtune", "epsilon")]
)
def test_ddpm_pipelines(tmp_path: Path, method: str, prediction_type: str) -> None:
    pipeline = tiny_sd_pipeline(prediction_type=prediction_type)
    trainer = tiny_trainer(
        tmp_path, closeness, pipeline, method=method, max_steps=1, guidance_scale=2.0, max_sequence_length=None
    )
    before = trained_tensors(trainer)
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained_tensors(trainer), strict=True))
    assert logged(trainer, "grad_norm")[0] > 0


def test_penalty_starts_at_zero_and_pulls(tmp_path: Path) -> None:
    free, held = (
        tiny_trainer(tmp_path, beta=beta, max_steps=4, per_device_train_batch_size=3, method="drtune")
        for beta in (1e-6, 1e3)
    )
    for trainer in (free, held):
        trainer.train()
        assert logged(trainer, "kl")[0] == 0
        assert logged(trainer, "kl")[1] > 0
    assert logged(held, "kl")[-1] < 0.5 * logged(free, "kl")[-1]
    without = tiny_trainer(tmp_path, beta=0.0)
    without.policy.reference = refuse_to_decode  # type: ignore[method-assign]
    without.train()
    assert logged(without, "kl") == []


def test_full_fine_tuning_with_a_penalty(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, train_full_model=True, beta=1.0, learning_rate=1e-4, per_device_train_batch_size=2
    )
    trainer.train()
    assert logged(trainer, "kl")[0] == 0
    assert logged(trainer, "kl")[1] > 0


def test_guidance_of_rollout_and_gradient_steps(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, method="draft", max_steps=1, guidance_scale=3.0, grad_guidance_scale=1.0)
    rows: list[tuple[int, bool]] = []
    trainer.policy.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((len(kwargs["hidden_states"]), torch.is_grad_enabled())),
        with_kwargs=True,
    )
    trainer.train()
    assert rows == [(12, False)] * 3 + [(6, True)] * 2
