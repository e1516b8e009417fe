"""Losses of a micro-batch that share a forward and a backward pass: how many, by arithmetic."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.checks.values import check_int


@dataclass
class JointTimestepsConfig(AlignmentConfig):
    """Settings of the trainers that train each sample at several timesteps."""

    timesteps_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Of the timesteps that a sample is trained at, how many share a forward and a backward pass: fewer and "
            "larger passes, equal losses up to rounding. By default as many as fill the rows of a micro-batch that "
            "keep_per_group leaves out. `dina-reward plan` says how many fit into memory."
        },
    )

    @property
    @abstractmethod
    def trained_timesteps(self) -> int:
        """Timesteps that each sample is trained at, in one pass over a generation batch."""

    def joint_timesteps(self) -> int:
        """`timesteps_per_forward`, or what it is by default: the same number on every rank."""
        if self.timesteps_per_forward is not None:
            return self.timesteps_per_forward
        if self.keep_per_group is None or self.per_device_train_batch_size % self.num_generations:
            return 1
        room = self.num_generations // self.keep_per_group
        return max(number for number in range(1, room + 1) if self.trained_timesteps % number == 0)

    def joint_positions(self, position: int) -> range:
        """Which of the trained timesteps a pass has.

        Args:
            position: number of the pass.
        """
        together = self.joint_timesteps()
        return range(position * together, (position + 1) * together)

    def _check_numbers(self) -> None:
        super()._check_numbers()
        if self.timesteps_per_forward is not None:
            check_int(self, "timesteps_per_forward", 1)

    def _check_geometry(self) -> None:
        super()._check_geometry()
        if self.timesteps_per_forward is not None and self.trained_timesteps % self.timesteps_per_forward:
            raise ValueError(
                f"timesteps_per_forward is {self.timesteps_per_forward}, which does not divide the "
                f"{self.trained_timesteps} timesteps that each sample is trained at"
            )
