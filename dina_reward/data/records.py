"""The preference record: a prompt, two latents, and how sure we are that the first is the better one.

| column | content |
|---|---|
| ``prompt`` | text |
| ``chosen``, ``rejected`` | clean latents in the family's layout, ``(channels, height, width)`` for unpacked families |
| ``p_chosen`` | optional: probability that ``chosen`` is preferred, in ``[0, 1]``; default 1, a tie is 0.5 |
| ``weight`` | optional: factor of the pair's loss; default 1 |
| ``score_chosen``, ``score_rejected`` | optional: what a judge scored the two, for a loss that regresses on it |
| ``prompt_embeds`` | optional: the prompt as its family encodes it, ``(length, channels)``; no text encoder runs then |
| ``pooled_prompt_embeds`` | optional: pooled embeddings, ``(channels,)`` |
| ``prompt_embeds_mask`` | optional: true for tokens of the prompt, ``(length,)``; without it all of them are |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from dina_reward.checks.tensors import check_numbers
from dina_reward.checks.values import check_text
from dina_reward.families import Conditioning


REQUIRED_COLUMNS = ("prompt", "chosen", "rejected")
EMBEDDING_COLUMNS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask")
SCORE_COLUMNS = ("score_chosen", "score_rejected")
OPTIONAL_COLUMNS = ("p_chosen", "weight", *SCORE_COLUMNS, *EMBEDDING_COLUMNS)


@dataclass(frozen=True)
class PreferencePair:
    """One validated preference.

    Args:
        prompt: text both latents were generated for.
        chosen, rejected (`Tensor`): clean latents of one shape, floating point.
        p_chosen: probability that ``chosen`` is preferred.
        weight: factor of the pair's loss.
        conditioning (`Conditioning`, *optional*): the encoded prompt, one row.
        scores: what a judge scored the two sides, where it scored both.
    """

    prompt: str
    chosen: Tensor
    rejected: Tensor
    p_chosen: float = 1.0
    weight: float = 1.0
    conditioning: Conditioning | None = None
    scores: tuple[float, float] | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PreferencePair:
        """Reads a row of a dataset; latents may be tensors, numpy arrays or nested lists. Other columns are ignored.

        Raises:
            ValueError: a column is missing, or its value cannot be used; the message names it.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"a preference record must be a mapping of columns, got {record!r:.80}")
        check_columns(record.keys())
        prompt = record["prompt"]
        check_text("prompt", prompt)
        chosen, rejected = (_latent(record[name], name, prompt) for name in ("chosen", "rejected"))
        if chosen.shape != rejected.shape:
            raise ValueError(
                f"the two latents of a pair differ in shape: chosen {tuple(chosen.shape)}, rejected "
                f"{tuple(rejected.shape)} (prompt {prompt!r}). Compare images of one resolution."
            )
        p_chosen = _number(record.get("p_chosen"), 1.0, "p_chosen", prompt)
        if not 0 <= p_chosen <= 1:
            raise ValueError(f"p_chosen must lie in [0, 1], got {p_chosen} (prompt {prompt!r})")
        weight = _number(record.get("weight"), 1.0, "weight", prompt)
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight must be finite and not negative, got {weight} (prompt {prompt!r})")
        return cls(prompt, chosen, rejected, p_chosen, weight, _conditioning(record, prompt), _scores(record, prompt))


class PreferenceBatch(TypedDict):
    """Batch of ``pairs`` preferences.

    ``chosen`` and ``rejected`` have shape ``(pairs, ...)``, ``p_chosen`` and ``weight`` shape ``(pairs,)``, float32.
    ``conditioning`` has one row per pair, or is ``None`` where the prompts still have to be encoded. ``scores`` has shape
    ``(pairs, 2)``, chosen and rejected, float32, or is ``None`` where some pair has none.
    """

    chosen: Tensor
    rejected: Tensor
    p_chosen: Tensor
    weight: Tensor
    prompts: list[str]
    conditioning: Conditioning | None
    scores: Tensor | None


def collate_preferences(records: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
    """Data collator: validates records and stacks them into a batch.

    Raises:
        ValueError: a record is unusable, or the batch mixes latent shapes, or records with and without embeddings.
    """
    pairs = [PreferencePair.from_record(record) for record in records]
    shapes = {tuple(pair.chosen.shape) for pair in pairs}
    if len(shapes) > 1:
        raise ValueError(
            f"one batch mixes latents of the shapes {sorted(shapes)}; group the dataset by resolution, "
            "or use a batch size of 1 per device with gradient accumulation"
        )
    scores = [pair.scores for pair in pairs if pair.scores is not None]
    return {
        "chosen": torch.stack([pair.chosen for pair in pairs]),
        "rejected": torch.stack([pair.rejected for pair in pairs]),
        "p_chosen": torch.tensor([pair.p_chosen for pair in pairs]),
        "weight": torch.tensor([pair.weight for pair in pairs]),
        "prompts": [pair.prompt for pair in pairs],
        "conditioning": _collate_conditionings([pair.conditioning for pair in pairs]),
        "scores": torch.tensor(scores) if len(scores) == len(pairs) else None,
    }


def _collate_conditionings(rows: Sequence[Conditioning | None]) -> Conditioning | None:
    given = [row for row in rows if row is not None]
    if not given:
        return None
    kinds = {(row.pooled_prompt_embeds is None, row.prompt_embeds.shape[-1]) for row in given}
    if len(given) < len(rows) or len(kinds) > 1:
        raise ValueError(
            "one batch mixes records with different embedding columns; give prompt_embeds (and pooled_prompt_embeds) of one "
            "model in every record, or in none"
        )
    if len({row.prompt_embeds.shape[1] for row in given}) > 1:
        # Stored without padding: what is added now is padding.
        given = [replace(row, prompt_embeds_mask=row.token_mask) for row in given]
    return Conditioning.cat(given)


def check_columns(columns: Any) -> None:
    """Raises a `ValueError` that lists the columns when a required one is missing."""
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"preference records lack the columns {missing}; they have {sorted(columns)}. "
            f"Expected {list(REQUIRED_COLUMNS)} and optionally {list(OPTIONAL_COLUMNS)}."
        )


def _conditioning(record: Mapping[str, Any], prompt: str) -> Conditioning | None:
    if record.get("prompt_embeds") is None:
        return None
    ranks = {"prompt_embeds": 2, "pooled_prompt_embeds": 1, "prompt_embeds_mask": 1}
    tensors: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        value = record.get(name)
        if value is None:
            continue
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        if tensor.ndim != rank or tensor.numel() == 0:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} (prompt {prompt!r}); expected the embeddings of one prompt, "
                f"{rank}-dimensional and not empty"
            )
        tensors[name] = tensor[None]
    mask = tensors.get("prompt_embeds_mask")
    if mask is not None and mask.shape != tensors["prompt_embeds"].shape[:2]:
        raise ValueError(
            f"prompt_embeds_mask has {mask.shape[1]} entries for {tensors['prompt_embeds'].shape[1]} tokens (prompt "
            f"{prompt!r})"
        )
    if mask is not None and (bool(((mask != 0) & (mask != 1)).any()) or not bool(mask.any())):
        raise ValueError(f"prompt_embeds_mask must be true or false, and true for some token (prompt {prompt!r})")
    return Conditioning(
        _embedding(tensors["prompt_embeds"], prompt),
        _embedding(tensors["pooled_prompt_embeds"], prompt) if "pooled_prompt_embeds" in tensors else None,
        None if mask is None else mask.bool(),
    )


def _scores(record: Mapping[str, Any], prompt: str) -> tuple[float, float] | None:
    if any(record.get(name) is None for name in SCORE_COLUMNS):
        return None
    chosen, rejected = (_number(record[name], 0.0, name, prompt) for name in SCORE_COLUMNS)
    if math.isnan(chosen) or math.isnan(rejected):  # not every pair of a dataset need be scored
        return None
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        raise ValueError(
            f"score_chosen and score_rejected must be finite, got {chosen}, {rejected} (prompt {prompt!r})"
        )
    return chosen, rejected


def _embedding(tensor: Tensor, prompt: str) -> Tensor:
    tensor = tensor if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"the embeddings of the prompt {prompt!r} hold NaN or infinite values")
    return tensor


def _latent(value: Any, name: str, prompt: str) -> Tensor:
    try:
        latent = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no array of numbers (prompt {prompt!r}): {error}") from None
    if latent.ndim < 2 or latent.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(latent.shape)} (prompt {prompt!r}); expected one latent without batch dimension, "
            "e.g. (channels, height, width)"
        )
    if not latent.is_floating_point():
        raise ValueError(
            f"{name} has dtype {latent.dtype} (prompt {prompt!r}), which looks like pixels; encode images with the "
            "pipeline's VAE first"
        )
    check_numbers(f"{name} of the prompt {prompt!r}", latent)
    if latent.dtype == torch.float64:
        latent = latent.float()
    if not bool(torch.isfinite(latent).all()):
        raise ValueError(f"{name} holds NaN or infinite values (prompt {prompt!r})")
    return latent


def _number(value: Any, default: float, name: str, prompt: str) -> float:
    if value is None:
        return default
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError(value)
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r} (prompt {prompt!r})") from None
