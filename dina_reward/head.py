"""The reward head: tapped hidden states and the model's time conditioning -> one score (arXiv 2602.11146).

Here are the configuration of all kinds of head and the kind ``query``; `dina_reward.head_registry` lists the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dina_reward.families import FeatureSizes, TapFeatures


HeadKind = Literal["query", "pooled", "conv"]


@dataclass(frozen=True)
class RewardHeadConfig:
    """Shape of a reward head.

    Args:
        kind: ``"query"`` attends with learned queries over the tokens (`RewardHead`), ``"pooled"`` averages the tokens of
            each tap before an MLP (`PooledHead`), ``"conv"`` convolves them as an image (`ConvHead`).
        width: channels inside the head; ``None`` takes the backbone's hidden size, in a UNet the largest tapped one.
        num_queries: learned query tokens of ``query``.
        num_attention_heads: attention heads of ``query``; must divide ``width``.
        project_inputs: put a linear layer before every FiLM adapter of ``query`` even where sizes already agree.
        use_text_features: read text tokens as well as image tokens; by default ``query`` does, the others do not.
        use_time_embedding: read the model's time conditioning, which says how noisy the latents are; by default ``query``
            does, which cannot go without, and the others do not.
        num_hidden_layers: hidden layers of ``pooled``, residual convolutions of ``conv``.
        dropout: dropout in the feed-forward block.
        squash: bound scores to ``(-2, 2)`` with a learned logistic curve.
    """

    kind: HeadKind = "query"
    width: int | None = None
    num_queries: int = 4
    num_attention_heads: int = 8
    project_inputs: bool = False
    use_text_features: bool | None = None
    use_time_embedding: bool | None = None
    num_hidden_layers: int = 2
    dropout: float = 0.0
    squash: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(HeadKind):
            raise ValueError(f"unknown head kind {self.kind!r}; choose one of {', '.join(get_args(HeadKind))}")
        for name in ("use_text_features", "use_time_embedding"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.kind == "query")
        if self.kind == "query" and not self.use_time_embedding:
            raise ValueError("head kind 'query' needs the time embedding: its adapters are modulated by it")
        if self.kind == "conv" and self.use_text_features:
            raise ValueError("head kind 'conv' reads image tokens alone, since text has no place on the grid")
        if self.num_queries < 1 or self.num_attention_heads < 1:
            raise ValueError(
                f"num_queries and num_attention_heads must be positive, got {self.num_queries}, {self.num_attention_heads}"
            )
        if self.num_hidden_layers < 1 or (self.width is not None and self.width < 1):
            raise ValueError(
                f"num_hidden_layers and width must be positive, got {self.num_hidden_layers} and {self.width}"
            )
        if self.width is not None:
            self.check_width(self.width)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    def check_width(self, width: int) -> None:
        """Raises a `ValueError` for a width that this head cannot have."""
        if self.kind == "query" and (width % self.num_attention_heads or width % 4):
            raise ValueError(
                f"head width {width} must be divisible by 4 and by num_attention_heads ({self.num_attention_heads})"
            )


def tap_sizes(sizes: FeatureSizes, num_visual_taps: int, num_text_taps: int) -> tuple[list[int], list[int]]:
    """Channels of each visual and of each text tap.

    Raises:
        ValueError: ``sizes`` are of another number of visual taps.
    """
    visual = [sizes.hidden] * num_visual_taps if isinstance(sizes.hidden, int) else list(sizes.hidden)
    if len(visual) != num_visual_taps:
        raise ValueError(f"got {len(visual)} sizes of visual features for {num_visual_taps} visual taps")
    return visual, [max(visual) if sizes.text is None else sizes.text] * num_text_taps


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


class LogisticSquash(nn.Module):
    """``(e1 - e2) / (1 + exp(-(x - e3) / (|e4| + 1e-6))) + e2`` with fixed bounds ``e1, e2`` and learned ``e3, e4``."""

    def __init__(self, upper: float = 2.0, lower: float = -2.0) -> None:
        super().__init__()
        self.upper, self.lower = upper, lower
        self.center = nn.Parameter(torch.tensor(0.0))
        self.scale = nn.Parameter(torch.tensor(0.15))

    def forward(self, scores: Tensor) -> Tensor:
        steepness = self.scale.abs() + 1e-6
        return (self.upper - self.lower) * torch.sigmoid((scores - self.center) / steepness) + self.lower


def final_scores(linear: nn.Linear, squash: nn.Module | None, hidden: Tensor) -> Tensor:
    """The last layer in float32 even under mixed precision: ``(..., width)`` -> ``(...)``."""
    # The meta device, on which costs are counted, has no autocast to leave.
    with nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False):
        # Under FSDP2's mixed precision the gathered weights are bfloat16.
        scores = F.linear(hidden.float(), linear.weight.float(), linear.bias.float()).squeeze(-1)
        return scores if squash is None else squash(scores)


class RewardHead(nn.Module):
    """Query tokens attend over the tapped tokens of all layers and become one score.

    Args:
        config: shape of the head.
        sizes: channel counts of the features; with a tuple, ``hidden`` has one entry per visual tap.
        num_visual_taps, num_text_taps: tapped layers per modality.

    Example:
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
