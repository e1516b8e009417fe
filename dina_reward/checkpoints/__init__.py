"""What lies on disk: the native format, the reader of the published one, model cards, and writing that is never half done.

No score is computed here. Begin at `pretrained.PretrainedReward`, the way from a path to a loaded reward; `convert` reads a
directory of any layout and `native` has the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.checkpoints.convert import (
        CheckpointSummary,
        convert_checkpoint,
        read_checkpoint,
        resolve_checkpoint,
        summarize_checkpoint,
    )
    from dina_reward.checkpoints.native import write_checkpoint
    from dina_reward.checkpoints.parts import Checkpoint, CheckpointError, check_state

__getattr__, __dir__, __all__ = lazy_exports(__name__)
