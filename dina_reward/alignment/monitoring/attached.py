"""Callbacks that work with the parts of an alignment trainer: its policy, its rewards, its evaluations."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from dina_reward.training.checkpointing import CheckpointedCallback


class AttachedCallback(CheckpointedCallback):
    """A callback among the ``callbacks`` of an `AlignmentTrainer`, which hands itself over once it is complete."""

    @abstractmethod
    def attach(self, trainer: Any) -> None:
        """Takes the trainer that this callback belongs to.

        Raises:
            ValueError: the callback cannot do its work in this run.
        """
