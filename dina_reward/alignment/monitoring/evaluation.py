"""Held-out evaluation while a policy trains: fixed prompts and noise, deterministic samples, scores, history and pictures.

Judges may look at decoded images here, which training never needs to.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor

from dina_reward.alignment.experience.images import checked_images, still_images
from dina_reward.alignment.experience.rewards import RewardSet, check_columns, forgive
from dina_reward.alignment.monitoring.hacking import (
    REWARD,
    REWARD_PREFIX,
    SCORES_NAME,
    PromptScores,
    RewardHacking,
    RewardHackingCallback,
    append_line,
    read_lines,
)
from dina_reward.alignment.monitoring.pictures import picture_grid, save_picture
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.prompts import PromptDataset, PromptTable
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.sampling.seeding import Stream, noise_by_row
from dina_reward.families import Conditioning
from dina_reward.noise.draws import fold_seed
from dina_reward.reward_functions import (
    RewardError,
    call_reward,
    check_synchronous,
    checked_scores,
    takes_images,
    unique_names,
)


HISTORY_NAME = "evaluation_history.jsonl"
PICTURES_NAME = "pictures"
HACKING_ALARM = "hacking_alarm"

EvalRewardFunction = Callable[..., Any]
"""A held-out judge: called by keyword like a reward function, with ``images`` if its signature names them.

``images`` has shape ``(batch, 3, height, width)``, of videos ``(batch, frames, 3, height, width)``, float32, in [0, 1], on
the device of the latents. It returns one number
(or None, "does not apply") per image, or a mapping of names to such sequences. The settings of the training reward, such as
``noise_level``, are not passed on: a `LatentReward` judges at its own.
"""


@dataclass(frozen=True)
class EvaluationRecord:
    """One line of the history.

    Args:
        step (`int`): optimizer steps made.
        metrics (`dict[str, float]`): means over the held-out prompts; ``"reward"`` is what training maximises.
        standard_errors (`dict[str, float]`): of those means.
        costs (`dict[str, float]`): what training had spent; see `RunCosts.as_metrics`.
        picture (`str`, *optional*): file of the picture grid, relative to the output directory.
        hacking (`list[dict]`): alarms of this evaluation, the fields of `RewardHacking`.
    """

    step: int
    metrics: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    picture: str | None = None
    hacking: list[dict[str, Any]] = field(default_factory=list)


class HeldOutEvaluator:
    """Samples held-out prompts with the same noise each time and reports how good the images are.

    Args:
        policy: the generator.
        rewards: the training reward, scored on the same samples so that the two can be compared.
        reward_weights: one weight per reward function.
        eval_reward_funcs: judges that training does not see; see `EvalRewardFunction`.
        output_dir: where the history and the pictures go.
        sampler: its deterministic steps are used; their number may differ from training.
        latent_shape: of one sample, without batch, in the family's spatial layout.
        guidance_scale: classifier-free guidance runs above 1.
        batch_size, num_images: samples made at once, on one rank, and images drawn.
        seed: of the noise.
        accelerator: the `accelerate.Accelerator` of the run; prompts are dealt out to its ranks.
        hacking (`RewardHackingCallback`, *optional*): asked after every evaluation.
        on_picture (*optional*): called on the main process with step, picture and caption; see `log_pictures`.

    Raises:
        ValueError: a judge is async.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: RewardSet,
        *,
        reward_weights: Sequence[float],
        eval_reward_funcs: Sequence[EvalRewardFunction],
        output_dir: str,
        sampler: Sampler,
        latent_shape: Sequence[int],
        guidance_scale: float,
        batch_size: int,
        num_images: int,
        seed: int,
        accelerator: Any,
        hacking: RewardHackingCallback | None = None,
        on_picture: Callable[[int, Image.Image, str], Any] | None = None,
    ) -> None:
        for function in eval_reward_funcs:
            check_synchronous(function)
        self.policy = policy
        self.rewards = rewards
        self.reward_weights = list(reward_weights)
        self.judges = dict(zip(map(str.lower, unique_names(eval_reward_funcs)), eval_reward_funcs, strict=True))
        self.output_dir = Path(output_dir)
        self.sampler = sampler
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size
        self.num_images = num_images
        self.seed = seed
        self.accelerator = accelerator
        self.hacking = hacking
        self.on_picture = on_picture
        self.latent_shape = tuple(latent_shape)
        self.failures: dict[str, int] = {}
        self.reward_version = 0

    def evaluate(
        self, dataset: PromptDataset, step: int, costs: Mapping[str, float] | None = None
    ) -> EvaluationRecord:
        """Evaluates the policy as it is now and writes history, scores and picture (on the main process).

        Args:
            dataset: held-out prompts.
            step: optimizer steps made, for the history and the name of the picture.
            costs: what training has spent so far, for the history.

        Returns:
            The record, the same on every rank.

        Raises:
            RewardError: a reward function or judge that is not optional failed.
            ValueError: there are no prompts, or a judge uses a name of the training reward.
        """
        dataset = PromptTable(dataset, "eval_dataset")
        check_columns(dataset.columns, list(self.judges.values()))
        scores: list[tuple[int, dict[str, float]]] = []
        images: list[tuple[int, Tensor]] = []
        for indices in self._batches(len(dataset)):
            batch_scores, batch_images = self._evaluate_batch(dataset, indices)
            scores += zip(indices, batch_scores, strict=True)
            images += [(i, image) for i, image in zip(indices, batch_images, strict=False) if i < self.num_images]
        if self.accelerator.num_processes > 1:
            scores, images = gather_object(scores), gather_object(images)
        columns = self._columns([values for _, values in sorted(scores, key=lambda item: item[0])])
        record = replace(_summarise(step, columns), costs=dict(costs or {}))
        if self.accelerator.is_main_process:
            record = self._write(record, columns, dataset, [image for _, image in sorted(images, key=lambda i: i[0])])
        if self.accelerator.num_processes > 1:
            (record,) = broadcast_object_list([record])
        if self.hacking is not None:
            alarms = [RewardHacking(**alarm) for alarm in record.hacking]
            self.hacking.report(alarms, is_main_process=self.accelerator.is_main_process)
        return record

    def _batches(self, count: int) -> Iterator[list[int]]:
        """Prompts of this rank; ranks make the same number of batches, the last of which may be empty.

        Parameters that are sharded over ranks are gathered by every forward pass, so all ranks must make as many.
        """
        ranks = self.accelerator.num_processes
        mine = range(self.accelerator.process_index, count, ranks)
        for start in range(0, -(-count // ranks), self.batch_size):
            yield list(mine[start : start + self.batch_size])

    @torch.no_grad()
    def _evaluate_batch(
        self, dataset: PromptDataset, indices: list[int]
    ) -> tuple[list[dict[str, float]], list[Tensor]]:
        if not indices:
            self._sample([dataset[0]["prompt"]], [0])
            return [], []
        rows = [dataset[index] for index in indices]
        latents, conditioning = self._sample([row["prompt"] for row in rows], indices)
        seeds = [fold_seed(self.seed, Stream.EVALUATION_REWARD, index) for index in indices]
        images = self._decode(latents, indices)
        rewards = self.rewards.score(
            latents, rows, conditioning, seeds, images=images if self.rewards.needs_images else None
        )
        scores = {f"{REWARD_PREFIX}{name}": rewards[:, i] for i, name in enumerate(self.rewards.names)}
        available = self.rewards.arguments(latents, rows, conditioning, seeds)
        available = {name: value for name, value in available.items() if name not in self.rewards.settings}
        for name, judge in self.judges.items():
            judged = self._judge(name, judge, {**available, "images": images}, len(rows))
            if clash := sorted(scores.keys() & judged.keys()):
                raise ValueError(f"two held-out judges give a score {clash[0]!r}, one of them {name}; rename one")
            scores |= judged
        rows_of_scores = [{name: float(values[i]) for name, values in scores.items()} for i in range(len(rows))]
        return rows_of_scores, [] if images is None else list(still_images(images).cpu())

    def _sample(self, prompts: Sequence[str], indices: Sequence[int]) -> tuple[Tensor, Conditioning]:
        device = self.accelerator.device
        conditioning = self.policy.encode(prompts, device)
        negative = self.policy.encode_negative(device, guidance_scale=self.guidance_scale)
        seeds = [fold_seed(self.seed, Stream.EVALUATION_LATENTS, index) for index in indices]
        initial = noise_by_row(seeds, self.latent_shape).to(device, self.policy.storage_dtype)
        predict = self.policy.bind(conditioning, negative, guidance_scale=self.guidance_scale)
        return sample(predict, initial, self.sampler).latents, conditioning

    def _decode(self, latents: Tensor, indices: Sequence[int]) -> Tensor | None:
        """All images if someone judges them, else those of the picture."""
        judged = self.rewards.needs_images or any(takes_images(judge) for judge in self.judges.values())
        if not judged:
            latents = latents[: sum(index < self.num_images for index in indices)]
        if len(latents) == 0:
            return None
        images = self.policy.family.decode_latents(self.policy.pipeline, latents)
        return checked_images(images, len(latents))

    def _judge(
        self, name: str, judge: EvalRewardFunction, available: Mapping[str, Any], batch_size: int
    ) -> dict[str, Tensor]:
        try:
            result = call_reward(judge, available, batch_size)
        except RewardError as error:
            return {name: forgive(judge, name, error, self.failures)}
        named = {str(key): value for key, value in result.items()} if isinstance(result, Mapping) else {name: result}
        scores: dict[str, Tensor] = {}
        for key, value in named.items():
            if key in (REWARD, HACKING_ALARM) or key.startswith(REWARD_PREFIX):
                raise ValueError(f"the held-out judge {name} may not call a score {key!r}, which means something else")
            label = f"{name}[{key!r}]" if isinstance(result, Mapping) else name
            try:
                scores[key] = checked_scores(label, value, available, batch_size)
            except RewardError as error:
                scores[key] = forgive(judge, name, error, self.failures)
        return scores

    def _columns(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
        """Scores by name, shape ``(prompts,)``, float64, NaN where not applicable; the weighted reward comes first."""
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {
            name: torch.tensor([row.get(name, math.nan) for row in rows], dtype=torch.float64) for name in names
        }
        parts = torch.stack([columns[f"{REWARD_PREFIX}{name}"] for name in self.rewards.names], dim=1)
        # As in training, a reward that does not apply counts as the mean of those that do.
        filled = parts.where(~torch.isnan(parts), parts.nanmean(dim=0).nan_to_num(0.0))
        total = (filled @ parts.new_tensor(self.reward_weights)).where(~torch.isnan(parts).all(dim=1), torch.nan)
        if parts.shape[1] == 1:
            del columns[f"{REWARD_PREFIX}{self.rewards.names[0]}"]
        return {REWARD: total, **columns}

    def _write(
        self,
        record: EvaluationRecord,
        columns: Mapping[str, Tensor],
        dataset: PromptDataset,
        images: Sequence[Tensor],
    ) -> EvaluationRecord:
        prompts = [dataset[index]["prompt"] for index in range(len(dataset))]
        scores = {name: [None if math.isnan(v) else v for v in values.tolist()] for name, values in columns.items()}
        line = PromptScores(record.step, scores, self._protocol(prompts))
        scored = append_line(self.output_dir / SCORES_NAME, line)
        if self.hacking is not None and self.judges:
            alarms = self.hacking.find(scored)
            metrics = {**record.metrics, HACKING_ALARM: float(bool(alarms))}
            record = replace(record, metrics=metrics, hacking=[asdict(alarm) for alarm in alarms])
        if images:
            record = replace(record, picture=f"{PICTURES_NAME}/step-{record.step:06d}.png")
            picture = picture_grid(images, prompts[: len(images)], columns[REWARD][: len(images)].tolist())
            save_picture(picture, self.output_dir / str(record.picture))
            if self.on_picture is not None:
                caption = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
                self.on_picture(record.step, picture, f"step {record.step}: {caption}")
        append_line(self.output_dir / HISTORY_NAME, record)
        return record

    def _protocol(self, prompts: Sequence[str]) -> str:
        settings = [list(prompts), self.seed, list(self.latent_shape), len(self.sampler), self.guidance_scale]
        if self.reward_version:  # a reward that has changed scores on another scale
            settings.append(self.reward_version)
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _summarise(step: int, columns: Mapping[str, Tensor]) -> EvaluationRecord:
    """Means and standard errors over the prompts that a score applies to; a score that applies to none is left out."""
    known = {name: values[~torch.isnan(values)] for name, values in columns.items()}
    means = {name: float(values.mean()) for name, values in known.items() if len(values)}
    errors = {name: float(v.std(correction=0)) / math.sqrt(len(v)) for name, v in known.items() if len(v)}
    return EvaluationRecord(step, means, errors)


def read_history(path: str | os.PathLike[str]) -> list[EvaluationRecord]:
    """Records of a history file in order; empty if there is none."""
    return read_lines(path, EvaluationRecord)
