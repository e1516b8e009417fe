from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload

from dina_reward.alignment.policy import Policy
from dina_reward.distill import PipelineSource, PolicySource
from dina_reward.distill.processes import OneProcess, on_main, processes_first
from tests.alignment.helpers import PIXELS, tiny_pipeline


class Alone(OneProcess):
    """An accelerator of one process."""

    device = torch.device("cpu")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


SEEDS = [11, 12, 13]
PROMPTS = ["a cat", "a dog", "a cat"]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def source_of(pipeline, **options):
    settings = {"num_inference_steps": 3, "max_sequence_length": 8, "batch_size": 2}
    return PipelineSource(pipeline, PIXELS, PIXELS, **{**settings, **options})


def test_samples_depend_on_prompt_and_seed_alone(pipeline):
    source = source_of(pipeline)
    latents = source.draw(PROMPTS, SEEDS)
    assert latents.shape == (3, 16, 4, 4)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(source.draw(PROMPTS[1:2], SEEDS[1:2])[0], latents[1])
    torch.testing.assert_close(source_of(pipeline, batch_size=3).draw(PROMPTS, SEEDS), latents)
    assert not torch.equal(source.draw(PROMPTS, [1, 2, 3]), latents)
    assert not torch.allclose(source_of(pipeline, guidance_scale=3.0).draw(PROMPTS, SEEDS), latents)


def test_samples_are_those_of_the_pipeline(pipeline):
    source = source_of(pipeline)
    initial = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(11))[None]
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a cat", latents=initial, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=8, height=PIXELS,
        width=PIXELS, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(source.draw(["a cat"], [11]), expected, atol=1e-4, rtol=1e-4)


def test_images_lie_in_the_unit_range(pipeline):
    source = source_of(pipeline)
    images = source.decode(source.draw(PROMPTS[:2], SEEDS[:2]))
    assert images.shape == (2, 3, PIXELS, PIXELS)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1


def test_identity_is_of_weights_and_settings(pipeline):
    identity = source_of(pipeline).identity()
    assert identity == source_of(pipeline, batch_size=1).identity()
    assert identity != source_of(pipeline, num_inference_steps=4).identity()


def test_a_policy_draws_what_it_is_now():
    pipeline = tiny_pipeline()
    alone = PipelineSource(pipeline, PIXELS, PIXELS, num_inference_steps=3, max_sequence_length=8, batch_size=8)
    before = alone.draw(PROMPTS, SEEDS)
    policy = Policy(pipeline, rank=2, alpha=4, max_sequence_length=8)
    sampler = policy.sampler(3, (16, 4, 4))
    source = PolicySource(policy, sampler, PIXELS, PIXELS, batch_size=2, accelerator=Alone())
    torch.testing.assert_close(source.draw(PROMPTS, SEEDS), before)
    assert policy.calls.rollout == 3 * 3
    identity = source.identity()
    for parameter in policy.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.5)
    assert not torch.allclose(source.draw(PROMPTS, SEEDS), before)
    assert source.identity() != identity


def test_work_of_the_main_process():
    assert on_main(OneProcess(), lambda: 3) == 3
    assert processes_first(OneProcess(), lambda: 4) == 4
    with pytest.raises(KeyError):
        on_main(OneProcess(), lambda: {}["x"])


def test_an_offloaded_denoiser_is_refused():
    offloaded = tiny_pipeline()
    cpu_offload(offloaded.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"is offloaded \(enable_sequential_cpu_offload"):
        source_of(offloaded)
