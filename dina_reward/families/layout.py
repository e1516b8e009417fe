"""Latent layouts that families share: 2 x 2 packing into tokens, and the checks whose messages name a wrong layout."""

from __future__ import annotations

import math

from torch import Tensor

from dina_reward.families.conditioning import Conditioning


def pack_2x2(latents: Tensor) -> Tensor:
    """``(batch, channels, height, width)`` -> ``(batch, height/2 * width/2, 4 channels)``, channels outermost in a token."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack_2x2(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of `pack_2x2`; ``grid`` is the number of tokens per column and row."""
    rows, columns = grid
    patches = tokens.view(tokens.shape[0], rows, columns, tokens.shape[-1] // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, 2 * rows, 2 * columns)


def token_grid(tokens: int, height: int | None, width: int | None, pixels: int, name: str) -> tuple[int, int]:
    """Rows and columns of packed latents.

    Args:
        tokens: length of the packed sequence.
        height, width: size of the image in pixels, as given to the pipeline. Without them the image has to be square.
        pixels: pixels per token and side.
        name: of the family, for messages.

    Raises:
        ValueError: the size does not give this number of tokens, or is missing for an image that is not square.
    """
    if (height is None) != (width is None):
        raise ValueError(f"give both `height` and `width`, or neither; got {height} and {width}")
    if height is None or width is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(
                f"packed latents of {tokens} tokens are not a square image, and the sequence does not say which shape it "
                f"has: pass `height=` and `width=` in pixels (multiples of {pixels}), as given to the pipeline"
            )
        return side, side
    grid = (height // pixels, width // pixels)
    if height % pixels or width % pixels or grid[0] * grid[1] != tokens:
        raise ValueError(
            f"packed latents of {tokens} tokens do not belong to an image of {height} x {width} pixels: {name} has one "
            f"token per {pixels} x {pixels} pixels, here {grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
        )
    return grid


def check_layout(latents: Tensor, name: str, *, channels: int, multiple: int, frames: bool = False) -> None:
    """Rank, channels and divisibility of latents in the spatial layout.

    Args:
        name: of the family, for messages.
        channels: of a latent.
        multiple: each side has to be a multiple of this.
        frames: whether latents have a frame dimension, ``(batch, channels, frames, height, width)``.

    Raises:
        ValueError: naming the fault.
    """
    shape = tuple(latents.shape)
    expected = f"latents of shape (batch, {channels}, {'frames, ' if frames else ''}height, width)"
    rank = 5 if frames else 4
    if latents.ndim != rank:
        if latents.ndim == rank - 1 and shape[0] == channels:
            raise ValueError(f"got one latent of shape {shape} without a batch dimension; pass latents[None]")
        kinds = {3: "packed latents", 4: "latents without frames", 5: "latents with a frame dimension"}
        raise ValueError(f"got {kinds.get(latents.ndim, 'latents')} of shape {shape}; {name} takes {expected}")
    if shape[1] != channels:
        hint = "; if these are images, encode them with the VAE" if shape[1] == 3 else ""
        raise ValueError(f"latents of shape {shape} have {shape[1]} channels; {name} takes {expected}{hint}")
    height, width = shape[-2:]
    if height % multiple or width % multiple or 0 in shape:
        raise ValueError(
            f"latents have shape {shape}; {name} takes sides that are a multiple of {multiple}, not empty"
        )


def check_embeds(
    conditioning: Conditioning, name: str, *, width: int, pooled_width: int | None = None, masked: bool = False
) -> None:
    """Widths of prompt embeddings, and whether pooled embeddings and a mask belong to them.

    Raises:
        ValueError: naming the fault.
    """
    embeds, pooled, mask = (
        conditioning.prompt_embeds,
        conditioning.pooled_prompt_embeds,
        conditioning.prompt_embeds_mask,
    )
    if embeds.ndim != 3 or embeds.shape[-1] != width:
        raise ValueError(f"prompt_embeds have shape {tuple(embeds.shape)}; {name} takes (batch, length, {width})")
    if pooled_width is None and pooled is not None:
        raise ValueError(f"{name} takes no pooled_prompt_embeds; give prompt_embeds alone")
    if pooled_width is not None and pooled is None:
        raise ValueError(f"{name} needs pooled_prompt_embeds of shape (batch, {pooled_width}) as well")
    if pooled is not None and pooled.shape != (embeds.shape[0], pooled_width):
        raise ValueError(
            f"pooled_prompt_embeds have shape {tuple(pooled.shape)}; expected {(embeds.shape[0], pooled_width)}"
        )
    if mask is not None and not masked:
        raise ValueError(f"{name} takes no prompt_embeds_mask: its model attends to every token")
    if mask is not None and mask.shape != embeds.shape[:2]:
        raise ValueError(f"prompt_embeds_mask has shape {tuple(mask.shape)}; expected {tuple(embeds.shape[:2])}")
