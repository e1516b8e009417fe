from __future__ import annotations

import pytest

from dina_reward.alignment.prompts import BatchGeometry, PromptRollouts, prompt_row


def geometry(**overrides: int) -> BatchGeometry:
    values = {"batch_size": 3, "num_processes": 2, "num_chunks": 2, "num_generations": 4, "num_iterations": 2}
    return BatchGeometry(**{**values, **overrides})


def test_geometry_counts():
    g = geometry()
    assert (g.chunk_rows, g.rows, g.groups, g.micro_steps) == (6, 12, 3, 4)
    assert [list(g.rows_of(chunk, rank)) for chunk in range(2) for rank in range(2)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]


def test_groups_must_be_whole():
    with pytest.raises(ValueError, match="12 rows .* not divisible by num_generations 5"):
        geometry(num_generations=5)


def test_every_row_is_trained_once_per_iteration_and_rows_of_a_chunk_stay_together():
    data = PromptRollouts([str(i) for i in range(6)], geometry(num_chunks=4), seed=1)
    rows = data.geometry.rows
    for start in range(0, len(data), rows):
        items = [data[i] for i in range(start, start + rows)]
        assert sorted(item["row"] for item in items) == list(range(rows))
        assert len({(item["generation"], item["iteration"]) for item in items}) == 1
        for chunk in range(0, rows, 6):
            part = [item["row"] for item in items[chunk : chunk + 6]]
            assert part == list(range(part[0], part[0] + 6))


def test_later_iterations_shuffle_chunks_only():
    data = PromptRollouts(["a"], geometry(num_chunks=8, num_iterations=3), seed=1)
    assert data.chunk_order(0, 0) == list(range(8))
    assert data.chunk_order(0, 1) != list(range(8))
    assert data.chunk_order(0, 1) == data.chunk_order(0, 1)
    assert data.chunk_order(0, 1) != data.chunk_order(0, 2)


def test_members_of_a_group_share_the_prompt_and_all_prompts_come_in_each_pass():
    prompts = [str(i) for i in range(7)]
    data = PromptRollouts(prompts, geometry(), seed=3)
    stream = []
    for generation in range(7):
        found = [row["prompt"] for row in data.rows(generation, range(12))]
        groups = [found[i : i + 4] for i in range(0, 12, 4)]
        assert all(len(set(group)) == 1 for group in groups)
        stream += [group[0] for group in groups]
    assert sorted(stream[:7]) == sorted(stream[7:14]) == sorted(stream[14:]) == prompts
    assert stream[:7] != stream[7:14]
    # Any order of access gives the same prompts: a resumed run starts in the middle.
    assert data.rows(1, range(12)) == PromptRollouts(prompts, geometry(), seed=3).rows(1, range(12))


def test_epochs_continue_the_generations():
    data = PromptRollouts([str(i) for i in range(7)], geometry(), gradient_accumulation_steps=8)
    assert data.generations_per_epoch == 4  # 3 generations see 7 prompts; two make an optimizer step
    data.set_epoch(2)
    assert data[0]["generation"] == 8


def test_prompt_rows():
    assert prompt_row(["a"], 0) == {"prompt": "a"}
    assert prompt_row([{"prompt": "a", "n": 1}], 0) == {"prompt": "a", "n": 1}
    with pytest.raises(ValueError, match=r"row 0 of the prompt dataset is columns \['text'\]"):
        prompt_row([{"text": "a"}], 0)
    with pytest.raises(ValueError, match="is a int"):
        prompt_row([3], 0)
    with pytest.raises(ValueError, match="no prompts"):
        PromptRollouts([], geometry())
