from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dina_reward.data import CachedPreferences, LatentCacheWriter, LatentPair, collate_preferences, load_preferences
from dina_reward.data.buckets import Bucket


SHAPE = (4, 2, 2)
LATENTS = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))


def open_writer(directory: Path, count: int = 5, **origin: object) -> LatentCacheWriter:
    return LatentCacheWriter(directory, Bucket(16, 16), SHAPE, count, {"seed": 1, **origin}, latents_per_shard=2)


def fill(writer: LatentCacheWriter) -> None:
    for number in writer.missing():
        writer.write(number, LATENTS[list(writer.shards()[number])])


def test_what_is_written_is_read_as_a_cache(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    assert writer.missing() == [0, 1, 2]
    fill(writer)
    torch.testing.assert_close(writer.read([4, 0, 3]), LATENTS[[4, 0, 3]], atol=0, rtol=0)
    pairs = [
        LatentPair("a cat", 0, 4, 0.75, weight=2.0, group="g", scores=(1.5, -0.5)),
        LatentPair("a dog", 3, 1, 0.5),
    ]
    writer.finish(pairs, {"calls": 7})
    rows = CachedPreferences(tmp_path)
    assert torch.equal(rows[0]["chosen"], LATENTS[0])
    assert torch.equal(rows[0]["rejected"], LATENTS[4])
    kept = {
        name: rows[0][name] for name in ("prompt", "p_chosen", "weight", "group", "score_chosen", "score_rejected")
    }
    assert list(kept.values()) == ["a cat", 0.75, 2.0, "g", 1.5, -0.5]
    assert rows[1]["p_chosen"] == 0.5
    assert collate_preferences([rows[0]])["scores"].tolist() == [[1.5, -0.5]]  # type: ignore[union-attr]
    assert collate_preferences([rows[0], rows[1]])["scores"] is None  # the second has none
    assert len(load_preferences(tmp_path)) == 2
    assert rows.manifest["report"] == {"calls": 7}


def test_a_writer_goes_on_with_what_is_there(tmp_path: Path) -> None:
    first = open_writer(tmp_path)
    first.write(1, LATENTS[2:4])
    again = open_writer(tmp_path)
    assert again.missing() == [0, 2]
    assert not again.complete
    fill(again)
    again.finish([LatentPair("p", 0, 1, 1.0)], {})
    assert open_writer(tmp_path).complete


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    with pytest.raises(ValueError, match="shard 0 needs latents of shape"):
        writer.write(0, LATENTS[:1])
    with pytest.raises(ValueError, match="are not finite"):
        writer.write(0, torch.full((2, *SHAPE), torch.nan))
    with pytest.raises(ValueError, match=r"has 0 pairs and lacks the shards \[0, 1, 2\]"):
        writer.finish([], {})
    with pytest.raises(ValueError, match="holds a cache of another dataset"):
        open_writer(tmp_path, seed=2)
    scored = {"prompt": "p", "chosen": LATENTS[0], "rejected": LATENTS[1], "score_chosen": float("inf")}
    with pytest.raises(ValueError, match="score_chosen and score_rejected must be finite"):
        collate_preferences([{**scored, "score_rejected": 0.0}])
