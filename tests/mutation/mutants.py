"""Mutants of the mathematics: one operator, comparison, sign or constant of a file changed, everything else as it was."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


MIRRORED = {
    "likelihood.py": "test_likelihood.py",
    "noise/processes.py": "noise",
    "noise/draws.py": "noise",
    "noise/states.py": "noise",
    "modeling/heads/base.py": "modeling/heads",
    "modeling/heads/query.py": "modeling/heads",
    "modeling/heads/pooled.py": "modeling/heads",
    "modeling/heads/conv.py": "modeling/heads",
    "modeling/scoring.py": "test_reward.py",
    "alignment/sampling/steps.py": "alignment/sampling/test_steps.py",
    "alignment/sampling/ddim.py": "alignment/sampling/test_ddim.py",
    "alignment/sampling/rollout.py": "alignment/sampling/test_rollout.py",
    "alignment/sampling/samplers.py": "alignment/sampling",
    "alignment/objectives/advantages.py": "alignment/objectives/test_advantages.py",
    "alignment/objectives/credit.py": "alignment/objectives/test_credit.py",
    "alignment/objectives/policy_gradient.py": "alignment/objectives/test_policy_gradient.py",
    "alignment/trainers/forward_process.py": "alignment/trainers/test_forward_process.py",
    "alignment/trainers/nft.py": "alignment/trainers/test_nft.py",
    "alignment/trainers/online_dpo.py": "alignment/trainers/test_online_dpo.py",
    "alignment/monitoring/hacking.py": "alignment/monitoring/test_hacking.py",
    "evaluation/ties.py": "evaluation/test_ties.py",
    "evaluation/bootstrap.py": "evaluation/test_bootstrap.py",
    "evaluation/calibration.py": "evaluation/test_calibration.py",
    "evaluation/accuracy.py": "evaluation/test_accuracy.py",
    "evaluation/variance.py": "evaluation/test_variance.py",
}
"""Files of the package that hold formulas, and the tests that mirror them."""

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


@dataclass(frozen=True)
class Mutant:
    """One change.

    Args:
        file: path below the package.
        line, column: of the change, both from 1.
        old, new: the expression before and after.
        text: the whole file with the change.
    """

    file: str
    line: int
    column: int
    old: str
    new: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.old}  ->  {self.new}"


def mutants_of(package: Path, file: str) -> Iterator[Mutant]:
    """All mutants of a file, from top to bottom."""
    text = (package / file).read_text(encoding="utf-8")
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    data = text.encode()
    for node, changed in _changes(ast.parse(text)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        old, new = data[begin:end].decode(), f"({ast.unparse(changed)})"
        yield Mutant(
            file, node.lineno, node.col_offset + 1, old, new, (data[:begin] + new.encode() + data[end:]).decode()
        )


def _changes(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Expressions with what they become. Annotations, messages, decorators and documentation are left alone."""
    if isinstance(tree, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)):
        return
    if isinstance(tree, ast.expr):
        yield from ((tree, changed) for changed in _changed(tree))
    skipped = {"annotation", "returns", "decorator_list", "type_comment"}
    for name, value in ast.iter_fields(tree):
        if name in skipped or (isinstance(tree, ast.Subscript) and name == "slice" and isinstance(value, ast.Tuple)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child)


def _changed(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        # Unions of types and concatenated texts are no arithmetic.
        if not any(
            isinstance(side, (ast.Constant, ast.JoinedStr)) and _is_text(side) for side in (node.left, node.right)
        ):
            yield ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        yield ast.Compare(node.left, [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 1.5 or 0.5)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
