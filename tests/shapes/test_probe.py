"""Linear probes of the generator's blocks."""

from __future__ import annotations

import pytest
import torch

from dina_reward.shapes.probe import image_tokens, probe_accuracy
from dina_reward.shapes.prompts import sample_prompts


def test_a_probe_reads_what_is_linear_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    features = torch.randn(600, 8, generator=generator)
    features[:, :3] += 4 * torch.nn.functional.one_hot(labels, 3)
    assert probe_accuracy(features, labels, 400) > 0.95
    assert probe_accuracy(features[:, 3:], labels, 400) == pytest.approx(1 / 3, abs=0.1)


def test_tokens_of_every_block_are_kept_and_hooks_removed(shapes_pipeline) -> None:
    prompts = sample_prompts(3, seed=0)
    tokens = image_tokens(shapes_pipeline, torch.zeros(3, 8, 8, 8), prompts, 0.4, seed=0)
    assert {number: tuple(part.shape) for number, part in tokens.items()} == dict.fromkeys(range(1, 6), (3, 16, 96))
    assert not any(block._forward_hooks for block in shapes_pipeline.transformer.transformer_blocks)
