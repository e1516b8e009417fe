"""flow_grpo, DiffusionNFT: `multi_score` as their scripts call it, from a pool of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations import multi_score_with
from tests.integrations.conftest import PROMPTS, agree


METADATA = [{}, {}, {}]


def jpeg_multi_score(device: Any, weights: dict[str, float]) -> Any:
    """The client's function for one pixel reward."""

    def fn(images: Any, prompts: Any, metadata: Any, only_strict: bool = True) -> Any:
        scores = {name: [float(image.mean()) for image in images] for name in weights}
        scores["avg"] = [sum(weights[name] * scores[name][i] for name in weights) for i in range(len(images))]
        return scores, {}

    return fn


def test_as_the_training_script_calls_it(reward: LatentReward, latents: Tensor, direct: Tensor) -> None:
    fn = multi_score_with(reward, {"latent_reward": 2.0})
    trajectory = torch.stack([torch.randn_like(latents), latents], dim=1)
    with ThreadPoolExecutor(max_workers=8) as executor:
        futures = [
            executor.submit(
                fn, torch.rand(3, 3, 64, 64), PROMPTS, METADATA, only_strict=True, latents=trajectory[:, -1]
            )
            for _ in range(8)
        ]
        results = [future.result() for future in futures]
    for scores, extra in results:
        assert extra == {}
        assert scores.keys() == {"latent_reward", "avg"}
        assert all(isinstance(score, float) for score in scores["avg"])
        gathered = {name: torch.as_tensor(values).float() for name, values in scores.items()}
        agree("flow_grpo", gathered["latent_reward"], direct)
        assert torch.allclose(gathered["avg"], 2 * direct, atol=1e-5)


def test_with_a_pixel_reward_of_the_client(reward: LatentReward, latents: Tensor, direct: Tensor) -> None:
    images = torch.rand(3, 3, 64, 64)
    weights = {"latent_reward": 1.0, "jpeg": 0.5}
    scores, _ = multi_score_with(reward, weights, jpeg_multi_score, "cpu")(images, PROMPTS, METADATA, latents=latents)
    assert list(scores) == ["jpeg", "avg", "latent_reward"]
    expected = direct.double() + 0.5 * torch.tensor([float(image.mean()) for image in images], dtype=torch.float64)
    assert torch.allclose(torch.tensor(scores["avg"], dtype=torch.float64), expected, atol=1e-5)


def test_evaluation_has_pictures_alone(reward: LatentReward) -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores, _ = multi_score_with(reward)(images, PROMPTS, METADATA, only_strict=False)
    assert len(scores["avg"]) == 3
    assert scores["avg"] == pytest.approx(multi_score_with(reward)(images, PROMPTS, METADATA, None, True)[0]["avg"])


def test_newer_trees_pass_reference_images_on(reward: LatentReward, latents: Tensor) -> None:
    got: list[Any] = []

    def newer(device: Any, weights: Any) -> Any:
        def fn(images: Any, prompts: Any, metadata: Any, ref_images: Any = None, only_strict: bool = True) -> Any:
            got.append((ref_images, only_strict))
            return {"avg": [0.0] * 3}, {}

        return fn

    multi_score_with(reward, {"latent_reward": 1, "edit": 1}, newer)(
        torch.rand(3, 3, 64, 64), PROMPTS, METADATA, ref_images="ref", only_strict=False, latents=latents
    )
    assert got == [("ref", False)]


def test_wrong_weights_are_refused(reward: LatentReward) -> None:
    with pytest.raises(ValueError, match=r"an entry 'latent_reward' for the latent reward, got \['pickscore'\]"):
        multi_score_with(reward, {"pickscore": 1.0})
    with pytest.raises(ValueError, match=r"pass the client's multi_score as `pixel_multi_score` for \['pickscore'\]"):
        multi_score_with(reward, {"latent_reward": 1.0, "pickscore": 1.0})
