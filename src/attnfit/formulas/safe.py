"""Which formulas of a file may be evaluated: formulaic runs Python, so a file's formula is checked first."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

FUNCTIONS = frozenset(
    (
        *("log", "log1p", "exp", "sqrt", "abs"),
        *("I", "C", "center", "scale", "poly", "bs", "cs", "cr"),
    )
)
MODULES = {
    "np": frozenset(("log", "log1p", "exp", "sqrt", "abs")),
    "contr": frozenset(("treatment", "SAS", "sum", "helmert", "diff", "poly")),
}
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd)
# Powers, degrees and knots beyond these take memory, and are not what anybody means.
LARGEST_POWER, LARGEST_ARGUMENT = 6, 100
LONGEST = 10_000


def require_safe(formula: str, columns: Iterable[str]) -> None:
    """Raise ValueError unless a right-hand side holds only names of columns, numbers, ``+ - * / ** : ( )``
    and known functions; it is not evaluated, and formulaic does not see it.

    Examples
    --------
    >>> require_safe("cost + log(time):C(mode)", ["cost", "time", "mode"])
    >>> require_safe("{__import__('os').getpid()}", [])
    Traceback (most recent call last):
        ...
    ValueError: the formula holds '{', which a formula of a file or of the command line may not
    """
    if len(formula) > LONGEST:
        raise ValueError(f"the formula has {len(formula):,} characters; at most {LONGEST:,} are read")
    outside_strings = re.sub(r"'[^'\\]*'|\"[^\"\\]*\"", "''", formula)
    for bad in "{}[]`\\;@%^|&!<>\n\r":
        if bad in (formula if bad == "\\" else outside_strings):
            raise _refused(bad)
    try:
        tree = ast.parse(_as_expression(formula), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the formula cannot be read: {error}") from None
    _check(tree.body, frozenset(columns))


def names_in(formula: str) -> list[str]:
    """Return the names that a right-hand side looks up as columns, in order, without evaluating it.

    Raises
    ------
    ValueError
        If it is not written as formulas are.

    Examples
    --------
    >>> names_in("cost + log(time):C(mode, contr.treatment('car'))")
    ['cost', 'time', 'mode']
    """
    try:
        tree = ast.parse(_as_expression(formula), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the formula cannot be read: {error}") from None
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    roots = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called | roots]
    found.sort(key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(node.id for node in found))


def _as_expression(formula: str) -> str:
    # An interaction is a product as far as the syntax goes.
    pieces = re.split(r"('[^'\\]*'|\"[^\"\\]*\")", formula)
    return "".join(p if k % 2 else p.replace(":", "*") for k, p in enumerate(pieces)).strip()


def _check(node: ast.AST, columns: frozenset[str]) -> None:
    if isinstance(node, ast.BinOp | ast.UnaryOp):
        if not isinstance(node.op, OPERATORS):
            raise _refused(type(node.op).__name__)
        if isinstance(node, ast.UnaryOp):
            _check(node.operand, columns)
            return
        if isinstance(node.op, ast.Pow):
            power = node.right
            if not (isinstance(power, ast.Constant) and _is_number(power.value, LARGEST_POWER)):
                raise ValueError(f"the formula has a power that is no number up to {LARGEST_POWER}")
        _check(node.left, columns)
        _check(node.right, columns)
    elif isinstance(node, ast.Constant):
        if not isinstance(node.value, int | float) or isinstance(node.value, bool):
            raise _refused(repr(node.value))
    elif isinstance(node, ast.Name):
        if node.id not in columns or node.id in FUNCTIONS or node.id in MODULES:
            raise _refused(node.id)
    elif isinstance(node, ast.Call):
        _check_call(node, columns)
    else:
        raise _refused(ast.unparse(node))


def _check_call(node: ast.Call, columns: frozenset[str]) -> None:
    function = node.func
    if isinstance(function, ast.Name):
        known = function.id in FUNCTIONS
    else:
        known = (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.attr in MODULES.get(function.value.id, frozenset())
        )
    if not known:
        raise _refused(ast.unparse(function))
    contrast = isinstance(function, ast.Attribute) and ast.unparse(function).startswith("contr.")
    for k, argument in enumerate(node.args):
        if k == 0 and not contrast:
            _check(argument, columns)
        else:
            _check_argument(argument, columns)
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _refused("**")
        _check_argument(keyword.value, columns)


def _check_argument(node: ast.AST, columns: frozenset[str]) -> None:
    """Allow numbers, text, and contrasts as further arguments of functions."""
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, str | bool) or value is None or _is_number(value, LARGEST_ARGUMENT):
            return
    elif isinstance(node, ast.Attribute | ast.Call):
        inner = node.func if isinstance(node, ast.Call) else node
        text = ast.unparse(inner)
        if text.startswith("contr.") and text[6:] in MODULES["contr"]:
            if isinstance(node, ast.Call):
                _check_call(node, columns)
            return
    raise _refused(ast.unparse(node))


def _is_number(value: object, largest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def _refused(what: str) -> ValueError:
    return ValueError(f"the formula holds {what!r}, which a formula of a file or of the command line may not")
