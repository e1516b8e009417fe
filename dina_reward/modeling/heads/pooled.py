"""A head on averaged tokens: layers of the middle and the end, pooled, and an MLP (as in DiT-Reward, arXiv 2606.23626)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dina_reward.families import FeatureSizes, TapFeatures
from dina_reward.modeling.heads.base import LogisticSquash, final_scores, tap_sizes
from dina_reward.modeling.heads.config import RewardHeadConfig


class PooledHead(nn.Module):
    """``MLP(concat_l norm(mean over tokens of tap l))``, by default of image tokens alone.

    Text tokens and the time conditioning are two further inputs when the configuration asks for them. In a token ensemble
    the averages run over the tokens of all levels of an image.

    Args:
        config: shape of the head.
        sizes: channel counts of the features; with a tuple, ``hidden`` has one entry per visual tap.
        num_visual_taps, num_text_taps: tapped layers per modality.

    Examples:
        >>> config = RewardHeadConfig(kind="pooled", width=128)
        >>> head = PooledHead(config, FeatureSizes(hidden=64, temb=64), num_visual_taps=4, num_text_taps=0)
        >>> scores = head(features)  # (rows,) float32
    """

    def __init__(
        self, config: RewardHeadConfig, sizes: FeatureSizes, *, num_visual_taps: int, num_text_taps: int
    ) -> None:
        super().__init__()
        visual_sizes, text_sizes = tap_sizes(sizes, num_visual_taps, num_text_taps)
        self.use_text, self.use_time = bool(config.use_text_features), bool(config.use_time_embedding)
        inputs = visual_sizes + (text_sizes if self.use_text else []) + ([sizes.temb] if self.use_time else [])
        width = config.width or max(visual_sizes)
        self.width = width
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in inputs)
        layers: list[nn.Module] = []
        for size in [sum(inputs)] + [width] * (config.num_hidden_layers - 1):
            layers += [nn.Linear(size, width), nn.GELU(), nn.Dropout(config.dropout)]
        self.mlp = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)
        self.squash = LogisticSquash() if config.squash else None

    def forward(self, features: TapFeatures, num_levels: int = 1) -> Tensor:
        """Scores a batch.

        Args:
            features: tapped features of ``num_levels * batch`` rows, level-major (row ``level * batch + i``).
            num_levels: with more than one, the tokens of all levels of an image are averaged at once (token ensemble).

        Returns:
            `Tensor`: scores, shape ``(batch,)``, float32.
        """
        pooled = [tokens.mean(dim=1, dtype=torch.float32) for tokens in features.visual]
        if self.use_text:
            pooled += [_masked_mean(tokens, features.text_mask) for tokens in features.text]
        if self.use_time:
            pooled.append(features.temb.float())
        joined = [vectors.unflatten(0, (num_levels, -1)).mean(dim=0) for vectors in pooled]
        dtype = self.head.weight.dtype
        hidden = torch.cat([norm(vectors.to(dtype)) for norm, vectors in zip(self.norms, joined, strict=True)], dim=-1)
        return final_scores(self.head, self.squash, self.mlp(hidden))


def _masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return tokens.mean(dim=1, dtype=torch.float32)
    mask = mask | ~mask.any(dim=1, keepdim=True)  # a prompt without a token reads its padding rather than nothing
    weight = mask.float() / mask.sum(dim=1, keepdim=True)
    return (tokens.float() * weight[..., None]).sum(dim=1)
