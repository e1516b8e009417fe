"""Checks of single values, for every configuration alike: types as annotated, numbers finite and in their range.

Nothing here knows what a value is for; what belongs together is checked where it is used. Begin at `check_fields`.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


_SCALARS: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,), dict: (dict,)}

Range = tuple[float, float]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; bools are no numbers, NaN and infinity are no floats."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (list, tuple) or hint in (list, tuple):
        of_kind = isinstance(value, origin or hint)
        return of_kind and all(fits(item, arguments[0]) for item in value if arguments)
    if hint is NoneType:
        return value is None
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint)
    scalar = dict if origin is dict else hint
    if scalar not in _SCALARS:
        return True
    right = isinstance(value, _SCALARS[scalar]) and (isinstance(value, bool) == (scalar is bool))
    return right and not (isinstance(value, float) and not math.isfinite(value))


@cache
def _hints_of(cls: type) -> dict[str, Any]:
    """Annotations of a class, which take longer to read than its fields take to check."""
    return get_type_hints(cls)


def check_fields(config: Any, *, beside: type | None = None, **ranges: Range) -> None:
    """Checks every field of a dataclass against its annotation, and numbers against closed ranges.

    Args:
        config: the instance, from its ``__post_init__``.
        beside: a base of its class whose fields are left out, because their annotations are not meant strictly.
        ranges: least and largest value by name of the field; of a list, of each of its items; ``None`` passes.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """
    cls: type = type(config)
    hints = _hints_of(cls)
    left_out = () if beside is None else {f.name for f in fields(beside)}
    for name in (f.name for f in fields(config) if f.name not in left_out):
        value, hint = getattr(config, name), hints[name]
        if not fits(value, hint):
            raise ValueError(f"{name} must be {described(hint)}, got {value!r}")
        if name in ranges:
            low, high = ranges[name]
            items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            if not all(low <= item <= high for item in items):
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")


def described(hint: Any) -> str:
    """A type as it is written in an annotation."""
    if isinstance(hint, type) and not get_args(hint):
        return "finite float" if hint is float else hint.__name__
    return str(hint).replace("typing.", "")


def is_int(value: Any) -> bool:
    """Whether a configuration value is an integer (and not a bool)."""
    return fits(value, int)


def is_real(value: Any) -> bool:
    """Whether a configuration value is a finite number (and not a bool)."""
    return fits(value, float)


def integer(value: Any) -> int:
    """An integer of any kind, also numpy's and 0-d tensors.

    Raises:
        TypeError: a fraction, which is not cut, a truth value, text or anything else.
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise TypeError(f"{value!r} is a truth value")
    return operator.index(value)


def checked_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An argument that is an integer of any kind, at least ``least`` and at most ``most``.

    Raises:
        ValueError: it is no integer, too small or too large.
    """
    with contextlib.suppress(TypeError):
        number = integer(value)
        if least <= number and (most is None or number <= most):
            return number
    limit = "" if most is None else f" and at most {most}"
    raise ValueError(f"{name} must be an integer of at least {least}{limit}, got {value!r}")


def check_int(config: object, name: str, least: int) -> None:
    """Refuses a field that is not an integer of at least ``least``."""
    value = getattr(config, name)
    if not is_int(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_real(config: object, name: str, low: float, high: float) -> None:
    """Refuses a field that is not a finite number in ``[low, high]``."""
    check_number(name, getattr(config, name), low, high)


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Refuses an argument that is not a finite number in ``[low, high]``."""
    if not is_real(value) or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r:.80}")


def check_numbers_list(name: str, value: object) -> None:
    """Refuses what is no list of finite numbers."""
    if not isinstance(value, (list, tuple)) or not all(is_real(number) for number in value):
        raise ValueError(f"{name} must be a list of finite numbers, got {value!r:.80}")


def check_flags(**flags: Any) -> None:
    """Refuses what is neither true nor false, such as the text ``"false"``, which would be true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r:.80}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuses what is no object of a class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {value!r:.80} ({type(value).__name__})")


def checked_texts(name: str, value: Any) -> list[str]:
    """One text or several, as a list with at least one.

    Raises:
        ValueError: there are none, something is no text, or it is in no order of its own, as sets and mappings are.
    """
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, (Mapping, Set, bytes)) or not isinstance(texts, Sequence) or len(texts) == 0:
        raise ValueError(f"{name} must be a string or a list of at least one, got {value!r:.80}")
    for text in texts:
        check_text(f"{name}: each", text)
    return list(texts)


def is_text(value: str) -> bool:
    """Whether a string can be written down: halves of characters and bytes of another encoding cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(name: str, value: object) -> None:
    """Refuses what is no text: another type, or half of a character."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}: {value!r:.80}")
    if not is_text(value):
        raise ValueError(f"{name} {value!r} holds half of a character, which is no text")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def check_trainer_numbers(args: Any) -> None:
    """Refuses numbers of `transformers.TrainingArguments` that its own constructor lets through.

    Raises:
        ValueError: naming the field.
    """
    check_int(args, "seed", 0)
    if args.seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, which is what numpy takes, got {args.seed}")
    if args.data_seed is not None:
        check_int(args, "data_seed", 0)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check_int(args, name, 1)
    check_int(args, "max_steps", -1)
    if args.max_steps == 0:
        raise ValueError("max_steps must be positive, or -1 to train for num_train_epochs, got 0")
    check_int(args, "dataloader_num_workers", 0)
    for name in ("save_steps", "eval_steps", "logging_steps"):
        steps = getattr(args, name)
        if steps is not None and not (is_real(steps) and steps > 0):
            raise ValueError(f"{name} must be a number of steps above 0, or a share of all below 1, got {steps!r}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "adam_epsilon"):
        check_real(args, name, 0, math.inf)
    for name in ("adam_beta1", "adam_beta2"):
        check_real(args, name, 0, 1)
        if getattr(args, name) == 1:
            raise ValueError(f"{name} must be below 1: an average that never changes trains nothing")
    if "\0" in str(args.output_dir):
        raise ValueError(f"output_dir must be a path, got {args.output_dir!r} with a NUL character in it")


def scheduler_config_checked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A noise schedule's configuration whose numbers are finite, and whose lengths can be built.

    Raises:
        ValueError: naming what is wrong.
    """
    for name, value in config.items():
        unlimited = name == "lambda_min_clipped" and value == -math.inf  # that is how diffusers says "not clipped"
        if isinstance(value, float) and not (math.isfinite(value) or unlimited):
            raise ValueError(f"the scheduler's {name} must be finite, got {value!r}")
    steps = config.get("num_train_timesteps", 1000)
    if not is_int(steps) or not 2 <= steps <= 100_000:
        raise ValueError(f"the scheduler's num_train_timesteps must be an integer from 2 to 100000, got {steps!r}")
    for name in ("shift", "flow_shift"):
        shift = config.get(name)
        if shift is not None and (not is_real(shift) or not 0 < shift <= 1000):
            raise ValueError(f"the scheduler's {name} must be a positive number up to 1000, got {shift!r}")
    return config
