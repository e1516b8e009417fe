"""What travels between a family and the rest of the package: encoded prompts, tapped features and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of a batch: every tensor has the prompt index as its first dimension.

    Args:
        prompt_embeds (`Tensor`): token embeddings, shape ``(batch, length, channels)``.
        pooled_prompt_embeds (`Tensor`, *optional*): pooled embeddings, shape ``(batch, pooled_channels)``.
        prompt_embeds_mask (`Tensor`, *optional*): true for tokens of the prompt, false for padding, shape
            ``(batch, length)``, bool. Families whose model attends to padding have none.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    prompt_embeds_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Applies a tensor function to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Conditioning(**{name: None if value is None else function(value) for name, value in values.items()})  # type: ignore[arg-type]

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """`Tensor.to` on every tensor; the mask keeps its dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(*args, **kwargs)
            return moved.bool() if tensor.dtype == torch.bool else moved

        return self.map(move)

    def __getitem__(self, index: slice | Tensor | list[int]) -> Conditioning:
        """Rows of every tensor."""
        return self.map(lambda tensor: tensor[index])

    @property
    def token_mask(self) -> Tensor:
        """The mask, all true where there is none, shape ``(batch, length)``, bool."""
        if self.prompt_embeds_mask is None:
            return self.prompt_embeds.new_ones(self.prompt_embeds.shape[:2], dtype=torch.bool)
        return self.prompt_embeds_mask

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt without padding; without a mask that is known without waiting for the device."""
        if self.prompt_embeds_mask is None:
            return [self.prompt_embeds.shape[1]] * len(self)
        return self.prompt_embeds_mask.sum(dim=1).tolist()

    def trimmed(self) -> Conditioning:
        """Without the columns that are padding in every row; padding has to be on the right."""
        if self.prompt_embeds_mask is None:
            return self
        length = max(1, int(self.prompt_embeds_mask.sum(dim=1).max()))
        return replace(
            self, prompt_embeds=self.prompt_embeds[:, :length], prompt_embeds_mask=self.prompt_embeds_mask[:, :length]
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenates batches; with masks, shorter ones are padded on the right.

        Raises:
            ValueError: different token lengths without a mask that could say what is padding.
        """
        length = max(part.prompt_embeds.shape[1] for part in parts)
        masked = any(part.prompt_embeds_mask is not None for part in parts)
        if not masked and any(part.prompt_embeds.shape[1] != length for part in parts):
            raise ValueError(
                f"prompt embeddings of {sorted({part.prompt_embeds.shape[1] for part in parts})} tokens cannot be joined "
                "without prompt_embeds_mask; encode all prompts to one length"
            )
        pooled = [part.pooled_prompt_embeds for part in parts]
        return Conditioning(
            torch.cat([_padded(part.prompt_embeds, length) for part in parts]),
            None if pooled[0] is None else torch.cat(pooled),  # type: ignore[arg-type]
            torch.cat([_padded(part.token_mask[..., None], length)[..., 0] for part in parts]) if masked else None,
        )


def _padded(tokens: Tensor, length: int) -> Tensor:
    return tokens if tokens.shape[1] == length else F.pad(tokens, (0, 0, 0, length - tokens.shape[1]))


@dataclass(frozen=True)
class TapFeatures:
    """Hidden states that a reward head reads.

    Args:
        visual (`list[Tensor]`): one tensor per visual tap, shape ``(rows, image_tokens, channels)``.
        text (`list[Tensor]`): one tensor per text tap, shape ``(rows, text_tokens, channels)``.
        temb (`Tensor`): the model's timestep (and pooled text) conditioning, shape ``(rows, channels)``.
        text_mask (`Tensor`, *optional*): true for text tokens that a head may read, shape ``(rows, text_tokens)``, bool.
        grid (`tuple[int, int]`, *optional*): rows and columns of the image tokens, which lie row by row; ``None`` where
            they are no plane.
    """

    visual: list[Tensor]
    text: list[Tensor]
    temb: Tensor
    text_mask: Tensor | None = None
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class FeatureSizes:
    """Channel counts of `TapFeatures`.

    Args:
        hidden (`int` or `tuple[int, ...]`): of the image tokens: one number for all blocks, or one per block.
        temb (`int`): of ``temb``.
        text (`int`, *optional*): of the text tokens; default: ``hidden``.
    """

    hidden: int | tuple[int, ...]
    temb: int
    text: int | None = None

    def at(self, blocks: Sequence[int]) -> FeatureSizes:
        """Sizes of the features of these blocks alone (1-based numbers); ``hidden`` then has one entry per tap."""
        if isinstance(self.hidden, int):
            return self
        return replace(self, hidden=tuple(self.hidden[block - 1] for block in blocks))
