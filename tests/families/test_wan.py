from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.alignment import DiffusionGRPOConfig, DiffusionGRPOTrainer
from dina_reward.alignment.experience.images import still_images
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.families import get_family
from tests.alignment.helpers import logged, tiny_config
from tests.families.row import Setup
from tests.families.rows.wan import ROW, tiny_wan_pipeline


FAMILY: Any = get_family("wan")
CPU = torch.device("cpu")
PUBLISHED = {
    "patch_size": (1, 2, 2),
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "num_layers": 40,
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_wan_pipeline()


def frames(count: int, width: int = 48, height: int = 32) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(frame.numpy()) for frame in pixels]


# --- videos --------------------------------------------------------------------------------------------------------


def test_latent_frames_follow_the_vaes_compression(pipeline: Any) -> None:
    config = pipeline.transformer.config
    shapes = [FAMILY.latent_shape(pipeline, 32, 48, config, num_frames) for num_frames in (1, 5, 81)]
    assert shapes == [(16, 1, 4, 6), (16, 2, 4, 6), (16, 21, 4, 6)]
    for wrong in (0, 4, 6):
        with pytest.raises(ValueError, match=f"num_frames is {wrong}; .* such as 1, 5 or 9"):
            FAMILY.latent_shape(pipeline, 32, 48, config, wrong)
    with pytest.raises(ValueError, match="32 x 40 must be divisible by 16"):
        FAMILY.latent_shape(pipeline, 32, 40, config, 5)
    with pytest.raises(ValueError, match="latents without frames of shape"):
        FAMILY.check_latents(torch.zeros(1, 16, 4, 6), config)
    with pytest.raises(ValueError, match="position table has 32 entries, so at most 32 frames and 64 x 64"):
        FAMILY.check_latents(torch.zeros(1, 16, 33, 4, 6), config)


def test_memory_of_training_grows_linearly_with_the_tokens(pipeline: Any) -> None:
    reward = LatentReward.from_config(Setup.of(ROW).reward_config(), pipeline=pipeline)

    def saved_bytes(frames: int) -> int:
        sizes: list[int] = []

        def remember(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            reward.score_noisy(torch.zeros(1, 16, frames, 8, 8), "a cat", noise_level=0.4)
        return sum(sizes)

    few, twice, four_times = (saved_bytes(frames) for frames in (8, 16, 32))
    assert twice - few > 100_000
    assert four_times - twice == pytest.approx(2 * (twice - few), rel=0.01)


@torch.no_grad()
def test_images_and_clips_are_encoded_by_the_vae_and_normalised(pipeline: Any) -> None:
    clips = [frames(5), frames(5)[::-1]]
    latents = FAMILY.encode_images(pipeline, clips)
    assert latents.shape == (2, 16, 2, 4, 6)
    assert not torch.allclose(latents[0], latents[1])
    config = pipeline.vae.config
    pixels = pipeline.video_processor.preprocess_video(clips, 32, 48)
    raw = pipeline.vae.encode(pixels).latent_dist.mode()
    for channel in (0, 15):
        expected = (raw[:, channel] - config.latents_mean[channel]) / config.latents_std[channel]
        torch.testing.assert_close(latents[:, channel], expected)
    images = frames(2)
    one_frame = FAMILY.encode_images(pipeline, images)
    assert one_frame.shape == (2, 16, 1, 4, 6)
    assert torch.equal(one_frame, FAMILY.encode_images(pipeline, [[image] for image in images]))
    with pytest.raises(ValueError, match=r"must have one length, got \[1, 5\] frames"):
        FAMILY.encode_images(pipeline, [frames(1), frames(5)])
    with pytest.raises(ValueError, match="num_frames is 4"):
        FAMILY.encode_images(pipeline, [frames(4)])
    with pytest.raises(ValueError, match="must have one size"):
        FAMILY.encode_images(pipeline, [frames(4) + frames(1, width=64)])


@torch.no_grad()
def test_prompts_are_padded_as_in_the_pipelines_call(pipeline: Any) -> None:
    default = FAMILY.encode_prompts(pipeline, ["a cat"])
    short = FAMILY.encode_prompts(pipeline, ["a cat"], max_sequence_length=16)
    assert default.prompt_embeds.shape == (1, 512, 32)
    assert default.prompt_embeds_mask is None
    torch.testing.assert_close(default.prompt_embeds[:, :16], short.prompt_embeds)
    padding = default.prompt_embeds.abs().sum(dim=-1) == 0
    assert 0 < int((~padding).sum()) < 16
    with pytest.raises(ValueError, match="cannot be joined"):
        default.cat([default, short])


# --- schedules and variants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow_shift", [3.0, 5.0])
def test_a_unipc_solver_gives_its_own_grid(flow_shift: float) -> None:
    pipeline = tiny_wan_pipeline()
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    pipeline.scheduler = solver
    policy = Policy(pipeline, rank=2, alpha=4)
    for steps in (4, 50):
        solver.set_timesteps(steps)
        sampler = policy.sampler(steps, (16, 2, 4, 6), sde_type="flow_sde", eta=0.7)
        torch.testing.assert_close(sampler.levels, solver.sigmas.float(), rtol=0, atol=2e-6)
        assert float(sampler.levels[0]) == 1
        assert torch.equal(sampler.timesteps, solver.timesteps.float())
    latents = torch.zeros(1, 16, 2, 4, 6)
    assert float(sampler.transition(0, latents, latents).std) < 1
    level = FAMILY.noise_process(solver.config).snap(0.4)
    assert float(level.level) == pytest.approx(0.4, abs=2e-3)
    assert float(level.timestep) == pytest.approx(1000 * float(level.level))


@torch.no_grad()
def test_expanded_timesteps_of_the_5b_model_are_one_timestep() -> None:
    pipeline = tiny_wan_pipeline()
    pipeline.register_to_config(expand_timesteps=True)
    noise = torch.randn(1, 16, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {**ROW.arguments, "num_inference_steps": 3, "height": 64, "width": 96}
    shapes: list[int] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(inputs["timestep"].ndim), with_kwargs=True
    )
    expected = pipeline("a cat", latents=noise, output_type="latent", **settings).frames
    policy = Policy(pipeline, rank=2, alpha=4, max_sequence_length=16)
    bound = policy.bind(policy.encode(["a cat"], CPU), None)
    latents = sample(bound, noise, policy.sampler(3, noise.shape[1:])).latents
    assert shapes == [2, 2, 2, 1, 1, 1]
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def test_two_denoisers_and_image_to_video_models_are_refused() -> None:
    two = tiny_wan_pipeline()
    two.register_modules(transformer_2=tiny_wan_pipeline(seed=1).transformer)
    two.register_to_config(boundary_ratio=0.875)
    with pytest.raises(ValueError, match=r"two denoisers \(transformer_2, boundary_ratio 0.875\)"):
        Policy(two, rank=2, alpha=4)
    LatentReward.from_config(Setup.of(ROW).reward_config(), pipeline=two)  # reads one of the two
    variants = ({"image_dim": 8}, {"added_kv_proj_dim": 32}, {"in_channels": 36, "out_channels": 16})
    for settings in ({**variants[0], **variants[1]}, variants[1], variants[2]):
        other = tiny_wan_pipeline(**settings)
        with pytest.raises(ValueError, match=f"has settings .*{next(iter(settings))}.*text-to-video"):
            Policy(other, rank=2, alpha=4)
        with pytest.raises(ValueError, match="text-to-video models"):
            FAMILY.build_backbone(other.transformer, num_layers=1, visual_taps=(1,), text_taps=(1,))


def test_the_first_eight_blocks_by_default() -> None:
    large = FAMILY.reward_defaults(PUBLISHED)
    assert (large.num_layers, large.taps, large.head_width) == (8, (3, 5, 8), 1536)
    tiny = FAMILY.reward_defaults({**PUBLISHED, "num_layers": 3, "num_attention_heads": 2})
    assert (tiny.num_layers, tiny.taps, tiny.head_width) == (3, (1, 2, 3), 256)


@torch.no_grad()
def test_weights_that_stay_in_float32_beside_bfloat16(tmp_path: Any) -> None:
    from diffusers import WanTransformer3DModel

    setup = Setup.of(ROW)
    setup.denoiser.save_pretrained(tmp_path)
    mixed = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32, torch.bfloat16}
    exact = setup.predict()
    setup.pipeline.transformer = mixed
    policy = Policy(setup.pipeline, rank=2, alpha=4, max_sequence_length=16)
    assert policy.storage_dtype == torch.bfloat16
    prediction = policy.bind(policy.encode(["a cat", "two dogs and a bird"], CPU), None)(setup.latents, setup.timestep)
    assert float((prediction - exact).norm() / exact.norm()) < 0.05
    shared = LatentReward.from_config(setup.reward_config(), pipeline=setup.pipeline, share_backbone=True)
    assert shared.model.dtype == torch.bfloat16
    own = LatentReward.from_config(
        setup.reward_config(), pipeline=tiny_wan_pipeline(), torch_dtype=torch.bfloat16
    ).model.backbone.get_base_model()
    for name, parameter in own.named_parameters():
        wanted = mixed.get_parameter(name.replace(".base_layer", "")).dtype if "lora_" not in name else torch.float32
        assert parameter.dtype == wanted, name
    scores = shared(setup.latents, "a cat", seed=0)
    alone = LatentReward.from_config(setup.reward_config(), transformer=mixed, pipeline=setup.pipeline)
    torch.testing.assert_close(alone(setup.latents, "a cat", seed=0), scores, rtol=0, atol=0.02)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_grpo_on_videos_with_a_latent_reward(tmp_path: Any) -> None:
    pipeline, seen = tiny_wan_pipeline(), []

    def judge(images: Tensor) -> list[float]:
        seen.append(tuple(images.shape))
        return images.flatten(1).mean(dim=1).tolist()

    reward = LatentReward.from_config(Setup.of(ROW).reward_config(), pipeline=pipeline, share_backbone=True)
    trainer = DiffusionGRPOTrainer(
        pipeline,
        reward,
        tiny_config(
            tmp_path,
            DiffusionGRPOConfig,
            num_frames=5,
            height=32,
            width=48,
            eval_height=32,
            eval_width=32,
            guidance_scale=2.0,
            beta=0.1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=1,
        ),
        ["a cat", "a dog"],
        eval_dataset=["a bird", "a fish"],
        eval_reward_funcs=judge,
    )
    trainer.train()
    assert trainer.experience_maker.latent_shape == (16, 2, 4, 6)
    assert logged(trainer, "ratio/mean") == logged(trainer, "ratio/max") == [1.0]
    assert logged(trainer, "reward_std")[0] > 0
    assert logged(trainer, "grad_norm")[0] > 0
    scores = trainer.evaluate()
    assert seen == [(2, 5, 3, 32, 32)]
    assert 0 < scores["eval_judge"] < 1
    clip = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(2, 5, 3, 4, 4)
    assert still_images(clip).unique().tolist() == [2.0]
    assert torch.equal(still_images(clip[:, 0]), clip[:, 0])
    (picture,) = (tmp_path / "pictures").glob("*.png")
    assert Image.open(picture).size[0] > 2 * 96
