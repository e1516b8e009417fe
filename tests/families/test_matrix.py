"""One matrix over all model families: a new family adds a row and gets every test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dina_reward import LatentReward, LatentRewardConfig
from dina_reward.alignment.policy_weights import save_lora
from dina_reward.families import Conditioning, ModelFamily, families, family_of, get_family
from dina_reward.head import RewardHeadConfig
from tests.tiny_models import tiny_sd3_pipeline, tiny_sd_pipeline


@dataclass(frozen=True)
class Row:
    """What the tests need to know about a family."""

    name: str
    pipeline: Callable[[], Any]
    latents: tuple[int, ...]
    num_layers: int
    taps: tuple[int, ...]
    blocks: Callable[[Any], list[nn.Module]]  # backbone -> its blocks, in the order of their numbers
    block_output: Callable[[Any, Conditioning], tuple[Tensor, Tensor]]  # block return -> (text, image)
    first_step: Callable[[Any, Tensor, Tensor], Tensor]  # pipeline, noise, its prediction -> latents after one step
    pixels_per_side: int  # images are cut to a multiple of this
    arguments: dict[str, Any] = field(default_factory=dict)  # of the pipeline's call


def euler_step(pipeline: Any, noise: Tensor, velocity: Tensor) -> Tensor:
    sigma, end = pipeline.scheduler.sigmas[:2]
    return noise + (end - sigma) * velocity


def ddim_step(pipeline: Any, noise: Tensor, epsilon: Tensor) -> Tensor:
    signal, end = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps[:2]]
    clean = (noise - (1 - signal).sqrt() * epsilon) / signal.sqrt()
    return end.sqrt() * clean + (1 - end).sqrt() * epsilon


def unet_output(output: Any, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
    hidden = output[0] if isinstance(output, tuple) else output
    return conditioning.prompt_embeds, hidden.flatten(2).transpose(1, 2)


ROWS = [
    Row(
        "sd3",
        tiny_sd3_pipeline,
        (2, 16, 8, 8),
        num_layers=2,
        taps=(1, 2),
        blocks=lambda backbone: list(backbone.transformer_blocks),
        block_output=lambda output, _: output,
        first_step=euler_step,
        pixels_per_side=16,
        arguments={"max_sequence_length": 16},
    ),
    Row(
        "stable_diffusion",
        tiny_sd_pipeline,
        (2, 4, 8, 8),
        num_layers=3,
        taps=(1, 2, 3),
        blocks=lambda backbone: [*backbone.down_blocks, backbone.mid_block],
        block_output=unet_output,
        first_step=ddim_step,
        pixels_per_side=8,
    ),
]


def test_every_family_has_a_row() -> None:
    assert {row.name for row in ROWS} == {family.name for family in families()}


@dataclass
class Setup:
    """A family with a tiny pipeline and inputs for one call."""

    row: Row
    family: ModelFamily
    pipeline: Any
    latents: Tensor
    timestep: Tensor
    conditioning: Conditioning

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.family.denoiser_attribute)

    def backbone(self) -> Any:
        return self.family.build_backbone(
            self.denoiser, num_layers=self.row.num_layers, visual_taps=self.row.taps, text_taps=self.row.taps
        )


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def setup(request: pytest.FixtureRequest) -> Setup:
    row, pipeline = request.param, request.param.pipeline()
    family = get_family(row.name)
    latents = torch.randn(row.latents, generator=torch.Generator().manual_seed(0))
    conditioning = family.encode_prompts(pipeline, ["a cat", "two dogs"], max_sequence_length=16)
    return Setup(row, family, pipeline, latents, torch.tensor([250.0, 800.0]), conditioning)


def test_found_from_pipeline_and_denoiser(setup: Setup) -> None:
    assert family_of(setup.pipeline) is setup.family
    assert family_of(setup.denoiser) is setup.family


@torch.no_grad()
def test_backbone_equals_the_full_model_at_the_taps(setup: Setup) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.register_forward_hook(
            lambda _, __, output: seen.append(setup.row.block_output(output, setup.conditioning))
        )
        for block in setup.row.blocks(setup.backbone())
    ]
    setup.family.predict_velocity(setup.denoiser, setup.latents, setup.timestep, setup.conditioning)
    for handle in handles:
        handle.remove()
    features = setup.backbone()(setup.latents, setup.timestep, setup.conditioning)
    for tap, visual, text in zip(setup.row.taps, features.visual, features.text, strict=True):
        assert torch.equal(text, seen[tap - 1][0])
        assert torch.equal(visual, seen[tap - 1][1])
    sizes = setup.family.feature_sizes(setup.denoiser.config).at(setup.row.taps)
    widths = (sizes.hidden,) * len(setup.row.taps) if isinstance(sizes.hidden, int) else sizes.hidden
    assert tuple(visual.shape[-1] for visual in features.visual) == widths
    assert {text.shape[-1] for text in features.text} == {sizes.text or sizes.hidden}
    assert features.temb.shape == (2, sizes.temb)


@torch.no_grad()
def test_prompt_index_selects_rows(setup: Setup) -> None:
    backbone = setup.backbone()
    index = torch.tensor([1, 1])
    picked = backbone(setup.latents, setup.timestep, setup.conditioning, index)
    direct = backbone(setup.latents, setup.timestep, setup.conditioning[index])
    torch.testing.assert_close(picked.visual[-1], direct.visual[-1])
    torch.testing.assert_close(picked.text[-1], direct.text[-1])


def test_gradients_reach_the_latents_with_and_without_checkpointing(setup: Setup) -> None:
    gradients = []
    for recompute in (False, True):
        backbone = setup.backbone()
        backbone.gradient_checkpointing = recompute
        latents = setup.latents.clone().requires_grad_()
        backbone(latents, setup.timestep, setup.conditioning).visual[-1].square().sum().backward()
        gradients.append(latents.grad)
    assert gradients[0] is not None
    assert float(gradients[0].abs().sum()) > 0
    assert torch.equal(gradients[0], gradients[1])


@torch.no_grad()
def test_backbone_compiles_whole(setup: Setup) -> None:
    backbone = setup.backbone()
    expected = backbone(setup.latents, setup.timestep, setup.conditioning)
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    features = compiled(setup.latents, setup.timestep, setup.conditioning)
    torch.testing.assert_close(features.visual[-1], expected.visual[-1])


@torch.no_grad()
def test_partial_load_equals_the_full_model(setup: Setup, tmp_path: Path) -> None:
    attribute = setup.family.denoiser_attribute
    setup.denoiser.save_pretrained(tmp_path / attribute)
    partial = setup.family.load_denoiser(str(tmp_path), num_layers=setup.row.num_layers, subfolder=attribute)
    backbone = setup.family.build_backbone(
        partial, num_layers=setup.row.num_layers, visual_taps=setup.row.taps, text_taps=setup.row.taps
    )
    features = backbone(setup.latents, setup.timestep, setup.conditioning)
    expected = setup.backbone()(setup.latents, setup.timestep, setup.conditioning)
    assert torch.equal(features.visual[-1], expected.visual[-1])
    assert torch.equal(features.text[-1], expected.text[-1])
    assert sum(p.numel() for p in partial.parameters()) < sum(p.numel() for p in setup.denoiser.parameters())


@torch.no_grad()
def test_guidance_mixes_two_predictions(setup: Setup) -> None:
    def predict(**kwargs: Any) -> Tensor:
        return setup.family.predict_velocity(
            setup.denoiser, setup.latents, setup.timestep, kwargs.pop("conditioning", setup.conditioning), **kwargs
        )

    negative = setup.conditioning[[1, 0]]
    conditional, unconditional = predict(), predict(conditioning=negative)
    guided = predict(negative_conditioning=negative, guidance_scale=3.0)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert torch.equal(predict(negative_conditioning=negative, guidance_scale=1.0), conditional)
    with pytest.raises(ValueError, match="needs negative_conditioning"):
        predict(guidance_scale=3.0)


@torch.no_grad()
def test_prediction_equals_the_pipelines_own_first_step(setup: Setup) -> None:
    """The pipeline's latents after its first step are those that the family's prediction leads to."""
    shape = setup.family.latent_shape(setup.pipeline, 64, 64, setup.denoiser.config)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    after: list[Tensor] = []

    def remember(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        after.append(kwargs["latents"])
        return {}

    setup.pipeline(
        "a cat",
        height=64,
        width=64,
        latents=noise,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=remember,
        **setup.row.arguments,
    )
    prediction = setup.family.predict_velocity(
        setup.denoiser, noise, setup.pipeline.scheduler.timesteps[:1].float(), setup.conditioning[:1]
    )
    expected = setup.row.first_step(setup.pipeline, noise, prediction)
    assert float((after[0] - noise).abs().max()) > 0.1
    torch.testing.assert_close(after[0], expected, rtol=1e-4, atol=1e-4)


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model family 'sd9'; this version supports: sd3"):
        get_family("sd9")
    with pytest.raises(ValueError, match=r"Linear belongs to no supported.*StableDiffusion3Pipeline"):
        family_of(torch.nn.Linear(1, 1))


def test_decoding_equals_the_pipelines_own(setup: Setup) -> None:
    arguments = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, **setup.row.arguments}
    images, latents = (
        setup.pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type=kind, **arguments).images
        for kind in ("pt", "latent")
    )
    torch.testing.assert_close(setup.family.decode_latents(setup.pipeline, latents), images, rtol=0, atol=1e-5)


def test_images_and_latents_round_trip_in_shape(setup: Setup) -> None:
    shape = setup.family.latent_shape(setup.pipeline, 64, 64, setup.denoiser.config)
    pixels = setup.family.decode_latents(setup.pipeline, torch.randn(2, *shape))
    assert pixels.shape == (2, 3, 64, 64)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    images = setup.pipeline.image_processor.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())
    latents = setup.family.encode_images(setup.pipeline, images)
    assert latents.shape == (2, *shape)
    assert latents.dtype == torch.float32
    setup.family.check_latents(latents, setup.denoiser.config)
    side = setup.row.pixels_per_side
    odd = setup.family.encode_images(setup.pipeline, [images[0].resize((64 + side - 1, 64 + side // 2))])
    assert odd.shape == (1, *shape)
    with pytest.raises(ValueError, match="must have one size"):
        setup.family.encode_images(setup.pipeline, [images[0], images[0].resize((32, 32))])
    with pytest.raises(ValueError, match=f"at least {side} x {side}"):
        setup.family.encode_images(setup.pipeline, [images[0].resize((side // 2, side // 2))])


def reward_config(setup: Setup) -> LatentRewardConfig:
    return LatentRewardConfig(
        family=setup.row.name,
        num_layers=setup.row.num_layers,
        visual_taps=setup.row.taps,
        head=RewardHeadConfig(num_attention_heads=4),
        max_sequence_length=16,
    )


def add_policy_lora(setup: Setup, pipeline: Any) -> Any:
    """A LoRA on the generator that is not a no-op, as during alignment."""
    denoiser = getattr(pipeline, setup.family.denoiser_attribute)
    denoiser.requires_grad_(False)
    targets = list(setup.family.policy_lora_targets)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser.add_adapter(LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=targets), "policy")
    return denoiser


def test_shared_reward_agrees_with_its_own_copy_and_spares_the_generator(setup: Setup, tmp_path: Path) -> None:
    pipeline, prompts = setup.row.pipeline(), ["a cat", "two dogs"]
    denoiser = add_policy_lora(setup, pipeline)
    with torch.no_grad():
        before = setup.family.predict_velocity(denoiser, setup.latents, setup.timestep, setup.conditioning)
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
    modules = [(name, type(module), module.training) for name, module in denoiser.named_modules()]

    shared = LatentReward.from_config(reward_config(setup), pipeline=pipeline, share_backbone=True)
    with torch.no_grad():
        for name, parameter in shared.model.trainable_state().items():
            if "lora_B" in name:
                parameter.fill_(0.05)
    latents = setup.latents.clone().requires_grad_()
    scores = shared.score(latents, prompts, seed=0).scores
    scores.sum().backward()
    assert float(latents.grad.abs().sum()) > 0  # type: ignore[union-attr]

    with torch.no_grad():
        after = setup.family.predict_velocity(denoiser, setup.latents, setup.timestep, setup.conditioning)
    assert torch.equal(before, after)
    assert all(torch.equal(tensor, state[name]) for name, tensor in denoiser.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()} == flags
    assert [(name, type(module), module.training) for name, module in denoiser.named_modules()] == modules
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    owned = {tensor.data_ptr() for tensor in denoiser.state_dict().values()}
    extra = {name for name, tensor in shared.model.state_dict().items() if tensor.data_ptr() not in owned}
    assert extra == set(shared.model.trainable_state())

    shared.save_pretrained(tmp_path / "reward")
    standalone = LatentReward.from_pretrained(tmp_path / "reward", pipeline=setup.pipeline)
    torch.testing.assert_close(standalone(setup.latents, prompts, seed=0), scores.detach(), rtol=0, atol=1e-5)
    untrained = LatentReward.from_config(reward_config(setup), pipeline=setup.pipeline)
    assert not torch.allclose(untrained(setup.latents, prompts, seed=0), scores.detach(), atol=1e-4)


@torch.no_grad()
def test_policy_lora_is_read_back_by_the_pipeline(setup: Setup, tmp_path: Path) -> None:
    inputs = (setup.latents, setup.timestep, setup.conditioning)
    denoiser = add_policy_lora(setup, setup.row.pipeline())
    attribute = setup.family.denoiser_attribute
    save_lora(setup.pipeline, denoiser, str(tmp_path), attribute, "policy")
    fresh = setup.row.pipeline()
    fresh.load_lora_weights(str(tmp_path))
    tuned = setup.family.predict_velocity(denoiser, *inputs)
    assert float((tuned - setup.family.predict_velocity(setup.denoiser, *inputs)).abs().max()) > 1e-3
    loaded = setup.family.predict_velocity(getattr(fresh, setup.family.denoiser_attribute), *inputs)
    torch.testing.assert_close(loaded, tuned, rtol=0, atol=1e-6)
