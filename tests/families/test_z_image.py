from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dina_reward import LatentReward
from dina_reward.alignment.policy import Policy
from dina_reward.families import Conditioning, get_family
from tests.families.row import Setup
from tests.families.rows.z_image import ROW, tiny_z_image_pipeline, unified_sequence


FAMILY: Any = get_family("z_image")
PUBLISHED = {"n_layers": 30, "dim": 3840}


def captions(*lengths: int, width: int | None = None, seed: int = 0) -> Conditioning:
    """Random captions of these lengths; what stands in the padding is not zero."""
    width = max(lengths) if width is None else width
    embeds = torch.randn(len(lengths), max(lengths), 32, generator=torch.Generator().manual_seed(seed))
    embeds = torch.cat([embeds, torch.full((len(lengths), width - max(lengths), 32), 7.0)], dim=1)
    return Conditioning(embeds, prompt_embeds_mask=torch.arange(width) < torch.tensor(lengths)[:, None])


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup.of(ROW)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (16, 16)], ids=["24 image tokens", "64 image tokens"])
@pytest.mark.parametrize("lengths", [(5, 31), (32, 33), (70, 1)])
def test_captions_of_any_length_equal_the_full_model(
    setup: Setup, lengths: tuple[int, int], size: tuple[int, int]
) -> None:
    latents = torch.randn(3, 16, *size, generator=torch.Generator().manual_seed(1))
    timestep, index = torch.tensor([10.0, 400.0, 990.0]), torch.tensor([1, 0, 1])
    conditioning, seen = captions(*lengths), []
    handles = [
        layer.register_forward_hook(lambda _, __, output: seen.append(output)) for layer in setup.denoiser.layers[:2]
    ]
    FAMILY.denoise(setup.denoiser, latents, timestep, conditioning[index], 1.0)
    for handle in handles:
        handle.remove()
    features = setup.backbone()(latents, timestep, conditioning, index)
    assert features.grid == (size[0] // 2, size[1] // 2)
    assert features.text_mask is not None
    assert features.text_mask.sum(dim=1).tolist() == [lengths[i] for i in index]
    given = Setup(ROW, FAMILY, setup.pipeline, latents, timestep, conditioning)
    for visual, text, output in zip(features.visual, features.text, seen, strict=True):
        expected_text, expected_visual = unified_sequence(output, given)
        torch.testing.assert_close(visual, expected_visual, rtol=0, atol=2e-6)
        mask = features.text_mask
        torch.testing.assert_close(text[mask], expected_text[mask], rtol=0, atol=2e-6)


def test_padding_does_not_change_scores(setup: Setup) -> None:
    reward = LatentReward.from_config(setup.reward_config(), pipeline=setup.pipeline)

    def score(conditioning: Conditioning, rows: slice = slice(None)) -> Tensor:
        return reward(
            setup.latents[rows],
            prompt_embeds=conditioning.prompt_embeds,
            prompt_embeds_mask=conditioning.prompt_embeds_mask,
            seed=[3, 4][rows],
        )

    exact = score(captions(5, 40))
    for width in (41, 64, 90):
        torch.testing.assert_close(score(captions(5, 40, width=width)), exact, rtol=0, atol=1e-6)
    alone = captions(5, 40)[[0]].trimmed()
    assert alone.prompt_embeds.shape[1] == 5
    torch.testing.assert_close(score(alone, slice(0, 1)), exact[:1], rtol=0, atol=1e-6)
    assert float((score(captions(6, 40)) - exact)[0].abs()) > 1e-5


@torch.no_grad()
def test_other_lengths_need_no_other_graph(setup: Setup) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    backbone = setup.backbone()
    compiled = torch.compile(backbone, backend=counter, fullgraph=True, dynamic=False)
    for lengths in ((5, 40), (33, 40), (40, 40), (64, 1)):
        conditioning = captions(*lengths, width=64)
        expected = backbone(setup.latents, setup.timestep, conditioning)
        actual = compiled(setup.latents, setup.timestep, conditioning)
        torch.testing.assert_close(actual.visual[-1], expected.visual[-1])
    assert counter.frame_count == 1


@torch.no_grad()
def test_prompts_are_padded_with_a_mask(setup: Setup) -> None:
    prompts = ["a cat", "a cat and two dogs"]
    encoded = FAMILY.encode_prompts(setup.pipeline, prompts)
    assert prompts == ["a cat", "a cat and two dogs"]
    expected, _ = setup.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    lengths = [len(caption) for caption in expected]
    assert encoded.prompt_embeds.shape == (2, max(lengths), 32)
    assert encoded.token_mask.sum(dim=1).tolist() == lengths
    for row, mask, caption in zip(encoded.prompt_embeds, encoded.token_mask, expected, strict=True):
        assert torch.equal(row[mask], caption)


@torch.no_grad()
def test_a_shift_by_image_size_is_the_pipelines() -> None:
    pipeline = tiny_z_image_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline("a cat", height=64, width=96, num_inference_steps=4, output_type="latent", **ROW.arguments)
    policy = Policy(pipeline, rank=2, alpha=4)
    sampler = policy.sampler(4, policy.latent_shape(64, 96))
    torch.testing.assert_close(sampler.levels, pipeline.scheduler.sigmas, rtol=0, atol=1e-7)
    torch.testing.assert_close(sampler.timesteps, pipeline.scheduler.timesteps, rtol=0, atol=1e-4)


def test_unsupported_variants_and_sizes_are_refused(setup: Setup) -> None:
    omni = tiny_z_image_pipeline(siglip_feat_dim=16)
    large = tiny_z_image_pipeline(all_patch_size=(4,))
    for pipeline, message in ((omni, "siglip_feat_dim=16"), (large, r"patches \[\(4, 1\)\]")):
        with pytest.raises(ValueError, match=message):
            Policy(pipeline, rank=2, alpha=4)
        with pytest.raises(ValueError, match=message):
            FAMILY.build_backbone(pipeline.transformer, num_layers=1, visual_taps=(1,), text_taps=(1,))
    with pytest.raises(ValueError, match="66 x 64; this model's position tables reach 64 x 64"):
        FAMILY.check_latents(torch.zeros(1, 16, 66, 64), setup.denoiser.config)
    mismatched = Conditioning(torch.zeros(1, 4, 32), prompt_embeds_mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="prompt_embeds_mask has shape"):
        FAMILY.check_conditioning(mismatched, setup.denoiser.config)


def test_published_defaults() -> None:
    published = FAMILY.reward_defaults(PUBLISHED)
    assert (published.num_layers, published.taps, published.published) == (16, (4, 8, 12, 16), True)
    assert (published.head_width, published.lora_rank) == (1536, 32)
    sizes = FAMILY.feature_sizes(PUBLISHED)
    assert (sizes.hidden, sizes.temb) == (3840, 256)
    assert FAMILY.reward_defaults({"n_layers": 3, "dim": 32}).num_layers == 1


def test_the_backbone_has_position_tables_of_its_own(setup: Setup) -> None:
    backbone = setup.backbone()
    assert backbone.rope_embedder is not setup.denoiser.rope_embedder
    assert backbone.rope_embedder.freqs_cis is not None
