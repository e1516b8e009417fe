"""Golden numbers of the reference implementation, in every form a reward can take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward, convert_checkpoint


LEVELS = (0.0, 0.1, 0.4, 0.7, 1.0)
FORMS = ("standalone", "shared", "loaded", "converted", "converted_shared")


@pytest.fixture(params=FORMS)
def reward(
    request: pytest.FixtureRequest, parity_dir: Path, parity_transformer: Any, parity_scheduler: Any, tmp_path: Path
) -> LatentReward:
    path = parity_dir / "reward"
    if request.param.startswith("converted"):
        convert_checkpoint(path, tmp_path / "native")
        path = tmp_path / "native"
    if request.param == "loaded":
        return LatentReward.from_pretrained(path, backbone=str(parity_dir / "base"))
    return LatentReward.from_pretrained(
        path,
        transformer=parity_transformer,
        scheduler=parity_scheduler,
        share_backbone=request.param.endswith("shared"),
    )


def embeds(cases: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
    return {name: cases[name][rows] for name in ("prompt_embeds", "pooled_prompt_embeds")}


@pytest.mark.parametrize("level", LEVELS)
def test_scores(reward: LatentReward, parity_cases: dict[str, Tensor], level: float) -> None:
    noise = parity_cases[f"noise_{level}"]
    expected = parity_cases[f"score_{level}"].squeeze(1)
    scores = reward(parity_cases["latents"], noise_level=level, noise=noise, **embeds(parity_cases))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    output = reward.score(parity_cases["latents"], noise_level=level, noise=noise, **embeds(parity_cases))
    torch.testing.assert_close(output.noise_levels, parity_cases[f"sigma_{level}"][:1])
    torch.testing.assert_close(output.timesteps, parity_cases[f"timestep_{level}"][:1])
    torch.testing.assert_close(output.level_scores, expected[:, None], atol=1e-5, rtol=0)


def test_token_ensemble(reward: LatentReward, parity_cases: dict[str, Tensor]) -> None:
    expected = parity_cases["score_ensemble"].squeeze(1)
    noise = parity_cases["noise_ensemble"]
    arguments = {"noise_level": (0.2, 0.5, 0.7), **embeds(parity_cases)}
    for batch_size in (None, 1, 2):
        scores = reward(parity_cases["latents"], noise=noise, batch_size=batch_size, **arguments)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    split = [
        reward(
            parity_cases["latents"][i : i + 1],
            noise=noise[i : i + 1],
            noise_level=(0.2, 0.5, 0.7),
            **embeds(parity_cases, slice(i, i + 1)),
        )
        for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(split), expected, atol=1e-5, rtol=0)


def test_noisy_latents_are_scored_as_they_are(reward: LatentReward, parity_cases: dict[str, Tensor]) -> None:
    sigma = parity_cases["sigma_0.7"].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * parity_cases["latents"] + sigma * parity_cases["noise_0.7"]
    expected = parity_cases["score_0.7"].squeeze(1)
    for where in ({"noise_level": 0.7}, {"timesteps": parity_cases["timestep_0.7"]}):
        scores = reward.score_noisy(noisy, **where, **embeds(parity_cases))
        torch.testing.assert_close(scores.detach(), expected, atol=1e-5, rtol=0)


def test_gradient(reward: LatentReward, parity_cases: dict[str, Tensor]) -> None:
    latents = parity_cases["latents"].clone().requires_grad_()
    reward.score(
        latents, noise_level=0.4, noise=parity_cases["noise_0.4"], **embeds(parity_cases)
    ).scores.sum().backward()
    expected = parity_cases["latents_grad_0.4"]
    assert latents.grad is not None
    assert float((latents.grad - expected).norm() / expected.norm()) < 1e-4
