"""`LatentRewardTrainer`: preference pairs of latents -> LoRA and head of a `LatentReward`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from dina_reward.data import collate_preferences, preference_rows
from dina_reward.evaluation import PairProtocol, PairScores, accuracy_by_noise, score_batch
from dina_reward.families import Conditioning
from dina_reward.inputs import NonFiniteError
from dina_reward.likelihood import PreferenceLoss, ThurstoneModel
from dina_reward.modeling import LatentRewardModel
from dina_reward.reward import LatentReward
from dina_reward.training.checkpointing import AtomicCheckpointMixin
from dina_reward.training.config import LatentRewardTrainingConfig
from dina_reward.training.ema import EMA_WEIGHTS_NAME, EMACallback
from dina_reward.training.metrics import PairMetrics
from dina_reward.training.pair_noise import PairNoiser


TRAINING_ARGS_FILE = "training_args.json"


class TrainedModule(nn.Module):
    """A `LatentRewardModel` in the shape that `transformers.Trainer` expects.

    The trainer writes into ``model.config``, which is frozen in a reward, and it patches ``model.forward`` for autocast;
    neither then touches the reward itself.
    """

    def __init__(self, reward_model: LatentRewardModel) -> None:
        super().__init__()
        self.reward_model = reward_model

    def forward(
        self, noisy_latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor
    ) -> Tensor:
        """Scores, shape ``(rows,)``; see `LatentRewardModel.forward`."""
        return self.reward_model(noisy_latents, timestep, conditioning, prompt_index)

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


class LatentRewardTrainer(AtomicCheckpointMixin, Trainer):
    """Trains a latent reward on preferences (arXiv 2602.11146).

    Every pair gets one noise level and one noise tensor, which both of its latents see; both sides go through the backbone
    in one batch, each prompt encoded once. LoRA and head train in float32. Runs on one device, under DDP and under
    DeepSpeed ZeRO 1 and 2; parameters sharded by FSDP or ZeRO-3 are refused.

    Supported: soft labels and weights per pair, every level distribution of `LevelSampler`, moving average of the weights,
    gradient accumulation and checkpointing, bf16 autocast, 8-bit optimizers, bit-exact resume on the CPU.
    Not supported: batches that mix latent shapes.

    Each ``checkpoint-N`` is itself a reward checkpoint with the trained (not averaged) weights. `save_model` and the model
    at the end of training with ``load_best_model_at_end`` hold the average when ``ema_decay`` is set.
    The optimizer, scheduler and random states beside it are written by `transformers` with `torch.save` and read back
    with ``weights_only=True``; the training arguments are plain JSON.

    Example:
        >>> reward = LatentReward.from_config(config, pipeline=pipe)
        >>> trainer = LatentRewardTrainer(reward, LatentRewardTrainingConfig(output_dir="out"), train_dataset=pairs)
        >>> trainer.train()
        >>> trainer.save_model("my_reward")

    Args:
        reward: reward to train, with the pipeline that encodes its prompts.
        args: training arguments.
        train_dataset: preference records (see `dina_reward.data`): a `datasets.Dataset`, a list of dicts, ...
        eval_dataset: the same, or a dict of several.
        kwargs: further arguments of `transformers.Trainer`, e.g. ``callbacks``.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        reward: LatentReward,
        args: LatentRewardTrainingConfig,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        **kwargs: Any,
    ) -> None:
        self.reward = reward.train()
        self.preference_loss = PreferenceLoss(
            args.loss_type,  # type: ignore[arg-type]
            ThurstoneModel(reward.config.variance_scale, reward.config.variance_offset),
            margin=args.margin,
        )
        self.noiser = PairNoiser(reward.noise_process, args.level_sampler(), args.seed)
        ensemble = None if args.eval_ensemble_levels is None else tuple(args.eval_ensemble_levels)
        self.eval_protocol = PairProtocol(tuple(args.eval_noise_levels), ensemble, seed=args.eval_seed)
        self._pair_metrics = PairMetrics()
        self._micro_step = (-1, 0)
        super().__init__(
            model=TrainedModule(reward.model),
            args=args,
            data_collator=kwargs.pop("data_collator", collate_preferences),
            train_dataset=None if train_dataset is None else preference_rows(train_dataset),
            eval_dataset=_eval_rows(eval_dataset),
            **kwargs,
        )
        if self.is_fsdp_enabled or _is_zero3(self):
            raise ValueError(
                "LatentRewardTrainer does not train parameters sharded by FSDP or ZeRO-3; only LoRA and head are trained, "
                "so use plain multi-GPU (DDP) or ZeRO 1 or 2"
            )
        self.ema = None
        if args.ema_decay is not None:
            self.ema = EMACallback(reward.model, args.ema_decay, args.ema_update_every)
            self.add_callback(self.ema)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, optionally from a checkpoint directory (``True``: the last one in ``output_dir``)."""
        if self.train_dataset is None:
            raise ValueError("LatentRewardTrainer.train needs a train_dataset; none was given")
        self._micro_step = (-1, 0)
        self.reward.train()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean preference loss of a micro-batch.

        Raises:
            ValueError: the latents are not in the layout of the reward's family.
            NonFiniteError: (a `ValueError`) a score is NaN or infinite.
        """
        chosen, rejected = (self._spatial(inputs[side]) for side in ("chosen", "rejected"))
        noised = self.noiser(chosen, rejected, step=self.state.global_step, first_position=self._first_position())
        conditioning, prompt_index = self.reward.encode_prompts(inputs["prompts"])
        scores = model(noised.latents, noised.point.timestep.repeat(2), conditioning, prompt_index.repeat(2))
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(
                f"the reward's scores became NaN or infinite at step {self.state.global_step}; lower learning_rate or "
                "max_grad_norm, or compute in bf16 or float32 instead of fp16"
            )
        score_chosen, score_rejected = scores.chunk(2)
        losses = self.preference_loss.per_pair(score_chosen, score_rejected, noised.point.level, inputs["p_chosen"])
        self._pair_metrics.update(score_chosen - score_rejected, losses, noised.point.level, inputs["p_chosen"])
        loss = (losses * inputs["weight"].to(losses)).mean()
        return (loss, {"chosen": score_chosen, "rejected": score_rejected}) if return_outputs else loss

    def _spatial(self, latents: Tensor) -> Tensor:
        family, config = self.reward.family, self.reward.config.backbone_config
        latents = family.unpack_latents(latents, config)
        family.check_latents(latents, config)
        return latents

    def _first_position(self) -> int:
        """Position of this rank's next micro-batch within the batch of the current optimizer step, in pairs."""
        step, count = self._micro_step
        count = count + 1 if step == self.state.global_step else 0
        self._micro_step = (self.state.global_step, count)
        return (count * self.args.world_size + self.args.process_index) * self._train_batch_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy, margin and loss by noise third to the training log lines."""
        if "loss" in logs:
            logs.update(self._pair_metrics.pop(self.accelerator))
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Scores all pairs at the evaluation levels and for the ensemble, under fixed noise and averaged weights.

        Metrics: ``accuracy_<level>`` and ``accuracy_ensemble``, ``accuracy`` (mean over the single levels), ``margin``
        and ``loss`` (mean over the single levels, unweighted).
        """
        module = self.reward.model
        was_training = module.training
        module.eval()
        rows = []
        with self._averaged_parameters(), self.accelerator.autocast():
            for index, batch in enumerate(dataloader):
                first = (index * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
                chosen, rejected = score_batch(self.reward, batch, self.eval_protocol, first)
                row = torch.cat([chosen, rejected, batch["p_chosen"][:, None].to(chosen)], dim=1)
                rows.append(self.accelerator.gather_for_metrics(row).cpu())
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        module.train(was_training)
        table = torch.cat(rows)
        width = len(self.eval_protocol.settings)
        scores = PairScores(
            table[:, :width],
            table[:, width : 2 * width],
            table[:, -1],
            self.eval_protocol,
            self.preference_loss.thurstone,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._evaluation_metrics(scores).items()}
        return EvalLoopOutput(
            predictions=scores.margins.numpy(), label_ids=None, metrics=metrics, num_samples=len(table)
        )

    def _evaluation_metrics(self, scores: PairScores) -> dict[str, float]:
        levels = self.eval_protocol.noise_levels
        metrics = {f"accuracy_{name}": result.value for name, result in accuracy_by_noise(scores).items()}
        metrics["accuracy"] = sum(metrics[f"accuracy_{level:g}"] for level in levels) / len(levels)
        metrics["margin"] = float(scores.margins[:, : len(levels)].mean())
        losses = [
            self.preference_loss(scores.chosen[:, i], scores.rejected[:, i], torch.tensor(level), scores.p_chosen)
            for i, level in enumerate(levels)
        ]
        metrics["loss"] = float(torch.stack(losses).mean())
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the reward as a native checkpoint; called by hand, with the averaged weights when EMA is on."""
        with contextlib.nullcontext() if _internal_call else self._averaged_parameters():
            super().save_model(output_dir, _internal_call)

    def _averaged_parameters(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.average_parameters()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir or ".")
        self.reward.save_pretrained(directory)
        (directory / TRAINING_ARGS_FILE).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.reward.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self.reward.load_weights(best)
        if self.ema is not None and os.path.isfile(os.path.join(best, EMA_WEIGHTS_NAME)):
            self.ema.load_state(best)


def _eval_rows(eval_dataset: Any) -> Any:
    if eval_dataset is None:
        return None
    if isinstance(eval_dataset, dict):
        return {name: preference_rows(rows) for name, rows in eval_dataset.items()}
    return preference_rows(eval_dataset)


def _is_zero3(trainer: Trainer) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3
