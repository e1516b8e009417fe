"""Held-out evaluation while a policy trains: fixed prompts and noise, ODE samples, scores, history and pictures.

This is the only place where an alignment run decodes latents.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from dina_reward.alignment.policy import Policy
from dina_reward.alignment.prompts import PromptDataset, columns_of, prompt_row
from dina_reward.alignment.rewards import RewardSet, accepted_arguments, callable_name, checked_scores
from dina_reward.alignment.rollout import Schedule, sample
from dina_reward.alignment.seeding import Stream, noise_by_row
from dina_reward.noise_draws import fold_seed


logger = logging.get_logger(__name__)

HISTORY_NAME = "evaluation_history.jsonl"
PICTURES_NAME = "pictures"
GRID_GAP = 4
"""Pixels between the images of a picture grid."""

Evaluator = Callable[..., Any]
"""Callable by keyword with ``images`` (shape ``(batch, 3, height, width)``, in [0, 1]), ``prompts``, ``latents``, columns.

Returns one number per image, or a mapping of names to such sequences.
"""


@dataclass(frozen=True)
class EvaluationRecord:
    """One line of the history.

    Args:
        step (`int`): optimizer steps made.
        metrics (`dict[str, float]`): means over the held-out prompts; ``"reward"`` is what training maximises.
        standard_errors (`dict[str, float]`): of those means.
        picture (`str`, *optional*): file of the picture grid, relative to the output directory.
    """

    step: int
    metrics: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)
    picture: str | None = None


class HeldOutEvaluator:
    """Samples held-out prompts with the same noise each time and reports how good the images are.

    Args:
        policy: the generator.
        rewards: the training reward, scored on the same samples so that the two can be compared.
        reward_weights: one weight per reward function.
        evaluators: judges that training does not see.
        output_dir: where the history and the pictures go.
        height, width, num_inference_steps, batch_size, num_images, seed: how to sample, and how much to draw.
        accelerator: the `accelerate.Accelerator` of the run; prompts are dealt out to its ranks.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: RewardSet,
        *,
        reward_weights: Sequence[float],
        evaluators: Sequence[Evaluator],
        output_dir: str,
        height: int,
        width: int,
        num_inference_steps: int,
        batch_size: int,
        num_images: int,
        seed: int,
        accelerator: Any,
    ) -> None:
        self.policy = policy
        self.rewards = rewards
        self.reward_weights = list(reward_weights)
        self.evaluators = list(evaluators)
        self.output_dir = Path(output_dir)
        self.batch_size = batch_size
        self.num_images = num_images
        self.seed = seed
        self.accelerator = accelerator
        self.latent_shape = policy.latent_shape(height, width)
        self.schedule = Schedule.from_scheduler(policy.pipeline.scheduler, num_inference_steps, accelerator.device)

    def evaluate(self, dataset: PromptDataset, step: int) -> EvaluationRecord:
        """Evaluates the policy as it is now and writes history and picture (on the main process).

        Args:
            dataset: held-out prompts.
            step: optimizer steps made, for the history and the name of the picture.
        """
        scores: list[tuple[int, dict[str, float]]] = []
        images: list[tuple[int, Tensor]] = []
        for indices in self._batches(len(dataset)):
            batch_scores, batch_images = self._evaluate_batch(dataset, indices)
            scores += zip(indices, batch_scores, strict=True)
            images += [(i, image) for i, image in zip(indices, batch_images, strict=False) if i < self.num_images]
        if self.accelerator.num_processes > 1:
            scores, images = gather_object(scores), gather_object(images)
        ordered = [values for _, values in sorted(scores, key=lambda item: item[0])]
        picture = f"{PICTURES_NAME}/step-{step:06d}.png" if images else None
        record = _summarise(step, ordered, picture)
        if self.accelerator.is_main_process:
            if picture is not None:
                grid = picture_grid([image for _, image in sorted(images, key=lambda item: item[0])])
                _save_picture(grid, self.output_dir / picture)
            history = append_record(self.output_dir / HISTORY_NAME, record)
            for message in reward_hacking_alarms(history):
                logger.warning(message)
        return record

    def _batches(self, count: int) -> Iterator[list[int]]:
        mine = list(range(count))[self.accelerator.process_index :: self.accelerator.num_processes]
        for start in range(0, len(mine), self.batch_size):
            yield mine[start : start + self.batch_size]

    @torch.no_grad()
    def _evaluate_batch(
        self, dataset: PromptDataset, indices: list[int]
    ) -> tuple[list[dict[str, float]], Tensor | list[Tensor]]:
        device = self.accelerator.device
        rows = [prompt_row(dataset, index) for index in indices]
        conditioning = self.policy.encode([row["prompt"] for row in rows], device)
        seeds = [fold_seed(self.seed, Stream.EVALUATION_LATENTS, index) for index in indices]
        initial = noise_by_row(seeds, self.latent_shape).to(device, self.policy.storage_dtype)
        velocity = self.policy.bind(conditioning, self.policy.encode_negative(device))
        latents = sample(velocity, initial, self.schedule).latents
        reward_seeds = [fold_seed(self.seed, Stream.EVALUATION_REWARD, index) for index in indices]
        rewards = self.rewards.score(latents, rows, conditioning, reward_seeds)
        scores = {"reward": rewards @ rewards.new_tensor(self.reward_weights)}
        if len(self.rewards.functions) > 1:
            scores |= {f"rewards/{name}": rewards[:, i] for i, name in enumerate(self.rewards.names)}
        images = self._images(latents, indices)
        available = {**columns_of(rows), "latents": latents, "images": images}
        for evaluator in self.evaluators:
            scores |= _judge(evaluator, available, len(rows))
        return [{name: float(values[i]) for name, values in scores.items()} for i in range(len(rows))], images

    def _images(self, latents: Tensor, indices: list[int]) -> Tensor | list[Tensor]:
        if not self.evaluators:
            latents = latents[: sum(index < self.num_images for index in indices)]
        return self.policy.family.decode_latents(self.policy.pipeline, latents).cpu() if len(latents) else []


def _judge(evaluator: Evaluator, available: Mapping[str, Any], batch_size: int) -> dict[str, Tensor]:
    name = callable_name(evaluator).lower()
    result = evaluator(**accepted_arguments(evaluator, available))
    if isinstance(result, Mapping):
        return {str(key): checked_scores(f"{name}[{key!r}]", value, batch_size) for key, value in result.items()}
    return {name: checked_scores(name, result, batch_size)}


def _summarise(step: int, scores: Sequence[Mapping[str, float]], picture: str | None) -> EvaluationRecord:
    if not scores:
        raise ValueError("eval_dataset has no prompts")
    columns = {name: torch.tensor([row[name] for row in scores], dtype=torch.float64) for name in scores[0]}
    means = {name: float(values.mean()) for name, values in columns.items()}
    spread = {name: float(v.std(correction=0)) / math.sqrt(len(v)) for name, v in columns.items()}
    return EvaluationRecord(step, means, spread, picture)


def picture_grid(images: Sequence[Tensor], min_side: int = 96, gap: int = GRID_GAP) -> Image.Image:
    """Images side by side, in an almost square grid; small ones are enlarged pixel by pixel.

    Args:
        images: at least one, each of shape ``(3, height, width)``, in [0, 1].
        min_side: the longer side of a tile has at least this many pixels.
        gap: pixels between tiles.
    """
    columns = math.ceil(math.sqrt(len(images)))
    height, width = images[0].shape[-2:]
    factor = max(1, math.ceil(min_side / max(width, height)))
    width, height = width * factor, height * factor
    size = (columns * (width + gap) + gap, math.ceil(len(images) / columns) * (height + gap) + gap)
    grid = Image.new("RGB", size, "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
    return grid


def _save_picture(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


def read_history(path: str | os.PathLike[str]) -> list[EvaluationRecord]:
    """Records of a history file in order; empty if there is none."""
    file = Path(path)
    if not file.exists():
        return []
    return [EvaluationRecord(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines() if line]


def append_record(path: str | os.PathLike[str], record: EvaluationRecord) -> list[EvaluationRecord]:
    """Adds a record; those of the same or later steps, left by a run that was resumed, are replaced.

    Returns:
        The whole history.
    """
    file = Path(path)
    history = [old for old in read_history(file) if old.step < record.step] + [record]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text("".join(json.dumps(asdict(line)) + "\n" for line in history), encoding="utf-8")
    os.replace(temporary, file)
    return history


def reward_hacking_alarms(history: Sequence[EvaluationRecord]) -> list[str]:
    """One message for every evaluator that has fallen since its best record while the reward has risen.

    A fall counts when it exceeds twice the standard error of the latest mean.
    """
    latest, messages = history[-1], []
    for name, value in latest.metrics.items():
        earlier = [record for record in history[:-1] if name in record.metrics]
        if name == "reward" or name.startswith("rewards/") or not earlier:
            continue
        best = max(earlier, key=lambda record: record.metrics[name])
        fallen = best.metrics[name] - value > 2 * latest.standard_errors.get(name, 0.0)
        if fallen and latest.metrics["reward"] > best.metrics["reward"]:
            messages.append(
                f"Reward hacking? Since step {best.step} the reward rose from {best.metrics['reward']:.4g} to "
                f"{latest.metrics['reward']:.4g} while held-out {name} fell from {best.metrics[name]:.4g} to {value:.4g} "
                f"(step {latest.step}). Stop here, lower the learning rate or raise beta."
            )
    return messages
