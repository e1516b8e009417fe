"""Stable Diffusion 1.x / 2.x: UNet taps, a reward on a UNet in both modes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from dina_reward import LatentReward, LatentRewardConfig, default_lora_config
from dina_reward.families import Conditioning, family_of, get_family
from dina_reward.families.stable_diffusion import UNetBackbone
from dina_reward.likelihood import ThurstoneModel
from dina_reward.modeling.heads.config import RewardHeadConfig
from tests.tiny_models import tiny_sd_pipeline, tiny_unet


FAMILY = get_family("stable_diffusion")
CONFIG = LatentRewardConfig(
    family="stable_diffusion",
    num_layers=3,
    visual_taps=(1, 2, 3),
    text_taps=(1,),
    head=RewardHeadConfig(num_attention_heads=4),
)
PROMPTS = ["a cat", "a dog", "a cat"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sd_pipeline()


@pytest.fixture(scope="module")
def reward(pipeline: Any) -> LatentReward:
    return make_reward(pipeline)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def make_reward(pipeline: Any, config: LatentRewardConfig = CONFIG, **kwargs: Any) -> LatentReward:
    """A reward whose LoRA is not a no-op, as after training."""
    reward = LatentReward.from_config(config, pipeline=pipeline, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reward.model.trainable_state().items():
            if "lora_B" in name or "cond_mlp" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return reward.eval()


def build(unet: Any, *taps: int) -> UNetBackbone:
    return FAMILY.build_backbone(unet, num_layers=max(taps), visual_taps=taps, text_taps=(1,))  # type: ignore[return-value]


def embeddings(count: int = 2) -> Conditioning:
    return Conditioning(torch.randn(count, 5, 48, generator=torch.Generator().manual_seed(2)))


@torch.no_grad()
def test_finer_taps_are_pooled_to_the_grid_of_the_last() -> None:
    torch.manual_seed(0)
    unet = tiny_unet(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    latents, timestep = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, out: seen.append(out[0])) for block in unet.down_blocks]
    unet(latents, timestep, encoder_hidden_states=embeddings().prompt_embeds)
    for handle in handles:
        handle.remove()
    assert [tuple(hidden.shape[1:]) for hidden in seen] == [(32, 4, 4), (64, 2, 2), (64, 2, 2)]
    features = build(unet, 1, 3)(latents, timestep, embeddings())
    pooled = nn.functional.avg_pool2d(seen[0], 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.visual[0], pooled, rtol=0, atol=1e-6)
    assert torch.equal(features.visual[1], seen[2].flatten(2).transpose(1, 2))
    alone = build(unet, 1)(latents, timestep, embeddings())
    assert torch.equal(alone.visual[0], seen[0].flatten(2).transpose(1, 2))
    assert len(alone.text) == 1


def test_sizes_of_the_taps_and_of_the_head(reward: LatentReward) -> None:
    sizes = FAMILY.feature_sizes(tiny_unet().config)
    assert (sizes.hidden, sizes.temb, sizes.text) == ((32, 64, 64), 128, 48)
    assert sizes.at((1, 3)).hidden == (32, 64)
    head = reward.model.head
    assert head.query_tokens.shape[-1] == 64
    assert [type(adapter.proj_in) for adapter in head.layer_adapters_visual] == [nn.Linear, nn.Identity, nn.Identity]
    assert head.layer_adapters_text[0].proj_in.in_features == 48  # type: ignore[index, union-attr]
    assert FAMILY.feature_sizes(tiny_unet(time_embedding_dim=40).config).temb == 40


def test_lora_goes_to_both_attentions_of_every_block(reward: LatentReward) -> None:
    names = {name for name in reward.model.trainable_state() if "lora_A" in name}
    assert len(names) == 3 * 2 * 4  # blocks x (attn1, attn2) x projections
    assert not any(set(name.split(".")) & {"up_blocks", "conv_in"} for name in names)
    assert default_lora_config(CONFIG).exclude_modules is None
    assert default_lora_config(replace(CONFIG, family="sd3")).exclude_modules is not None


def test_scores_rise_along_their_gradient(reward: LatentReward, latents: Tensor) -> None:
    latents.requires_grad_()
    output = reward.score(latents, PROMPTS, seed=0)
    output.scores.sum().backward()
    assert latents.grad is not None
    assert all(float(row.abs().sum()) > 0 for row in latents.grad)
    shifted = reward(latents.detach() + 0.01 * latents.grad / latents.grad.norm(), PROMPTS, seed=0)
    assert float(shifted.sum()) > float(output.scores.detach().sum())


def test_scores_depend_on_seed_prompt_and_level_and_not_on_batch_split(reward: LatentReward, latents: Tensor) -> None:
    scores = reward(latents, PROMPTS, seed=3, noise_level=[0.2, 0.6])
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reward(latents, PROMPTS, seed=3, noise_level=[0.2, 0.6]))
    split = reward(latents, PROMPTS, seed=3, noise_level=[0.2, 0.6], batch_size=1)
    torch.testing.assert_close(split, scores, rtol=0, atol=1e-5)
    for other in ({"seed": 4}, {"noise_level": 0.6}, {"ensemble": "mean"}):
        assert not torch.allclose(
            reward(latents, PROMPTS, **{"seed": 3, "noise_level": [0.2, 0.6], **other}), scores, atol=1e-4
        )
    assert not torch.allclose(reward(latents, ["a dog"] * 3, seed=3, noise_level=[0.2, 0.6])[0], scores[0], atol=1e-4)


def test_noise_level_is_the_standard_deviation_of_the_schedulers_noise(reward: LatentReward, latents: Tensor) -> None:
    """`score` noises as the scheduler's `add_noise` does at the grid timestep of the level."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    output = reward.score(latents, PROMPTS, noise=noise, noise_level=0.4)
    timestep = int(output.timesteps)
    scheduler = DDIMScheduler.from_config(reward.config.scheduler_config)
    assert float(output.noise_levels) == pytest.approx(float((1 - scheduler.alphas_cumprod[timestep]) ** 0.5))
    assert float(output.noise_levels) == pytest.approx(0.4, abs=2e-3)
    noisy = scheduler.add_noise(latents, noise, torch.tensor(timestep))
    torch.testing.assert_close(
        reward.score_noisy(noisy, PROMPTS, timesteps=float(timestep)), output.scores, rtol=0, atol=1e-5
    )
    rows = reward.score_noisy(noisy, PROMPTS, timesteps=torch.tensor([5, timestep, 990]))
    torch.testing.assert_close(rows[1], output.scores[1], rtol=0, atol=1e-5)
    assert not torch.allclose(rows[[0, 2]], output.scores[[0, 2]], atol=1e-4)


def test_states_of_unknown_scale_are_refused_and_scaled_by_the_scheduler_that_is_named(
    reward: LatentReward, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    euler = EulerDiscreteScheduler.from_config(reward.config.scheduler_config)
    euler.set_timesteps(10)
    time, sigma = float(euler.timesteps[4]), float(euler.sigmas[4])
    preserving = latents * 1.0
    level = sigma / (1 + sigma**2) ** 0.5
    expected = reward.score_noisy(preserving, PROMPTS, noise_level=level)
    unscaled = preserving * (1 + sigma**2) ** 0.5
    scores = reward.score_noisy(unscaled, PROMPTS, timesteps=time, scheduler=euler)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    monkeypatch.setattr(reward.prompt_encoder.pipeline, "scheduler", euler)
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler they may be unscaled.*scheduler=.*noise_level="):
        reward.score_noisy(unscaled, PROMPTS, timesteps=time)
    with pytest.raises(ValueError, match="`scheduler` goes with its `timesteps`"):
        reward.score_noisy(unscaled, PROMPTS, noise_level=level, scheduler=euler)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got -1"):
        reward.score_noisy(unscaled, PROMPTS, noise_level=level, batch_size=-1)


@pytest.mark.parametrize("settings", [{"num_train_timesteps": 200}, {"beta_schedule": "linear"}])
def test_noise_process_is_the_schedulers(settings: dict[str, Any]) -> None:
    scheduler = DDIMScheduler(beta_schedule=settings.pop("beta_schedule", "scaled_linear"), **settings)
    process = FAMILY.noise_process(scheduler.config)
    assert torch.equal(process.levels, (1 - scheduler.alphas_cumprod).sqrt())
    assert torch.equal(process.timesteps, torch.arange(len(scheduler.alphas_cumprod)).float())


def test_checkpoint_scores_alike_in_both_modes_and_from_disk(
    reward: LatentReward, pipeline: Any, latents: Tensor, tmp_path: Path
) -> None:
    reward.save_pretrained(tmp_path / "reward")
    pipeline.save_pretrained(tmp_path / "model")
    expected = reward(latents, PROMPTS, seed=0)
    standalone = LatentReward.from_pretrained(tmp_path / "reward", pipeline=pipeline)
    assert torch.equal(standalone(latents, PROMPTS, seed=0), expected)
    shared = LatentReward.from_pretrained(tmp_path / "reward", pipeline=pipeline, share_backbone=True)
    torch.testing.assert_close(shared(latents, PROMPTS, seed=0), expected, rtol=0, atol=1e-5)
    from_disk = LatentReward.from_pretrained(tmp_path / "reward", backbone=str(tmp_path / "model"))
    conditioning = FAMILY.encode_prompts(pipeline, PROMPTS)
    scores = from_disk(latents, prompt_embeds=conditioning.prompt_embeds, seed=0)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    other = tiny_sd_pipeline(layers_per_block=2)
    with pytest.raises(ValueError, match="layers_per_block: reward 1, backbone 2"):
        LatentReward.from_pretrained(tmp_path / "reward", pipeline=other)


def test_scores_do_not_see_a_policy_lora_on_the_unet(latents: Tensor) -> None:
    from peft import LoraConfig

    pipeline = tiny_sd_pipeline()
    pipeline.unet.requires_grad_(False)
    shared = make_reward(pipeline, share_backbone=True)
    expected = shared(latents, PROMPTS, seed=0)
    pipeline.unet.add_adapter(
        LoraConfig(r=4, init_lora_weights=False, target_modules=list(FAMILY.policy_lora_targets)), "policy"
    )
    assert torch.equal(shared(latents, PROMPTS, seed=0), expected)
    after = make_reward(pipeline, share_backbone=True)
    torch.testing.assert_close(after(latents, PROMPTS, seed=0), expected, rtol=0, atol=1e-5)


def test_one_gradient_step_lowers_the_pair_loss(pipeline: Any) -> None:
    """Latents of another mean are preferred; both sides see the same noise."""
    reward = LatentReward.from_config(CONFIG, pipeline=pipeline, lora_config=default_lora_config(CONFIG, rank=4))
    draw = torch.Generator().manual_seed(5)
    chosen, rejected, noise = (torch.randn(8, 4, 8, 8, generator=draw) for _ in range(3))
    level = torch.full((16,), 0.4)
    noisy = reward.noise_process.add_noise(torch.cat([chosen + 0.5, rejected]), noise.repeat(2, 1, 1, 1), level)
    timestep = reward.noise_process.snap(0.4).timestep.expand(16)
    conditioning, index = reward.encode_prompts(["a cat", "a dog"] * 8)
    parameters = [p for p in reward.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(3):
        scores = reward.model(noisy, timestep, conditioning, index)
        loss = -ThurstoneModel().probability(scores[:8], scores[8:], level[:8]).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    lora = [p for name, p in reward.model.trainable_state().items() if "lora_B" in name]
    assert all(bool(p.any()) for p in lora)


@torch.no_grad()
def test_bfloat16_backbone_keeps_float32_scores(pipeline: Any, reward: LatentReward, latents: Tensor) -> None:
    half = make_reward(pipeline, torch_dtype=torch.bfloat16)
    scores = half(latents, PROMPTS, seed=0)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(latents, PROMPTS, seed=0), rtol=0.05, atol=0.05)


def test_v_prediction_pipelines_are_policies_and_backbones(latents: Tensor) -> None:
    """The prediction is returned raw: a DDIM step with it, read as v, is the pipeline's own."""
    pipeline = tiny_sd_pipeline(prediction_type="v_prediction")
    noise = latents[:1]
    after: list[Tensor] = []
    pipeline(
        "a cat",
        height=64,
        width=64,
        latents=noise,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=lambda *arguments: after.append(arguments[3]["latents"]) or {},
    )
    timesteps = pipeline.scheduler.timesteps
    with torch.no_grad():
        v = FAMILY.predict_velocity(
            pipeline.unet, noise, timesteps[:1].float(), FAMILY.encode_prompts(pipeline, ["a cat"])
        )
    signal, end = pipeline.scheduler.alphas_cumprod[timesteps]
    clean, epsilon = (
        signal.sqrt() * noise - (1 - signal).sqrt() * v,
        signal.sqrt() * v + (1 - signal).sqrt() * noise,
    )
    torch.testing.assert_close(end.sqrt() * clean + (1 - end).sqrt() * epsilon, after[0], rtol=1e-4, atol=1e-4)
    assert make_reward(pipeline)(latents, PROMPTS, seed=0).shape == (3,)


def test_prompts_are_padded_to_the_tokenizers_length(pipeline: Any) -> None:
    default = FAMILY.encode_prompts(pipeline, PROMPTS)
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(default.prompt_embeds, expected)
    assert default.prompt_embeds.shape == (3, 16, 48)
    assert default.pooled_prompt_embeds is None
    assert torch.equal(FAMILY.encode_prompts(pipeline, PROMPTS, max_sequence_length=16).prompt_embeds, expected)
    with pytest.raises(ValueError, match=r"max_sequence_length is 8.*tokenizer's 16 tokens; give 16 or None"):
        FAMILY.encode_prompts(pipeline, PROMPTS, max_sequence_length=8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 16, 64), r"got packed latents of shape \(2, 16, 64\)"),
        ((2, 4, 1, 8, 8), r"with a frame dimension of shape \(2, 4, 1, 8, 8\)"),
        ((2, 16, 8, 8), r"have 16 channels.*\(batch, 4, height, width\)"),
        ((4, 8, 8), r"one latent of shape \(4, 8, 8\) without a batch dimension; pass latents\[None\]"),
        ((2, 4, 0, 8), "have shape"),
    ],
)
def test_wrong_layouts_are_named(pipeline: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILY.check_latents(torch.zeros(shape), pipeline.unet.config)


def test_latent_shape_and_conditioning(pipeline: Any, reward: LatentReward, latents: Tensor) -> None:
    config = pipeline.unet.config
    assert FAMILY.latent_shape(pipeline, 64, 96, config) == (4, 8, 12)
    with pytest.raises(ValueError, match=r"60 x 64 must be divisible by 8"):
        FAMILY.latent_shape(pipeline, 60, 64, config)
    FAMILY.check_conditioning(embeddings(), config)
    with pytest.raises(ValueError, match=r"takes \(batch, length, 48\)"):
        FAMILY.check_conditioning(Conditioning(torch.zeros(2, 5, 32)), config)
    with pytest.raises(ValueError, match="takes no pooled_prompt_embeds"):
        reward(latents, prompt_embeds=torch.zeros(3, 5, 48), pooled_prompt_embeds=torch.zeros(3, 5), seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        {"num_class_embeds": 3},
        {"time_cond_proj_dim": 16},
        {"in_channels": 9},
        {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 20},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_unets_with_other_inputs_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(settings))}.*StableDiffusionPipeline alone"):
        build(tiny_unet(**settings), 1)


def test_more_blocks_than_the_unet_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads 4 blocks but this UNet2DConditionModel has 3"):
        build(tiny_unet(), 4)


def test_the_unread_part_of_a_loaded_unet_is_let_go(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet")
    unet: Any = FAMILY.load_denoiser(str(tmp_path), num_layers=1, subfolder="unet")
    assert isinstance(unet, UNet2DConditionModel)
    assert (len(unet.down_blocks), unet.mid_block, len(unet.up_blocks)) == (1, None, 0)
    whole: Any = FAMILY.load_denoiser(str(tmp_path), subfolder="unet")
    assert (len(whole.down_blocks), len(whole.up_blocks)) == (2, 2)


def test_classes_find_the_family_and_unets_with_other_inputs_do_not(pipeline: Any) -> None:
    from diffusers import StableDiffusionXLPipeline

    assert family_of(pipeline) is FAMILY
    assert family_of(pipeline.unet) is FAMILY
    assert family_of(StableDiffusionXLPipeline.__new__(StableDiffusionXLPipeline)) is not FAMILY
    unet = tiny_unet(addition_embed_type="text", encoder_hid_dim=None, addition_embed_type_num_heads=4)
    with pytest.raises(ValueError, match="UNet2DConditionModel belongs to no supported model family"):
        family_of(unet)
