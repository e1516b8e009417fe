"""Which rows a training run generates and trains on: a map-style dataset of integers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from dina_reward.alignment.sampling.seeding import Stream, generator_from


class PromptDataset(Protocol):
    """Anything with a length and integer indexing: a `datasets.Dataset`, a list of strings or of dictionaries."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def prompt_row(dataset: PromptDataset, index: int) -> dict[str, Any]:
    """One row as a dictionary with a ``"prompt"``.

    Raises:
        ValueError: the row is neither a string nor a mapping with a string under ``"prompt"``.
    """
    row = dataset[index]
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row, Mapping) and isinstance(row.get("prompt"), str):
        return dict(row)
    found = f"columns {sorted(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
    raise ValueError(
        f"row {index} of the prompt dataset is {found}; expected a string or a row with a 'prompt' string"
    )


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows turned into columns, with ``"prompt"`` renamed to ``"prompts"``; None where a row has no such column."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return {"prompts": columns.pop("prompt"), **columns}


class PromptTable:
    """Prompts of any supported kind as rows that all have the same columns.

    Args:
        dataset: a `datasets.Dataset` with a column ``"prompt"``; a list of strings, or of dictionaries with a ``"prompt"``;
            or any other dataset with a length and integer indexing that gives such elements.
        name: of the argument, for messages.

    Raises:
        ValueError: it is of another kind (the message says what to do), has no prompts, or a row of a list has none.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        _refuse_other_kinds(dataset, name)
        if len(dataset) == 0:
            raise ValueError(f"{name} has no prompts")
        self._dataset = dataset
        columns = getattr(dataset, "column_names", None)
        if isinstance(dataset, (list, tuple)):
            columns = list(dict.fromkeys(key for index in range(len(dataset)) for key in prompt_row(dataset, index)))
        self.columns: list[str] = list(columns or ())
        """Names of the columns; empty where they are not known before the rows are read."""
        if self.columns and "prompt" not in self.columns:
            raise ValueError(f"{name} has the columns {self.columns} and no 'prompt'; rename the one with the prompts")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**dict.fromkeys(self.columns), **prompt_row(self._dataset, index)}


def _refuse_other_kinds(dataset: Any, name: str) -> None:
    kind, advice = type(dataset).__name__, None
    if isinstance(dataset, PromptTable):
        return
    if isinstance(dataset, str):
        advice = "put the prompt into a list, or read the file it names with datasets.load_dataset"
    elif isinstance(dataset, Mapping):
        advice = f"it has the keys {sorted(map(str, dataset))[:4]}; pass one of its values, {name}[...]"
    elif hasattr(dataset, "iloc"):
        advice = "use datasets.Dataset.from_pandas"
    elif not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        advice = "prompts are drawn in random order; a stream has to be read first, e.g. list(...)"
    if advice is not None:
        raise ValueError(
            f"{name} must be a list of prompts or a dataset with a 'prompt' column, got a {kind}: {advice}"
        )


@dataclass(frozen=True)
class BatchGeometry:
    """How the rows of a generation batch are split.

    A generation batch is ``num_chunks`` chunks, and a chunk is ``num_processes`` micro-batches. Rows are numbered over
    all ranks; members of a group are neighbours.

    Args:
        batch_size (`int`): rows of a micro-batch, on one rank.
        num_processes (`int`): ranks.
        num_chunks (`int`): micro-batches that a rank makes out of one generation batch (`steps_per_generation`).
        num_generations (`int`): rows that share a prompt.
        num_iterations (`int`): passes over a generation batch.
    """

    batch_size: int
    num_processes: int
    num_chunks: int
    num_generations: int
    num_iterations: int

    def __post_init__(self) -> None:
        if self.rows % self.num_generations == 0:
            return
        per_chunk = self.chunk_rows
        least = self.num_generations // math.gcd(per_chunk, self.num_generations)
        below, above = self.num_chunks // least * least, -(-self.num_chunks // least) * least
        chunks = " or ".join(str(number) for number in (below, above) if number)
        sizes = [size for size in range(1, self.rows + 1) if self.rows % size == 0]
        nearest = sorted(sizes, key=lambda size: (abs(size - self.num_generations), size))[:2]
        raise ValueError(
            f"the generation batch has {self.rows} rows (per_device_train_batch_size {self.batch_size} x "
            f"{self.num_processes} processes x steps_per_generation {self.num_chunks}), which is not divisible by "
            f"num_generations {self.num_generations}, so groups would not be whole. Set steps_per_generation to {chunks} "
            f"(and gradient_accumulation_steps along with it), or num_generations to {' or '.join(map(str, nearest))}"
        )

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk over all ranks."""
        return self.batch_size * self.num_processes

    @property
    def rows(self) -> int:
        """Rows of a generation batch over all ranks."""
        return self.chunk_rows * self.num_chunks

    @property
    def groups(self) -> int:
        """Prompts of a generation batch."""
        return self.rows // self.num_generations

    @property
    def micro_steps(self) -> int:
        """Micro-steps between two generations."""
        return self.num_chunks * self.num_iterations

    def rows_of(self, chunk: int, process_index: int) -> range:
        """Rows of one micro-batch."""
        start = chunk * self.chunk_rows + process_index * self.batch_size
        return range(start, start + self.batch_size)


class PromptRollouts(Dataset[dict[str, int]]):
    """Every row of every micro-step of an epoch, in the order in which it is trained.

    Item ``i`` holds integers only: the ``generation`` it belongs to, the ``iteration`` over that generation batch and
    the ``row`` in it. Sharding the batches over ranks gives every rank the rows of `BatchGeometry.rows_of`. Chunks come
    in order in the first iteration and in an order drawn from ``(seed, generation, iteration)`` in later ones; the rows
    inside a chunk stay together. An epoch is about one pass over the prompts.

    Args:
        dataset (`PromptDataset`): the prompts, with any other columns.
        geometry (`BatchGeometry`): the batch.
        gradient_accumulation_steps (`int`): an epoch is a whole number of optimizer steps.
        seed (`int`): order of prompts and chunks.
    """

    def __init__(
        self, dataset: PromptDataset, geometry: BatchGeometry, *, gradient_accumulation_steps: int = 1, seed: int = 0
    ) -> None:
        self.dataset = PromptTable(dataset, "train_dataset")
        self.geometry = geometry
        self.seed = seed
        self.epoch = 0
        per_step = max(1, gradient_accumulation_steps // geometry.micro_steps)
        passes = -(-len(dataset) // geometry.groups)
        self.generations_per_epoch = -(-passes // per_step) * per_step
        self._orders: dict[int, list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.generations_per_epoch * self.geometry.num_iterations * self.geometry.rows

    def __getitem__(self, index: int) -> dict[str, int]:
        passes, position = divmod(index, self.geometry.rows)
        generation, iteration = divmod(passes, self.geometry.num_iterations)
        generation += self.epoch * self.generations_per_epoch
        chunk, offset = divmod(position, self.geometry.chunk_rows)
        row = self.chunk_order(generation, iteration)[chunk] * self.geometry.chunk_rows + offset
        return {"generation": generation, "iteration": iteration, "row": row}

    def chunk_order(self, generation: int, iteration: int) -> list[int]:
        """Chunk numbers in the order in which an iteration trains them."""
        chunks = list(range(self.geometry.num_chunks))
        if iteration == 0:
            return chunks
        generator = generator_from(self.seed, Stream.CHUNK_ORDER, generation, iteration)
        return torch.randperm(len(chunks), generator=generator).tolist()

    def group_of(self, row: int) -> int:
        """Group number, inside its generation batch, of a row."""
        return row // self.geometry.num_generations

    def rows(self, generation: int, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Dataset rows (``prompt`` and other columns) behind these rows of a generation batch."""
        groups = [self.group_of(row) for row in rows]
        found = {group: self._prompt(generation * self.geometry.groups + group) for group in sorted(set(groups))}
        return [found[group] for group in groups]

    def _prompt(self, position: int) -> dict[str, Any]:
        """Element of the endless stream of shuffled passes over the prompts."""
        number, index = divmod(position, len(self.dataset))
        if number not in self._orders:
            generator = generator_from(self.seed, Stream.PROMPT_ORDER, number)
            # A generation batch may span two passes; older ones are not needed again.
            self._orders = {key: order for key, order in self._orders.items() if key >= number - 1}
            self._orders[number] = torch.randperm(len(self.dataset), generator=generator).tolist()
        return prompt_row(self.dataset, self._orders[number][index])
