"""What only a CUDA device can show; skipped with a reason elsewhere."""

from __future__ import annotations

import pytest
import torch

from tests.test_reward import PROMPTS, make_reward
from tests.tiny_models import tiny_sd3_pipeline


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_seeded_scores_are_the_same_on_every_device() -> None:
    latents = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = tiny_sd3_pipeline()
    expected = make_reward(pipeline)(latents, PROMPTS, seed=0)
    scores = make_reward(pipeline.to("cuda"))(latents.cuda(), PROMPTS, seed=0)
    torch.testing.assert_close(scores.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_bfloat16_shared_and_standalone_agree() -> None:
    pipeline = tiny_sd3_pipeline().to("cuda", torch.bfloat16)
    latents = torch.randn(3, 16, 8, 8, device="cuda", dtype=torch.bfloat16)
    scores = [make_reward(pipeline, share_backbone=share)(latents, PROMPTS, seed=0) for share in (False, True)]
    assert scores[0].dtype == torch.float32
    torch.testing.assert_close(scores[0], scores[1], atol=0.05, rtol=0.05)


def test_compiled_reward_on_cuda() -> None:
    pipeline = tiny_sd3_pipeline().to("cuda")
    latents = torch.randn(3, 16, 8, 8, device="cuda")
    reward = make_reward(pipeline)
    eager = reward(latents, PROMPTS, seed=0, noise_level=(0.2, 0.5))
    compiled = reward.compile()(latents, PROMPTS, seed=0, noise_level=(0.2, 0.5))
    torch.testing.assert_close(compiled, eager, atol=1e-3, rtol=1e-3)
