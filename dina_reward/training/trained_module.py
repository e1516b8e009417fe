"""A reward as the module that `transformers.Trainer` trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dina_reward.modeling import LatentRewardModel


class TrainedModule(nn.Module):
    """A `LatentRewardModel` in the shape that `transformers.Trainer` expects.

    The trainer writes into ``model.config``, which is frozen in a reward, and it patches ``model.forward`` for autocast;
    neither then touches the reward itself. Under FSDP2 it is the root of what is sharded.
    """

    def __init__(self, reward_model: LatentRewardModel) -> None:
        super().__init__()
        self.reward_model = reward_model

    def forward(self, *args: Any, run: Callable[[], Any] | None = None) -> Any:
        """Scores of a training batch, or whatever else has to see the whole weights.

        Args:
            args: those of `LatentRewardModel.forward`.
            run: called instead, e.g. for an evaluation that uses the reward itself.
        """
        return self.reward_model(*args) if run is None else run()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recomputes every block's activations in the backward pass.

        Raises:
            ValueError: options that the backbones do not have.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "a reward's backbone recomputes every block; remove every_n_layers and offload from "
                "activation_checkpointing_kwargs"
            )
        self.reward_model.enable_gradient_checkpointing()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The name of `gradient_checkpointing_enable` in newer releases of `transformers`."""
        self.gradient_checkpointing_enable(**kwargs)
