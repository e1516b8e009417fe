from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from transformers import TrainerCallback

from dina_reward import LatentReward, LatentRewardConfig
from dina_reward.alignment import DDPOConfig, DDPOTrainer, DiffusionGRPOTrainer
from dina_reward.alignment.policy import LORA_WEIGHTS_NAME
from dina_reward.reward_functions import RewardError
from dina_reward.training.run_settings import RUN_SETTINGS_NAME
from tests.alignment.helpers import (
    LATENT_SHAPE,
    PIXELS,
    PROMPTS,
    closeness,
    logged,
    lora_tensors,
    tiny_config,
    tiny_pipeline,
    tiny_trainer,
)
from tests.tiny_models import tiny_sd_pipeline


def refuse_to_decode(*args, **kwargs):
    raise AssertionError("the VAE was decoded in training")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"sde_type": "flow_sde", "eta": 0.7},
        {"sde_type": "dance_sde", "eta": 0.3},
        {"guidance_scale": 2.0},
        {"dtype": torch.bfloat16},
        {"gradient_checkpointing": True},
        {"bf16": True},
        *(
            pytest.param(overrides, marks=pytest.mark.slow)
            for overrides in (
                {"same_latent_within_group": True},
                {"offload_trajectories": True},
                {"train_timestep_fraction": 0.5},
                {"sde_window_schedule": "sliding"},
                {"loss_type": "grpo_guard", "sde_type": "flow_sde", "eta": 0.7},
            )
        ),
        {"train_full_model": True, "learning_rate": 1e-4},
        {"load_in_4bit": True},
    ],
)
def test_ratio_is_exactly_one_on_policy(tmp_path, overrides):
    # One optimizer step per generation: all data is on-policy, after updates too.
    trainer = tiny_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3, **overrides)
    trainer.train()
    for name in ("ratio/mean", "ratio/min", "ratio/max"):
        assert logged(trainer, name) == [1.0] * 3
    assert logged(trainer, "clip_frac") == logged(trainer, "approx_kl") == [0.0] * 3
    assert all(value > 0 for value in logged(trainer, "grad_norm"))


def test_gradient_is_the_mean_over_rows_and_window(tmp_path):
    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.seen = [p.grad.clone() for p in model.parameters() if p.requires_grad]

    settings = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0, "ema_decay": None}
    trainer, callback = tiny_trainer(tmp_path, **settings), Gradients()
    trainer.add_callback(callback)
    trainer.train()
    other = tiny_trainer(tmp_path, **settings)
    experience, _ = other.make_experience(0)
    losses = [other.step_loss(other.model, part, position).loss for part in experience for position in range(2)]
    parameters = [p for p in other.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    for actual, gradient in zip(callback.seen, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_off_policy_steps_have_other_ratios(tmp_path):
    trainer = tiny_trainer(tmp_path, num_iterations=2, max_steps=4)
    trainer.train()
    assert logged(trainer, "ratio/max")[0] == 1
    assert all(value > 1 for value in logged(trainer, "ratio/max")[1:])


def test_reward_rises(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        per_device_train_batch_size=24,
        steps_per_generation=1,
        num_generations=8,
        max_steps=20,
        learning_rate=2e-2,
        epsilon=1e-2,
        ema_decay=None,
        eval_dataset=PROMPTS * 2,
        eval_num_images=0,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert after > before + 0.12


def test_training_never_decodes_and_leaves_the_scheduler_alone(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.policy.pipeline.vae.decode = refuse_to_decode
    sigmas = trainer.policy.pipeline.scheduler.sigmas.clone()
    trainer.train()
    assert torch.equal(trainer.policy.pipeline.scheduler.sigmas, sigmas)


def test_only_lora_changes(tmp_path):
    trainer = tiny_trainer(tmp_path)
    frozen = {n: p.detach().clone() for n, p in trainer.policy.denoiser.named_parameters() if not p.requires_grad}
    lora = lora_tensors(trainer)
    trainer.train()
    parameters = dict(trainer.policy.denoiser.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())
    assert any(not torch.equal(parameters[name], tensor) for name, tensor in lora.items())


def test_samples_of_a_generation_differ_and_share_the_window(tmp_path):
    trainer = tiny_trainer(tmp_path)
    maker = trainer.experience_maker
    experience, metrics = trainer.make_experience(0)
    assert len({part.rollout.stochastic for part in experience}) == 1
    assert metrics["sde_window_start"] == experience[0].rollout.stochastic[0]
    assert 0.5 < metrics["diversity"] < 1.5
    initial = torch.cat([maker.initial_latents(0, part.rows) for part in experience])
    assert len({tuple(latent.flatten().tolist()) for latent in initial}) == 12
    later = maker.initial_latents(1, range(12))
    assert not any(torch.equal(a, b) for a in initial for b in later)
    noise = torch.cat([maker._step_noise(0, part.rows, 2).flatten(0, 1) for part in experience])
    assert len({tuple(draw.flatten().tolist()) for draw in noise}) == 24
    advantages = torch.cat([part.advantages for part in experience]).view(3, 4)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_same_latent_within_group(tmp_path):
    trainer = tiny_trainer(tmp_path, same_latent_within_group=True)
    initial = trainer.experience_maker.initial_latents(0, range(12)).view(3, 4, *LATENT_SHAPE)
    assert all(torch.equal(member, group[0]) for group in initial for member in group)
    assert not torch.equal(initial[0, 0], initial[1, 0])
    experience, _ = trainer.make_experience(0)
    final = torch.cat([part.rollout.latents for part in experience])
    assert not torch.equal(final[0], final[1])


def test_kl_to_the_reference_starts_at_zero_and_pulls(tmp_path):
    trainer = tiny_trainer(tmp_path / "kl", beta=1.0, kl_kind="velocity", max_steps=6)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == 0
    assert all(value > 0 for value in kl[1:])
    strong = tiny_trainer(tmp_path / "strong", beta=1e4, kl_kind="velocity", max_steps=6)
    strong.train()
    assert logged(strong, "kl")[-1] < kl[-1]


@pytest.mark.parametrize("shared", [True, False])
def test_reward_noise_is_shared_inside_groups_only(tmp_path, shared):
    calls = []

    def reward(latents, prompts, seed, noise_level, ensemble):
        calls.append((prompts, seed, noise_level, ensemble))
        return closeness(latents)

    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=reward,
        share_noise_within_group=shared,
        reward_noise_level=[0.2, 0.5],
        reward_ensemble="mean",
        per_device_train_batch_size=12,
        steps_per_generation=1,
    )
    trainer.train()
    assert calls[0][2:] == ([0.2, 0.5], "mean")
    seeds = torch.tensor(calls[0][1]).view(3, 4)
    assert len(set(seeds.flatten().tolist())) == (3 if shared else 12)
    assert set(calls[0][1]).isdisjoint(calls[1][1])
    prompts = [calls[0][0][i : i + 4] for i in range(0, 12, 4)]
    assert all(len(set(group)) == 1 for group in prompts)


@pytest.mark.parametrize("share_backbone", [True, False])
def test_latent_reward_of_the_same_pipeline_stays_fixed_while_the_policy_moves(tmp_path, share_backbone):
    pipeline = tiny_pipeline()
    settings = LatentRewardConfig(family="sd3", num_layers=1, visual_taps=(1,), max_sequence_length=8)
    reward = LatentReward.from_config(settings, pipeline=pipeline, share_backbone=share_backbone).eval()
    latents = torch.randn((3, *LATENT_SHAPE), generator=torch.Generator().manual_seed(0))
    before = reward(latents, PROMPTS[:3], seed=1)
    trainer = DiffusionGRPOTrainer(pipeline, reward, tiny_config(tmp_path, gradient_accumulation_steps=2), PROMPTS)
    assert torch.equal(reward(latents, PROMPTS[:3], seed=1), before)
    trainer.train()
    assert torch.equal(reward(latents, PROMPTS[:3], seed=1), before)
    assert logged(trainer, "ratio/max") == [1.0, 1.0]
    assert logged(trainer, "rewards/latent_reward/std")[0] > 0


def test_several_rewards_are_weighted_and_logged(tmp_path):
    def brightness(latents):
        return latents.float().mean(dim=(1, 2, 3))

    trainer = tiny_trainer(tmp_path, reward_funcs=[closeness, brightness], reward_weights=[1.0, 0.5])
    trainer.train()
    line = trainer.state.log_history[0]
    expected = line["rewards/closeness/mean"] + 0.5 * line["rewards/brightness/mean"]
    assert line["reward"] == pytest.approx(expected, abs=1e-5)
    assert {"frac_reward_zero_std", "time/rollout", "time/reward", "time/train"} <= set(line)
    with pytest.raises(ValueError, match="reward_weights has 3 entries for 2 reward functions"):
        tiny_trainer(tmp_path, reward_funcs=[closeness, brightness], reward_weights=[1.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        tiny_trainer(tmp_path, reward_funcs=[])


def test_bad_rewards_stop_the_run(tmp_path):
    def broken(latents):
        return latents.new_full((len(latents),), float("inf"))

    with pytest.raises(RewardError, match="broken .*inf"):
        tiny_trainer(tmp_path, reward_funcs=broken).train()


@pytest.mark.parametrize("extra", [{}, {"num_iterations": 2, "beta": 0.1}])
def test_resume_is_bit_exact(tmp_path, extra):
    steps = 4 * extra.get("num_iterations", 1)
    common = {"max_steps": steps, "save_strategy": "steps", "save_steps": steps // 2, **extra}
    straight = tiny_trainer(tmp_path / "straight", **common)
    straight.train()
    resumed = tiny_trainer(tmp_path / "resumed", **common)
    # Unrelated draws in between must not matter.
    torch.rand(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{steps // 2}"))
    assert resumed.state.global_step == straight.state.global_step == steps
    expected, actual = lora_tensors(straight), lora_tensors(resumed)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    with straight.averaged_policy(), resumed.averaged_policy():
        expected, actual = lora_tensors(straight), lora_tensors(resumed)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    for name in ("reward", "loss", "grad_norm"):
        assert logged(straight, name)[-2:] == logged(resumed, name)[-2:]


def test_resume_inside_a_generation_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    other = tiny_trainer(tmp_path, steps_per_generation=4, per_device_train_batch_size=6, max_steps=4)
    with pytest.raises(ValueError, match="samples per generation: 12 there, 24 here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / RUN_SETTINGS_NAME).unlink()
    with pytest.raises(ValueError, match="step 2 lies inside generation 0|is damaged: run_settings.json is missing"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora_alpha": 64}, "lora_alpha: 4 there, 64 here"),
        ({"reward_funcs": [closeness, closeness]}, "reward functions"),
    ],
)
def test_resuming_another_run_is_refused_and_a_finished_one_changes_nothing(tmp_path, change, named):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    first = tiny_trainer(tmp_path, **saving)
    first.train(resume_from_checkpoint=True)  # there is none yet
    assert first.state.global_step == 2
    with pytest.raises(ValueError, match=named):
        tiny_trainer(tmp_path, max_steps=4, **saving, **change).train(resume_from_checkpoint=True)
    again = tiny_trainer(tmp_path, **saving)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    for context in (contextlib.nullcontext, lambda trainer: trainer.averaged_policy()):
        with context(first) as _, context(again) as _:
            expected, actual = lora_tensors(first), lora_tensors(again)
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_checkpoints_hold_loadable_loras(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert {LORA_WEIGHTS_NAME, os.path.join("ema", LORA_WEIGHTS_NAME), "ema.safetensors", "optimizer.pt"} <= files
    assert "model.safetensors" not in files
    with trainer.averaged_policy():
        averaged = lora_tensors(trainer)
    trainer.policy.load_lora(str(checkpoint / "ema"))
    actual = lora_tensors(trainer)
    assert all(torch.equal(actual[name], tensor) for name, tensor in averaged.items())


def test_wrong_launch_is_refused(tmp_path, monkeypatch):
    # What torchrun does when accelerate does not notice it: the variable is set, but there is no process group.
    config = tiny_config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the launcher started 2 processes but accelerate sees 1"):
        DiffusionGRPOTrainer(tiny_pipeline(), closeness, config, PROMPTS)


def test_batch_geometry_is_checked_before_the_pipeline_changes(tmp_path):
    with pytest.raises(ValueError, match="12 rows .* is not divisible by num_generations 5"):
        tiny_trainer(tmp_path, num_generations=5)


def test_an_offloaded_pipeline_is_refused_before_it_changes(tmp_path):
    """`enable_sequential_cpu_offload` on a machine without accelerator, which its own call asks for."""
    pipeline = tiny_pipeline()
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        cpu_offload(part, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"is offloaded \(enable_sequential_cpu_offload, or a device_map\); load"):
        DiffusionGRPOTrainer(pipeline, closeness, tiny_config(tmp_path), PROMPTS)
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())


def test_save_model_writes_beside_the_checkpoints(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "ema", LORA_WEIGHTS_NAME}


def test_filtered_groups_leave_the_others_their_weight(tmp_path):
    def flat_in_two_groups(latents, prompts):
        return [
            float(value) if prompt == prompts[0] else 1.0 for value, prompt in zip(range(12), prompts, strict=True)
        ]

    settings = {"per_device_train_batch_size": 12, "steps_per_generation": 1, "beta": 0.1}
    plain = tiny_trainer(tmp_path, reward_funcs=flat_in_two_groups, **settings).make_experience(0)
    filtered = tiny_trainer(
        tmp_path, reward_funcs=flat_in_two_groups, filter_zero_std_groups=True, **settings
    ).make_experience(0)
    assert plain[1]["frac_reward_zero_std"] == filtered[1]["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert plain[0][0].weights.tolist() == [1.0] * 12
    assert filtered[0][0].weights.tolist() == [3.0] * 4 + [0.0] * 8


@pytest.mark.parametrize("credit", ["terminal", "gain"])
def test_kept_rows_train_like_all_rows_with_the_others_at_weight_zero(tmp_path, credit):
    trainer = tiny_trainer(
        tmp_path, keep_per_group=2, beta=0.1, credit=credit, loss_type="grpo_guard", sde_type="flow_sde"
    )
    for part in trainer.make_experience(0)[0]:
        kept = part.without_unused()
        assert len(kept.rows) == int((part.weights > 0).sum()) < len(part.rows)
        for position in range(trainer.num_losses(part)):
            full, short = (trainer.step_loss(trainer.model, each, position).loss for each in (part, kept))
            torch.testing.assert_close(short, full)


def test_a_micro_batch_of_which_nothing_is_kept_keeps_a_row_of_weight_zero(tmp_path):
    ((experience, *_), _) = tiny_trainer(tmp_path, keep_per_group=2).make_experience(0)
    nothing = replace(experience, weights=torch.zeros(len(experience.rows))).without_unused()
    assert (list(nothing.rows), nothing.weights.tolist()) == ([experience.rows[0]], [0.0])


def test_rewards_that_do_not_apply_add_nothing(tmp_path):
    def sometimes(latents):
        return [None if row % 2 else float(value) for row, value in enumerate(closeness(latents))]

    trainer = tiny_trainer(tmp_path, reward_funcs=[sometimes], per_device_train_batch_size=12, steps_per_generation=1)
    ((experience,), metrics) = trainer.make_experience(0)
    assert experience.advantages[1::2].tolist() == [0.0] * 6
    assert experience.weights.tolist() == [2.0, 0.0] * 6
    assert all(experience.advantages[0::2] != 0)
    assert metrics["rewards/sometimes/mean"] < 0


def test_only_pixel_rewards_decode(tmp_path):
    shapes = []

    def brightness(images):
        shapes.append(tuple(images.shape))
        return images.mean(dim=(1, 2, 3))

    trainer = tiny_trainer(tmp_path, reward_funcs=[closeness, brightness])
    assert trainer.rewards.needs_images
    trainer.train()
    assert set(shapes) == {(6, 3, PIXELS, PIXELS)}
    latent_only = tiny_trainer(tmp_path)
    assert not latent_only.rewards.needs_images


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_gain_credit_gives_every_step_its_own_advantage(tmp_path, discount):
    settings = {"per_device_train_batch_size": 12, "steps_per_generation": 1, "credit_discount": discount}
    trainer = tiny_trainer(tmp_path, credit="gain", **settings)
    ((experience,), _) = trainer.make_experience(0)
    first, second = experience.rollout.trained
    assert experience.rollout.clean == {}
    predict = trainer.policy.bind(experience.conditioning_rows(), experience.negative)
    values = {}
    for step in (first, second):
        state, timestep = experience.rollout.states[step], trainer.sampler.timesteps[step].expand(12)
        with torch.no_grad():
            values[step] = closeness(trainer.sampler.predict_clean(step, state, predict(state, timestep)))
    final = closeness(experience.rollout.latents)
    # After the last stochastic step the end is known.
    following = {first: final if discount else values[second], second: final}
    for step in (first, second):
        gain = (following[step] - values[step]).view(3, 4)
        expected = (gain - gain.mean(1, keepdim=True)) / (gain.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(experience.advantages_at(step), expected.flatten(), rtol=1e-3, atol=1e-3)
    assert not torch.equal(experience.advantages_at(first), experience.advantages_at(second))
    assert experience.advantages_at(99) is experience.advantages


def test_gain_credit_scores_a_trajectory_under_one_noise(tmp_path):
    seeds = []

    def reward(latents, prompts, seed):
        seeds.append((tuple(prompts), tuple(seed)))
        scores = zip(prompts, closeness(latents).tolist(), strict=True)
        return [None if prompt == "a cat" else score for prompt, score in scores]

    settings = {"per_device_train_batch_size": 12, "steps_per_generation": 1, "num_generations": 2}
    trainer = tiny_trainer(tmp_path, reward_funcs=reward, credit="gain", **settings)
    ((experience,), _) = trainer.make_experience(0)
    assert len(seeds) == 3
    assert len(set(seeds)) == 1
    cats = torch.tensor([prompt == "a cat" for prompt in experience.prompts])
    assert 0 < int(cats.sum()) < 12
    for step in experience.rollout.trained:
        assert torch.equal(experience.advantages_at(step) == 0, cats)


def test_hacking_alarm_stops_the_run_if_asked(tmp_path):
    calls = []

    def falling(images, prompts):
        calls.append(1)
        return [-float(len(calls))] * len(prompts)

    trainer = tiny_trainer(
        tmp_path,
        per_device_train_batch_size=24,
        per_device_eval_batch_size=6,
        steps_per_generation=1,
        num_generations=8,
        max_steps=40,
        learning_rate=2e-2,
        epsilon=1e-2,
        ema_decay=None,
        eval_dataset=PROMPTS,
        eval_reward_funcs=falling,
        eval_strategy="steps",
        eval_steps=5,
        eval_num_images=0,
        hacking_stop=True,
    )
    trainer.train()
    assert trainer.state.global_step < 40
    assert logged(trainer, "eval_hacking_alarm")[-1] == 1


def test_ddpo_on_a_unet_tracks_prompts_and_resumes(tmp_path):
    def trainer(name, **overrides):
        settings = {
            "output_dir": str(tmp_path / name),
            "num_generations": 1,
            "sde_type": "ddim",
            "eta": 1.0,
            "max_sequence_length": None,
            "guidance_scale": 2.0,
            "per_prompt_stat_tracking_buffer_size": 4,
            "per_prompt_stat_tracking_min_count": 2,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        return DDPOTrainer(
            tiny_sd_pipeline(), closeness, tiny_config(cls=DDPOConfig, **{**settings, **overrides}), PROMPTS
        )

    straight = trainer("straight")
    straight.train()
    assert logged(straight, "ratio/max")[0] == 1
    assert sum(len(values) for values in straight.stat_tracker.history.values()) == 24
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert resumed.stat_tracker.state_dict() == straight.stat_tracker.state_dict()
    expected, actual = lora_tensors(straight), lora_tensors(resumed)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("loss_type", "accumulation"), [("ppo_clip", 1), ("policy_gradient", 2)])
def test_score_function_and_importance_sampling_agree_on_policy(tmp_path, loss_type, accumulation):
    trainer = tiny_trainer(
        tmp_path, loss_type=loss_type, gradient_accumulation_steps=accumulation, max_steps=2 // accumulation
    )
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0


def test_eight_bit_optimizer(tmp_path):
    trainer = tiny_trainer(tmp_path, optim="adamw_bnb_8bit", lora_rank=256, max_steps=2)
    before = lora_tensors(trainer)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__module__.startswith("bitsandbytes")
    states = [state["state1"].dtype for state in optimizer.state.values()]
    assert torch.uint8 in states  # tensors of fewer than 4,096 elements stay in float32
    assert any(not torch.equal(before[name], tensor) for name, tensor in lora_tensors(trainer).items())
