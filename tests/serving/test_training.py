"""A policy is trained on a server's scores as on the reward's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dina_reward import LatentReward, RemoteReward
from dina_reward.alignment.experience.rewards import check_columns
from dina_reward.recipes import RecipeArguments
from dina_reward.recipes import alignment as recipes
from tests.alignment.helpers import logged, lora_tensors, tiny_pipeline, tiny_trainer
from tests.serving.conftest import running
from tests.training.tiny_reward import tiny_reward


@pytest.fixture(scope="module")
def tiny() -> LatentReward:
    """A reward with latents of 16 channels."""
    return tiny_reward(pipeline=tiny_pipeline()).eval()


def test_a_remote_reward_trains_as_the_reward_itself(tiny: LatentReward, tmp_path: Path) -> None:
    settings = {"reward_noise_level": [0.3], "max_steps": 4}
    local = tiny_trainer(tmp_path / "local", reward_funcs=tiny, **settings)
    local.train()
    with running(tiny) as server:
        remote = tiny_trainer(
            tmp_path / "remote", reward_funcs=RemoteReward(server.url), reward_overlap=True, **settings
        )
        remote.train()
        assert server.metric("dina_reward_rows_scored_total") == 24
    assert logged(local, "reward") == logged(remote, "reward")
    assert logged(local, "rewards/latent_reward/mean") == logged(remote, "rewards/latent_reward/mean")
    weights, others = lora_tensors(local), lora_tensors(remote)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    # A run may begin with one of them and be resumed with the other.
    here, there = (json.loads(json.dumps(trainer.run_settings())) for trainer in (local, remote))
    assert here == there


def test_a_server_of_another_reward_is_another_run(tiny: LatentReward, tmp_path: Path) -> None:
    with running(tiny_reward(seed=1, pipeline=tiny_pipeline()).eval()) as server:
        remote = tiny_trainer(tmp_path, reward_funcs=RemoteReward(server.url))
    local = tiny_trainer(tmp_path, reward_funcs=tiny)
    assert remote.run_settings()["latent rewards"] != local.run_settings()["latent rewards"]


def test_columns_that_are_options_are_refused() -> None:
    with pytest.raises(ValueError, match="column 'height'"):
        check_columns(["height"], [RemoteReward("http://127.0.0.1:9")])


def test_recipes_take_addresses() -> None:
    arguments = RecipeArguments("shapes", "http://127.0.0.1:9, https://other:8000/", "shapes")
    _, reward = recipes.load_models(arguments, "cpu")
    assert repr(reward) == "RemoteReward(http://127.0.0.1:9, https://other:8000)"


def test_conservative_scores_need_the_reward_itself(tiny: LatentReward, tmp_path: Path) -> None:
    message = r"reward_kappa=0\.5 needs a LatentReward; RemoteReward scores on a server"
    with running(tiny) as server, pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, reward_funcs=RemoteReward(server.url), reward_kappa=0.5)
