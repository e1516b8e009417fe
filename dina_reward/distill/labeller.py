"""`JudgeLabeller`: samples of a generator, a judge's opinion of the informative ones, and preferences made of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.checkpoints.locking import sole_owner
from dina_reward.checks.stored import read_json
from dina_reward.checks.values import check_kind, checked_int, checked_texts
from dina_reward.data.buckets import Bucket
from dina_reward.data.cache_writer import LatentCacheWriter
from dina_reward.distill.judges import Answer, Judge, JudgeBatch, as_judges, judge_weights
from dina_reward.distill.labels import LabelPlan, LabelReport, LabelSettings
from dina_reward.distill.ledger import JudgeLedger, JudgeLimits, Question, Spent, by_question, in_calls
from dina_reward.distill.opinions import JudgeOpinion, label_pairs
from dina_reward.distill.processes import OneProcess, on_main, processes_first
from dina_reward.distill.selection import Selection, score_candidates, select
from dina_reward.distill.soft_labels import JudgeScale, fit_scale
from dina_reward.distill.sources import SampleSource
from dina_reward.noise.draws import checked_seed, fold_seed
from dina_reward.reward import LatentReward
from dina_reward.training.run_settings import tensor_digest, text_digest


SAMPLES_NAME = "samples.json"
_STREAM, _NOISE, _ORDER = 0x6C626C, 0x6C6E7A, 0x6C6F72
_LARGEST_BUDGET = 100_000_000


class JudgeLabeller:
    """Makes preferences between a generator's own latents out of what a judge says of them.

    Examples:
        >>> labeller = JudgeLabeller(my_judge)  # def my_judge(images, prompts): return one number per image
        >>> source = PipelineSource(pipe, height=1024, width=1024)
        >>> labeller.label("labels", source, prompts, budget=2000)
        >>> pairs = CachedPreferences("labels")  # or LatentRewardTrainer(reward, args, train_dataset=pairs)

    Latents are decoded here and nowhere else, and only those that a judge of images is asked about. What is drawn, asked
    and answered is written as it comes (see `dina_reward.distill.ledger`), so that a call that was killed goes on.

    Args:
        judge: a callable (see `CallableJudge`), a `Judge`, or a list of them.
        weights: one per judge, equal by default. A pair's label is the weighted mean over the judges with an opinion.
        limits: how judges are asked, and what they may cost.
        settings: what is judged.
        timeout: seconds after which a call of a callable counts as failed.

    Raises:
        ValueError: no judge, or weights that do not fit.
    """

    def __init__(
        self,
        judge: Any,
        weights: Sequence[float] | None = None,
        limits: JudgeLimits | None = None,
        settings: LabelSettings | None = None,
        timeout: float | None = None,
    ) -> None:
        self.judges = as_judges(judge, timeout)
        self.weights = judge_weights(weights, self.judges)
        self.limits = JudgeLimits() if limits is None else limits
        self.settings = LabelSettings() if settings is None else settings
        check_kind("limits", self.limits, JudgeLimits)
        check_kind("settings", self.settings, LabelSettings)

    @property
    def compares(self) -> bool:
        """Whether all judges compare pairs, so that only pairs that were asked about have labels."""
        return all(judge.kind == "pairs" for judge in self.judges)

    @property
    def calls_per_group(self) -> int:
        """Judgements that one group of samples takes, without repeats."""
        size = self.settings.group_size
        return sum(size if judge.kind == "scores" else self.pairs_per_group for judge in self.judges)

    @property
    def pairs_per_group(self) -> int:
        """Pairs of a group that a judge of pairs is asked about."""
        size = self.settings.group_size
        return min(size * (size - 1) // 2, size)

    def groups_within(self, budget: int) -> tuple[int, int]:
        """Groups that a budget of judgements allows, and how many of them are judged twice.

        Raises:
            ValueError: not one.
        """
        each = self.calls_per_group
        share = 0.0 if self.settings.temperature is not None and not self.compares else self.settings.repeat_share
        groups = int(budget // (each * (1 + share)))
        if groups < 1:
            raise ValueError(
                f"a budget of {budget} judgements is too small: one group of {self.settings.group_size} samples takes {each}"
                f"{' and its repetition as many' if share else ''}; raise the budget or lower group_size"
            )
        return groups, min(math.ceil(share * groups) if share else 0, budget // each - groups, groups)

    def label(
        self,
        directory: str | Path,
        source: SampleSource,
        prompts: Sequence[str],
        budget: int,
        *,
        reward: LatentReward | None = None,
        seed: int = 0,
        step: int = 0,
        scales: Mapping[str, JudgeScale] | None = None,
        accelerator: Any | None = None,
        on_judged: Callable[[int], Any] | None = None,
        progress: bool = False,
    ) -> LabelReport:
        """Draws samples, has them judged and writes a latent cache of preferences; or goes on with what it finds.

        Args:
            directory: of the labels; with several processes one that all see.
            source: of the samples.
            prompts: texts to draw samples for; each group takes the next one of a random order.
            budget: judgements at most, of all judges together: a judged sample or a judged pair counts one.
            reward: says which samples are informative; without it they are random.
            seed: of everything random.
            step: training step that the samples are of, for the record.
            scales: of an earlier labelling, by judge, so that scores and temperatures mean the same.
            accelerator: of a run with several processes, all of which have to call this; the main one asks the judges.
            on_judged: told the number of new judgements, on the main process.
            progress: show a progress bar.

        Raises:
            JudgeError: (a `ValueError`) a judge failed or answered nonsense; what was judged is kept.
            ValueError: the budget is too small, there are no prompts, the directory holds something else, or another run is
                writing into it.
        """
        plan = self._plan(source, prompts, budget, reward, seed)
        origin = self._origin(source, plan, reward, step, scales)
        processes = accelerator if accelerator is not None else OneProcess()
        labelling = _Labelling(self, Path(directory), source, plan, step, dict(scales or {}))
        with sole_owner(Path(directory)) if processes.is_main_process else contextlib.nullcontext():
            writer = processes_first(processes, lambda: labelling.open(origin))
            if writer.complete:
                return LabelReport.read(directory)
            # All ranks see the same shards missing, because none writes before all have looked.
            missing = writer.missing()
            processes.wait_for_everyone()
            for number in missing:
                rows = writer.shards()[number]
                latents = source.draw([plan.prompts[row] for row in rows], [plan.seeds[row] for row in rows])
                if processes.is_main_process:
                    writer.write(number, latents)
            with tqdm(total=budget, desc="judging", unit="call", disable=not progress) as bar:

                def judged(count: int) -> None:
                    bar.update(count)
                    if on_judged is not None:
                        on_judged(count)

                on_main(processes, lambda: labelling.judge(writer, reward, judged))
        return LabelReport.read(directory)

    def _plan(
        self, source: SampleSource, prompts: Sequence[str], budget: int, reward: LatentReward | None, seed: int
    ) -> LabelPlan:
        check_kind("source", source, SampleSource)
        prompts = checked_texts("prompts", prompts)
        checked_int("budget", budget, 1, _LARGEST_BUDGET)
        seed = checked_seed(seed)
        if reward is not None:
            check_kind("reward", reward, LatentReward)
        groups, repeats = self.groups_within(budget)
        members = self.settings.group_size if reward is None else self.settings.candidates
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(fold_seed(seed, _ORDER))).tolist()
        rows = [(group, member) for group in range(groups) for member in range(members)]
        return LabelPlan(
            prompts=[prompts[order[group % len(order)]] for group, _ in rows],
            seeds=[fold_seed(seed, _STREAM, group, member) for group, member in rows],
            members=members,
            groups=groups,
            repeats=repeats,
            seed=seed,
        )

    def _origin(
        self,
        source: SampleSource,
        plan: LabelPlan,
        reward: LatentReward | None,
        step: int,
        scales: Mapping[str, JudgeScale] | None,
    ) -> dict[str, Any]:
        state = None if reward is None else reward.model.trainable_state().values()
        return {
            "source": source.identity(),
            "prompts": text_digest([plan.prompts, plan.seeds]),
            "groups": plan.groups,
            "repeats": plan.repeats,
            "judges": [{**judge.identity(), "weight": w} for judge, w in zip(self.judges, self.weights, strict=True)],
            "settings": asdict(self.settings),
            "batch_size": self.limits.batch_size,
            "reward": None if state is None else tensor_digest(state),
            "step": step,
            "scales": text_digest({name: asdict(scale) for name, scale in (scales or {}).items()}),
        }


class _Labelling:
    """One call of `JudgeLabeller.label`."""

    def __init__(
        self,
        labeller: JudgeLabeller,
        directory: Path,
        source: SampleSource,
        plan: LabelPlan,
        step: int,
        scales: dict[str, JudgeScale],
    ) -> None:
        self.labeller, self.directory, self.source, self.plan, self.step = labeller, directory, source, plan, step
        self.scales = scales

    def open(self, origin: Mapping[str, Any]) -> LatentCacheWriter:
        bucket = Bucket(self.source.width, self.source.height)
        size = self.labeller.settings.samples_per_shard
        shape, count = self.source.latent_shape, len(self.plan.prompts)
        return LatentCacheWriter(self.directory, bucket, shape, count, origin, latents_per_shard=size)

    def judge(self, writer: LatentCacheWriter, reward: LatentReward | None, on_judged: Callable[[int], Any]) -> None:
        """Chooses, asks, and writes the labels."""
        chosen = self._selection(writer, reward)
        spent, opinions, decoded = Spent(), [], 0
        for judge, weight in zip(self.labeller.judges, self.labeller.weights, strict=True):
            ledger = JudgeLedger(self.directory, judge, self.labeller.limits, spent, on_judged)
            before = spent.calls
            opinions.append(JudgeOpinion(weight, *self._ask(judge, ledger, chosen, writer)))
            if judge.needs_images:
                decoded += (spent.calls - before) * (2 if judge.kind == "pairs" else 1)
        pairs = label_pairs(
            chosen, self.plan.prompts, opinions, self.labeller.settings.tie_margin, asked_only=self.labeller.compares
        )
        scales = {judge.name: each.scale for judge, each in zip(self.labeller.judges, opinions, strict=True)}
        report = LabelReport(
            samples=len(self.plan.prompts),
            judged=len({side for pair in pairs for side in (pair.chosen, pair.rejected)}),
            pairs=len(pairs),
            ties=sum(pair.p_chosen == 0.5 for pair in pairs),
            groups=self.plan.groups,
            calls=spent.calls,
            cost=spent.cost,
            seconds=spent.seconds,
            decoded=decoded,
            scales=scales,
        )
        writer.finish(pairs, report.to_json())

    def _selection(self, writer: LatentCacheWriter, reward: LatentReward | None) -> Selection:
        """What to ask about, kept so that an interrupted call asks the same; the reward may round differently elsewhere."""
        path = self.directory / SAMPLES_NAME
        if path.is_file():
            stored = read_json(path)
            return Selection(stored["groups"], [(a, b) for a, b in stored["pairs"]])
        settings, plan = self.labeller.settings, self.plan
        scores = spreads = model = None
        level = 0.4
        if reward is not None:
            scores, spreads, level = self._doubts(writer, reward)
            model = reward.preference_model
        chosen = select(
            plan.candidates(),
            scores,
            spreads,
            group_size=settings.group_size,
            exploration=settings.exploration,
            seed=plan.seed,
            model=model,
            level=level,
        )
        record = {"step": self.step, "prompts": plan.prompts, "seeds": plan.seeds, **asdict(chosen)}
        with atomic_file(path) as staging:
            staging.write_text(json.dumps(record) + "\n", encoding="utf-8")
        return chosen

    def _doubts(self, writer: LatentCacheWriter, reward: LatentReward) -> tuple[Tensor, Tensor, float]:
        """Scores of all samples, their spread, and the level they are of; read and scored shard by shard."""
        plan, scores, spreads, level = self.plan, [], [], 0.0
        for rows in writer.shards():
            noise = [fold_seed(plan.seed, _NOISE, row // plan.members) for row in rows]
            texts = [plan.prompts[row] for row in rows]
            draws, size = self.labeller.settings.noise_draws, self.labeller.limits.batch_size
            part, spread, level = score_candidates(
                reward, writer.read(rows), texts, noise, draws=draws, batch_size=size
            )
            scores.append(part)
            spreads.append(spread)
        return torch.cat(scores), torch.cat(spreads), level

    def _ask(
        self, judge: Judge, ledger: JudgeLedger, chosen: Selection, writer: LatentCacheWriter
    ) -> tuple[Mapping[Question, Answer], JudgeScale]:
        """What a judge answers, and its scale."""
        groups = self._questions(judge, chosen)
        first = in_calls(groups, self.labeller.limits.batch_size)
        again = in_calls(groups[: self.plan.repeats], self.labeller.limits.batch_size)
        if judge.kind == "pairs":  # with the sides exchanged, so that a bias for one of them shows
            again = [[(b, a) for a, b in call] for call in again]  # type: ignore[misc]
        answers = ledger.ask([*first, *again], lambda questions: self._call(judge, questions, writer), self.step)
        said = by_question(first, answers[: len(first)])
        repeated = by_question(again, answers[len(first) :])
        if judge.kind == "pairs":
            repeated = {(b, a): None if p is None else 1 - p for (a, b), p in repeated.items()}  # type: ignore[misc]
        known = self.scales.get(judge.name)
        temperature = self.labeller.settings.temperature
        return said, known or fit_scale(judge.kind, said, repeated, chosen.groups, temperature)

    def _questions(self, judge: Judge, chosen: Selection) -> list[list[Question]]:
        if judge.kind == "scores":
            return [list(group) for group in chosen.groups]
        place = {sample: number for number, group in enumerate(chosen.groups) for sample in group}
        questions: list[list[Question]] = [[] for _ in chosen.groups]
        for pair in chosen.pairs:
            group = questions[place[pair[0]]]
            if len(group) < self.labeller.pairs_per_group:
                group.append(pair)
        return questions

    def _call(self, judge: Judge, questions: Sequence[Question], writer: LatentCacheWriter) -> list[Answer]:
        sides = [list(questions)] if judge.kind == "scores" else [list(side) for side in zip(*questions, strict=True)]
        endings = [""] if judge.kind == "scores" else ["_a", "_b"]
        columns: dict[str, Tensor] = {}
        for ending, samples in zip(endings, sides, strict=True):
            latents = writer.read(samples)
            columns[f"latents{ending}"] = latents.to(self.source.device)
            if judge.needs_images:
                columns[f"images{ending}"] = self.source.decode(latents)
        prompts = [self.plan.prompts[sample] for sample in sides[0]]  # type: ignore[index]
        return judge.ask(JudgeBatch(prompts, columns))
