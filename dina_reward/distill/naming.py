"""Judges by name, as command lines and configurations have them.

| name | judge |
|---|---|
| ``module:function`` | a Python callable, see `CallableJudge` |
| ``clip:MODEL`` | a CLIP-type reward through `transformers` (PickScore, CLIP), see `ClipReward` |
| ``openai:MODEL``, ``openai-pairs:MODEL`` | a vision model behind an OpenAI-compatible endpoint, see `VisionEndpointJudge` |
| ``command:...``, ``command-pairs:...`` | a program, see `CommandJudge` |
| ``http://...``, ``pairs+http://...`` | an endpoint, see `EndpointJudge`; also https |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from dina_reward.checks.values import fits
from dina_reward.distill.judges import CallableJudge, Judge, JudgeKind
from dina_reward.distill.remote import CommandJudge, EndpointJudge
from dina_reward.distill.vision import VisionEndpointJudge


def open_judge(name: str, timeout: float | None = None, **options: Any) -> Judge:
    """The judge of a name; see the top of this module.

    Args:
        name: the name.
        timeout: seconds after which a call counts as failed; by default that of the kind of judge.
        options: of `VisionEndpointJudge` or `ClipReward.from_pretrained`.

    Raises:
        ValueError: no such judge.
    """
    kind, _, rest = name.partition(":")
    pairs: JudgeKind = "pairs" if kind.endswith("-pairs") or kind.startswith("pairs+") else "scores"
    limits: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    known: dict[str, Callable[[], Judge]] = {
        "command": lambda: CommandJudge(rest, pairs, **limits),
        "openai": lambda: VisionEndpointJudge(rest, pairs, **limits, **options),
        "clip": lambda: _clip(rest, timeout, **options),
        "http": lambda: EndpointJudge(name.removeprefix("pairs+"), pairs, **limits),
    }
    known["https"] = known["http"]
    kind = kind.removesuffix("-pairs").removeprefix("pairs+")
    if kind in known and rest:
        return known[kind]()
    found = _imported(name)
    return found if isinstance(found, Judge) else CallableJudge(found, timeout)


def open_judges(names: Sequence[str], timeout: float | None = None) -> list[Judge]:
    """Several judges by name.

    Raises:
        ValueError: none, or one that is not known.
    """
    if not names or not all(fits(name, str) for name in names):
        raise ValueError(f"judge must name at least one judge, such as 'my_judges:sharpness', got {names!r}")
    return [open_judge(name, timeout) for name in names]


def _clip(model: str, timeout: float | None, **options: Any) -> Judge:
    from dina_reward.evaluation.clip import ClipReward

    return CallableJudge(ClipReward.from_pretrained(model, **options), timeout)


def _imported(name: str) -> Judge | Callable[..., Any]:
    module_name, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        found = getattr(import_module(module_name), attribute) if module_name else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the judge {name!r}: {error}") from error
    if isinstance(found, type):  # of a class an object is made, without arguments
        found = found()
    if isinstance(found, Judge) or callable(found):
        return found
    raise ValueError(
        f"{name!r} names no judge; give 'module:function', 'clip:MODEL', 'openai:MODEL', 'command:...' or a URL"
    )
