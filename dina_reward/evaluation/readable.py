"""The pairs of a dataset reader as an evaluation goes through them: again and again, without broken rows, ties kept."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from dina_reward.data import BrokenRowError, Preference, PreferenceReader


class ReadablePairs:
    """The pairs of a reader that can be read, in order; unreadable ones are counted in its ``report``.

    Args:
        reader: from `read_preferences`.
        limit: use the first so many pairs.
    """

    def __init__(self, reader: PreferenceReader, limit: int | None = None) -> None:
        self.reader, self.count = reader, len(reader) if limit is None else min(limit, len(reader))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Preference]:
        return self.reader.readable(range(self.count))


class RankedPairs:
    """All pairs of every published ranking. Those of equal rank are ties: benchmarks differ in what they make of them.

    An image that cannot be read is counted in the reader's ``report``; its ranking goes on without it.

    Args:
        reader: of a dataset with rankings.
        limit: use whole rankings until there are so many pairs.
    """

    def __init__(self, reader: PreferenceReader, limit: int | None = None) -> None:
        if reader.rankings is None:
            raise ValueError(f"the schema {reader.schema!r} has pairs, not rankings")
        self.reader, self.rankings, self.limit = reader, reader.rankings, limit

    def __iter__(self) -> Iterator[Preference]:
        count = 0
        for number in range(len(self.rankings)):
            if self.limit is not None and count >= self.limit:
                return
            for pair in self._pairs(self.rankings[number]):
                count += 1
                yield pair

    def _pairs(self, ranking: Any) -> Iterator[Preference]:
        images = {}
        for item in range(len(ranking)):
            try:
                images[item] = ranking.image(item)
            except BrokenRowError as error:
                self.reader.report.add(error.index, error.reason)
        for a, b in combinations(images, 2):
            rank_a, rank_b = ranking.ranks[a], ranking.ranks[b]
            yield Preference(
                prompt=ranking.prompt,
                a=images[a],
                b=images[b],
                p_a=0.5 if rank_a == rank_b else float(rank_a < rank_b),
                source=self.reader.schema,
                group=ranking.group,
                a_name=ranking.names[a],
                b_name=ranking.names[b],
                columns=ranking.columns,
            )


def pairs_of(reader: PreferenceReader, limit: int | None = None) -> ReadablePairs | RankedPairs:
    """Pairs of a reader for evaluation: from rankings where the dataset publishes rankings."""
    return ReadablePairs(reader, limit) if reader.rankings is None else RankedPairs(reader, limit)
