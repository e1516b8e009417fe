"""The published schemas of preference data, one file per kind, and which one a dataset has.

A schema turns one row into preferences; it opens no file and resolves no path. Begin at `base.Schema`.
"""

from __future__ import annotations

from collections.abc import Iterable

from dina_reward.data.schemas.base import Options, Schema
from dina_reward.data.schemas.latents import REFERENCE_LATENTS, TRL
from dina_reward.data.schemas.ranked import HPDV2, IMAGEREWARD, IMAGEREWARD_BENCHMARK
from dina_reward.data.schemas.voted import GENAI_BENCH, HPDV3, PICKAPIC, RAPIDATA, VIDEOGEN_REWARDBENCH


SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        HPDV2,
        HPDV3,
        PICKAPIC,
        IMAGEREWARD,
        IMAGEREWARD_BENCHMARK,
        GENAI_BENCH,
        VIDEOGEN_REWARDBENCH,
        RAPIDATA,
        TRL,
        REFERENCE_LATENTS,
    )
}


def find_schema(columns: Iterable[str], name: str | None = None) -> Schema:
    """The schema of that name, or the one whose columns are there.

    Raises:
        ValueError: no such schema, columns are missing, or several schemas fit; the message lists the candidates.
    """
    present = set(columns)
    if name is not None:
        if not isinstance(name, str) or name not in SCHEMAS:
            raise ValueError(f"unknown schema {name!r}; expected one of {sorted(SCHEMAS)}")
        schema = SCHEMAS[name]
        if schema.missing(present):
            raise ValueError(
                f"the dataset lacks the columns {schema.missing(present)} of the schema {name!r}; it has {sorted(present)}"
            )
        return schema
    fitting = [schema for schema in SCHEMAS.values() if not schema.missing(present)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = [schema.name for schema in fitting]
        raise ValueError(f"the columns {sorted(present)} fit the schemas {names}; pass schema=NAME")
    nearest = sorted(SCHEMAS.values(), key=lambda schema: len(schema.missing(present)))
    candidates = "\n".join(f"  {schema.name}: lacks {schema.missing(present)}" for schema in nearest)
    raise ValueError(f"the columns {sorted(present)} fit no schema of preference data. Candidates:\n{candidates}")


__all__ = ["SCHEMAS", "Options", "Schema", "find_schema"]
