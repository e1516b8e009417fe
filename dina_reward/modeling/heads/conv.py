"""A convolutional head on the image tokens as a feature map (as in DRM, CVPR 2026)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dina_reward.families import FeatureSizes, TapFeatures
from dina_reward.modeling.heads.base import LogisticSquash, final_scores, tap_sizes
from dina_reward.modeling.heads.config import RewardHeadConfig


class ResidualConvolution(nn.Module):
    """``x + conv3x3(SiLU(norm(x)))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(width, 32), width)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.conv(nn.functional.silu(self.norm(maps)))


class ConvHead(nn.Module):
    """The tapped layers side by side as one map, residual 3 x 3 convolutions, average over all places, one linear layer.

    With ``use_time_embedding`` a projection of the time conditioning is added at every place. In a token ensemble the maps
    of all levels of an image are averaged place by place before the first convolution.

    Args:
        config: shape of the head.
        sizes: channel counts of the features; with a tuple, ``hidden`` has one entry per visual tap.
        num_visual_taps: tapped layers; the published head reads one, the last.
        num_text_taps: not read.

    Examples:
        >>> config = RewardHeadConfig(kind="conv", width=64)
        >>> head = ConvHead(config, FeatureSizes(hidden=64, temb=64), num_visual_taps=1, num_text_taps=0)
        >>> scores = head(features)  # (rows,) float32; features.grid says which shape the image has
    """

    def __init__(
        self, config: RewardHeadConfig, sizes: FeatureSizes, *, num_visual_taps: int, num_text_taps: int
    ) -> None:
        super().__init__()
        visual_sizes, _ = tap_sizes(sizes, num_visual_taps, num_text_taps)
        width = config.width or max(visual_sizes)
        self.width = width
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in visual_sizes)
        self.proj_in = nn.Linear(sum(visual_sizes), width)
        self.proj_time = nn.Linear(sizes.temb, width) if config.use_time_embedding else None
        self.convolutions = nn.Sequential(*(ResidualConvolution(width) for _ in range(config.num_hidden_layers)))
        self.norm_out = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, 1)
        self.squash = LogisticSquash() if config.squash else None

    def forward(self, features: TapFeatures, num_levels: int = 1) -> Tensor:
        """Scores a batch.

        Args:
            features: tapped features of ``num_levels * batch`` rows, level-major (row ``level * batch + i``).
            num_levels: with more than one, the maps of all levels of an image are averaged (token ensemble).

        Returns:
            `Tensor`: scores, shape ``(batch,)``, float32.

        Raises:
            ValueError: the features do not say how the tokens lie in the image.
        """
        if features.grid is None:
            raise ValueError(
                "head kind 'conv' needs image tokens on a grid, and this model family does not say how its tokens lie; use "
                "head kind 'query' or 'pooled'"
            )
        dtype = self.proj_in.weight.dtype
        tokens = torch.cat(
            [norm(layer.to(dtype)) for norm, layer in zip(self.norms, features.visual, strict=True)], dim=-1
        )
        tokens = self.proj_in(tokens)
        if self.proj_time is not None:
            tokens = tokens + self.proj_time(features.temb.to(dtype))[:, None]
        tokens = tokens.unflatten(0, (num_levels, -1)).mean(dim=0)
        maps = self.convolutions(tokens.transpose(1, 2).unflatten(2, features.grid))
        pooled = self.norm_out(maps.mean(dim=(2, 3), dtype=torch.float32).to(dtype))
        return final_scores(self.head, self.squash, self.dropout(pooled))
