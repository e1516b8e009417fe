"""Small models that stand in for the large ones that the documentation names."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer

from dina_reward.shapes import weights_dir


MAX_STEPS = 2
"""Optimizer steps of every training in the documentation while it is tested."""

SUBSTITUTES = {
    "stabilityai/stable-diffusion-3.5-medium": str(weights_dir("flow")),
    "liuhuohuo/DiNa-LRM-SD35M-12layers": str(weights_dir("flow-reward")),
    '"cuda"': '"cpu"',
    "torch.bfloat16": "torch.float32",  # many times as fast on a CPU
}
"""Names of models and devices that are not at hand, and what stands for them."""


def substituted(code: str) -> str:
    """Code with the embedded world's models in place of those that it names."""
    for name, stand_in in SUBSTITUTES.items():
        code = code.replace(name, stand_in)
    return code


def shorten_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends every training after `MAX_STEPS`."""
    train = Trainer.train

    def short(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.args.max_steps = MAX_STEPS
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", short)
