from __future__ import annotations

import pandas
import pytest
from datasets import Dataset, DatasetDict

from dina_reward.alignment.sampling.prompts import BatchGeometry, PromptRollouts, PromptTable, prompt_row


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


def test_rows_of_a_table_have_the_same_columns():
    rows = [{"prompt": "a", "tag": 1}, {"prompt": "b", "n": 2}]
    table = PromptTable(rows, "train_dataset")
    assert table.columns == ["prompt", "tag", "n"]
    assert [table[i] for i in range(2)] == [{"prompt": "a", "tag": 1, "n": None}, {"prompt": "b", "tag": None, "n": 2}]
    assert PromptRollouts(rows, geometry()).dataset.columns == table.columns
    assert PromptTable(Dataset.from_list([table[0], table[1]]), "train_dataset")[1] == table[1]
    assert PromptTable(table, "train_dataset")[1] == table[1]
    assert PromptTable(("a", "b"), "train_dataset")[1] == {"prompt": "b"}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("a cat", "got a str: put the prompt into a list"),
        (DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})), r"a DatasetDict: .*keys \['train'\]; pass one"),
        ({"easy": ["a"], "hard": ["b"]}, r"got a dict: it has the keys \['easy', 'hard'\]"),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), "a stream has to be read first"),
        ((prompt for prompt in ["a"]), "got a generator: .*a stream has to be read first"),
        ({"a", "b"}, "got a set"),
        (pandas.DataFrame({"prompt": ["a"]}), "from_pandas"),
        (Dataset.from_dict({"caption": ["a"]}), r"has the columns \['caption'\] and no 'prompt'"),
        (["a", 3], "row 1 of the prompt dataset is a int"),
        ([], "eval_dataset has no prompts"),
    ],
)
def test_other_kinds_of_prompts_are_refused_in_words(dataset, message):
    with pytest.raises(ValueError, match=message):
        PromptTable(dataset, "eval_dataset")
