"""Scores of every side of every pair of a dataset, each image scored once."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dina_reward.data.preference import Preference
from dina_reward.evaluation.cost import Cost, device_name, peak_memory, reset_peak_memory, timed
from dina_reward.evaluation.pair_table import PairTable, as_preference
from dina_reward.evaluation.scorers import Scorer
from dina_reward.families import family_of
from dina_reward.noise.draws import fold_seed


_BATCHES_WAITING = 16


@dataclass(frozen=True)
class ScoredPairs:
    """A dataset as one scorer sees it.

    Args:
        scores (`Tensor`): score of each sample in each setting, shape ``(samples, settings)``, float32.
        table (`PairTable`): the pairs; ``table.a`` and ``table.b`` are rows of ``scores``.
        cost (`Cost`): what it took.
    """

    scores: Tensor
    table: PairTable
    cost: Cost


@dataclass
class _Sample:
    row: int
    side: Any
    prompt: str
    seed: int


@dataclass
class _Results:
    """Scores by row, and seconds of every batch with its size."""

    scores: dict[int, Tensor] = field(default_factory=dict)
    scoring: list[tuple[int, np.ndarray]] = field(default_factory=list)
    preparing: list[tuple[int, np.ndarray]] = field(default_factory=list)


def score_dataset(
    scorer: Scorer,
    pairs: Iterable[Preference | Mapping[str, Any]],
    *,
    pipeline: Any | None = None,
    columns: Sequence[str] = (),
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> ScoredPairs:
    """Scores a dataset in one pass; images are read when it is their turn.

    Images are encoded with the family's ``encode_images`` for a scorer of latents; latents are decoded with its
    ``decode_latents`` for a scorer of images. Both sides of a pair see the same noise: it depends on the seed and the
    pair's group, or on its position in the dataset where there are no groups. An image that occurs in several pairs of a
    prompt is scored once. A sample's noise and score do not depend on the batch it is in.

    Args:
        scorer: what scores.
        pairs: `Preference` records, or rows of training data.
        pipeline: diffusers pipeline that encodes or decodes.
        columns: columns of the dataset to keep in the table, for reporting by their values.
        batch_size: samples of one shape per pass.
        seed: seed of the noise.
        progress: show a progress bar.

    Raises:
        ValueError: no pairs, a record that cannot be used, a column that the first of them lacks, or a pipeline is needed
            and not given.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    table, results = PairTable(), _Results()
    reset_peak_memory()
    total = len(pairs) if isinstance(pairs, Sized) else None
    bar = tqdm(pairs, total=total, desc=scorer.name, unit="pair", disable=not progress)
    for samples in _batches(_new_samples(bar, table, seed, columns), batch_size):
        _score(scorer, samples, pipeline, results)
    if not len(table):
        raise ValueError("got no preference pairs to evaluate")
    scores = torch.stack([results.scores[row] for row in range(len(results.scores))])
    return ScoredPairs(scores, table, _cost(scorer, results, batch_size))


def _new_samples(
    pairs: Iterable[Preference | Mapping[str, Any]], table: PairTable, seed: int, columns: Sequence[str]
) -> Iterator[_Sample]:
    """Adds every pair to the table and gives those of its sides that have not been seen."""
    rows: dict[Hashable, int] = {}
    for position, record in enumerate(pairs):
        pair, bucket = as_preference(record)
        stream = zlib.crc32(pair.group.encode()) if pair.group else position
        noise_seed = fold_seed(seed, stream, 1) if pair.group else fold_seed(seed, stream)
        found, fresh = [], []
        for letter, side, name in (("a", pair.a, pair.a_name), ("b", pair.b, pair.b_name)):
            key = (pair.prompt, pair.group, name) if name and pair.group else (position, letter)
            if key not in rows:
                rows[key] = len(rows)
                fresh.append(_Sample(rows[key], side, pair.prompt, noise_seed))
            found.append(rows[key])
        table.add(pair, bucket, (found[0], found[1]), columns)
        yield from fresh


def _batches(samples: Iterable[_Sample], size: int) -> Iterator[list[_Sample]]:
    """Batches of one shape each. At most `_BATCHES_WAITING` batches of samples wait for others of their shape."""
    waiting: dict[Hashable, list[_Sample]] = {}
    for sample in samples:
        queue = waiting.setdefault(_shape(sample.side), [])
        queue.append(sample)
        if len(queue) == size:
            yield waiting.pop(_shape(sample.side))
        elif sum(map(len, waiting.values())) > _BATCHES_WAITING * size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _shape(side: Any) -> Hashable:
    if isinstance(side, Tensor):
        return ("latent", *side.shape)
    if isinstance(side, Image.Image):
        return ("image", *side.size)
    raise ValueError(
        f"one side of a pair is a {type(side).__name__}; expected an image or a latent. Turn videos into latents first"
    )


def _score(scorer: Scorer, samples: list[_Sample], pipeline: Any, results: _Results) -> None:
    with timed() as seconds:
        batch, converted = _prepare(scorer, [sample.side for sample in samples], pipeline)
    result = scorer.score(batch, [sample.prompt for sample in samples], [sample.seed for sample in samples])
    results.scores.update(zip((sample.row for sample in samples), result.scores, strict=True))
    results.scoring.append((len(samples), np.array(result.seconds)))
    results.preparing.append((len(samples), np.array(seconds if converted else [0.0])))


@torch.no_grad()
def _prepare(scorer: Scorer, sides: list[Any], pipeline: Any) -> tuple[Tensor, bool]:
    """The batch that the scorer reads, and whether the pipeline's VAE had to run."""
    are_latents = isinstance(sides[0], Tensor)
    if are_latents == (scorer.inputs == "latents"):
        batch = torch.stack(sides) if are_latents else images_to_tensor(sides)
        return batch.to(scorer.device), False
    if pipeline is None:
        have, need = ("latents", "images") if are_latents else ("images", "latents")
        raise ValueError(
            f"{scorer.name} reads {need} and the dataset holds {have}; give the pipeline that converts them"
        )
    family = family_of(pipeline)
    if are_latents:
        return family.decode_latents(pipeline, torch.stack(sides).to(pipeline.device)).to(scorer.device), True
    return family.encode_images(pipeline, sides).to(scorer.device), True


def images_to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images of one size as float32 in [0, 1], shape ``(batch, 3, height, width)``."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _cost(scorer: Scorer, results: _Results, batch_size: int) -> Cost:
    memory, kind = peak_memory()
    seconds = _per_thousand(results.scoring)
    return Cost(
        seconds_per_1000={setting.name: float(value) for setting, value in zip(scorer.settings, seconds, strict=True)},
        prepare_seconds_per_1000=float(_per_thousand(results.preparing)[0]),
        peak_memory=memory,
        memory_kind=kind,
        samples=len(results.scores),
        batch_size=batch_size,
        device=device_name(scorer.device),
    )


def _per_thousand(batches: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Seconds per 1,000 samples; the first batch, which warms up, is left out where there are others."""
    counted = batches[1:] or batches
    seconds = np.stack([spent for _, spent in counted]).sum(axis=0)
    return 1000 * seconds / sum(count for count, _ in counted)
