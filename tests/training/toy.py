"""A two-parameter regression that `transformers.Trainer` trains in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from dina_reward.training.checkpointing import AtomicCheckpointMixin


class ToyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        prediction = self.linear(x) * self.frozen
        return {"loss": (prediction - y).square().mean(), "prediction": prediction}


class ToyTrainer(AtomicCheckpointMixin, Trainer):
    pass


def toy_data() -> list[dict[str, Tensor]]:
    x = torch.linspace(-1, 1, 32).reshape(-1, 1)
    return [{"x": value, "y": 3 * value + 1} for value in x]


def toy_arguments(output_dir: Path | str, **overrides: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "steps",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **overrides})


def toy_trainer(output_dir: Path | str, trainer_class: type[Trainer] = ToyTrainer, **overrides: Any) -> Trainer:
    callbacks = overrides.pop("callbacks", None)
    model = overrides.pop("model", None) or ToyModel()
    return trainer_class(
        model=model,
        args=toy_arguments(output_dir, **overrides),
        train_dataset=toy_data(),
        eval_dataset=toy_data(),
        callbacks=callbacks,
    )
