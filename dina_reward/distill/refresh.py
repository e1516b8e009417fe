"""`RewardRefresh`: a latent reward that is kept true while a policy moves, by a judge that is called rarely."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from dina_reward.alignment.monitoring.attached import AttachedCallback
from dina_reward.alignment.sampling.prompts import PromptTable
from dina_reward.checkpoints.atomic import atomic_directory, atomic_file
from dina_reward.checks.stored import read_json, read_tensors
from dina_reward.checks.values import check_kind, checked_texts
from dina_reward.data import PreferencePair
from dina_reward.data.cached import CachedPreferences
from dina_reward.distill.drift import DriftSettings, DriftSnapshot, drift_reasons, snapshot
from dina_reward.distill.labeller import JudgeLabeller
from dina_reward.distill.labels import LabelReport
from dina_reward.distill.processes import on_main
from dina_reward.distill.refresh_settings import RefreshRecord, RefreshSettings
from dina_reward.distill.refresh_training import ReplayedPairs, at_rest, continue_training, restore, state_of
from dina_reward.distill.sources import PolicySource
from dina_reward.evaluation import PairProtocol, PairScores, pairwise_accuracy, score_pairs
from dina_reward.noise.draws import fold_seed
from dina_reward.reward import LatentReward
from dina_reward.reward_functions import unwrapped
from dina_reward.training.run_settings import tensor_digest


logger = logging.get_logger(__name__)

FOLDER = "refresh"
DRIFT_NAME = "refresh_drift.safetensors"
_LABELS, _AUDIT, _TRAINING, _DRIFT, _CHECK, _SCORING = range(0x726600, 0x726606)


class RewardRefresh(AttachedCallback):
    """Labels fresh samples of the policy with a judge, trains the reward on them and goes on, while the policy trains.

    Whenever `RefreshSettings` says so, at the end of a generation: a budget of samples of the policy as it is now is judged,
    the informative ones first; the reward's LoRA and head are trained on these pairs and on old ones; both rewards are
    checked on an audit, fresh samples of prompts that are never trained on; the better one is used from then on.

    Everything of a refresh is in ``OUTPUT_DIR/refresh/round-NNN``: labels, audit, reward and record. A run that was killed
    in the middle of one resumes from its last checkpoint, comes there again and goes on with what is there: no judgement is
    asked for twice. On the CPU the resumed run is the uninterrupted one, bit for bit. With several processes, which must all
    see the output directory, the main one asks the judge and all of them sample and train.

    Judgements count as ``judge_calls`` among the costs of the run, samples as denoiser calls.

    Examples:
        >>> refresh = RewardRefresh(JudgeLabeller(judge), reward, RefreshSettings(every=10, budget=200), audit_prompts)
        >>> DiffusionNFTTrainer(pipe, reward, args, train_dataset=prompts, callbacks=[refresh]).train()

    Args:
        labeller: of the samples.
        reward: among the trainer's ``reward_funcs``; its backbone may be shared with the generator.
        settings: when and with what.
        audit_prompts: prompts that the reward is checked on. By default the trainer's ``eval_dataset``.
        replay: preferences, such as those that the reward was trained on, that are old from the beginning.
    """

    file_name = "refresh.json"

    def __init__(
        self,
        labeller: JudgeLabeller,
        reward: LatentReward,
        settings: RefreshSettings | None = None,
        audit_prompts: Sequence[str] | None = None,
        replay: Any | None = None,
    ) -> None:
        self.labeller, self.reward = labeller, reward
        self.settings = RefreshSettings() if settings is None else settings
        for name, value, kind in (
            ("labeller", labeller, JudgeLabeller),
            ("reward", reward, LatentReward),
            ("settings", self.settings, RefreshSettings),
        ):
            check_kind(name, value, kind)
        self.audit_prompts = None if audit_prompts is None else checked_texts("audit_prompts", audit_prompts)
        if replay is not None:
            _check_replay(replay)
        self.replay = replay
        self.records: list[RefreshRecord] = []
        self.checks = self.check_calls = 0
        self._alarmed = False
        self._reference: DriftSnapshot | None = None
        self._trainer: Any = None

    @property
    def judge_calls(self) -> int:
        """Judgements of all refreshes, and of the checks between them."""
        return self.check_calls + sum(record.judge_calls for record in self.records)

    def attach(self, trainer: Any) -> None:
        """Takes the trainer.

        Raises:
            ValueError: the reward is none of the trainer's, no audit prompts are left, or parameters are sharded.
        """
        if not any(unwrapped(function) is self.reward for function in trainer.rewards.functions):
            raise ValueError(
                "RewardRefresh was given a reward that is not among the trainer's reward_funcs; give the same"
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("RewardRefresh trains the reward under DDP or alone, not under FSDP or DeepSpeed")
        prompts = trainer.experience_maker.prompts
        train = list(dict.fromkeys(row["prompt"] for row in _rows(prompts.dataset, "train_dataset")))
        if self.audit_prompts is None:
            if trainer.eval_dataset is None:
                raise ValueError("RewardRefresh needs audit_prompts, or a trainer with an eval_dataset")
            self.audit_prompts = [row["prompt"] for row in _rows(trainer.eval_dataset, "eval_dataset")]
        self.prompts = [prompt for prompt in train if prompt not in set(self.audit_prompts)]
        if not self.prompts:
            raise ValueError("all prompts of the train_dataset are audit prompts; leave some to train the reward on")
        self._trainer = trainer
        at_rest(self.reward)
        args = trainer.args
        self.source = PolicySource(
            trainer.policy,
            trainer.sampler,
            args.height,
            args.width,
            num_frames=args.num_frames,
            batch_size=args.per_device_train_batch_size,
            accelerator=trainer.accelerator,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the policy that the run starts from, to which later ones are compared."""
        if self.settings.drift is not None and self._reference is None:
            self._reference = self._snapshot(self.settings.drift)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refreshes the reward at the end of a generation, if it is time."""
        trainer = self._trainer
        micro = state.global_step * trainer.args.gradient_accumulation_steps
        generation, inside = divmod(micro, trainer.args.micro_steps_per_generation)
        if inside or state.global_step >= state.max_steps:
            return
        reasons = self._reasons(generation)
        most = self.settings.max_judgements
        if reasons and (most is None or self.judge_calls + self.settings.budget + self.settings.audit_budget <= most):
            self._refresh(state.global_step, reasons)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remembers an alarm until the generation has ended."""
        self._alarmed |= self.settings.on_alarm and bool(self._trainer.hacking.alarms)

    def _reasons(self, generation: int) -> list[str]:
        settings, reasons = self.settings, []
        if settings.every is not None and generation % settings.every == 0:
            reasons.append(f"generation {generation}")
        if self._alarmed:
            reasons.append("reward-hacking alarm")
        if settings.drift is not None and not reasons and generation % settings.drift.every == 0:
            reasons += self._drifted(settings.drift)
        return reasons

    def _drifted(self, drift: DriftSettings) -> list[str]:
        assert self._reference is not None
        found = self._snapshot(drift)
        reasons = drift_reasons(drift, found, self._reference)
        metrics = {
            "refresh/feature_distance": found.distance(self._reference),
            "refresh/spread_ratio": found.spread / max(self._reference.spread, 1e-6),
        }
        if drift.min_accuracy is not None and not reasons:
            directory = self._root / f"check-{self.checks:03d}"
            on_main(self._trainer.accelerator, lambda: self._claim(directory, self._trainer.state.global_step))
            seed = fold_seed(self._trainer.args.seed, _CHECK, self.checks)
            self.check_calls += self._label(
                directory / "labels", self._audit_texts, drift.judgements, seed, None
            ).calls
            accuracy = self._accuracy(self._score(directory / "labels"))
            metrics["refresh/check_accuracy"] = accuracy
            if accuracy < drift.min_accuracy:
                reasons.append(f"accuracy against the judge fell to {accuracy:.2f}")
        self.checks += 1
        self._trainer.log(metrics)
        return reasons

    def _snapshot(self, drift: DriftSettings) -> DriftSnapshot:
        texts = [self._audit_texts[row % len(self._audit_texts)] for row in range(drift.samples)]
        seeds = [fold_seed(self._trainer.args.seed, _DRIFT, row) for row in range(drift.samples)]
        latents = self.source.draw(texts, seeds)
        return snapshot(self.reward, latents, texts, seeds, batch_size=self.labeller.limits.batch_size)

    def _refresh(self, step: int, reasons: list[str]) -> None:
        number, settings = len(self.records), self.settings
        directory = self._root / f"round-{number:03d}"
        on_main(self._trainer.accelerator, lambda: self._claim(directory, step))
        seed = fold_seed(self._trainer.args.seed, number)
        labels = self._label(
            directory / "labels", self.prompts, settings.budget, fold_seed(seed, _LABELS), self.reward
        )
        audit = self._label(
            directory / "audit", self._audit_texts, settings.audit_budget, fold_seed(seed, _AUDIT), None, labels
        )
        before, old = self._score(directory / "audit"), state_of(self.reward)
        new = CachedPreferences(directory / "labels")
        pairs = ReplayedPairs(new, self._old_pairs(number), settings.replay, seed)
        if (directory / "reward").is_dir():
            self.reward.load_weights(directory / "reward")
        else:
            continue_training(
                self.reward,
                pairs,
                directory / "training",
                steps=settings.steps,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                loss_type=settings.loss_type,
                seed=fold_seed(seed, _TRAINING),
                outer=self._trainer,
            )
            on_main(self._trainer.accelerator, lambda: self._save_reward(directory / "reward"))
        record = self._record(number, step, reasons, (labels, audit), pairs, before, self._score(directory / "audit"))
        if not record.accepted:
            restore(self.reward, old)
        self._take(record, directory)

    def _record(
        self,
        number: int,
        step: int,
        reasons: list[str],
        reports: tuple[LabelReport, LabelReport],
        pairs: ReplayedPairs,
        before: PairScores,
        after: PairScores,
    ) -> RefreshRecord:
        accuracy = self._accuracy(before), self._accuracy(after)
        margins = before.margins[:, 0].double(), after.margins[:, 0].double()
        centred = [margin - margin.mean() for margin in margins]
        spread = [float(margin.square().mean().sqrt()) for margin in centred]
        correlation = float((centred[0] * centred[1]).mean()) / max(spread[0] * spread[1], 1e-12)
        flips = float((margins[0].sign() != margins[1].sign()).double().mean())
        return RefreshRecord(
            number=number,
            step=step,
            reasons=reasons,
            judge_calls=sum(report.calls for report in reports),
            pairs=reports[0].pairs,
            replayed=pairs.replayed,
            accuracy_before=accuracy[0],
            accuracy_after=accuracy[1],
            margin_correlation=correlation,
            margin_flips=flips,
            margin_scale=spread[1] / max(spread[0], 1e-12),
            accepted=accuracy[1] >= accuracy[0] - self.settings.tolerance,
        )

    def _take(self, record: RefreshRecord, directory: Path) -> None:
        """Uses what the record decided from now on, and says so."""
        trainer = self._trainer
        self.records.append(record)
        self._alarmed = False
        on_main(trainer.accelerator, lambda: _write_json(directory / "record.json", asdict(record)))
        trainer.log(record.as_metrics())
        if record.accepted:
            trainer.reward_changed(self._version)
        if self.settings.drift is not None:
            self._reference = self._snapshot(self.settings.drift)
        if trainer.is_world_process_zero():
            verdict = "is used from now on" if record.accepted else "is no better and is not used"
            accuracies = f"{record.accuracy_before:.3f} before, {record.accuracy_after:.3f} after"
            logger.warning(
                f"Reward refreshed at step {record.step} ({', '.join(record.reasons)}) with {record.judge_calls} "
                f"judgements: accuracy on the audit {accuracies}; it {verdict}."
            )

    def _label(
        self,
        directory: Path,
        prompts: Sequence[str],
        budget: int,
        seed: int,
        reward: LatentReward | None,
        earlier: LabelReport | None = None,
    ) -> LabelReport:
        scales = self._first_scales() or (None if earlier is None else earlier.scales)
        trainer = self._trainer
        report = self.labeller.label(
            directory,
            self.source,
            prompts,
            budget,
            reward=reward,
            seed=seed,
            step=trainer.state.global_step,
            scales=scales,
            accelerator=trainer.accelerator,
        )
        if trainer.accelerator.is_main_process:  # counted once, also where a killed run had asked already
            trainer.policy.calls.count_judgements(report.calls)
        return report

    def _first_scales(self) -> Any:
        """What the first refresh found out about the judges, by which later scores mean the same."""
        return LabelReport.read(self._root / "round-000" / "labels").scales if self.records else None

    def _old_pairs(self, number: int) -> list[Any]:
        earlier = [] if self.replay is None else [self.replay]
        return [*earlier, *(CachedPreferences(self._root / f"round-{n:03d}" / "labels") for n in range(number))]

    def _score(self, directory: Path) -> PairScores:
        """Scores of the audit's pairs at the levels of the run, computed once for all processes."""
        args, pairs = self._trainer.args, CachedPreferences(directory)
        levels = tuple(args.reward_noise_level)
        alone = len(levels) == 1
        protocol = PairProtocol(
            levels if alone else (), None if alone else levels, args.reward_ensemble, fold_seed(args.seed, _SCORING)
        )
        size = self.labeller.limits.batch_size
        return on_main(
            self._trainer.accelerator,
            lambda: score_pairs(self.reward, pairs, protocol, batch_size=size, progress=False),
        )

    @staticmethod
    def _accuracy(scores: PairScores) -> float:
        return pairwise_accuracy(scores.margins[:, 0], scores.p_chosen).value

    def _claim(self, directory: Path, step: int) -> None:
        """Puts aside what another run has left under this name, or this one with another policy, and signs it."""
        args = self._trainer.args
        mine = {
            "step": step,
            "seed": args.seed,
            "policy": tensor_digest(self._trainer.policy.snapshot()),
            "reward": tensor_digest(self.reward.model.trainable_state().values()),
            "settings": asdict(self.settings),
        }
        path = directory / "attempt.json"
        if path.is_file() and read_json(path) == mine:
            return
        if directory.exists():
            taken = sum(1 for _ in directory.parent.glob(f"{directory.name}-other-*"))
            os.rename(directory, directory.with_name(f"{directory.name}-other-{taken}"))
        _write_json(path, mine)

    def _save_reward(self, directory: Path) -> None:
        with atomic_directory(directory) as staging:
            self.reward.save_pretrained(staging)

    @property
    def _root(self) -> Path:
        return Path(self._trainer.args.output_dir) / FOLDER

    @property
    def _audit_texts(self) -> list[str]:
        assert self.audit_prompts is not None
        return self.audit_prompts

    @property
    def _version(self) -> int:
        return sum(record.accepted for record in self.records)

    def save_state(self, directory: str) -> None:
        """Writes the records into a checkpoint; labels and rewards stay where they are."""
        counts = {"checks": self.checks, "check_calls": self.check_calls}
        state = {"alarmed": self._alarmed, **counts, "records": [asdict(record) for record in self.records]}
        Path(directory, self.file_name).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        if self._reference is not None:
            save_file(self._reference.tensors(), Path(directory, DRIFT_NAME))

    def load_state(self, directory: str) -> None:
        """Goes on from a checkpoint, with the reward that was in use then.

        Raises:
            ValueError: the checkpoint is of a run without refreshes, or a reward that it used is gone.
        """
        path = Path(directory, self.file_name)
        if not path.is_file():
            raise ValueError(
                f"{directory} holds no {self.file_name}: that run did not refresh its reward; resume it without"
            )
        state = read_json(path)
        self._alarmed = bool(state["alarmed"])
        self.checks, self.check_calls = int(state["checks"]), int(state["check_calls"])
        self.records = [RefreshRecord(**record) for record in state["records"]]
        accepted = [record.number for record in self.records if record.accepted]
        if accepted:
            self.reward.load_weights(self._root / f"round-{accepted[-1]:03d}" / "reward")
            at_rest(self.reward)
            self._trainer.reward_changed(self._version)
        drift = Path(directory, DRIFT_NAME)
        self._reference = DriftSnapshot.from_tensors(read_tensors(drift)) if drift.is_file() else None


def _rows(dataset: Any, name: str) -> list[dict[str, Any]]:
    table = PromptTable(dataset, name)
    return [table[index] for index in range(len(table))]


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staging:
        staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _check_replay(replay: Any) -> None:
    """Refuses what has no rows of preferences; the first is looked at."""
    has_rows = hasattr(replay, "__len__") and hasattr(replay, "__getitem__")
    if (
        not has_rows
        or isinstance(replay, (str, bytes, type))
        or len(replay) == 0
        or not isinstance(replay[0], Mapping)
    ):
        raise ValueError(f"replay must be a dataset of preferences, got {replay!r:.80} ({type(replay).__name__})")
    PreferencePair.from_record(replay[0])
