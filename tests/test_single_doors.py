"""Files are read and written through one door each; whoever goes past it has a reason here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dina_reward


PACKAGE = Path(dina_reward.__file__).parent
READS = {"safe_open", "load_file", "torch.load", "json.load", "json.loads", "pickle.load", "pickle.loads", "yaml.load"}
WRITES = {"write_text", "write_bytes", "save_file", "torch.save", "savefig", "json.dump"}
ATOMIC = ("atomic_file", "atomic_files", "atomic_directory")
SHAPES = "shapes/"  # reads and writes what its own build made, below a directory that it made
READERS = {
    "checks/stored.py": "the door",
    "data/json_rows.py": "records of a dataset; a damaged one is counted",
    "data/columns.py": "values inside a row; a damaged one is counted",
    "checkpoints/published.py": "tensors of a pickled head, with weights_only, any error of which is ours",
    "backbones/structures.py": "files of the package itself",
    "training/run_settings.py": "a copy of values through JSON",
    "checkpoints/kept_results.py": "a copy of values through JSON",
    "recipes/arguments.py": "the strict reading of a configuration",
    "alignment/policy_weights.py": "a configuration that diffusers has just written as text",
}
STAGED = {
    "checkpoints/native.py:_write_files": "the caller's staging directory",
    "checkpoints/native.py:_sort_sets": "the caller's staging directory",
    "training/run_settings.py:write_settings": "a checkpoint that is still hidden",
    "training/run_settings.py:write_digests": "a checkpoint that is still hidden",
    "training/ownership.py:write_run": "a checkpoint that is still hidden",
    "training/ema.py:save_state": "a checkpoint that is still hidden",
    "training/trainer.py:_save": "a checkpoint that is still hidden, or beside a reward that is whole",
    "training/trainer.py:_save_optimizer_and_scheduler": "a checkpoint that is still hidden",
    "alignment/trainers/grpo.py:save_state": "a checkpoint that is still hidden",
    "alignment/costs.py:save_state": "a checkpoint that is still hidden",
    "bench/report.py:draw": "the caller's staging file",
    "alignment/monitoring/best_policy.py:save_state": "a checkpoint that is still hidden",
    "alignment/monitoring/tightening.py:save_state": "a checkpoint that is still hidden",
    "distill/refresh.py:save_state": "a checkpoint that is still hidden",
    "evaluation/plots.py:plot_evaluation": "a picture, which nothing reads back",
    "evaluation/comparison_plots.py:plot_comparison": "the caller's staging directory",
    "evaluation/cost.py:reset_peak_memory": "a file of the kernel",
    "backbones/cards.py:write_table": "a page of the repository under version control",
    "cli/demo_run.py:draw": "a picture, which nothing reads back",
}


def name_of(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        full = f"{owner}.{function.attr}"
        return full if full in READS | WRITES else function.attr
    return ""


def calls(path: Path, names: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """Calls of these names outside of any ``with atomic_...``, each with the innermost function it is in."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
        if isinstance(node, ast.With):
            contexts = [
                name_of(item) for with_ in node.items for item in ast.walk(with_) if isinstance(item, ast.Call)
            ]
            if any(name in ATOMIC for name in contexts):
                return
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and name_of(node) in names:
            yield function, node
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
OWN = {name: path for name, path in FILES.items() if not name.startswith(SHAPES)}


@pytest.mark.parametrize("name", OWN)
def test_files_are_read_through_one_door(name: str) -> None:
    found = [f"line {call.lineno}: {name_of(call)}" for _, call in calls(OWN[name], READS)]
    assert not found or name in READERS


@pytest.mark.parametrize("name", OWN)
def test_files_are_written_whole_or_not_at_all(name: str) -> None:
    found = {f"{name}:{function}" for function, _ in calls(OWN[name], WRITES)}
    assert found <= STAGED.keys()


def test_reasons_are_of_today() -> None:
    assert {name for name in READERS if not any(calls(FILES[name], READS))} == set()
    writers = {f"{name}:{function}" for name, path in OWN.items() for function, _ in calls(path, WRITES)}
    assert STAGED.keys() - writers == set()
