"""TRL up to 0.23: stand-ins of `DDPOTrainer` and `AlignPropTrainer` that call as those do (see real_clients.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations import LatentOutput, as_trl_reward, decoded
from tests.integrations.conftest import PROMPTS, agree


class Wrapper:
    """What `DDPOStableDiffusionPipeline` asks of its subclasses: it decodes unless told to return latents."""

    def __init__(self, sd_pipeline: Any, latents: Tensor) -> None:
        self.sd_pipeline, self.latents = sd_pipeline, latents

    def __call__(self, prompt_embeds: Any = None, output_type: str = "pil") -> Any:
        assert output_type == "latent", "a picture was decoded"
        return SimpleNamespace(images=self.latents, latents=[self.latents], log_probs=[])

    def rgb_with_grad(self, prompt_embeds: Any = None, output_type: str = "pil") -> Any:
        return self(output_type=output_type)


class Policy(LatentOutput, Wrapper):
    pass


def test_ddpo_gets_latents_scores_and_pictures_for_its_hook(
    sd3_pipeline: Any, reward: LatentReward, latents: Tensor, direct: Tensor
) -> None:
    policy, shown = Policy(sd3_pipeline, latents), []
    images = policy(prompt_embeds=None, output_type="pt").images
    rewards, extra = as_trl_reward(reward)(images, PROMPTS, ({}, {}, {}))
    agree("TRL, DDPOTrainer", rewards, direct, 0)
    hook = decoded(policy, lambda data, step, tracker: shown.append((data, step, tracker)))
    hook([[images, PROMPTS, ({}, {}, {}), rewards, extra]], 7, "tracker")
    ((pictures, prompts, _, shown_rewards, _),) = shown[0][0]
    assert pictures.shape == (3, 3, 64, 64)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert (prompts, shown[0][1:], shown_rewards is rewards) == (PROMPTS, (7, "tracker"), True)


def test_alignprop_backpropagates_through_the_score(
    sd3_pipeline: Any, reward: LatentReward, latents: Tensor, direct: Tensor
) -> None:
    policy, shown = Policy(sd3_pipeline, latents.requires_grad_()), []
    data = {"images": policy.rgb_with_grad(output_type="pt").images, "prompts": PROMPTS, "prompt_metadata": ({},) * 3}
    rewards, _ = as_trl_reward(reward, differentiable=True)(data["images"], data["prompts"], data["prompt_metadata"])
    agree("TRL, AlignPropTrainer", rewards.detach(), direct, 1e-6)
    (10.0 - rewards.mean()).backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    decoded(policy, lambda data, step, tracker: shown.append(data["images"].shape))(data, 0, None)
    assert shown == [(3, 3, 64, 64)]
    assert data["images"] is latents
