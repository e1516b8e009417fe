"""Shape of a reward head, of any kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dina_reward.checks.values import check_fields


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
        num_members: heads on one backbone pass, whose mean is the score and whose spread says how unsure it is.
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
    num_members: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in get_args(HeadKind):
            raise ValueError(f"unknown head kind {self.kind!r}; choose one of {', '.join(get_args(HeadKind))}")
        for name in ("use_text_features", "use_time_embedding"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.kind == "query")
        check_fields(self)
        if self.kind == "query" and not self.use_time_embedding:
            raise ValueError("head kind 'query' needs the time embedding: its adapters are modulated by it")
        if self.kind == "conv" and self.use_text_features:
            raise ValueError("head kind 'conv' reads image tokens alone, since text has no place on the grid")
        if self.num_queries < 1 or self.num_attention_heads < 1:
            raise ValueError(
                f"num_queries and num_attention_heads must be positive, got {self.num_queries}, {self.num_attention_heads}"
            )
        if not 1 <= self.num_members <= 64:
            raise ValueError(f"num_members must be an integer from 1 to 64, got {self.num_members}")
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
