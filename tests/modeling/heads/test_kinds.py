"""The pooled and the convolutional head: numbers by hand, invariances, token ensembles, refusals; and the registry."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dina_reward.families import FeatureSizes, TapFeatures
from dina_reward.modeling.heads import HEADS, build_head
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.modeling.heads.conv import ConvHead, ResidualConvolution
from dina_reward.modeling.heads.pooled import PooledHead
from dina_reward.modeling.heads.query import RewardHead


SIZES = FeatureSizes(hidden=(16, 24), temb=8, text=12)
GRID = (2, 3)


def make_head(kind: str, **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    config = RewardHeadConfig(kind=kind, width=32, **overrides)  # type: ignore[arg-type]
    return build_head(config, SIZES, num_visual_taps=2, num_text_taps=1).eval()


def make_features(rows: int = 4, dtype: torch.dtype = torch.float32) -> TapFeatures:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator).to(dtype)

    mask = torch.arange(5) < torch.arange(1, rows + 1)[:, None]
    return TapFeatures([draw(6, 16), draw(6, 24)], [draw(5, 12)], draw(8), text_mask=mask, grid=GRID)


def test_registry_builds_every_kind() -> None:
    classes = {kind: type(make_head(kind)) for kind in HEADS}
    assert classes == {"query": RewardHead, "pooled": PooledHead, "conv": ConvHead}


@pytest.mark.parametrize("kind", ["pooled", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_vectors_whatever_the_features(kind: str, dtype: torch.dtype) -> None:
    head, features = make_head(kind), make_features(dtype=dtype)
    for context in (torch.autocast("cpu", torch.bfloat16, enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with context:
            scores = head(features)
        assert scores.shape == (4,)
        assert scores.dtype == torch.float32
        assert len(set(scores.tolist())) == 4


def test_pooled_head_is_an_mlp_on_normalised_means() -> None:
    head, features = make_head("pooled", num_hidden_layers=1), make_features()
    means = [tokens.mean(1) for tokens in features.visual]
    joined = torch.cat([nn.functional.layer_norm(mean, mean.shape[-1:]) for mean in means], dim=1)
    hidden = nn.functional.gelu(joined @ head.mlp[0].weight.T + head.mlp[0].bias)
    torch.testing.assert_close(head(features), (hidden @ head.head.weight.T + head.head.bias)[:, 0])


def test_pooled_head_reads_only_what_it_is_told_to() -> None:
    features = make_features()
    text = dataclasses.replace(features, text=[features.text[0] + 1 + torch.arange(12)])
    time = dataclasses.replace(features, temb=features.temb * 2 + torch.arange(8))
    for use_text in (False, True):
        for use_time in (False, True):
            head = make_head("pooled", use_text_features=use_text, use_time_embedding=use_time)
            assert torch.equal(head(text), head(features)) != use_text
            assert torch.equal(head(time), head(features)) != use_time


def test_pooled_head_ignores_masked_text() -> None:
    head, features = make_head("pooled", use_text_features=True), make_features()
    assert features.text_mask is not None
    noise = torch.where(features.text_mask[..., None], 0.0, 100.0)
    padded = dataclasses.replace(features, text=[features.text[0] + noise])
    torch.testing.assert_close(head(padded), head(features))
    unmasked = dataclasses.replace(features, text_mask=None)
    assert not torch.allclose(head(unmasked), head(features))


def test_token_order_matters_to_the_convolution_alone() -> None:
    features = make_features()
    shuffled = dataclasses.replace(features, visual=[tokens[:, [3, 0, 5, 1, 4, 2]] for tokens in features.visual])
    torch.testing.assert_close(make_head("pooled")(shuffled), make_head("pooled")(features))
    assert not torch.allclose(make_head("conv")(shuffled), make_head("conv")(features), atol=1e-4)


def test_convolution_sees_the_neighbours_of_a_place_in_rows_and_columns() -> None:
    head, features = make_head("conv", num_hidden_layers=1), make_features(rows=1)
    layer: ResidualConvolution = head.convolutions[0]
    layer.norm = nn.Identity()
    maps: list[Tensor] = []
    head.convolutions.register_forward_hook(lambda module, args, output: maps.append(output - args[0]))
    head(features)
    changed = [tokens.clone() for tokens in features.visual]
    for tokens in changed:
        tokens[:, 0] += torch.randn(tokens.shape[-1])  # the upper left place of 2 rows and 3 columns
    head(dataclasses.replace(features, visual=changed))
    moved = (maps[1] - maps[0]).abs().amax(dim=1)[0] > 1e-6
    assert moved.tolist() == [[True, True, False], [True, True, False]]


def test_convolution_learns_the_noise_level_only_if_asked() -> None:
    features = make_features()
    other = dataclasses.replace(features, temb=features.temb + 1)
    assert torch.equal(make_head("conv")(features), make_head("conv")(other))
    head = make_head("conv", use_time_embedding=True)
    assert not torch.equal(head(features), head(other))


def test_convolution_by_hand() -> None:
    head, features = make_head("conv", num_hidden_layers=1, use_time_embedding=True), make_features()
    joined = torch.cat([nn.functional.layer_norm(tokens, tokens.shape[-1:]) for tokens in features.visual], dim=2)
    time = features.temb @ head.proj_time.weight.T + head.proj_time.bias
    tokens = joined @ head.proj_in.weight.T + head.proj_in.bias + time[:, None]
    maps = tokens.transpose(1, 2).reshape(4, 32, *GRID)
    convolution = head.convolutions[0].conv
    inner = nn.functional.silu(nn.functional.group_norm(maps, 32))
    maps = maps + nn.functional.conv2d(inner, convolution.weight, convolution.bias, padding=1)
    pooled = nn.functional.layer_norm(maps.mean(dim=(2, 3)), (32,))
    torch.testing.assert_close(head(features), (pooled @ head.head.weight.T + head.head.bias)[:, 0])


def test_convolution_without_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="needs image tokens on a grid.*'query' or 'pooled'"):
        make_head("conv")(dataclasses.replace(make_features(), grid=None))


@pytest.mark.parametrize("kind", ["pooled", "conv"])
def test_token_ensembles(kind: str) -> None:
    head = make_head(kind, use_time_embedding=True)
    features = make_features()
    doubled = TapFeatures([torch.cat([v, v]) for v in features.visual], [], torch.cat([features.temb] * 2), grid=GRID)
    torch.testing.assert_close(head(doubled, num_levels=2), head(features))
    many = make_features(rows=6)  # 2 levels x 3 images, level-major
    rows = torch.tensor([1, 4])
    alone = TapFeatures([v[rows] for v in many.visual], [], many.temb[rows], grid=GRID)
    torch.testing.assert_close(head(many, num_levels=2)[1:2], head(alone, num_levels=2))


@pytest.mark.parametrize("kind", ["pooled", "conv"])
def test_squash_dropout_and_default_width(kind: str) -> None:
    assert make_head(kind, squash=True)(make_features()).abs().max() < 2
    head = build_head(RewardHeadConfig(kind=kind, dropout=0.5), SIZES, num_visual_taps=2, num_text_taps=0)  # type: ignore[arg-type]
    assert head.head.in_features == 24
    assert not torch.equal(head.train()(make_features()), head(make_features()))


def test_defaults_depend_on_the_kind() -> None:
    flags = {kind: RewardHeadConfig(kind=kind) for kind in HEADS}
    assert {k: c.use_text_features for k, c in flags.items()} == {"query": True, "pooled": False, "conv": False}
    assert {k: c.use_time_embedding for k, c in flags.items()} == {"query": True, "pooled": False, "conv": False}
    RewardHeadConfig(kind="pooled", width=30)  # only attention needs a divisible width


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kind": "mlp"}, "unknown head kind 'mlp'; choose one of query, pooled, conv"),
        ({"use_time_embedding": False}, "needs the time embedding"),
        ({"kind": "conv", "use_text_features": True}, "text has no place on the grid"),
        ({"kind": "pooled", "num_hidden_layers": 0}, "must be positive"),
        ({"kind": "pooled", "width": 0}, "must be positive"),
    ],
)
def test_impossible_settings_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardHeadConfig(**overrides)  # type: ignore[arg-type]
