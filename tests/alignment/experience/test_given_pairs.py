"""Pairs of a dataset in place of sampled groups: what is trained on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dina_reward.alignment.experience.given_pairs import has_pairs
from dina_reward.data import LatentPreferenceDataset
from tests.alignment.tiny_policy import tiny_pipeline
from tests.alignment.trainers.forward_helpers import (
    dpo_trainer,
    logged,
)


NAMES = ["a cat", "a dog", "red", "blue", "one", "two"]


@pytest.fixture(scope="module")
def shape() -> tuple[int, ...]:
    trainer = dpo_trainer("unused", pipeline=tiny_pipeline())
    return tuple(trainer.experience_maker.latent_shape)


def pairs(shape: tuple[int, ...], count: int = 6, **columns: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    sides = torch.randn(count, 2, *shape, generator=generator)
    return [
        {"prompt": NAMES[row], "chosen": chosen, "rejected": rejected, **columns}
        for row, (chosen, rejected) in enumerate(sides)
    ]


def given(tmp_path: Path, rows: Any, **overrides: Any) -> Any:
    return dpo_trainer(tmp_path, prompts=rows, **{"num_generations": 2, "per_device_train_batch_size": 4, **overrides})


def test_pairs_are_trained_on_as_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows = pairs(shape)
    trainer = given(tmp_path, rows)
    parts, metrics = trainer.make_experience(0)
    by_prompt = {row["prompt"]: row for row in rows}
    seen = []
    for part in parts:
        for place, prompt in enumerate(part.prompts):
            side = by_prompt[prompt]["rejected" if place % 2 else "chosen"]
            assert torch.equal(part.rollout.latents[place], side)
            seen.append(prompt)
        assert bool((part.rewards[::2] > part.rewards[1::2]).all())
    assert len(set(seen)) == 4  # two micro-batches of two different pairs
    assert metrics == {"pairs/p_chosen": pytest.approx(1.0, abs=1e-5)}
    trainer.train()
    calls = trainer.policy.calls
    # Two optimizer steps of one micro-batch of four rows, two levels each, by the policy and by the reference; no sampling.
    assert (calls.update, calls.rollout) == (2 * 4 * 2, 2 * 4 * 2)
    assert (calls.reward, calls.decoder) == (0, 0)
    assert len(logged(trainer, "dpo/margin")) > 0


def test_any_kind_of_array_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = given(tmp_path, pairs(shape)).make_experience(0)[0]
    arrays = [{**row, "chosen": row["chosen"].numpy(), "rejected": row["rejected"].tolist()} for row in pairs(shape)]
    for one, other in zip(tensors, given(tmp_path, arrays).make_experience(0)[0], strict=True):
        assert torch.equal(one.rollout.latents, other.rollout.latents)


def test_our_own_dataset_of_pairs_is_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """It names no columns: its rows say what they are."""
    rows = pairs(shape)
    sides = [torch.stack([row[side] for row in rows]) for side in ("chosen", "rejected")]
    dataset = LatentPreferenceDataset(NAMES, *sides, weight=torch.tensor([0.0, 2, 2, 2, 2, 2]))
    part = given(tmp_path, dataset, per_device_train_batch_size=6).make_experience(0)[0][0]
    for place, prompt in enumerate(part.prompts):
        assert torch.equal(part.rollout.latents[place], sides[place % 2][NAMES.index(prompt)])
        assert float(part.weights[place]) == (0.0 if prompt == NAMES[0] else 2.0)
    with pytest.raises(ValueError, match="weight of a pair .* at least 0, got -1"):
        given(tmp_path, pairs(shape, weight=-1)).make_experience(0)


def test_soft_labels_are_the_probabilities_of_the_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    trainer = given(tmp_path, pairs(shape, p_chosen=0.8), loss_type="soft")
    (part, _), metrics = trainer.make_experience(0)
    assert metrics["pairs/p_chosen"] == pytest.approx(0.8, abs=1e-6)
    with torch.no_grad():
        # Without training both errors equal the reference's: the loss is that of a coin, whatever the labels.
        assert trainer.step_loss(trainer.model, part, 0).loss.item() == pytest.approx(np.log(2), abs=1e-5)
    labels = trainer._labels(part, _pairs_of(part.rewards))
    torch.testing.assert_close(labels, torch.full((2,), 0.8), atol=1e-5, rtol=0)


def _pairs_of(rewards: Tensor) -> Any:
    from dina_reward.alignment.trainers.online_dpo import form_pairs

    return form_pairs(rewards, 2)


def test_doubtful_pairs_change_places_and_ties_make_none(tmp_path: Path, shape: tuple[int, ...]) -> None:
    turned = given(tmp_path, pairs(shape, p_chosen=0.1)).make_experience(0)[0][0]
    assert _pairs_of(turned.rewards).chosen.tolist() == [1, 3]
    tied = given(tmp_path, pairs(shape, p_chosen=0.5)).make_experience(0)[0][0]
    assert _pairs_of(tied.rewards).kept.tolist() == [0.0, 0.0]


def test_what_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows = pairs(shape)
    with pytest.raises(ValueError, match="num_generations is 4; set it to 2"):
        given(tmp_path, rows, num_generations=4)
    with pytest.raises(ValueError, match="a column 'chosen' and none for the other side"):
        given(tmp_path, [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in rows])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rejected": torch.zeros(1, *shape)}, r"the 'rejected' side of a pair .* has the shape \(1, "),
        ({"chosen": "a.png"}, "the 'chosen' side of a pair .* is a str, not latents"),
        ({"chosen": torch.full(shape, torch.nan)}, "has values that are not finite"),
        ({"p_chosen": 1.5}, "p_chosen of a pair .* must be a probability, got 1.5"),
        ({"p_chosen": True}, "must be a probability, got True"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            given(tmp_path, [{**row, **change} for row in rows]).make_experience(0)
    assert not has_pairs(["prompt", "source"])


def test_a_run_is_not_resumed_on_other_latents(tmp_path: Path, shape: tuple[int, ...]) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    given(tmp_path, pairs(shape), **settings).train()
    others = pairs(shape)
    others[2]["chosen"][0, 0, 1] += 1e-3  # one element of one side
    with pytest.raises(ValueError, match="prompts"):
        given(tmp_path, others, max_steps=4, **settings).train(resume_from_checkpoint=True)
