"""A reward on a tiny SD3 with 16 latent channels and encoders of 77 tokens, as the clients' own code expects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from tests.test_reward import make_reward


PROMPTS = ("a cat", "a dog", "a cat")


def agree(client: str, scores: Any, direct: Tensor, most: float = 1e-5) -> None:
    """Scores as a client got them against direct ones; `pytest -s` prints the difference."""
    worst = float((torch.as_tensor(scores) - direct).abs().max())
    print(f"\n{client}: differs from direct scores by at most {worst:.1e}")
    assert worst <= most


@pytest.fixture(scope="session")
def reward(sd3_pipeline: Any) -> LatentReward:
    return make_reward(sd3_pipeline)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def direct(reward: LatentReward, latents: Tensor) -> Tensor:
    """Scores as the package itself gives them, under the noise that all clients use."""
    from dina_reward.integrations import prompt_seeds

    return reward(latents, list(PROMPTS), seed=prompt_seeds(PROMPTS))


@pytest.fixture(scope="session")
def saved(sd3_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of the reward and of its pipeline, for clients that load them."""
    root = tmp_path_factory.mktemp("saved")
    sd3_pipeline.save_pretrained(root / "pipeline")
    make_reward(sd3_pipeline).save_pretrained(root / "reward")
    return {"model_path": str(root / "reward"), "base_model_path": str(root / "pipeline")}
