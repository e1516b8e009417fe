"""Results of long commands that can be killed and started again: kept if they are whole and of the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.checks.stored import content_digest, differences, read_json


_LATER = ("content", "version")
"""Settings that older results do not have."""


def identity(settings: Mapping[str, Any], *paths: str | Path) -> dict[str, Any]:
    """Settings of a result with what else decides it: the content of files and directories, and the package's version.

    Paths are known by their order: a result stays valid where a checkout or its data moves.
    """
    from dina_reward import __version__

    content = [content_digest(Path(path)) for path in paths]
    return json.loads(json.dumps({**settings, "content": content, "version": __version__}, default=str))


def read_result(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result that `write_result` wrote for the same settings; ``None`` if there is none, or only a damaged one."""
    try:
        result = read_json(path)
    except ValueError:
        return None
    stored = result.get("settings") if isinstance(result, dict) else None
    if not isinstance(stored, dict):
        return None
    later = [name for name in _LATER if name not in stored]
    return None if differences(stored, settings, may_differ=later, both=True) else result


def write_result(path: Path, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Writes a result with the settings it is of, whole or not at all."""
    write_whole(path, json.dumps({"settings": settings, **result}, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staging:
        staging.write_text(text, encoding="utf-8")
