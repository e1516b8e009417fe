"""The reward head: tapped hidden states and the model's time conditioning -> one score (arXiv 2602.11146)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dina_reward.families import FeatureSizes, TapFeatures
from dina_reward.modeling.heads.base import LogisticSquash, final_scores, tap_sizes
from dina_reward.modeling.heads.config import RewardHeadConfig


class LayerAdapter(nn.Module):
    """FiLM of one tapped layer by the time conditioning, then reduction to a quarter of the width.

    ``proj(x (1 + gamma(temb)) + beta(temb) + layer_embed)``; gamma and beta start at zero.
    """

    def __init__(self, hidden_size: int, temb_size: int, width: int, project_inputs: bool) -> None:
        super().__init__()
        if project_inputs or hidden_size != width:
            self.proj_in: nn.Module = nn.Linear(hidden_size, width)
        else:
            self.proj_in = nn.Identity()
        self.layer_embed = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.cond_mlp = nn.Sequential(nn.Linear(temb_size, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        nn.init.zeros_(self.cond_mlp[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.cond_mlp[2].bias)  # type: ignore[arg-type]
        self.proj = nn.Linear(width, width // 4)

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        gamma, beta = self.cond_mlp(temb).unsqueeze(1).chunk(2, dim=-1)
        tokens = self.proj_in(tokens) * (1 + gamma) + beta
        return self.proj(tokens + self.layer_embed)


def _value_gate(width: int) -> nn.Sequential:
    gate = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    nn.init.zeros_(gate[2].weight)  # type: ignore[arg-type]
    nn.init.zeros_(gate[2].bias)  # type: ignore[arg-type]
    return gate


class QueryAttention(nn.Module):
    """Pre-norm cross-attention of query tokens, with a residual.

    With text, image and text tokens have separate softmaxes whose outputs are summed. With gates, each value is scaled
    by a token-wise ``sigmoid`` gate that starts at one half. Text tokens that a mask marks false are not read.
    """

    def __init__(self, width: int, num_heads: int, *, use_text: bool, gated: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = nn.RMSNorm(width)
        self.norm_v = nn.RMSNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k_vis = nn.Linear(width, width)
        self.to_v_vis = nn.Linear(width, width)
        self.gate_vis = _value_gate(width) if gated else None
        self.use_text = use_text
        if use_text:
            self.norm_t = nn.RMSNorm(width)
            self.to_k_text = nn.Linear(width, width)
            self.to_v_text = nn.Linear(width, width)
            self.gate_text = _value_gate(width) if gated else None
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend(
        self,
        query: Tensor,
        tokens: Tensor,
        to_k: nn.Module,
        to_v: nn.Module,
        gate: nn.Module | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        value = to_v(tokens)
        if gate is not None:
            value = value * torch.sigmoid(gate(tokens))
        key, value = self._split_heads(to_k(tokens)), self._split_heads(value)
        attn_mask = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask).transpose(1, 2).flatten(2)

    def forward(
        self, queries: Tensor, visual: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        query = self._split_heads(self.to_q(self.norm_q(queries)))
        mixed = self._attend(query, self.norm_v(visual), self.to_k_vis, self.to_v_vis, self.gate_vis)
        if self.use_text:
            text = self.norm_t(text)
            mixed = mixed + self._attend(query, text, self.to_k_text, self.to_v_text, self.gate_text, text_mask)
        return queries + self.to_out(mixed)


def _merge_mask(mask: Tensor | None, num_levels: int) -> Tensor | None:
    if mask is None:
        return None
    mask = mask | ~mask.any(dim=1, keepdim=True)  # a prompt without a token reads its padding rather than nothing
    return torch.cat(mask.chunk(num_levels), dim=1)


class RewardHead(nn.Module):
    """Query tokens attend over the tapped tokens of all layers and become one score.

    Args:
        config: shape of the head.
        sizes: channel counts of the features; with a tuple, ``hidden`` has one entry per visual tap.
        num_visual_taps, num_text_taps: tapped layers per modality.

    Examples:
        >>> head = RewardHead(RewardHeadConfig(), FeatureSizes(hidden=64, temb=64), num_visual_taps=3, num_text_taps=3)
        >>> scores = head(features)  # (rows,) float32
    """

    def __init__(
        self, config: RewardHeadConfig, sizes: FeatureSizes, *, num_visual_taps: int, num_text_taps: int
    ) -> None:
        super().__init__()
        visual_sizes, text_sizes = tap_sizes(sizes, num_visual_taps, num_text_taps)
        width = config.width or max(visual_sizes)
        config.check_width(width)

        def adapters(input_sizes: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(LayerAdapter(size, sizes.temb, width, config.project_inputs) for size in input_sizes)

        self.width = width
        use_text = bool(config.use_text_features)
        self.layer_adapters_visual = adapters(visual_sizes)
        self.agg_visual = nn.Linear(num_visual_taps * (width // 4), width)
        self.layer_adapters_text = adapters(text_sizes) if use_text else None
        self.agg_text = nn.Linear(num_text_taps * (width // 4), width) if use_text else None
        self.query_tokens = nn.Parameter(torch.randn(1, config.num_queries, width) * 0.02)
        self.attn1 = QueryAttention(width, config.num_attention_heads, use_text=use_text, gated=True)
        self.attn2 = QueryAttention(width, config.num_attention_heads, use_text=False, gated=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(config.dropout)
        )
        self.head = nn.Linear(width, 1)
        self.squash = LogisticSquash() if config.squash else None

    def forward(self, features: TapFeatures, num_levels: int = 1) -> Tensor:
        """Scores a batch.

        Args:
            features: tapped features of ``num_levels * batch`` rows, level-major (row ``level * batch + i``).
            num_levels: with more than one, the tokens of all levels of an image are attended at once (token ensemble).

        Returns:
            `Tensor`: scores, shape ``(batch,)``, float32.
        """
        temb = features.temb.to(self.query_tokens.dtype)
        visual = self._merge(features.visual, temb, self.layer_adapters_visual, self.agg_visual, num_levels)
        text = text_mask = None
        if self.layer_adapters_text is not None and self.agg_text is not None:
            text = self._merge(features.text, temb, self.layer_adapters_text, self.agg_text, num_levels)
            text_mask = _merge_mask(features.text_mask, num_levels)
        queries = self.query_tokens.expand(visual.shape[0], -1, -1)
        queries = self.attn1(queries, visual, text, text_mask)
        queries = self.attn2(queries, visual)
        queries = queries + self.ff(self.norm_ff(queries))
        return final_scores(self.head, self.squash, queries).mean(dim=1)

    def _merge(
        self,
        layers: Sequence[Tensor],
        temb: Tensor,
        adapters: nn.ModuleList,
        aggregate: nn.Linear,
        num_levels: int,
    ) -> Tensor:
        adapted = [adapter(tokens.to(temb.dtype), temb) for adapter, tokens in zip(adapters, layers, strict=True)]
        tokens = aggregate(torch.cat(adapted, dim=-1))
        if num_levels == 1:
            return tokens
        return torch.cat(tokens.chunk(num_levels), dim=1)
