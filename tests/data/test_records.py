from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dina_reward.data import PreferencePair, collate_preferences


LATENT = torch.arange(32.0).reshape(2, 4, 4)


def record(**overrides: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "chosen": LATENT, "rejected": -LATENT, **overrides}


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.double()])
def test_latents_may_be_tensors_arrays_or_lists(convert: Any) -> None:
    pair = PreferencePair.from_record(record(chosen=convert(LATENT), rejected=convert(-LATENT)))
    torch.testing.assert_close(pair.chosen, LATENT)
    torch.testing.assert_close(pair.rejected, -LATENT)
    assert (pair.p_chosen, pair.weight) == (1.0, 1.0)


def test_half_precision_is_kept() -> None:
    assert (
        PreferencePair.from_record(record(chosen=LATENT.half(), rejected=LATENT.half())).chosen.dtype == torch.float16
    )


def test_batch_has_labels_weights_and_prompts() -> None:
    batch = collate_preferences([record(), record(prompt="a dog", p_chosen=0.5, weight=2, source="x")])
    assert batch["prompts"] == ["a cat", "a dog"]
    assert batch["chosen"].shape == batch["rejected"].shape == (2, 2, 4, 4)
    assert batch["p_chosen"].tolist() == [1.0, 0.5]
    assert batch["weight"].tolist() == [1.0, 2.0]


def test_missing_optional_values_take_their_defaults() -> None:
    batch = collate_preferences([record(p_chosen=None, weight=None)])
    assert batch["p_chosen"].tolist() == batch["weight"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": 3}, "prompt must be text, got int"),
        ({"rejected": LATENT[:, :2]}, r"differ in shape: chosen \(2, 4, 4\), rejected \(2, 2, 4\)"),
        ({"chosen": LATENT / 0}, "chosen holds NaN or infinite"),
        ({"chosen": LATENT[0, 0]}, r"chosen has shape \(4,\).*without batch dimension"),
        ({"chosen": np.zeros((3, 8, 8), np.uint8)}, "looks like pixels"),
        ({"chosen": "latent.pt"}, "chosen is no array of numbers"),
        ({"chosen": [[1.0, 2.0], [3.0]]}, "chosen is no array of numbers"),
        ({"p_chosen": 1.2}, r"p_chosen must lie in \[0, 1\], got 1.2"),
        ({"p_chosen": float("nan")}, r"p_chosen must lie in \[0, 1\]"),
        ({"p_chosen": "yes"}, "p_chosen must be a number"),
        ({"p_chosen": True}, "p_chosen must be a number, got True"),
        ({"weight": "1"}, "weight must be a number, got '1'"),
        ({"weight": -1}, "weight must be finite and not negative"),
        ({"weight": float("inf")}, "weight must be finite and not negative"),
    ],
)
def test_bad_records_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferencePair.from_record(record(**bad))


def test_missing_columns_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"lack the columns \['chosen', 'rejected'\]; they have \['image', 'prompt'\]"
    ):
        PreferencePair.from_record({"prompt": "x", "image": 1})


def test_mixed_shapes_in_a_batch_are_refused() -> None:
    small = record(chosen=LATENT[:, :2], rejected=LATENT[:, :2])
    with pytest.raises(ValueError, match="group the dataset by resolution"):
        collate_preferences([record(), small])


def test_embeddings_become_the_conditioning_of_the_batch() -> None:
    assert collate_preferences([record()])["conditioning"] is None
    first = record(prompt_embeds=np.ones((3, 2)), pooled_prompt_embeds=[1.0, 2.0, 3.0])
    second = record(prompt_embeds=torch.zeros(3, 2, dtype=torch.bfloat16), pooled_prompt_embeds=torch.ones(3))
    conditioning = collate_preferences([first, second])["conditioning"]
    assert conditioning is not None
    assert conditioning.prompt_embeds.tolist() == [[[1.0, 1.0]] * 3, [[0.0, 0.0]] * 3]
    assert conditioning.pooled_prompt_embeds is not None
    assert conditioning.pooled_prompt_embeds.tolist() == [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
    assert conditioning.prompt_embeds_mask is None


def test_embeddings_of_different_lengths_are_padded_and_masked() -> None:
    short, long = (record(prompt_embeds=torch.ones(length, 2)) for length in (1, 3))
    conditioning = collate_preferences([short, long])["conditioning"]
    assert conditioning is not None
    assert conditioning.prompt_embeds_mask is not None
    assert conditioning.prompt_embeds_mask.tolist() == [[True, False, False], [True, True, True]]
    assert conditioning.prompt_embeds[0].tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    masked = record(prompt_embeds=torch.ones(3, 2), prompt_embeds_mask=[True, True, False])
    conditioning = collate_preferences([masked, masked])["conditioning"]
    assert conditioning is not None
    assert conditioning.token_mask.sum().item() == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt_embeds": torch.ones(2, 2)}, {}], "with different embedding columns"),
        (
            [{"prompt_embeds": torch.ones(2, 2)}, {"prompt_embeds": torch.ones(2, 3)}],
            "with different embedding columns",
        ),
        ([{"prompt_embeds": torch.ones(2)}], r"prompt_embeds has shape \(2,\)"),
        ([{"prompt_embeds": torch.full((2, 2), float("nan"))}], "embeddings of the prompt 'a cat' hold NaN"),
        ([{"prompt_embeds": torch.ones(2, 2), "prompt_embeds_mask": [True]}], "has 1 entries for 2 tokens"),
    ],
)
def test_unusable_embeddings_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate_preferences([record(**row) for row in rows])
