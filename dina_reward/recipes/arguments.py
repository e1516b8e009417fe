"""Command lines and YAML files turned into dataclasses, with errors that name the nearest valid key."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, get_type_hints

import yaml

from dina_reward.checkpoints.locking import DirectoryInUseError
from dina_reward.checks.disk import disk_fault
from dina_reward.checks.values import described, fits
from dina_reward.lazy import missing_extra
from dina_reward.quiet import hide_library_notes


hide_library_notes()  # scripts import this before what imports transformers

try:
    from trl import TrlParser
except ModuleNotFoundError as error:
    raise missing_extra(error, "dina_reward.recipes") from error


SHIPPED = Path(__file__).parent / "shipped"
"""What the package has of the repository's ``recipes``: the configurations, in ``configs``."""


class ConfigParser(TrlParser):
    """`trl.TrlParser` that checks the keys and the types of a YAML file too, and says in one line what is wrong.

    The dataclasses are filled from ``--config file.yaml``, or the name of a configuration that ships with the package, and
    from the command line, which wins. One number stands for a
    list of one, and ``--name null`` for no value where a field may have none. Every fault is a `ValueError`: a key or option
    that no dataclass has (with the nearest one that exists), a value of the wrong type, a missing required field, and what
    the dataclasses themselves refuse.

    Args:
        dataclass_types: the dataclasses to fill.

    Examples:
        >>> arguments, config = ConfigParser((RecipeArguments, DDPOConfig)).parse_args_and_config()
    """

    def __init__(self, dataclass_types: Iterable[type]) -> None:
        types = tuple(dataclass_types)
        self.field_types = {name: hint for cls in types for name, hint in field_types(cls).items()}
        self._nulls: dict[str, None] = {}
        # An option's beginning would be taken for it, although unknown keys are errors.
        super().__init__(types, allow_abbrev=False)  # type: ignore[arg-type]

    def parse_args_and_config(  # type: ignore[override]
        self, args: Iterable[str] | None = None, **options: Any
    ) -> tuple[Any, ...]:
        """Parses a command line (that of the process by default); see `trl.TrlParser.parse_args_and_config`."""
        arguments = _split_config(sys.argv[1:] if args is None else args)
        self._check_options(arguments)
        arguments = self._take_nulls(arguments)
        if "--config" not in arguments:
            super().set_defaults_with_config(**self._nulls)
            return super().parse_args_and_config(arguments, **options)
        place = arguments.index("--config") + 1
        path = config_path("".join(arguments[place : place + 1]))
        _check_yaml(path)
        arguments[place : place + 1] = [str(path)]
        return super().parse_args_and_config(arguments, **options)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Takes over the values of a YAML file once names and types are right."""
        for name in values:
            if name not in self.field_types:
                raise ValueError(f"unknown key {name!r} in the configuration{self._suggestion(name)}")
        checked = {name: checked_value(name, value, self.field_types[name]) for name, value in values.items()}
        return super().set_defaults_with_config(**{**checked, **self._nulls})

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print below a page of usage."""
        raise ValueError(message)

    def _check_options(self, arguments: Sequence[str]) -> None:
        known = {"config", "help", *self.field_types, *(f"no_{name}" for name in self.field_types)}
        for argument in arguments:
            name = argument.removeprefix("--").split("=")[0].replace("-", "_")
            if argument.startswith("--") and name not in known:
                raise ValueError(f"unknown option {argument.split('=')[0]}{self._suggestion(name, '--')}")

    def _take_nulls(self, arguments: Sequence[str]) -> list[str]:
        """Keeps ``--name null`` for later where the field may be None, which argparse has no word for; returns the rest."""
        rest: list[str] = []
        self._nulls = {}
        for argument in arguments:
            option = rest[-1] if rest else ""
            if argument.startswith("--") and argument.endswith("=null"):
                rest.append(argument.removesuffix("=null"))
                option, argument = rest[-1], "null"
            name = option.removeprefix("--").replace("-", "_")
            if argument == "null" and option.startswith("--") and fits(None, self.field_types.get(name, str)):
                rest.pop()
                self._nulls[name] = None
            else:
                rest.append(argument)
        return rest

    def _suggestion(self, name: str, prefix: str = "") -> str:
        return did_you_mean(name, self.field_types, prefix)


def config_path(name: str) -> Path:
    """A configuration's file by its path, or by its name among those that ship with the package.

    Raises:
        ValueError: there is neither; the nearest name is given.
    """
    path, shipped = Path(name), {path.stem: path for path in (SHIPPED / "configs").glob("*.yaml")}
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml")
    if stem in shipped and path.parent in (Path("."), Path("recipes/configs")):
        return shipped[stem]
    guess = did_you_mean(stem, shipped)
    raise ValueError(f"--config must name a YAML file or a configuration, but there is no file {name!r}{guess}")


class _StrictLoader(yaml.SafeLoader):
    """Plain values alone, and every key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {doubled!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _check_yaml(path: Path) -> None:
    """Reads a configuration once before `trl` does, which lets the last of two keys win and sets environment variables."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must contain a YAML mapping with names for keys, found {type(values).__name__}")
    if "env" in values:
        raise ValueError(f"{path} has the key 'env'; set environment variables in the shell, not in a configuration")


def parse_command_line(*dataclass_types: type, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Dataclasses for a script's ``main``, filled by `ConfigParser`; faults end the process in one line, with code 2."""
    faults_in_one_line()
    try:
        return ConfigParser(dataclass_types).parse_args_and_config(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def faults_in_one_line() -> None:
    """From here on the script says in one line that it was interrupted, that the disk is full, or its folder in use."""
    sys.excepthook = _faults_in_one_line


def _faults_in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What an error that ends a script prints; neither Ctrl-C nor a full disk is an error of the script."""
    fault = str(error) if isinstance(error, DirectoryInUseError) else disk_fault(error)
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif fault is not None:
        print(f"error: {fault}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def did_you_mean(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean ...?"`` with the nearest candidate, or nothing if none is near."""
    nearest = difflib.get_close_matches(name.replace("-", "_"), list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


def field_types(dataclass_type: type) -> dict[str, Any]:
    """Types, resolved, of the fields that a dataclass's constructor takes."""
    hints = get_type_hints(dataclass_type)
    return {f.name: hints[f.name] for f in fields(dataclass_type) if f.init}


def checked_value(name: str, value: Any, hint: Any) -> Any:
    """A YAML value for a field of this type.

    Strings pass where anything else is expected, since the parser converts them (YAML reads ``1e-4`` as a string), except
    in lists, where they are converted here; a scalar becomes a list of one where only a list fits.

    Raises:
        ValueError: the value does not fit.
    """
    if fits(value, hint) or (isinstance(value, str) and not _takes_only_lists(hint)):
        return value
    listed = [_number(item) for item in (value if isinstance(value, list) else [value])]
    if not isinstance(value, dict) and fits(listed, hint):
        return listed
    # YAML 1.1 reads unquoted yes, no, on and off as booleans.
    advice = "; quote it to make it a string" if isinstance(value, (bool, int, float)) and fits("", hint) else ""
    raise ValueError(f"{name} must be {described(hint)}, got {value!r} in the configuration{advice}")


def _number(value: Any) -> Any:
    """The number that a string is, if it is one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _takes_only_lists(hint: Any) -> bool:
    scalars: tuple[Any, ...] = ("", 0, 0.5, False, {})
    return not any(fits(value, hint) for value in scalars)


def _split_config(args: Iterable[str]) -> list[str]:
    """``--config=file`` in two parts, which is the only form that `TrlParser` knows."""
    parts: list[str] = []
    for argument in args:
        parts += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    return parts
