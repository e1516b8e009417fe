"""Judges outside of this process: a command line, or an HTTP endpoint; both get PNG images and answer in JSON."""

from __future__ import annotations

import base64
import io
import json
import shlex
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dina_reward.checks.stored import parse_json
from dina_reward.distill.judges import Answer, Judge, JudgeBatch, JudgeError, JudgeKind, checked_answers
from dina_reward.evaluation.clip import to_pictures


_SHOWN = 300


def png_files(images: Tensor) -> list[bytes]:
    """PNG files of images in [0, 1], shape ``(batch, 3, height, width)``; equal images give equal bytes."""
    files = []
    for picture in to_pictures(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        files.append(buffer.getvalue())
    return files


def image_columns(batch: JudgeBatch, kind: JudgeKind) -> dict[str, list[bytes]]:
    """PNG files by argument: ``image``, or ``image_a`` and ``image_b``."""
    names = ("image",) if kind == "scores" else ("image_a", "image_b")
    return {name: png_files(batch.columns[name.replace("image", "images")]) for name in names}


class CommandJudge(Judge):
    """A program that reads one JSON object per line and writes one JSON value per line.

    | kind | a line that it reads | a line that it writes |
    |---|---|---|
    | scores | ``{"prompt": "...", "image": "/tmp/.../0.png"}`` | a number, or null |
    | pairs | ``{"prompt": "...", "image_a": "...", "image_b": "..."}`` | a probability, true, "a", "b", "tie" or null |

    It is started once for each call and may write what it likes to its standard error.

    Args:
        command: the command line, which no shell sees.
        kind: what it answers.
        timeout: seconds after which it is killed.
    """

    def __init__(self, command: str, kind: JudgeKind = "scores", timeout: float | None = 600.0) -> None:
        self.words = shlex.split(command)
        if not self.words:
            raise ValueError("the command of a judge is empty; name a program")
        super().__init__(Path(self.words[0]).name, kind, needs_images=True)
        self.timeout = timeout

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "command": self.words}

    def ask(self, batch: JudgeBatch) -> list[Answer]:
        with tempfile.TemporaryDirectory() as folder:
            lines = self._questions(batch, Path(folder))
            try:
                done = subprocess.run(
                    self.words, input="".join(lines), capture_output=True, text=True, timeout=self.timeout
                )
            except subprocess.TimeoutExpired:
                raise JudgeError(f"the judge {self.name} gave no answer within {self.timeout:g} s") from None
            except OSError as error:
                raise JudgeError(f"the judge {shlex.join(self.words)} cannot be started: {error}") from error
        if done.returncode:
            raise JudgeError(f"the judge {self.name} ended with code {done.returncode}: {done.stderr[-_SHOWN:]}")
        said = [line for line in done.stdout.splitlines() if line.strip()]
        values = [_parsed(line, self.name) for line in said]
        return checked_answers(self, values, batch.prompts)

    def _questions(self, batch: JudgeBatch, folder: Path) -> list[str]:
        rows: list[dict[str, str]] = [{"prompt": prompt} for prompt in batch.prompts]
        for name, files in image_columns(batch, self.kind).items():
            for number, (row, data) in enumerate(zip(rows, files, strict=True)):
                path = folder / f"{name}-{number}.png"
                with path.open("wb") as file:
                    file.write(data)
                row[name] = str(path)
        return [json.dumps(row) + "\n" for row in rows]


class EndpointJudge(Judge):
    """An HTTP endpoint that is sent one JSON object by POST for each call.

    It gets ``{"prompts": [...], "images": [...]}``, or with ``"images_a"`` and ``"images_b"``, images as base64 of PNG
    files, and answers ``{"answers": [...]}`` with a score of each image, or what a `CommandJudge` of pairs says.

    Args:
        url: of the endpoint.
        kind: what it answers.
        timeout: seconds after which a call counts as failed.
    """

    def __init__(self, url: str, kind: JudgeKind = "scores", timeout: float | None = 120.0) -> None:
        super().__init__(url.partition("://")[2].partition("/")[0] or url, kind, needs_images=True)
        self.url, self.timeout = url, timeout

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "url": self.url}

    def ask(self, batch: JudgeBatch) -> list[Answer]:
        columns = image_columns(batch, self.kind)
        images = {
            name.replace("image", "images"): [encoded(file) for file in files] for name, files in columns.items()
        }
        answer = post_json(self.url, {"prompts": list(batch.prompts), **images}, self.name, self.timeout)
        if "answers" not in answer:
            raise JudgeError(f"the judge {self.name} answered without 'answers'; it has {sorted(answer)[:8]}")
        return checked_answers(self, answer["answers"], batch.prompts)


def encoded(data: bytes) -> str:
    """Base64, as text."""
    return base64.b64encode(data).decode("ascii")


def post_json(
    url: str, content: Mapping[str, Any], name: str, timeout: float | None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Sends a JSON object and returns the one that is answered.

    Args:
        url: where to.
        content: the object.
        name: of the judge, for messages; the headers are never part of one.
        timeout: in seconds.
        headers: further ones.

    Raises:
        JudgeError: no connection, no answer in time, an error, or no JSON object.
    """
    data = json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        said = error.read()[:_SHOWN].decode("utf-8", "replace")
        raise JudgeError(f"the judge {name} answered with status {error.code}: {said}") from error
    except TimeoutError as error:
        raise JudgeError(f"the judge {name} gave no answer within {timeout:g} s") from error
    except (OSError, ValueError) as error:
        raise JudgeError(f"the judge {name} cannot be reached at {url}: {error}") from error
    answer = _parsed(body.decode("utf-8", "replace"), name)
    if not isinstance(answer, dict):
        raise JudgeError(f"the judge {name} answered with a {type(answer).__name__}; expected a JSON object")
    return answer


def _parsed(text: str, name: str) -> Any:
    try:
        return parse_json(text, "its answer")
    except ValueError as error:
        raise JudgeError(f"the judge {name} did not answer in JSON: {error} ({text[:80]!r})") from error


def per_row(columns: Mapping[str, Sequence[bytes]], row: int) -> list[bytes]:
    """The files of one row, in the order of the columns."""
    return [files[row] for files in columns.values()]
