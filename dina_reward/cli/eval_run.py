"""What `dina-reward eval` does: open the dataset, load the rewards, compare them, write the report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dina_reward.checkpoints.atomic import atomic_files
from dina_reward.cli.console import in_terminal
from dina_reward.cli.score_run import load_pipeline, locate_reward
from dina_reward.data import BrokenRows, CachedPreferences, Preference, load_preferences, read_preferences
from dina_reward.data.cache_manifest import is_cache
from dina_reward.data.storage import TENSORS_NAME
from dina_reward.evaluation import (
    BENCHMARK_TIES,
    CallableScorer,
    ClipReward,
    Comparison,
    LatentScorer,
    Scorer,
    Setting,
    comparison_table,
    ensemble_advice,
    evaluate_scorers,
    evaluation_settings,
    plot_comparison,
)
from dina_reward.evaluation.comparison import DEFAULT_COLUMNS, ScorerReport
from dina_reward.evaluation.pair_table import OWN_COLUMNS, as_preference
from dina_reward.evaluation.readable import pairs_of
from dina_reward.modeling.scoring import Ensemble
from dina_reward.recipes.alignment import import_function
from dina_reward.reward import LatentReward


SHAPES = "shapes"
_SHAPES_PAIRS = 2000
_ADVICE_DRAWS = 4


@dataclass(frozen=True)
class EvalRequest:
    """Arguments of ``dina-reward eval``; see its ``--help``."""

    rewards: Sequence[str]
    dataset: str
    clip: Sequence[str] = ()
    clip_processor: str | None = None
    functions: Sequence[str] = ()
    pipeline: str | None = None
    split: str = "test"
    schema: str | None = None
    image_root: Path | None = None
    min_confidence: float | None = None
    max_pairs: int | None = None
    levels: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    ensembles: Sequence[Sequence[float]] = ((0.2, 0.5, 0.7),)
    kinds: Sequence[Ensemble] = ("tokens",)
    draws: Sequence[int] = (1,)
    by: Sequence[str] = DEFAULT_COLUMNS
    advice: bool = False
    ties: str | None = None
    tie_threshold: float | None = None
    resamples: int = 1000
    seed: int = 0
    batch_size: int = 16
    device: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Entrant:
    """A scorer, and the pipeline that encodes or decodes for it."""

    scorer: Scorer
    pipeline: Any | None


@dataclass
class _Loader:
    """Loads every pipeline once."""

    request: EvalRequest
    pipelines: dict[str, Any] = field(default_factory=dict)

    def pipeline(self, model_id: str) -> Any:
        if model_id not in self.pipelines:
            self.pipelines[model_id] = load_pipeline(model_id, device=self.request.device, dtype=self.request.dtype)
        return self.pipelines[model_id]


def run_evaluation(request: EvalRequest, entrants: Sequence[Entrant] | None = None) -> Comparison:
    """Evaluates everything that was asked for.

    Args:
        request: what on what.
        entrants: its rewards where `load_entrants` has loaded them already, for evaluating them on several datasets.

    Raises:
        ValueError: nothing to evaluate, or something that cannot be loaded or read.
    """
    entrants = load_entrants(request) if entrants is None else entrants
    pipeline = next((entrant.pipeline for entrant in entrants if entrant.pipeline is not None), None)
    opened = open_dataset(request, pipeline)
    ties = request.ties or BENCHMARK_TIES.get(request.schema or opened.schema, "half")
    comparison = evaluate_scorers(
        [entrant.scorer for entrant in entrants],
        opened.pairs,
        pipeline=[entrant.pipeline for entrant in entrants],
        by=request.by,
        ties=ties,
        tie_threshold=request.tie_threshold,
        dataset=f"{request.dataset.rstrip('/')} ({request.split})",
        resamples=request.resamples,
        batch_size=request.batch_size,
        seed=request.seed,
        progress=in_terminal(),
    )
    if request.advice:
        comparison = replace(comparison, rewards=_with_advice(request, comparison, entrants, opened.pairs))
    return replace(comparison, notes=(*comparison.notes, *opened.notes()))


def _with_advice(
    request: EvalRequest, comparison: Comparison, entrants: Sequence[Entrant], pairs: Any
) -> tuple[ScorerReport, ...]:
    """The reports, those of latent rewards with advice on ensembles, under four noise draws or as many as are asked for."""
    draws = max(_ADVICE_DRAWS, *request.draws, *map(len, request.ensembles))
    reports = []
    for report, entrant in zip(comparison.rewards, entrants, strict=True):
        if isinstance(entrant.scorer, LatentScorer):
            advice = ensemble_advice(
                entrant.scorer.reward,
                pairs,
                noise_levels=request.levels,
                ensembles=request.ensembles,
                draws=draws,
                pipeline=entrant.pipeline,
                ties=comparison.ties,
                resamples=request.resamples,
                batch_size=request.batch_size,
                seed=request.seed,
                progress=in_terminal(),
            )
            report = replace(report, advice=advice)
        reports.append(report)
    return tuple(reports)


def write_evaluation(comparison: Comparison, directory: Path) -> None:
    """Writes ``evaluation.json``, ``evaluation.md`` and ``evaluation.png``."""
    text = json.dumps(comparison.to_dict(), indent=2, allow_nan=False)
    with atomic_files(directory) as staging:
        (staging / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        (staging / "evaluation.md").write_text(comparison_table(comparison) + "\n", encoding="utf-8")
        plot_comparison(comparison, staging / "evaluation.png")


@dataclass(frozen=True)
class OpenedDataset:
    """Pairs, the name of their schema (empty where there is none), and what the reader left out so far."""

    pairs: Any
    schema: str = ""
    report: BrokenRows | None = None

    def notes(self) -> tuple[str, ...]:
        """For the comparison: rows that were left out."""
        if self.report is None or not (self.report.count or self.report.dropped):
            return ()
        return ("; ".join(line.strip() for line in str(self.report).splitlines()),)


def open_dataset(request: EvalRequest, pipeline: Any | None) -> OpenedDataset:
    """Opens what the request names: the embedded world, saved latents, a latent cache, or a published schema.

    Args:
        request: names the dataset, its split and schema.
        pipeline: generator of the embedded world, which makes the pairs of ``shapes``.
    """
    if request.dataset == SHAPES:
        return OpenedDataset(shapes_pairs(request, pipeline))
    location, limit = Path(request.dataset), request.max_pairs
    if (location / TENSORS_NAME).exists():
        return OpenedDataset(_First(load_preferences(location), limit))
    if is_cache(location):
        return OpenedDataset(_First(CachedPreferences(location), limit))
    reader = read_preferences(
        request.dataset,
        schema=request.schema,
        split=request.split,
        image_root=request.image_root,
        seed=request.seed,
        min_confidence=request.min_confidence,
        columns=[name for name in request.by if name not in OWN_COLUMNS],
    )
    return OpenedDataset(pairs_of(reader, limit), reader.schema, reader.report)


def shapes_pairs(request: EvalRequest, pipeline: Any | None) -> list[Preference]:
    """Pairs of the embedded world: ``held_out`` captions for the split ``test``, sources are the two kinds of latents."""
    from dina_reward.shapes import fresh_preferences
    from dina_reward.shapes import load_pipeline as load_shapes
    from dina_reward.shapes.preferences import SOURCES

    pipeline = pipeline or load_shapes()
    count = request.max_pairs or _SHAPES_PAIRS
    least = request.min_confidence or 0.0
    pairs = []
    for row in fresh_preferences(pipeline, request.split, count, request.seed):
        if max(row["p_chosen"], 1 - row["p_chosen"]) >= least:
            sources = " - ".join(sorted(row["kind"].split("-"), key=SOURCES.index))
            pairs.append(replace(as_preference(row)[0], source=sources))
    return pairs


def load_entrants(request: EvalRequest) -> list[Entrant]:
    """Loads the rewards that a request names, each with its pipeline.

    Raises:
        ValueError: it names none, or one that cannot be loaded.
    """
    if not (request.rewards or request.clip or request.functions):
        raise ValueError("nothing to evaluate: name a checkpoint before the dataset, or use --clip or --function")
    loader, entrants = _Loader(request), []
    settings = evaluation_settings(request.levels, request.ensembles, kinds=request.kinds, draws=request.draws)
    names = iter(
        _names([*request.rewards, *request.clip, *(dotted.replace(".", "/") for dotted in request.functions)])
    )
    for reward in request.rewards:
        entrants.append(_latent_entrant(reward, loader, settings, next(names)))
    shared = entrants[0].pipeline if entrants else None
    if shared is None and request.pipeline is not None:
        shared = loader.pipeline(request.pipeline)
    if shared is None and request.dataset == SHAPES:
        shared = loader.pipeline(SHAPES)
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for model_id in request.clip:
        model = ClipReward.from_pretrained(
            model_id, request.clip_processor, torch_dtype=getattr(torch, request.dtype), device=device
        )
        entrants.append(Entrant(CallableScorer(model, name=next(names), likelihood="bradley_terry"), shared))
    for dotted in request.functions:
        entrants.append(Entrant(CallableScorer(import_function(dotted), name=next(names), device=device), shared))
    return entrants


def _latent_entrant(reward: str, loader: _Loader, settings: Sequence[Setting], name: str) -> Entrant:
    directory, model_id = locate_reward(reward, loader.request.pipeline)
    pipeline = loader.pipeline(model_id)
    loaded = LatentReward.from_pretrained(directory, pipeline=pipeline, share_backbone=True)
    return Entrant(LatentScorer(loaded, settings, name=name), pipeline)


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of every path or id; where that is not unique, as many parts as it takes."""
    parts = [path.rstrip("/\\").replace(os.sep, "/").split("/") for path in paths]
    longest = max(len(each) for each in parts)
    for length in range(1, longest + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same reward is named twice: {', '.join(paths)}")


class _First:
    """The first pairs of a sequence, as often as one likes."""

    def __init__(self, pairs: Any, limit: int | None) -> None:
        self.pairs, self.count = pairs, len(pairs) if limit is None else min(limit, len(pairs))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (self.pairs[index] for index in range(self.count))
