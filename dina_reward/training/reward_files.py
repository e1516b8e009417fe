"""Native checkpoints of a reward that may be sharded by FSDP2: whole tensors on disk, slices in memory."""

from __future__ import annotations

import os
from dataclasses import replace

from peft import get_peft_model_state_dict

from dina_reward.checkpoints import check_state, read_checkpoint, write_checkpoint
from dina_reward.reward import LatentReward
from dina_reward.training.sharding import assign, whole


def save_reward(reward: LatentReward, directory: str | os.PathLike[str], *, write: bool = True) -> None:
    """Writes the native checkpoint; sharded tensors are gathered, so under FSDP2 all ranks have to call this together.

    Args:
        write: whether this process writes.
    """
    checkpoint = reward.checkpoint()
    gathered = [
        {name: whole(tensor).cpu() for name, tensor in part.items()} for part in (checkpoint.adapter, checkpoint.head)
    ]
    if write:
        write_checkpoint(directory, replace(checkpoint, adapter=gathered[0], head=gathered[1]))


def load_reward(reward: LatentReward, directory: str | os.PathLike[str]) -> None:
    """Reads LoRA and head of a native checkpoint of this same reward, strictly; the LoRA must not be merged.

    Sharded tensors are scattered from rank 0, so under FSDP2 all ranks have to call this together.

    Raises:
        CheckpointError: (a `ValueError`) keys, shapes or files do not fit.
    """
    checkpoint = read_checkpoint(directory)
    reward.check_same(checkpoint, str(directory))
    parts = {
        "LoRA adapter": (checkpoint.adapter, get_peft_model_state_dict(reward.model.backbone)),
        "head": (checkpoint.head, reward.model.head.state_dict()),
    }
    for name, (given, expected) in parts.items():
        check_state(given, expected, name)
    for given, expected in parts.values():
        for key, tensor in expected.items():
            assign(tensor, given[key])
