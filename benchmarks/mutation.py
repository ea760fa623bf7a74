"""Changes of one place of a module: Cosmic Ray's operators, and a few for numerical code."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import parso.python.tree as tree
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

# One replacement of each operator: more kinds of wrong arithmetic are found by the same tests. None of
# < by <=: where numbers are rounded, equality says nothing; integers that count change anyway.
REPLACED = {
    "BinaryOperator": [
        *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Mul", "Mod_Mul"),
        *("BitOr_BitAnd", "BitAnd_BitOr"),
    ],
    "ComparisonOperator": [
        "Lt_GtE",
        "LtE_Gt",
        "Gt_LtE",
        "GtE_Lt",
        "Eq_NotEq",
        "NotEq_Eq",
        "Is_IsNot",
        "IsNot_Is",
    ],
    "UnaryOperator": ["USub_UAdd", "Delete_Not", "Delete_Invert"],
}
NAMED = ["AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"]
NAMED += ["ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"]

PAIRS = [("min", "max"), ("minimum", "maximum"), ("any", "all"), ("zeros", "ones"), ("floor", "ceil")]
PAIRS += [("zeros_like", "ones_like"), ("+=", "-="), ("*=", "/="), ("|=", "&=")]
COUNTERPARTS = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])} | {"abs": "float"}


class Constants(Operator):
    """A number times ten and with its sign changed, an integer one larger."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if isinstance(node, tree.Number):
            yield from [(node.start_pos, node.end_pos)] * len(self._others(node.value))

    def mutate(self, node: Any, index: int) -> Any:
        return tree.Number(f"({self._others(node.value)[index]!r})", node.start_pos, node.prefix)

    @staticmethod
    def _others(value: str) -> list[float]:
        number = ast.literal_eval(value)
        return [number + 1] if isinstance(number, int) or not number else [10 * number, -number]

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class Words(Operator):
    """A function's counterpart in place of it."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if isinstance(node, tree.Name | tree.Operator) and node.value in COUNTERPARTS:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        after_dot = node.value == "abs" and node.get_previous_leaf() == "."
        node.value = "asarray" if after_dot else COUNTERPARTS[node.value]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Mutant:
    """A change of one place, in the function that begins at ``function`` (0: in none)."""

    line: int
    function: int
    was: str
    source: str

    @property
    def text(self) -> str:
        """What is changed, wherever that stands."""
        now = self.source.splitlines()[self.line - 1].strip()
        return f"`{self.was.strip()}` became `{now}`"

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def operators() -> Iterator[Operator]:
    """Yield what changes a place."""
    known = OperatorProvider()
    for kind, names in REPLACED.items():
        yield from (
            known[f"Replace{kind}_{name}" if "Delete" not in name else f"ReplaceUnaryOperator_{name}"]()
            for name in names
        )
    yield from (known[name]() for name in NAMED)
    yield Constants()
    yield Words()


def bare(source: str) -> str | None:
    """Return what a source means, without annotations; None if it means nothing."""
    try:
        module = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(module):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
        if isinstance(node, ast.arguments):
            # How arguments may be passed is for those who call.
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.posonlyargs, node.kwonlyargs = [], []
    return ast.dump(module)


class Changes:
    """Every place of a source that can be changed, each by one of the operators."""

    def __init__(self, source: str) -> None:
        self.lines, self.same = source.splitlines(), bare(source)
        self.functions = sorted(
            (node.lineno, node.end_lineno or 0, min([node.lineno, *(d.lineno for d in node.decorator_list)]))
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef)
        )
        nodes = get_ast(source)
        self.tree = pickle.dumps(nodes)
        self.places = [
            (line, operator, number)
            for operator in operators()
            for number, ((line, _), _) in enumerate(
                p for node in ast_nodes(nodes) for p in operator.mutation_positions(node)
            )
            # Type checkers alone read what is imported for them.
            if "TYPE_CHECKING" not in self.lines[line - 1]
        ]

    def mutant(self, place: tuple[int, Operator, int]) -> Mutant | None:
        """Return the source changed there, None if that is no program or means the same."""
        line, operator, number = place
        changed = MutationVisitor(number, operator).walk(pickle.loads(self.tree)).get_code()
        if bare(changed) in (None, self.same):
            return None
        around = [first for start, end, first in self.functions if start <= line <= end]
        return Mutant(line, around[-1] if around else 0, self.lines[line - 1], changed)
