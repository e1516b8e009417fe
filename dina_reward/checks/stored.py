"""What files say of themselves: read with errors that name the file, and compared, item by item, with what is asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_JSON = 1 << 28
_WHOLE = 1 << 26
_END = 1 << 20


def parse_json(text: str | bytes, where: object) -> Any:
    """What `json.loads` returns.

    Args:
        where: what is read, for the message.

    Raises:
        ValueError: it is no JSON, or is nested too deeply, or holds numbers of thousands of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} is not valid JSON: {reason}") from error


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: naming a file that is missing, no JSON, or larger than 256 MiB.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, too many for a file of settings")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(data, path)


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """`safetensors.safe_open` of a file, on the CPU.

    Raises:
        ValueError: naming a file that is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing, truncated or no safetensors file: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; see `open_tensors` for the errors."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], *, may_differ: Collection[str] = (), both: bool = False
) -> list[str]:
    """Items that are stored with another value than is wanted, each as ``name: ... there, ... here``.

    Args:
        may_differ: names that are not compared.
        both: also report what only one side has; else that is of a version that wrote other items.
    """
    names = dict.fromkeys([*stored, *wanted]) if both else [name for name in wanted if name in stored]
    return [
        f"{name}: {_shown(stored.get(name))} there, {_shown(wanted.get(name))} here"
        for name in names
        if name not in may_differ and _canonical(stored.get(name)) != _canonical(wanted.get(name))
    ]


def check_same(
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    fault: str,
    advice: str,
    *,
    error: type[ValueError] = ValueError,
    **options: Any,
) -> None:
    """Compares what a checkpoint, cache or run directory says of itself with what is asked for.

    Args:
        fault: beginning of the message, such as ``"out/checkpoint-3 is a checkpoint of another run"``.
        advice: end of the message.
        error: class of the error.
        options: those of `differences`.

    Raises:
        ValueError: some items differ, each named with both values.
    """
    different = differences(stored, wanted, **options)
    if different:
        raise error(f"{fault}; {len(different)} of its settings differ ({'; '.join(different)}). {advice}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str | None:
    """Digest of a file, or of all files below a directory with their names; ``None`` where there is neither.

    Of files beyond 64 MiB the size, the time of their last change and both ends count.
    """
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file()):
        state = file.stat()
        digest.update(repr((file.relative_to(path).as_posix(), state.st_size)).encode())
        if state.st_size <= _WHOLE:
            digest.update(file.read_bytes())
        else:
            digest.update(str(state.st_mtime_ns).encode())
            with file.open("rb") as content:
                for start in (0, state.st_size - _END):
                    content.seek(start)
                    digest.update(content.read(_END))
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    """A value as JSON has it; integers equal to floats."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_canonical(item) for item in value)
    if isinstance(value, bool) or value is None:
        return repr(value)
    return repr(float(value)) if isinstance(value, (int, float)) else str(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
