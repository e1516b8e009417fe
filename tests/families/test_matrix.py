"""One matrix over all model families: a new family adds a row and gets every test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward.families import Conditioning, ModelFamily, families, family_of, get_family
from tests.tiny_models import tiny_sd3_pipeline


@dataclass(frozen=True)
class Row:
    """What the tests need to know about a family."""

    name: str
    pipeline: Callable[[], Any]
    latents: tuple[int, ...]
    num_layers: int
    taps: tuple[int, ...]
    block_output: Callable[[Any], tuple[Tensor, Tensor]]  # block return -> (text, image)


ROWS = [
    Row("sd3", tiny_sd3_pipeline, (2, 16, 8, 8), num_layers=2, taps=(1, 2), block_output=lambda output: output),
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
    blocks = setup.backbone().transformer_blocks
    handles = [
        block.register_forward_hook(lambda _, __, output: seen.append(setup.row.block_output(output)))
        for block in blocks
    ]
    setup.family.predict_velocity(setup.denoiser, setup.latents, setup.timestep, setup.conditioning)
    for handle in handles:
        handle.remove()
    features = setup.backbone()(setup.latents, setup.timestep, setup.conditioning)
    for tap, visual, text in zip(setup.row.taps, features.visual, features.text, strict=True):
        assert torch.equal(text, seen[tap - 1][0])
        assert torch.equal(visual, seen[tap - 1][1])
    sizes = setup.family.feature_sizes(setup.denoiser.config)
    assert features.visual[0].shape[-1] == features.text[0].shape[-1] == sizes.hidden
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
    """The latents after one Euler step of the pipeline give back the velocity it used."""
    shape = setup.family.latent_shape(setup.pipeline, 64, 64, setup.denoiser.config)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    latents = setup.pipeline(
        "a cat",
        height=64,
        width=64,
        latents=noise,
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=16,
        output_type="latent",
    ).images
    sigma, end = setup.pipeline.scheduler.sigmas[0], setup.pipeline.scheduler.sigmas[1]
    velocity = setup.family.predict_velocity(
        setup.denoiser, noise, setup.pipeline.scheduler.timesteps[:1], setup.conditioning[:1]
    )
    torch.testing.assert_close(noise + (end - sigma) * velocity, latents, rtol=1e-4, atol=1e-4)


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model family 'sd9'; this version supports: sd3"):
        get_family("sd9")
    with pytest.raises(ValueError, match=r"Linear belongs to no supported.*StableDiffusion3Pipeline"):
        family_of(torch.nn.Linear(1, 1))


def test_decoding_equals_the_pipelines_own(setup: Setup) -> None:
    arguments = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 16}
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
    odd = setup.family.encode_images(setup.pipeline, [images[0].resize((79, 70))])
    assert odd.shape == (1, *shape)
    with pytest.raises(ValueError, match="must have one size"):
        setup.family.encode_images(setup.pipeline, [images[0], images[0].resize((32, 32))])
    with pytest.raises(ValueError, match="at least 16 x 16"):
        setup.family.encode_images(setup.pipeline, [images[0].resize((8, 8))])
