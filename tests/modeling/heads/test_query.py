"""RewardHead: invariances, gates, ensembles, precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dina_reward.families import FeatureSizes, TapFeatures
from dina_reward.modeling.heads.base import LogisticSquash
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.modeling.heads.query import LayerAdapter, QueryAttention, RewardHead


SIZES = FeatureSizes(hidden=32, temb=24)


def make_head(**overrides: object) -> RewardHead:
    torch.manual_seed(0)
    return RewardHead(RewardHeadConfig(**overrides), SIZES, num_visual_taps=2, num_text_taps=2).eval()  # type: ignore[arg-type]


def make_features(rows: int = 4, dtype: torch.dtype = torch.float32) -> TapFeatures:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[torch.Tensor]:
        return [torch.randn(rows, count, 32, generator=generator).to(dtype) for _ in range(2)]

    return TapFeatures(visual=tokens(6), text=tokens(5), temb=torch.randn(rows, 24, generator=generator).to(dtype))


def test_scores_are_float32_vectors_whatever_the_features() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scores = make_head()(make_features(dtype=dtype))
        assert scores.shape == (4,)
        assert scores.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        scores = make_head()(make_features())
    assert scores.dtype == torch.float32
    assert len(set(scores.tolist())) == 4


def test_token_order_does_not_matter() -> None:
    head, features = make_head(), make_features()
    permuted = TapFeatures([v.flip(1) for v in features.visual], [t.roll(2, 1) for t in features.text], features.temb)
    torch.testing.assert_close(head(features), head(permuted))


def test_film_is_inert_and_gates_are_one_half_at_initialisation() -> None:
    adapter = LayerAdapter(32, 24, 32, project_inputs=False)
    tokens, temb = torch.randn(2, 3, 32), torch.randn(2, 24)
    torch.testing.assert_close(adapter(tokens, temb), adapter(tokens, torch.zeros_like(temb)))
    gate = make_head().attn1.gate_vis
    assert gate is not None
    torch.testing.assert_close(torch.sigmoid(gate(tokens)), torch.full((2, 3, 1), 0.5))


def test_token_ensemble_of_equal_levels_equals_one_level() -> None:
    head, features = make_head(), make_features()
    doubled = TapFeatures(
        [torch.cat([v, v]) for v in features.visual],
        [torch.cat([t, t]) for t in features.text],
        torch.cat([features.temb] * 2),
    )
    torch.testing.assert_close(head(doubled, num_levels=2), head(features))


def test_ensemble_rows_stay_with_their_image() -> None:
    head, features = make_head(), make_features(rows=6)  # 2 levels x 3 images, level-major
    scores = head(features, num_levels=2)
    rows = torch.tensor([1, 4])
    alone = TapFeatures([v[rows] for v in features.visual], [t[rows] for t in features.text], features.temb[rows])
    torch.testing.assert_close(scores[1:2], head(alone, num_levels=2))


def test_without_text_there_are_no_text_weights() -> None:
    head = make_head(use_text_features=False)
    assert not [name for name in head.state_dict() if "text" in name]
    features = make_features()
    other = TapFeatures(features.visual, [t + 1 for t in features.text], features.temb)
    torch.testing.assert_close(head(features), head(other))


def test_squash_bounds_scores() -> None:
    squash = LogisticSquash()
    torch.testing.assert_close(squash(torch.tensor([0.0, 1e4, -1e4])), torch.tensor([0.0, 2.0, -2.0]))
    expected = 4 / (1 + torch.exp(-torch.tensor(0.1) / (0.15 + 1e-6))) - 2
    torch.testing.assert_close(squash(torch.tensor(0.1)), expected)
    assert "squash.center" in make_head(squash=True).state_dict()


def test_other_width_projects_the_inputs() -> None:
    head = make_head(width=16)
    assert head.layer_adapters_visual[0].proj_in.weight.shape == (16, 32)
    assert head(make_features()).shape == (4,)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"width": 30}, "divisible by 4"),
        ({"num_queries": 0}, "must be positive"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"num_attention_heads": 5}, "divisible by 4 and by num_attention_heads"),
    ],
)
def test_impossible_shapes_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(**overrides)


def test_a_negative_scale_of_the_squash_is_its_absolute_value() -> None:
    squash = LogisticSquash()
    with torch.no_grad():
        squash.scale.fill_(-0.15)
    torch.testing.assert_close(squash(torch.tensor(0.1)), 4 / (1 + torch.exp(-torch.tensor(0.1) / (0.15 + 1e-6))) - 2)


@pytest.mark.parametrize("num_levels", [1, 2])
def test_a_prompt_without_a_token_reads_its_padding(num_levels: int) -> None:
    head, features = make_head(), make_features()
    mask = torch.ones(4, 5, dtype=torch.bool)
    expected = head(replace(features, text_mask=mask), num_levels)
    torch.testing.assert_close(head(replace(features, text_mask=~mask), num_levels), expected)
    assert torch.isfinite(expected).all()


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    width, heads = 8, 2
    attention = QueryAttention(width, heads, use_text=True, gated=True)
    for gate in (attention.gate_vis, attention.gate_text):
        assert gate is not None
        torch.nn.init.normal_(gate[2].weight)
    queries, visual, text = torch.randn(1, 3, width), torch.randn(1, 5, width), torch.randn(1, 4, width)
    mask = torch.tensor([[True, True, False, True]])

    def mixed(tokens: torch.Tensor, kind: str) -> torch.Tensor:
        keys = getattr(attention, f"to_k_{kind}")(tokens)
        values = getattr(attention, f"to_v_{kind}")(tokens) / (1 + (-getattr(attention, f"gate_{kind}")(tokens)).exp())
        parts = []
        for columns in torch.arange(width).chunk(heads):
            logits = wanted[..., columns] @ keys[..., columns].mT / (width / heads) ** 0.5
            parts.append(logits.softmax(dim=-1) @ values[..., columns])
        return torch.cat(parts, dim=-1)

    wanted = attention.to_q(attention.norm_q(queries))
    both = mixed(attention.norm_v(visual), "vis") + mixed(attention.norm_t(text[:, mask[0]]), "text")
    expected = queries + attention.to_out(both)
    torch.testing.assert_close(attention(queries, visual, text, mask), expected)


def test_film_scales_and_shifts_by_hand() -> None:
    adapter = LayerAdapter(2, 3, 4, project_inputs=True)
    with torch.no_grad():
        adapter.cond_mlp[2].bias.copy_(torch.tensor([1.0, 0.5, -0.5, 2.0, 0.1, 0.2, 0.3, 0.4]))
    tokens = torch.tensor([[[1.0, -2.0]]])
    gamma, beta = torch.tensor([1.0, 0.5, -0.5, 2.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = adapter.proj(adapter.proj_in(tokens) * (1 + gamma) + beta + adapter.layer_embed)
    torch.testing.assert_close(adapter(tokens, torch.zeros(1, 3)), expected)


def test_the_squash_by_hand() -> None:
    squash = LogisticSquash()
    scores = torch.tensor([0.0, 0.15, -0.3])
    expected = 4 / (1 + torch.exp(-scores / (0.15 + 1e-6))) - 2
    torch.testing.assert_close(squash(scores), expected)
    with torch.no_grad():
        squash.scale.fill_(0.0)
    torch.testing.assert_close(squash(torch.tensor([1e-6])), torch.tensor([4 * 0.7310585786 - 2]))


def test_queries_start_small() -> None:
    queries = make_head(num_queries=64).query_tokens
    assert float(queries.std()) == pytest.approx(0.02, rel=0.1)
    torch.manual_seed(0)
    embeds = torch.cat([LayerAdapter(64, 24, 64, project_inputs=False).layer_embed for _ in range(20)])
    assert float(embeds.std()) == pytest.approx(0.02, rel=0.1)
