"""`LatentRewardTrainer`: preference pairs of latents -> LoRA and head of a `LatentReward`."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput, seed_worker

from dina_reward.data import collate_preferences, preference_rows
from dina_reward.data.sampler import bucketed_loader
from dina_reward.evaluation import PairProtocol, score_batch
from dina_reward.likelihood import PreferenceLoss, ThurstoneModel
from dina_reward.modeling.config import lora_facts
from dina_reward.modeling.heads.ensemble import member_weights
from dina_reward.modeling.inputs import NonFiniteError
from dina_reward.reward import LatentReward
from dina_reward.training.batching import SequentialBucketSampler, gather_rows, has_buckets, make_batch_sampler
from dina_reward.training.checkpointing import AtomicCheckpointMixin
from dina_reward.training.config import LatentRewardTrainingConfig, check_mixed_precision
from dina_reward.training.ema import EMA_WEIGHTS_NAME, EMACallback
from dina_reward.training.log_table import print_tables, reward_training_cells
from dina_reward.training.metrics import PairMetrics, evaluation_metrics
from dina_reward.training.pair_noise import PairNoiser
from dina_reward.training.reward_files import load_reward, save_reward
from dina_reward.training.run_settings import dataset_digest, settings_of, tensor_digest
from dina_reward.training.sharding import (
    ExactTimesteps,
    compute_by_autocast,
    keep_frozen_from_ddp,
    keep_scores_exact,
    reshard,
)
from dina_reward.training.trained_module import TrainedModule


TRAINING_ARGS_FILE = "training_args.json"


class LatentRewardTrainer(AtomicCheckpointMixin, Trainer):
    """Trains a latent reward on preferences (arXiv 2602.11146).

    Every pair gets one noise level and one noise tensor, which both of its latents see (unless
    ``share_noise_within_pair=False``). Both sides go through the backbone in one batch, each prompt encoded once. LoRA and
    head train in float32. Runs on one device, under DDP, under FSDP2 and under DeepSpeed ZeRO 1 and 2; FSDP1 and ZeRO-3 are
    refused.

    Supported: soft labels and weights per pair, prompts that are encoded already, every level distribution of
    `LevelSampler`, a frozen or 4-bit backbone, moving average of the weights, gradient accumulation and checkpointing, bf16
    autocast, 8-bit optimizers, bit-exact resume on the CPU. Datasets with an attribute ``bucket_of`` (see
    `dina_reward.training.batching`) are read in batches of one latent shape each.
    Not supported: batches that mix latent shapes.

    Each ``checkpoint-N`` is itself a reward checkpoint with the trained (not averaged) weights. `save_model` and the model
    at the end of training with ``load_best_model_at_end`` hold the average when ``ema_decay`` is set.
    The optimizer, scheduler and random states beside it are written by `transformers` with `torch.save` and read back
    with ``weights_only=True``; the training arguments are plain JSON.

    Examples:
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

    args: LatentRewardTrainingConfig
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        reward: LatentReward,
        args: LatentRewardTrainingConfig,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        **kwargs: Any,
    ) -> None:
        check_mixed_precision(reward.model.dtype, args)
        self.reward = reward
        self.preference_loss = _loss_of(reward, args)
        self.noiser = PairNoiser(
            reward.noise_process, args.level_sampler(), args.seed, share_noise=args.share_noise_within_pair
        )
        ensemble = None if args.eval_ensemble_levels is None else tuple(args.eval_ensemble_levels)
        self.eval_protocol = PairProtocol(tuple(args.eval_noise_levels), ensemble, seed=args.eval_seed)
        self._pair_metrics = PairMetrics()
        self._micro_step = (-1, 0)
        self._exact_timesteps: ExactTimesteps | None = None
        _set_trainable(reward, args)
        train_rows = None if train_dataset is None else preference_rows(train_dataset)
        self._facts = _facts_of(reward, train_rows)
        # FSDP2 shards it in place, so that it stays the trained module whatever it is wrapped in.
        self._trained_module = TrainedModule(reward.model)
        if reward.shares_backbone:
            keep_frozen_from_ddp(self._trained_module)
        if args.deepspeed_plugin is not None and args.bf16:
            compute_by_autocast(args.deepspeed_plugin.deepspeed_config)
        super().__init__(
            model=self._trained_module,
            args=args,
            data_collator=kwargs.pop("data_collator", collate_preferences),
            train_dataset=train_rows,
            eval_dataset=_eval_rows(eval_dataset),
            **kwargs,
        )
        _refuse_sharding(self)
        print_tables(self, reward_training_cells)
        self.ema = None
        if args.ema_decay is not None:
            self.ema = EMACallback(reward.model, args.ema_decay, args.ema_update_every, root=self._trained_module)
            self.add_callback(self.ema)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, optionally from a checkpoint directory (``True``: the last one in ``output_dir``)."""
        if self.train_dataset is None:
            raise ValueError("LatentRewardTrainer.train needs a train_dataset; none was given")
        self._micro_step = (-1, 0)
        _set_trainable(self.reward, self.args)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def run_settings(self) -> dict[str, Any]:
        """The arguments that decide what is computed, with the reward's configuration, its LoRA and its frozen weights."""
        return settings_of(self.args, **self._facts)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one bucket each where the dataset has buckets; else those of `transformers.Trainer`."""
        if not has_buckets(self.train_dataset):
            return super().get_train_dataloader()
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = make_batch_sampler(
            self.train_dataset,
            self._train_batch_size,
            seed,
            num_replicas=args.world_size,
            rank=args.process_index,
        )
        return self._bucket_loader(self.train_dataset, sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Bucket by bucket where the dataset has buckets; else the data loader of `transformers.Trainer`."""
        datasets: Any = self.eval_dataset
        dataset = datasets if eval_dataset is None else eval_dataset
        dataset = datasets[dataset] if isinstance(dataset, str) else dataset
        if not has_buckets(dataset):
            return super().get_eval_dataloader(eval_dataset)
        args = self.args
        sampler = SequentialBucketSampler(
            dataset, args.eval_batch_size, num_replicas=args.world_size, rank=args.process_index
        )
        return self._bucket_loader(dataset, sampler)

    def _bucket_loader(self, dataset: Any, batch_sampler: Any) -> DataLoader[Any]:
        args = self.args
        return bucketed_loader(
            dataset,
            batch_sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )

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
        with self._given_prompts(inputs):
            conditioning, prompt_index = self.reward.encode_prompts(inputs["prompts"])
        given = (noised.latents, noised.point.timestep.repeat(2), conditioning, prompt_index.repeat(2))
        # Every member of the head learns on its own; most heads have one.
        scores = model(*given, 1, True) if self.reward.config.head.num_members > 1 else model(*given)[None]
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(
                f"the reward's scores became NaN or infinite at step {self.state.global_step}; lower learning_rate or "
                "max_grad_norm, or compute in bf16 or float32 instead of fp16"
            )
        if scores.requires_grad:
            scores.register_hook(_without_traces)
        losses = self._member_losses(scores, noised.point.level, inputs)
        score_chosen, score_rejected = scores.mean(dim=0).chunk(2)
        self._pair_metrics.update(score_chosen - score_rejected, losses, noised.point.level, inputs["p_chosen"])
        loss = (losses * inputs["weight"].to(losses)).mean()
        return (loss, {"chosen": score_chosen, "rejected": score_rejected}) if return_outputs else loss

    def _member_losses(self, scores: Tensor, level: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Loss of every pair, shape ``(pairs,)``, averaged over the members of the head."""
        each = []
        for member in scores:
            chosen, rejected = member.chunk(2)
            each.append(
                self.preference_loss.per_pair(chosen, rejected, level, inputs["p_chosen"], inputs.get("scores"))
            )
        losses = torch.stack(each)
        if len(losses) > 1:
            losses = losses * member_weights(inputs["chosen"], len(losses)).to(losses)
        return losses.mean(dim=0)

    def _spatial(self, latents: Tensor) -> Tensor:
        family, config = self.reward.family, self.reward.config.backbone_config
        latents = family.unpack_latents(latents, config)
        family.check_latents(latents, config)
        return latents

    def _given_prompts(self, batch: Any) -> contextlib.AbstractContextManager[None]:
        """Inside the context, prompts whose embeddings are in the batch are not encoded."""
        conditioning = batch["conditioning"]
        if conditioning is not None:
            self.reward.family.check_conditioning(conditioning, self.reward.config.backbone_config)
        return self.reward.prompt_encoder.given(batch["prompts"], conditioning)

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
        table = self._score_dataset(dataloader)
        module.train(was_training)
        width = len(self.eval_protocol.settings)
        chosen, rejected, p_chosen = table[:, :width], table[:, width : 2 * width], table[:, -1]
        values = evaluation_metrics(
            chosen, rejected, p_chosen, self.eval_protocol, self.preference_loss.of_preferences()
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(
            predictions=(chosen - rejected).numpy(), label_ids=None, metrics=metrics, num_samples=len(table)
        )

    def _score_dataset(self, dataloader: DataLoader[Any]) -> Tensor:
        """Scores of the chosen and of the rejected sides at each setting and the label, a row per pair of all ranks."""
        rows, positions = [], []
        bucketed = isinstance(dataloader.batch_sampler, SequentialBucketSampler)
        with torch.no_grad(), self._averaged_parameters(), self._autocast():
            for index, batch in enumerate(dataloader):
                first = (index * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
                if bucketed:
                    first = dataloader.batch_sampler.first_positions[index]  # type: ignore[union-attr]
                with self._given_prompts(batch):
                    score = partial(score_batch, self.reward, batch, self.eval_protocol, first)
                    chosen, rejected = self._trained_module(run=score)
                row = torch.cat([chosen, rejected, batch["p_chosen"][:, None].to(chosen)], dim=1)
                rows.append(row.cpu() if bucketed else self.accelerator.gather_for_metrics(row).cpu())
                positions.append(first + torch.arange(len(row)))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return gather_rows(torch.cat(rows), torch.cat(positions)) if bucketed else torch.cat(rows)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            keep_scores_exact(self.accelerator.state.fsdp_plugin)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled and self._exact_timesteps is None:
            self._exact_timesteps = ExactTimesteps(self._trained_module)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the reward as a native checkpoint; called by hand, with the averaged weights when EMA is on.

        Under FSDP2 all ranks have to call this together.
        """
        with contextlib.nullcontext() if _internal_call else self._averaged_parameters():
            if self.is_fsdp_enabled:
                self._save(output_dir)  # the trainer's own way would write the frozen backbone too
            else:
                super().save_model(output_dir, _internal_call)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.is_deepspeed_enabled and self.args.bf16:  # accelerate leaves precision to DeepSpeed's engine
            return torch.autocast(self.args.device.type, torch.bfloat16)
        return self.accelerator.autocast()

    def _averaged_parameters(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.average_parameters()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir or ".")
        if self.is_fsdp_enabled:
            reshard(self._trained_module)
            save_reward(self.reward, directory, write=self.args.should_save)
        elif self.args.should_save:
            self.reward.save_pretrained(directory)
        if self.args.should_save:
            (directory / TRAINING_ARGS_FILE).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # As the parent does, without a second copy of the whole model, which would include the frozen backbone.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
        self._save_callbacks(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        reshard(self._trained_module)
        load_reward(self.reward, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self._load_from_checkpoint(best)
        if self.ema is not None and os.path.isfile(os.path.join(best, EMA_WEIGHTS_NAME)):
            self.ema.load_state(best)


def _without_traces(gradient: Tensor) -> Tensor:
    """Zero where a pair is beyond doubt: on its way back so small a gradient turns subnormal, and CPUs slow down by half."""
    return gradient.masked_fill(gradient.abs() < 1e-20, 0)


def _set_trainable(reward: LatentReward, args: LatentRewardTrainingConfig) -> None:
    reward.train()
    reward.model.set_trainable(True, lora=not args.freeze_backbone)


def _loss_of(reward: LatentReward, args: LatentRewardTrainingConfig) -> PreferenceLoss:
    config = reward.config
    thurstone = ThurstoneModel(config.variance_scale, config.variance_offset)
    loss = PreferenceLoss(args.loss_type, thurstone, margin=args.margin)  # type: ignore[arg-type]
    if loss.likelihood != config.likelihood:
        fitting = (
            "'bradley_terry'"
            if config.likelihood == "bradley_terry"
            else "'thurstone_fidelity', 'thurstone_nll', 'gaussian'"
        )
        raise ValueError(
            f"loss_type {args.loss_type!r} fits the likelihood {loss.likelihood!r}, but the reward's is "
            f"{config.likelihood!r}; set loss_type to {fitting}, or likelihood={loss.likelihood!r} in the reward's "
            "configuration"
        )
    return loss


def _facts_of(reward: LatentReward, train_dataset: Any | None) -> dict[str, Any]:
    """What defines a run besides its arguments; to be taken before anything is sharded."""
    config = {name: value for name, value in reward.config.to_dict().items() if name != "backbone_model_id"}
    facts = {f"reward {name}": value for name, value in config.items()}
    return {
        **facts,
        **lora_facts(reward.lora_config),
        "pairs": None if train_dataset is None else dataset_digest(train_dataset),
        "frozen weights": tensor_digest(
            parameter for name, parameter in reward.model.backbone.named_parameters() if ".lora_" not in name
        ),
    }


def _eval_rows(eval_dataset: Any) -> Any:
    if eval_dataset is None:
        return None
    if isinstance(eval_dataset, dict):
        return {name: preference_rows(rows) for name, rows in eval_dataset.items()}
    return preference_rows(eval_dataset)


def _refuse_sharding(trainer: Trainer) -> None:
    state = trainer.accelerator.state
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "LatentRewardTrainer does not train parameters partitioned by ZeRO-3; use ZeRO 1 or 2, DDP, or FSDP2 for a "
            "backbone that does not fit on one device"
        )
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("LatentRewardTrainer runs under FSDP2, not FSDP1: set fsdp_version: 2 in fsdp_config")
