"""Moving average by `diffusers.EMAModel`, to which this callback adds sharded parameters and exact resumption."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from dina_reward.backbones.wrappers import unwrap
from dina_reward.checks.stored import open_tensors
from dina_reward.training.checkpointing import CheckpointedCallback
from dina_reward.training.sharding import assign, is_main_process, local, reshard, trainable_parameters, whole


EMA_WEIGHTS_NAME = "ema.safetensors"


class EMACallback(CheckpointedCallback):
    """``average <- decay * average + (1 - decay) * parameter`` after every ``update_every``-th optimizer step.

    The decay warms up as in `diffusers.training_utils.EMAModel`: update ``n`` uses ``min(decay, n / (9 + n))``, the first
    one copies the parameters. Only parameters that require gradients when training starts are averaged. With
    `AtomicCheckpointMixin` the averages travel in every checkpoint (``ema.safetensors``) and resume bit for bit. They are
    float32 whatever the parameters are. Under FSDP2 every rank averages its own slices, and whole tensors are saved;
    parameters partitioned by DeepSpeed ZeRO-3 are refused.

    Examples:
        >>> ema = EMACallback(model, decay=0.999)
        >>> trainer = MyTrainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[ema])
        >>> trainer.train()
        >>> with ema.average_parameters():
        ...     trainer.evaluate()

    Args:
        model (`nn.Module`): the model that is trained, or a compiled or data-parallel wrapper of it.
        decay (`float`): upper limit of the decay, in ``(0, 1)``.
        update_every (`int`): optimizer steps between two updates.
        root (`nn.Module`, *optional*): what FSDP2 shards as a whole, if that is a module around ``model``.
    """

    gathers = True

    def __init__(
        self, model: nn.Module, decay: float = 0.999, update_every: int = 1, *, root: nn.Module | None = None
    ) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"EMA decay must lie strictly between 0 and 1, got {decay}")
        if update_every < 1:
            raise ValueError(f"EMA update_every must be at least 1 optimizer step, got {update_every}")
        self.model = unwrap(model, adapters=False)
        self.root = self.model if root is None else root
        self.decay = decay
        self.update_every = update_every
        self._ema: EMAModel | None = None
        self._restored = False
        self._swapped = False
        self._saves: bool | None = None

    @property
    def num_updates(self) -> int:
        """Updates made so far."""
        return 0 if self._ema is None else int(self._ema.optimization_step)

    def _parameters(self) -> dict[str, nn.Parameter]:
        reshard(self.root)
        return trainable_parameters(self.model)

    def _new_average(self) -> EMAModel:
        ema = EMAModel(self._parameters().values(), decay=self.decay)
        ema.to(dtype=torch.float32)
        return ema

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts from the current parameters, unless the averages have just been read from a checkpoint."""
        self._saves = args.should_save
        if not self._restored:
            self._ema = self._new_average()
        self._restored = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Updates the averages once per ``update_every`` optimizer steps."""
        if self._ema is not None and state.global_step % self.update_every == 0:
            self._ema.step(self._parameters().values())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the averages for evaluation and saving; the next training starts its own."""
        self._restored = False

    def restart(self) -> None:
        """Begins again at the current parameters, e.g. after others were loaded."""
        self._ema = self._new_average()

    @contextlib.contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Puts the averages into the model, and the trained parameters back on leaving. May be nested.

        Before the first update it changes nothing.
        """
        if self._swapped or self.num_updates == 0:
            yield
            return
        assert self._ema is not None
        trained = [local(parameter).to("cpu", copy=True) for parameter in self._parameters().values()]
        self._put([local(average) for average in self._ema.shadow_params])
        self._swapped = True
        try:
            yield
        finally:
            self._put(trained)
            self._swapped = False

    def _put(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters().values(), tensors, strict=True):
            local(parameter).data.copy_(tensor)

    def save_state(self, directory: str) -> None:
        """Writes the averages, by parameter name, and the number of updates to ``ema.safetensors``.

        Sharded averages are gathered, so under FSDP2 every rank has to call this; those that save write.
        """
        if self._ema is None:
            return
        saves = is_main_process() if self._saves is None else self._saves
        tensors = {}
        for name, average in zip(self._parameters(), self._ema.shadow_params, strict=True):
            gathered = whole(average)
            if saves:
                tensors[name] = gathered.contiguous().cpu()
        if saves:
            metadata = {"format": "pt", "num_updates": str(self.num_updates)}
            save_file(tensors, os.path.join(directory, EMA_WEIGHTS_NAME), metadata=metadata)

    def load_state(self, directory: str) -> None:
        """Reads ``ema.safetensors``.

        Raises:
            ValueError: the file is missing, or its names or shapes are not those of the model's trainable parameters.
        """
        path = os.path.join(directory, EMA_WEIGHTS_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{directory} holds no {EMA_WEIGHTS_NAME}: that run kept no moving average. "
                "Resume it without EMA, or start a new run."
            )
        with open_tensors(path) as file:
            num_updates = int((file.metadata() or {}).get("num_updates", 0))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parameters = self._parameters()
        _check_same_tensors(stored, parameters, path)
        ema = self._new_average()
        for average, name in zip(ema.shadow_params, parameters, strict=True):
            assign(average, stored[name])
        ema.optimization_step = num_updates
        self._ema, self._restored = ema, True


def _check_same_tensors(stored: dict[str, Tensor], parameters: dict[str, nn.Parameter], path: str) -> None:
    missing, unexpected = sorted(parameters.keys() - stored.keys()), sorted(stored.keys() - parameters.keys())
    reshaped = [name for name, p in parameters.items() if name in stored and stored[name].shape != p.shape]
    for fault, names in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes for", reshaped)):
        if names:
            raise ValueError(
                f"{path} does not fit the trained model: it {fault} {names[0]!r} ({len(names)} tensor(s)). "
                "Resume with the LoRA and head configuration of that run."
            )
