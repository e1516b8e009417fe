"""Training checkpoints that are whole or absent: a mixin for `transformers.Trainer`."""

from __future__ import annotations

import contextlib
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from dina_reward.checkpoints.atomic import clean_leftovers, incomplete_name, remove_directory, replace_directory
from dina_reward.checkpoints.locking import new_run, sole_owner
from dina_reward.training.ownership import checkpoints_of, last_checkpoint, run_of, set_aside, write_run
from dina_reward.training.run_settings import (
    check_digests,
    check_same_run,
    settings_of,
    write_digests,
    write_settings,
)
from dina_reward.training.stopping import StopOnSignal


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

_TRAINER_STATE_FILE = "trainer_state.json"


class CheckpointedCallback(TrainerCallback, ABC):
    """A callback with tensors of its own that belong into every checkpoint, saved and restored with the optimizer.

    (`transformers.trainer_callback.ExportableState` does the same for values that fit into JSON.)
    """

    gathers: bool = False
    """Whether `save_state` is called on every rank, because it gathers sharded tensors; it then writes on some only."""

    @abstractmethod
    def save_state(self, directory: str) -> None:
        """Writes the callback's files into a checkpoint directory; called on the ranks that save."""

    @abstractmethod
    def load_state(self, directory: str) -> None:
        """Restores what `save_state` wrote; called on every rank, before ``on_train_begin``."""


class AtomicCheckpointMixin(_Trainer):
    """Makes every ``checkpoint-N`` of a `transformers.Trainer` appear complete or not at all.

    All files of a checkpoint are written to ``.checkpoint-N.incomplete/``, which `get_last_checkpoint` never picks. When
    all ranks have written theirs, the directory is flushed to the disk and renamed. Rotation (``save_total_limit``)
    renames a checkpoint out of sight before it deletes it. What a killed run leaves is removed when training starts.

    Examples:
        >>> class MyTrainer(AtomicCheckpointMixin, Trainer): ...
    """

    _staging: Path | None = None
    _run: str | None = None
    _stop: StopOnSignal | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer.train`, after removing what a killed run left in the output directory.

        ``True`` resumes from the last checkpoint, or starts where there is none yet. A checkpoint of a run that has made
        all its steps is loaded, and nothing is trained.

        SIGTERM makes the run save at the next step that it can be resumed from, and end with code 143.

        Raises:
            ValueError: the checkpoint belongs to a run with other settings or is damaged, or another run is writing into the
                output directory.
        """
        output_dir = Path(self.args.output_dir or ".")
        self._run = self._run or new_run()
        alone = sole_owner(output_dir, self._run) if self.is_world_process_zero() else contextlib.nullcontext()
        with alone:
            if self.args.local_process_index == 0 and output_dir.is_dir():
                clean_leftovers(output_dir, prefix=f"{PREFIX_CHECKPOINT_DIR}-")
            self.accelerator.wait_for_everyone()
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint, output_dir)
            if checkpoint is not None:
                check_same_run(checkpoint, self.run_settings())
                check_digests(checkpoint)
                self._run = run_of(checkpoint) or self._run
                finished = self._finished_state(checkpoint)
                if finished is not None:
                    return self._load_finished(checkpoint, finished)
            # A resumed run has been evaluated at its start; once more would count as an evaluation of its own.
            with _replaced(self.args, eval_on_start=self.args.eval_on_start and checkpoint is None):
                return self._train_until_told(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _checkpoint_to_resume(self, asked: str | bool | None, output_dir: Path) -> Path | None:
        if asked is not True:
            return Path(asked) if asked else None
        found = last_checkpoint(output_dir)
        if found is None:
            logger.warning(f"There is no checkpoint in {output_dir} yet; the run starts from the beginning.")
        return found

    def _train_until_told(self, *args: Any, **kwargs: Any) -> Any:
        if self._stop is None:
            self._stop = StopOnSignal(self.accelerator, self.can_save_at)
            self.add_callback(self._stop)
        try:
            with self._stop:
                output = super().train(*args, **kwargs)
        except KeyboardInterrupt:
            last = last_checkpoint(Path(self.args.output_dir or "."))
            place = (
                "there is no checkpoint yet" if last is None else f"go on from {last} with resume_from_checkpoint=True"
            )
            logger.warning(f"Interrupted at step {self.state.global_step}: {place}.")
            raise
        if self._stop.stopped:
            logger.warning(
                f"Stopped by SIGTERM at step {self.state.global_step}; go on with resume_from_checkpoint=True."
            )
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def can_save_at(self, step: int) -> bool:
        """Whether the run can be resumed from this step."""
        return True

    def run_settings(self) -> dict[str, Any]:
        """What defines the run; written into every checkpoint, and compared before one is resumed."""
        return settings_of(self.args)

    def _finished_state(self, checkpoint: Path) -> TrainerState | None:
        """The state in a checkpoint of a run that has made all its steps."""
        path = checkpoint / _TRAINER_STATE_FILE
        if not path.is_file():
            return None
        state = TrainerState.load_from_json(str(path))
        steps = self.args.max_steps
        if steps <= 0 and state.num_train_epochs >= self.args.num_train_epochs:
            steps = state.max_steps
        return state if 0 < steps <= state.global_step else None

    def _load_finished(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        logger.warning(
            f"{checkpoint} has made all {state.global_step} steps of its run; it is loaded, nothing is trained."
        )
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        for callback in self._checkpointed_callbacks():
            callback.load_state(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = incomplete_name(target)
        staged = self._staging / target.name
        try:
            # There before any rank writes, so that no rank creates or replaces it while another one is writing.
            staged.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                write_settings(staged, self.run_settings())
                write_run(staged, self._run or new_run())
            self._point_at_best_checkpoint(run_dir, staged)
            self._publish(staged, target)
        except OSError:
            # A full disk is not left any fuller.
            shutil.rmtree(incomplete_name(target), ignore_errors=True)
            raise
        finally:
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            self._rotate(run_dir, newest=target)

    def _point_at_best_checkpoint(self, run_dir: Path, staged: Path) -> None:
        """Writes the final path of the best checkpoint into the state, which has just seen the staging directory."""
        step = self.state.best_global_step
        if not step:
            return
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == self.state.global_step or best.is_dir():
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(staged / _TRAINER_STATE_FILE))

    def _publish(self, staged: Path, target: Path) -> None:
        """Renames the checkpoint once every rank has written its part: on each node that has a staging directory."""
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_digests(staged)
            set_aside(target, self._run or "")
            _rename_into_place(staged, target)
        self.accelerator.wait_for_everyone()
        # Nodes without a shared file system hold the files of their own ranks.
        if self.args.local_process_index == 0 and staged.is_dir():
            _rename_into_place(staged, target)
        self.accelerator.wait_for_everyone()

    def _rotate(self, run_dir: Path, newest: Path) -> None:
        """Removes the oldest checkpoints beyond ``save_total_limit``, never the best nor the newest one."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        best = self.state.best_model_checkpoint
        kept = {newest} if best is None else {newest, Path(best)}
        others = [path for path in checkpoints_of(run_dir, self._run) if path not in kept]
        surplus = len(others) + len(kept) - max(limit, len(kept))
        for checkpoint in others[: max(surplus, 0)]:
            remove_directory(checkpoint)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        # With save_total_limit=1 the trainer deletes all but the best checkpoint here; do it by renaming first.
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for checkpoint in checkpoints_of(Path(self._get_output_dir(trial)), self._run):
                if not checkpoint.samefile(best):
                    remove_directory(checkpoint)
        return super()._finalize_training(trial, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._save_callbacks(output_dir)

    def _save_callbacks(self, output_dir: str) -> None:
        for callback in self._checkpointed_callbacks():
            if self.args.should_save or callback.gathers:
                callback.save_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for callback in self._checkpointed_callbacks():
                callback.load_state(checkpoint)

    def _checkpointed_callbacks(self) -> list[CheckpointedCallback]:
        return [cb for cb in self.callback_handler.callbacks if isinstance(cb, CheckpointedCallback)]


@contextlib.contextmanager
def _replaced(args: Any, **values: Any) -> Iterator[None]:
    """Inside the context some arguments have other values."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


def _rename_into_place(staged: Path, target: Path) -> None:
    replace_directory(staged, target)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()
