"""Prompts -> conditioning through a pipeline's own text encoders: unique prompts alone, cached, whatever else is asked."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.checks.values import check_text
from dina_reward.families import Conditioning, ModelFamily
from dina_reward.modeling.content import TextEncoderState, remove_capturing_hooks, text_encoders


_ROWS_OF_SMALL_ENCODERS = 8
_SMALL = 50_000_000


class _Given(threading.local):
    """Prompts whose conditioning is known, in the thread that knows it."""

    def __init__(self) -> None:
        self.rows: dict[str, Conditioning] = {}


class PromptEncoder:
    """Bounded LRU cache in front of a family's `encode_prompts`.

    The encoding of a prompt does not depend, in any bit, on the prompts that are asked for with it, nor on those that were
    asked for before: matrix products of other shapes round differently, so every call of the encoders has the same shape.

    What is cached is forgotten when the text encoders, their adapters or tokenizers change (textual inversion, a LoRA).

    Args:
        family: model family of the pipeline.
        pipeline: diffusers pipeline with its text encoders, or ``None`` when only embeddings will be given.
        max_sequence_length: token limit; ``None`` takes the pipeline's default.
        cache_size: prompts that stay encoded; ``0`` switches the cache off.
        batch_size: rows of every call of the text encoders; short calls are filled up. Default: 1, where time grows with
            the rows, or the length with the longest prompt; 8 for small encoders (below 50 million parameters) that pad
            to one length.
    """

    def __init__(
        self,
        family: ModelFamily,
        pipeline: Any | None,
        *,
        max_sequence_length: int | None = None,
        cache_size: int = 128,
        batch_size: int | None = None,
    ) -> None:
        if cache_size < 0 or (batch_size is not None and batch_size < 1):
            raise ValueError(
                f"cache_size must be >= 0 and batch_size >= 1, got {cache_size} and {batch_size}; use cache_size=0 for none"
            )
        self.family = family
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.cache_size = cache_size
        self.batch_size = _rows_per_call(family, pipeline) if batch_size is None else batch_size
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()
        self._given = _Given()
        self._encoders: TextEncoderState | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            remove_capturing_hooks(self.pipeline)
        state = {**self.__dict__, "_cache": OrderedDict(), "_encoders": None}
        del state["_lock"], state["_given"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _given=_Given())

    def __call__(self, prompts: Sequence[str], device: torch.device | None = None) -> tuple[Conditioning, Tensor]:
        """Encodes prompts.

        Returns:
            The conditioning of the unique prompts, in order of first appearance, and for each prompt its position
            there, shape ``(len(prompts),)``, int64.

        Raises:
            ValueError: no pipeline to encode with, or something that is not a string.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of strings, got {type(prompts).__name__} {str(prompts)[:80]!r}")
        for prompt in prompts:
            check_text("prompt", prompt)
        position: dict[str, int] = {}
        index = torch.tensor([position.setdefault(prompt, len(position)) for prompt in prompts], device="cpu")
        with self._lock:
            rows = self._rows(list(position), device)
        return Conditioning.cat(rows), index

    @contextlib.contextmanager
    def given(self, prompts: Sequence[str], conditioning: Conditioning | None) -> Iterator[None]:
        """Inside the context these prompts are not encoded, since their conditioning is known; nothing for ``None``.

        It holds for the calls of this thread.

        Args:
            prompts: one per row of ``conditioning``; of equal prompts the first counts.
            conditioning: encoded prompts, padded on the right.
        """
        rows: dict[str, Conditioning] = {}
        if conditioning is not None:
            for position, prompt in enumerate(prompts):
                rows.setdefault(prompt, conditioning[position : position + 1].trimmed())
        before, self._given.rows = self._given.rows, rows
        try:
            yield
        finally:
            self._given.rows = before

    def clear(self) -> None:
        """Forgets every cached prompt."""
        with self._lock:
            self._cache.clear()

    def _forget_if_encoders_changed(self) -> None:
        if self.pipeline is None or not self.cache_size:
            return
        state = TextEncoderState(self.pipeline)
        if state != self._encoders:
            self._cache.clear()
        self._encoders = state

    def _rows(self, order: list[str], device: torch.device | None) -> list[Conditioning]:
        given = {prompt: self._given.rows[prompt] for prompt in order if prompt in self._given.rows}
        if device is not None:
            given = {prompt: row.to(device) for prompt, row in given.items()}
        unique = [prompt for prompt in order if prompt not in given]
        if unique:  # to look at the encoders reads from the device
            self._forget_if_encoders_changed()
        rows = {prompt: self._cache[prompt] for prompt in unique if prompt in self._cache}
        missing = [prompt for prompt in unique if prompt not in rows]
        if missing and self.pipeline is None:
            raise ValueError(
                "this reward has no text encoders: load it with `pipeline=`, or pass `prompt_embeds` (and "
                "`pooled_prompt_embeds`) instead of prompts"
            )
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            filled = chunk + chunk[-1:] * (self.batch_size - len(chunk))
            encoded = self.family.encode_prompts(
                self.pipeline, filled, max_sequence_length=self.max_sequence_length, device=device
            )
            for i, prompt in enumerate(chunk):
                rows[prompt] = encoded[i : i + 1].trimmed().map(lambda tensor: tensor.detach().clone())
        if self.cache_size:
            for prompt in unique:
                self._cache[prompt] = rows[prompt]
                self._cache.move_to_end(prompt)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        rows |= given
        return [rows[prompt] for prompt in order]


def _rows_per_call(family: ModelFamily, pipeline: Any) -> int:
    weights = sum(weight.numel() for encoder in text_encoders(pipeline) for weight in encoder.parameters())
    return 1 if family.has_text_mask or weights > _SMALL else _ROWS_OF_SMALL_ENCODERS
