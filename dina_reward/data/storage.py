"""Preferences between latents in memory and as safetensors, which keep bfloat16, for which Arrow has no type."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from dina_reward.checkpoints.atomic import atomic_directory, settled
from dina_reward.checks.stored import read_json, read_tensors
from dina_reward.checks.tensors import check_numbers
from dina_reward.checks.values import check_text
from dina_reward.data.records import check_columns, collate_preferences


if TYPE_CHECKING:
    import datasets

    from dina_reward.data.cached import CachedPreferences
    from dina_reward.data.latent_rows import LatentRows

TENSORS_NAME = "preferences.safetensors"
PROMPTS_NAME = "prompts.json"


class LatentPreferenceDataset(Dataset[dict[str, Any]]):
    """Preferences whose latents all have one shape, held in memory; a row is a preference record.

    Examples:
        >>> dataset = LatentPreferenceDataset(prompts, chosen=better_latents, rejected=worse_latents)
        >>> dataset.save("preferences")
        >>> dataset = LatentPreferenceDataset.load("preferences")

    Args:
        prompts: one per pair.
        chosen, rejected (`Tensor`): clean latents, shape ``(pairs, ...)``.
        p_chosen, weight (`Tensor`, *optional*): shape ``(pairs,)``; one by default.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        chosen: Tensor,
        rejected: Tensor,
        p_chosen: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise ValueError(f"prompts must be a list of strings, one per pair, got {type(prompts).__name__}")
        self.prompts = list(prompts)
        for prompt in self.prompts:
            check_text("prompts: each", prompt)
        for name, latents in (("chosen", chosen), ("rejected", rejected)):
            _check_latents(name, latents)
        pairs = len(self.prompts)
        if chosen.shape != rejected.shape or chosen.shape[0] != pairs:
            raise ValueError(
                f"got {pairs} prompts, chosen latents of shape {tuple(chosen.shape)} and rejected latents of shape "
                f"{tuple(rejected.shape)}; expected one prompt per row and equal shapes"
            )
        self.chosen, self.rejected = chosen, rejected
        self.p_chosen = torch.ones(pairs) if p_chosen is None else p_chosen
        self.weight = torch.ones(pairs) if weight is None else weight
        for name, values, high in (("p_chosen", self.p_chosen, 1.0), ("weight", self.weight, math.inf)):
            check_numbers(name, values)
            if values.shape != (pairs,):
                raise ValueError(f"{name} has shape {tuple(values.shape)}; expected ({pairs},), one value per pair")
            if not bool(((values >= 0) & (values <= high) & torch.isfinite(values)).all()):
                raise ValueError(f"{name} must be finite numbers in [0, {high:g}], got {values.tolist()[:4]} ...")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "prompt": self.prompts[index],
            "chosen": self.chosen[index],
            "rejected": self.rejected[index],
            "p_chosen": float(self.p_chosen[index]),
            "weight": float(self.weight[index]),
        }

    def fingerprint(self) -> str:
        """Digest of everything in it, by which a training run knows its dataset again."""
        digest = hashlib.sha256(json.dumps(self.prompts).encode())
        for tensor in (self.chosen, self.rejected, self.p_chosen, self.weight):
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> LatentPreferenceDataset:
        """Validates and stacks preference records.

        Raises:
            ValueError: there are none, one is unusable, or their latents differ in shape.
        """
        rows = list(records)
        if not rows:
            raise ValueError("got no preference records")
        batch = collate_preferences(rows)
        return cls(batch["prompts"], batch["chosen"], batch["rejected"], batch["p_chosen"], batch["weight"])

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``preferences.safetensors`` and ``prompts.json``; older preferences are replaced as a whole.

        Raises:
            ValueError: the directory holds other files, or is the working directory.
        """
        tensors = {name: getattr(self, name).contiguous() for name in ("chosen", "rejected", "p_chosen", "weight")}
        with atomic_directory(directory, marker=TENSORS_NAME) as staging:
            save_file(tensors, staging / TENSORS_NAME, metadata={"format": "pt"})
            (staging / PROMPTS_NAME).write_text(json.dumps(self.prompts, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> LatentPreferenceDataset:
        """Reads what `save` wrote.

        Raises:
            ValueError: a file is missing or damaged, or their lengths differ.
        """
        directory = settled(directory)
        tensors_path, prompts_path = directory / TENSORS_NAME, directory / PROMPTS_NAME
        for path in (tensors_path, prompts_path):
            if not path.is_file():
                raise ValueError(f"{path} is missing; expected {TENSORS_NAME} and {PROMPTS_NAME} in {directory}")
        try:
            tensors = read_tensors(tensors_path)
            prompts = read_json(prompts_path)
        except ValueError as error:
            raise ValueError(f"the preferences in {directory} are damaged: {error}") from error
        check_columns(["prompt", *tensors])
        try:
            return cls(prompts, tensors["chosen"], tensors["rejected"], tensors.get("p_chosen"), tensors.get("weight"))
        except ValueError as error:
            raise ValueError(f"the preferences in {directory} cannot be used: {error}") from error


def _check_latents(name: str, latents: Any) -> None:
    check_numbers(name, latents, floating=True)
    if latents.ndim < 3:
        raise ValueError(f"{name} must be a tensor of latents, (pairs, ...), got shape {tuple(latents.shape)}")
    finite = torch.isfinite(latents).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(
            f"{name} holds NaN or infinite values in the pairs {(~finite).nonzero().flatten().tolist()[:8]}"
        )


def load_preferences(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    min_confidence: float | None = None,
    max_pairs_per_prompt: int | None = None,
) -> LatentPreferenceDataset | CachedPreferences | LatentRows | datasets.Dataset:
    """Opens preferences between latents, on disk or on the hub.

    Args:
        path: a directory written by `LatentPreferenceDataset.save`, by `build_cache` (``dina-reward cache``) or by
            `datasets.Dataset.save_to_disk`, a parquet file, a directory of parquet files, the index (csv) of published
            latents, or the hub id of a dataset. Columns are those of a preference record, or those of the latents that
            the published reward was trained on (``latent1``, ``latent2``).
        split: split to read from a `DatasetDict`, from parquet files in a directory (``split-*.parquet``, or all of
            them for ``train`` when none is named so), from a directory with one latent cache per split, or from the hub.
        min_confidence, max_pairs_per_prompt: filters of published latents, see `read_preferences`.

    Raises:
        ValueError: nothing readable there, required columns are missing, or filters for a dataset that takes none.
    """
    from dina_reward.data.latent_rows import LatentRows

    filters = {"min_confidence": min_confidence, "max_pairs_per_prompt": max_pairs_per_prompt}
    rows = _open(settled(path), str(path), split, filters)
    given = [name for name, value in filters.items() if value is not None]
    if given and not isinstance(rows, LatentRows):
        raise ValueError(
            f"{path} takes no {' and '.join(given)}: these filters are for published latents; a latent cache is filtered "
            "when it is made"
        )
    return rows


def _open(location: Path, name: str, split: str, filters: Mapping[str, Any]) -> Any:
    import datasets

    from dina_reward.data.cache_manifest import is_cache

    if (location / TENSORS_NAME).exists():
        return LatentPreferenceDataset.load(location)
    for place in (location, location / split):
        if is_cache(place):
            from dina_reward.data.cached import CachedPreferences

            return CachedPreferences(place)
    if location.is_file() and location.suffix == ".csv":
        return _published_latents(location, filters)
    if location.is_file() and location.suffix == ".parquet":
        return _rows(datasets.load_dataset("parquet", data_files=str(location), split="train"), filters)
    if not location.exists():
        return _rows(_from_hub(name, split), filters)
    if (location / "dataset_info.json").exists() or (location / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(location))
        return _rows(_pick_split(loaded, split, location), filters)
    files = sorted(str(file) for file in location.glob("*.parquet")) if location.is_dir() else []
    named = [file for file in files if Path(file).name.startswith(f"{split}-")]
    if not (named or (files and split == "train")):
        found = sorted(entry.name for entry in location.iterdir())[:8] if location.is_dir() else "a file"
        raise ValueError(
            f"{location} holds no preferences for the split {split!r}: expected {TENSORS_NAME}, a saved "
            f"datasets.Dataset or parquet files, found {found}"
        )
    return _rows(datasets.load_dataset("parquet", data_files=named or files, split="train"), filters)


def _rows(dataset: datasets.Dataset, filters: Mapping[str, Any]) -> Any:
    if {"latent1", "latent2"} <= set(dataset.column_names):
        return _published_latents(dataset, filters)
    return preference_rows(dataset)


def _published_latents(dataset: Path | datasets.Dataset, filters: Mapping[str, Any]) -> LatentRows:
    from dina_reward.data.latent_rows import LatentRows
    from dina_reward.data.readers import read_preferences

    return LatentRows(read_preferences(dataset, **filters))


def preference_rows(dataset: Any) -> Any:
    """Checks the columns of a dataset and makes a `datasets.Dataset` return latents as tensors, not nested lists.

    Other sequences of records are returned as they are, after a look at the first one; streams without one.

    Raises:
        ValueError: required columns are missing, or the dataset is empty.
    """
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list) and hasattr(dataset, "format"):
        check_columns(columns)
        return dataset.with_format("torch") if dataset.format["type"] is None else dataset
    if not hasattr(dataset, "__len__"):
        return dataset
    if len(dataset) == 0:
        raise ValueError("the preference dataset is empty")
    check_columns(dataset[0].keys())
    return dataset


def _from_hub(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name!r} is neither a path here nor a dataset that can be downloaded: {error}") from error


def _pick_split(loaded: Any, split: str, location: Path) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{location} has no split {split!r}; it has {sorted(loaded)}")
    return loaded[split]
