"""Flow-Factory: its base class and how its processor calls, in stand-ins of the same contract (see real_clients.py)."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from tests.integrations.conftest import PROMPTS, agree


STEPS = 4
TIMESTEPS = torch.tensor([1000.0, 900.0, 750.0, 500.0])


class PointwiseRewardModel(ABC):
    """The client's base class."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        self.accelerator, self.config = accelerator, config
        self.device = accelerator.device if config.device == torch.device("cuda") else config.device
        self.dtype = config.dtype

    @abstractmethod
    def __call__(self, prompt: Any, **fields: Any) -> Any: ...


@pytest.fixture
def model(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As the client's loader makes it, from the dotted path."""
    for name in ("flow_factory", "flow_factory.rewards", "flow_factory.rewards.abc"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flow_factory.rewards.abc"].PointwiseRewardModel = PointwiseRewardModel  # type: ignore[attr-defined]
    module = __import__("dina_reward.integrations.flow_factory", fromlist=["LatentRewardModel"])
    config = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, extra_kwargs=dict(saved))
    yield module.LatentRewardModel(config=config, accelerator=SimpleNamespace(device=torch.device("cpu")))
    del module.LatentRewardModel


def process(model: Any, samples: list[dict[str, Any]]) -> Tensor:
    """The client's processor: fields by parameter name, lists of rows, fields that any sample lacks left out."""
    names = [name for name in inspect.signature(model.__call__).parameters if name in samples[0]]
    fields = {name: [sample[name] for sample in samples] for name in names}
    fields = {name: values for name, values in fields.items() if all(value is not None for value in values)}
    output = model(**fields)
    return torch.as_tensor(output.rewards if hasattr(output, "rewards") else output, dtype=torch.float32)


def samples(latents: Tensor, stored: list[int], image: Tensor | None = None) -> list[dict[str, Any]]:
    """Samples that store these positions of a trajectory whose last state is ``latents``."""
    places = torch.full((STEPS + 1,), -1)
    for place, position in enumerate(stored):
        places[position] = place
    return [
        {
            "prompt": prompt,
            "timesteps": TIMESTEPS,
            "latent_index_map": places if stored else None,
            "all_latents": torch.stack([row if p == STEPS else row + p for p in stored]) if stored else None,
            "image": None if image is None else image[i],
            "height": 64,
            "width": 64,
        }
        for i, (prompt, row) in enumerate(zip(PROMPTS, latents, strict=True))
    ]


@pytest.mark.parametrize("stored", [[0, 1, 2, 3, 4], [2, 4]])
def test_the_final_state_is_found(model: Any, latents: Tensor, direct: Tensor, stored: list[int]) -> None:
    agree("Flow-Factory", process(model, samples(latents, stored)), direct)


def test_a_window_without_the_final_state_is_scored_at_its_level(
    model: Any, reward: LatentReward, latents: Tensor
) -> None:
    scores = process(model, samples(latents, [1, 2, 3], torch.rand(3, 3, 64, 64)))
    expected = reward.score_noisy(latents + 3, list(PROMPTS), timesteps=500.0)
    assert torch.allclose(scores, expected, atol=1e-5)


def test_evaluation_stores_no_latents(model: Any, latents: Tensor) -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = process(model, samples(latents, [], images))
    assert torch.allclose(scores, model.scorer(model.scorer.encode(images), PROMPTS), atol=1e-5)
    model.noisy = "image"
    assert torch.allclose(process(model, samples(latents, [1, 2], images)), scores, atol=1e-5)


def test_neither_latents_nor_images(model: Any, latents: Tensor) -> None:
    with pytest.raises(ValueError, match="neither a final latent nor an image"):
        process(model, samples(latents, []))


def test_wrong_configurations_are_refused(model: Any) -> None:
    config = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, extra_kwargs={"noisy": "guess"})
    with pytest.raises(ValueError, match="give model_path, and noisy as 'score' or 'image'"):
        type(model)(config, None)
