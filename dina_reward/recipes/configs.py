"""The catalogue of recipes: which configurations there are, how each is launched, and whether it is valid.

A recipe is a script ``recipes/NAME.py`` whose ``main`` takes the dataclasses that a configuration fills. A configuration is
a YAML file that opens with comments; the first line says what it is, and ``Launch:`` is followed by its command line, which
may go on after a backslash. That line is what makes a configuration belong to a recipe: it names the script, the number of
processes, and the options that a user has to give.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dina_reward.recipes.alignment import ALGORITHMS, RecipeArguments, classes_of
from dina_reward.recipes.arguments import SHIPPED, ConfigParser, did_you_mean


_PROCESS_OPTIONS = ("--num_processes", "--nproc_per_node", "--nproc-per-node")


@dataclass(frozen=True)
class Launch:
    """The command line in a configuration's header.

    Args:
        recipe (`str`): name of the script, without ``.py``.
        num_processes (`int`): processes that it starts.
        options (`tuple[str, ...]`): what follows the script, without ``--config``.
    """

    recipe: str
    num_processes: int
    options: tuple[str, ...]

    @classmethod
    def parse(cls, command: str) -> Launch:
        """Reads a command line.

        Raises:
            ValueError: it runs no script of ``recipes``.
        """
        words = shlex.split(command)
        scripts = [i for i, word in enumerate(words) if re.search(r"(^|/)recipes/\w+\.py$", word)]
        if not scripts:
            raise ValueError(f"the launch line {command!r} runs no recipes/NAME.py")
        before, options = words[: scripts[0]], words[scripts[0] + 1 :]
        if "--config" in options:
            position = options.index("--config")
            del options[position : position + 2]
        counts = [int(before[i + 1]) for i, word in enumerate(before[:-1]) if word in _PROCESS_OPTIONS]
        return cls(Path(words[scripts[0]]).stem, counts[0] if counts else 1, tuple(options))


@dataclass(frozen=True)
class RecipeConfig:
    """One YAML file.

    Args:
        path (`Path`): where it is.
    """

    path: Path

    @property
    def name(self) -> str:
        """File name without ending."""
        return self.path.stem

    @property
    def header(self) -> list[str]:
        """The comment lines that the file opens with, without ``#``."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").strip())
        return lines

    @property
    def title(self) -> str:
        """First line of the header."""
        return self.header[0] if self.header else ""

    @property
    def model(self) -> str:
        """The generator that it is for."""
        values = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        return str(values.get("model_name_or_path", "")) if isinstance(values, dict) else ""

    @property
    def launch(self) -> Launch | None:
        """The header's ``Launch:`` line; ``None`` if there is none."""
        header = self.header
        start = next((i for i, line in enumerate(header) if line.startswith("Launch:")), None)
        if start is None:
            return None
        command = header[start].removeprefix("Launch:")
        for line in header[start + 1 :]:
            if not command.rstrip().endswith("\\"):
                break
            command = command.rstrip().removesuffix("\\") + line
        return Launch.parse(command.strip())


def find_directory(directory: Path | None = None) -> Path:
    """The ``recipes`` directory: the given one, else that of the working directory, else the one beside the package.

    An installed package has its configurations within itself, and no scripts.

    Raises:
        ValueError: there is none.
    """
    places = [Path("recipes"), Path(__file__).parents[2] / "recipes", SHIPPED] if directory is None else [directory]
    for place in places:
        if (place / "configs").is_dir():
            return place
    raise ValueError(
        f"no recipes in {' or '.join(str(place.resolve()) for place in places)}: expected a directory with configs/*.yaml"
    )


def configs_of(directory: Path) -> list[RecipeConfig]:
    """All configurations of a ``recipes`` directory, by name."""
    return [RecipeConfig(path) for path in sorted((directory / "configs").glob("*.yaml"))]


def find_config(name: str, directory: Path | None = None) -> RecipeConfig:
    """A configuration by its path, or by its name in the ``recipes`` directory.

    Raises:
        ValueError: there is none; the nearest name is given.
    """
    if Path(name).is_file():
        return RecipeConfig(Path(name))
    found = {config.name: config for config in configs_of(find_directory(directory))}
    stem = Path(name).name.removesuffix(".yaml")
    if stem not in found:
        raise ValueError(f"no configuration {name!r}{did_you_mean(stem, found)}")
    return found[stem]


def alignment_command(name: str, options: Sequence[str]) -> tuple[str, list[str]]:
    """Algorithm and options of ``dina-reward align NAME ...``; a configuration stands for its algorithm and ``--config``.

    Args:
        name: of an algorithm, or of a configuration in the ``recipes`` directory.
        options: what follows it.

    Raises:
        ValueError: it is neither, or the configuration of a recipe that aligns nothing.
    """
    if name in ALGORITHMS:
        return name, list(options)
    recipes = {config: launch.recipe for config in configs_of(find_directory()) if (launch := config.launch)}
    found = {config.name: (recipe, config.path) for config, recipe in recipes.items()}
    recipe, path = found.get(name, ("", Path()))
    if recipe in ALGORITHMS:
        return recipe, ["--config", str(path), *options]
    if recipe:
        raise ValueError(f"{name} is a configuration of recipes/{recipe}.py, which aligns nothing")
    known = [*ALGORITHMS, *(name for name, (recipe, _) in found.items() if recipe in ALGORITHMS)]
    listed = f"; there are {', '.join(ALGORITHMS)}, and what `dina-reward recipes list` shows"
    raise ValueError(f"no algorithm or configuration {name!r}{did_you_mean(name, known) or listed}")


def recipe_dataclasses(script: Path) -> tuple[type, ...]:
    """The dataclasses that annotate the parameters of a recipe's ``main``.

    Those of the recipes that are commands, `align` and `train`, are known without their scripts.

    Raises:
        ValueError: there is no such script, or its ``main`` does not take dataclasses.
    """
    if not script.is_file() and (known := _known_dataclasses(script.stem)):
        return known
    # A dataclass that the script defines looks its module up by name.
    name = f"dina_reward_recipe_{script.stem}"
    specification = importlib.util.spec_from_file_location(name, script) if script.is_file() else None
    if specification is None or specification.loader is None:
        names = sorted(path.stem for path in script.parent.glob("*.py"))
        raise ValueError(f"there is no recipe {script}; there are: {', '.join(names) or 'none'}")
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    main = getattr(module, "main", None)
    hints = {} if main is None else get_type_hints(main)
    types = tuple(hint for name, hint in hints.items() if name != "return")
    if not types or not all(isinstance(hint, type) and is_dataclass(hint) for hint in types):
        raise ValueError(
            f"{script}: the parameters of main must be annotated with the dataclasses of its configuration"
        )
    return types


def _known_dataclasses(recipe: str) -> tuple[type, ...]:
    if recipe == "train_reward":
        from dina_reward.recipes.reward_training import TrainRewardArguments
        from dina_reward.training import LatentRewardTrainingConfig

        return TrainRewardArguments, LatentRewardTrainingConfig
    if recipe == "distill_reward":
        from dina_reward.recipes.distillation import DistillArguments, DistillTrainingConfig

        return DistillArguments, DistillTrainingConfig
    return (RecipeArguments, classes_of(recipe)[0]) if recipe in ALGORITHMS else ()


def check_config(
    config: RecipeConfig,
    *,
    recipe: str | None = None,
    num_processes: int | None = None,
    overrides: Sequence[str] = (),
    directory: Path | None = None,
) -> str:
    """Checks a configuration as its launch line would run it: keys, types, values and batches. No weight is touched.

    Args:
        config: the file.
        recipe: name of the script, for a file without a launch line.
        num_processes: processes that will be started; by default those of the launch line.
        overrides: further options, such as ``["--learning_rate", "1e-4"]``.
        directory: the ``recipes`` directory.

    Returns:
        One line about what it would run.

    Raises:
        ValueError: in one line, what is wrong.
    """
    launch = launch_of(config, recipe, num_processes)
    try:
        parsed = parse_config(config, launch, overrides, directory)
    except ValueError as error:
        raise ValueError(f"{config.path}: {' '.join(str(error).split())}") from error
    return f"{config.path}: valid for recipes/{launch.recipe}.py, {_describe_batch(parsed, launch.num_processes)}"


def parse_config(
    config: RecipeConfig, launch: Launch, overrides: Sequence[str] = (), directory: Path | None = None
) -> tuple[Any, ...]:
    """The dataclasses of a recipe's ``main``, as a launch line fills them; their ``geometry()`` counts on its processes.

    Arguments and errors as for `check_config`.
    """
    script = find_directory(directory) / f"{launch.recipe}.py"
    parser = ConfigParser(_planned(cls, launch.num_processes) for cls in recipe_dataclasses(script))
    # No accelerator is asked for, so that the answer is the same on every machine.
    return parser.parse_args_and_config(
        ["--config", str(config.path), *launch.options, *overrides, "--use_cpu", "true"]
    )


def launch_of(config: RecipeConfig, recipe: str | None, num_processes: int | None) -> Launch:
    """The launch line of a configuration, with another script or number of processes where they are given.

    Raises:
        ValueError: there is neither a line nor a script.
    """
    launch = config.launch
    if launch is None and recipe is None:
        raise ValueError(f"{config.path} has no '# Launch: ... recipes/NAME.py' line; give --recipe NAME")
    launch = launch or Launch("", 1, ())
    return replace(launch, recipe=recipe or launch.recipe, num_processes=num_processes or launch.num_processes)


def _planned(cls: type, num_processes: int) -> type:
    """A configuration class that counts on so many processes, which do not have to run."""
    if not hasattr(cls, "geometry"):
        return cls
    parent: Any = cls

    def geometry(self: Any, processes: int | None = None) -> Any:
        return parent.geometry(self, num_processes if processes is None else processes)

    return type(cls.__name__, (cls,), {"geometry": geometry, "__doc__": cls.__doc__})


def _describe_batch(parsed: Sequence[Any], num_processes: int) -> str:
    config = next((part for part in parsed if hasattr(part, "geometry")), None)
    noun = "process" if num_processes == 1 else "processes"
    if config is None:
        return f"{num_processes} {noun}"
    batch, steps = config.geometry(), config.optimizer_steps_per_generation
    report = f"{num_processes} {noun} x {batch.batch_size} x {batch.num_chunks} = {batch.rows} samples"
    if batch.num_generations > 1:
        report += f" = {batch.groups} group{'' if batch.groups == 1 else 's'} of {batch.num_generations}"
    return f"{report}, {steps:g} optimizer step{'' if steps == 1 else 's'} per generation"
