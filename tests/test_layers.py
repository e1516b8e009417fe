"""Data flows one way: every module imports from its own package or from lower layers, and no two modules need each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dina_reward


PACKAGE = Path(dina_reward.__file__).parent
LAYERS = (
    {"lazy", "quiet", "checks", "shipped"},
    {"noise", "likelihood"},
    {"families"},
    {"modeling"},
    {"backbones"},
    {"checkpoints"},
    {"reward", "reward_functions", "data"},
    {"evaluation"},
    {"training"},
    {"alignment"},
    {"search", "integrations", "serving", "distill", "bench"},
    {"planning"},
    {"shapes"},
    {"recipes"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ALIGNMENT = (
    {"sampling", "objectives"},
    {"config", "samplers"},
    {"costs", "policy_weights"},
    {"generator"},
    {"policy"},
    {"experience"},
    {"monitoring"},
    {"trainers"},
)
ALIGNMENT_RANK = {name: rank for rank, names in enumerate(ALIGNMENT) for name in names}
MAX_TOP_LEVEL_FILES = 8


def module_name(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[str]:
    """Modules of ours that a module imports, inside functions and for type checking too."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield from ({f"{origin}.{alias.name}", origin} & MODULES.keys() - {PACKAGE.name, name})


def inside(package: str) -> list[str]:
    return [name for name in MODULES if name.startswith(f"{package}.")]


def check_flow(package: str, name: str, rank: Mapping[str, int]) -> None:
    """That a module of a package imports from its own part of it or from lower ones."""

    def part(module: str) -> str:
        return module.removeprefix(f"{package}.").split(".")[0]

    assert part(name) in rank, f"{part(name)} has no place among the layers of {package} yet"
    others = {part(other) for other in imports(name) if other.startswith(f"{package}.")} - {part(name)}
    assert not {other for other in others if rank[other] >= rank[part(name)]}


@pytest.mark.parametrize("name", inside(PACKAGE.name))
def test_nothing_imports_upwards_or_sideways(name: str) -> None:
    check_flow(PACKAGE.name, name, RANK)


@pytest.mark.parametrize("name", inside("dina_reward.alignment"))
def test_nothing_in_alignment_imports_upwards_or_sideways(name: str) -> None:
    check_flow("dina_reward.alignment", name, ALIGNMENT_RANK)


def test_no_circles() -> None:
    # The __init__ of a package lists what its modules define; they in turn do not import it.
    fronts = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {name: set(imports(name)) for name in MODULES.keys() - fronts}
    list(TopologicalSorter(graph).static_order())
    inward = [
        (name, front) for name, needs in graph.items() for front in needs & fronts if name.startswith(f"{front}.")
    ]
    assert inward == []


def test_every_package_opens_with_what_lives_here() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert path.parent == PACKAGE or "Begin at" in text, f"{path} does not say where to begin"


def test_top_level_is_small() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= MAX_TOP_LEVEL_FILES
