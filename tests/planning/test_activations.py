"""What is counted on the meta device is what the allocator hands out in a real pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from dina_reward.families import Conditioning
from dina_reward.planning.activations import activations_of, saved_bytes
from dina_reward.planning.sizes import RunSizes
from tests.alignment.tiny_policy import make_policy


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that the CPU allocator hands out in a call: the most at any time, and what is left while its result lives."""
    with profile(profile_memory=True) as profiler:
        result = run()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del result
    return most, now


@pytest.fixture(scope="module")
def policy() -> Any:
    return make_policy(pipeline=None)


def forward(policy: Any, sizes: RunSizes, rows: int) -> Callable[[], Tensor]:
    card = sizes.card
    latents = torch.randn(rows, *card.latent_shape)
    assert card.pooled_text_width is not None
    text = Conditioning(
        torch.randn(rows, card.text_tokens, card.text_width), torch.randn(rows, card.pooled_text_width)
    )
    return lambda: policy.family.predict_velocity(
        policy.denoiser, latents, torch.full((rows,), 500.0), text, guidance_scale=1.0
    )


def test_a_real_pass_keeps_what_is_counted(policy: Any, sizes: RunSizes) -> None:
    run = forward(policy, sizes, rows=4)
    run()
    _, kept = allocated(run)
    assert sizes.denoiser_kept.bytes(4, False) == pytest.approx(kept, rel=0.1)
    assert saved_bytes(run, policy.denoiser) == pytest.approx(sizes.denoiser_kept.bytes(4, False), rel=0.1)


def test_checkpointing_peaks_where_it_is_said_to(policy: Any, sizes: RunSizes) -> None:
    run = forward(policy, sizes, rows=8)
    policy.denoiser.enable_gradient_checkpointing()
    peak, _ = allocated(lambda: run().sum().backward())
    policy.denoiser.disable_gradient_checkpointing()
    assert sizes.denoiser_kept.bytes(8, True) == pytest.approx(peak, rel=0.25)


def test_tensors_are_counted_once_and_parameters_never() -> None:
    layer = nn.Linear(6, 5, bias=False)
    inputs = torch.randn(3, 6, requires_grad=True)
    assert saved_bytes(lambda: layer(inputs), layer) == 4 * 3 * 6
    assert saved_bytes(lambda: layer(inputs) + layer(inputs), layer) == 4 * 3 * 6


def test_bytes_are_linear_in_rows_and_half_as_many_in_16_bits() -> None:
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))

    def run(rows: int) -> Tensor:
        return layers(torch.empty(rows, 8, device="meta", dtype=torch.bfloat16, requires_grad=True))

    kept = activations_of(layers, run, torch.bfloat16)
    # Input, first product and its GELU in bfloat16; two casts of weights, which do not grow.
    assert (kept.fixed, kept.per_row) == (2 * (8 * 8 + 8 * 4), 2 * (8 + 8 + 8))
    assert kept.bytes(10, False) == kept.fixed + 10 * kept.per_row
