"""The reward side of a model: its first blocks, run as the full model runs them, with tokens read after some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dina_reward.families.conditioning import Conditioning, TapFeatures


@dataclass(frozen=True)
class BlockInputs:
    """What goes into the first block, and what every block takes besides the tokens.

    Args:
        hidden (`Tensor`): image tokens, shape ``(rows, tokens, channels)``.
        text (`Tensor`): text tokens, shape ``(rows, tokens, channels)``.
        temb (`Tensor`): conditioning vector that a head reads, shape ``(rows, channels)``.
        arguments: by name, for the blocks of each list in `Backbone.block_lists`.
        text_mask, grid: as in `TapFeatures`.
    """

    hidden: Tensor
    text: Tensor
    temb: Tensor
    arguments: Sequence[Mapping[str, Any]]
    text_mask: Tensor | None = None
    grid: tuple[int, int] | None = None


class Backbone(nn.Module):
    """Truncated view of a denoiser: its own module tree, the first N blocks, features tapped after chosen blocks.

    Sub-modules keep the names they have in the diffusers model, so adapters trained on either side fit the other. A
    family's backbone says what it takes from the denoiser, and in `embed` what its blocks are given.

    Class attributes:
        embedders: the denoiser's modules that run before or between the blocks.
        block_lists: its lists of blocks, in the order in which they run.

    Args:
        denoiser: the diffusers model, or a clone of its module tree.
        num_layers: blocks to run.
        visual_taps, text_taps: 1-based numbers of the blocks after which image / text tokens are read.
    """

    embedders: ClassVar[tuple[str, ...]] = ()
    block_lists: ClassVar[tuple[str, ...]] = ()
    gradient_checkpointing: bool = False

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the denoiser's modules

    def __init__(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.visual_taps = tuple(visual_taps)
        self.text_taps = tuple(text_taps)
        for name in self.embedders:
            setattr(self, name, getattr(denoiser, name))
        for name in self.block_lists:
            setattr(self, name, getattr(denoiser, name)[: max(0, num_layers)])
            num_layers -= len(getattr(denoiser, name))

    def embed(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> BlockInputs:
        """Everything that the denoiser does before its blocks; arguments as for `forward`."""
        raise NotImplementedError(f"{type(self).__name__} needs embed, or a forward of its own")

    def forward(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None = None
    ) -> TapFeatures:
        """Runs the blocks.

        Args:
            latents (`Tensor`): noisy latents in the spatial layout, shape ``(rows, ...)``.
            timestep (`Tensor`): scheduler timesteps, shape ``(rows,)``, float32.
            conditioning (`Conditioning`): encoded *unique* prompts.
            prompt_index (`Tensor`, *optional*): for every row its prompt's position in ``conditioning``, shape
                ``(rows,)``, int64. Without it, row ``i`` uses prompt ``i``.
        """
        inputs = self.embed(latents, timestep, conditioning, prompt_index)
        hidden, text, number = inputs.hidden, inputs.text, 0
        features = TapFeatures([], [], temb=inputs.temb, text_mask=inputs.text_mask, grid=inputs.grid)
        for name, arguments in zip(self.block_lists, inputs.arguments, strict=True):
            for block in getattr(self, name):
                number += 1
                output = self.run(block, hidden_states=hidden, encoder_hidden_states=text, **arguments)
                # Blocks that read text by cross attention do not transform it.
                text, hidden = output if isinstance(output, tuple) else (text, output)
                self.tap(features, number, hidden, text)
        return features

    def tap(self, features: TapFeatures, number: int, visual: Tensor, text: Tensor) -> None:
        """Adds the tokens after a block to the features, if that block is tapped.

        Args:
            features: of this pass; its lists grow.
            number: of the block, from 1.
            visual, text: image and text tokens after it, shape ``(rows, tokens, channels)``.
        """
        if number in self.visual_taps:
            features.visual.append(visual)
        if number in self.text_taps:
            features.text.append(text)

    def run(self, block: nn.Module, *inputs: Any, **named_inputs: Any) -> Any:
        """Calls a block; with gradient checkpointing its activations are recomputed in the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, **named_inputs)
        return block(*inputs, **named_inputs)


def of_rows(prompt_index: Tensor | None, *values: Tensor | None) -> tuple[Any, ...]:
    """What belongs to unique prompts, picked for every row; see `Backbone.forward`."""
    return (
        values if prompt_index is None else tuple(None if value is None else value[prompt_index] for value in values)
    )
