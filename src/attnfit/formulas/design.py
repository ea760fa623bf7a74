"""A formula with what it learned from the training data: levels, knots, scales, and which columns stay."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import narwhals as nw
import numpy as np
from numpy.typing import NDArray

from attnfit.formulas.frames import (
    column_kind,
    levels_of,
    require_columns,
    require_finite,
    to_pandas,
    unused_levels,
)
from attnfit.formulas.safe import FUNCTIONS, MODULES, require_safe

Array = NDArray[np.float64]
# Functions that formulaic does not bring.
CONTEXT: dict[str, Any] = {"abs": np.abs, "sqrt": np.sqrt, "log1p": np.log1p, "np": np}
# Columns whose values differ within groups by less than this share of their size are constant.
CONSTANT = 1e-12
# Step of the differences that are derivatives in a variable, relative to its size.
STEP = 1e-3
STATES = (int, float, str, bool, type(None))


def formulaic() -> Any:
    """Return the package, or say how to install it."""
    try:
        import formulaic
    except ImportError:
        raise ImportError("formulas need the extra attnfit[formula] (formulaic)") from None
    return formulaic


@dataclass
class FormulaDesign:
    """The right-hand side of a formula on data.

    Attributes
    ----------
    text : str
        Terms joined by ``+``, those included that were added so that ranks can be reduced.
    variables : list of str
        The columns of the data that it needs.
    levels : dict
        The levels of each category among them, the reference first unless the formula says otherwise.
    columns : list of str
        The columns of the matrix that stay.
    state : dict
        What transformations learned: knots, polynomials, centres and scales, by expression.
    notes : list of str
    context : dict
        Names of the caller, which a stored formula may not use.
    """

    text: str
    variables: list[str]
    levels: dict[str, list[Any]]
    columns: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    context: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def matrix(self, data: Any) -> Any:
        """Return the columns for new data as a pandas data frame.

        Raises
        ------
        KeyError
            If a column is missing.
        ValueError
            For missing values, or levels that the training data did not have.
        """
        if not nw.dependencies.is_into_dataframe(data):
            raise ValueError("the model was fitted by a formula: pass a data frame with its columns")
        require_columns(self.variables, data)
        require_finite(data, self.variables)
        table = to_pandas(data, self.variables, self.levels)
        found, _ = self._evaluate(table)
        index = getattr(data, "index", None)
        found = found[self.columns]
        if index is not None and len(index) == len(found):
            found.index = index
        return found

    def _evaluate(self, table: Any) -> tuple[Any, dict[str, Any]]:
        """Return all columns of the matrix, and the state of the transformations."""
        package = formulaic()
        spec = package.ModelSpec(
            formula=package.Formula(self.text),
            transform_state={name: dict(value) for name, value in self.state.items()},
            na_action="ignore",
            output="pandas",
        )
        if not len(table):
            raise ValueError("the data have no rows")
        found = spec.get_model_matrix(table, context={**CONTEXT, **self.context})
        return found.astype(np.float64), dict(found.model_spec.transform_state)

    def derivative(self, data: Any, name: str) -> tuple[Array, Array]:
        """Return a variable v, shape (n,), and the derivative of the matrix in it, shape (n, d), by
        four-point central differences.
        """
        if name not in self.variables:
            raise ValueError(f"{name!r} is no variable of the formula; these are {', '.join(self.variables)}")
        if name in self.levels:
            raise ValueError(
                f"{name!r} is a category with levels {', '.join(map(repr, self.levels[name][:8]))}: a change "
                "by one per cent has no meaning; use marginal_effects(..., levels=(one, other))"
            )
        require_columns(self.variables, data)
        require_finite(data, self.variables)
        table = to_pandas(data, self.variables, self.levels)
        v = np.asarray(table[name], dtype=np.float64)
        spread = float(np.std(v)) or 1.0
        step = STEP * np.where(v == 0.0, spread, np.abs(v))

        def at(times: float) -> Array:
            moved = table.assign(**{name: v + times * step})
            return np.asarray(self._evaluate(moved)[0][self.columns])

        near, far = at(1.0) - at(-1.0), at(2.0) - at(-2.0)
        return v, (8.0 * near - far) / (12.0 * step[:, None])

    def is_plain(self, name: str) -> bool:
        """Whether a variable is one column of the matrix, as it is, and enters no other."""
        uses = [term for term in formulaic().Formula(self.text) if name in _term_variables(term)]
        return len(uses) == 1 and str(uses[0]) == name and name in self.columns

    # ---- storage

    def to_json(self) -> dict[str, Any]:
        """Return the design as JSON holds it.

        Raises
        ------
        ValueError
            If the formula uses more than columns, numbers and known functions.
        """
        try:
            require_safe(self.text, self.variables)
        except ValueError as error:
            raise ValueError(f"a model with this formula cannot be saved: {error}") from None
        return {
            "text": self.text,
            "variables": self.variables,
            "levels": self.levels,
            "columns": self.columns,
            "state": _encode(self.state),
            "notes": self.notes,
        }

    @classmethod
    def from_json(cls, told: Any) -> FormulaDesign:
        """Return a stored design; nothing of it is evaluated.

        Raises
        ------
        ValueError
            If it is malformed, or its formula uses more than columns, numbers and known functions.
        """
        names = {"text", "variables", "levels", "columns", "state", "notes"}
        if not isinstance(told, dict) or set(told) != names or not isinstance(told["text"], str):
            raise ValueError("the formula of the file is malformed")
        for name in ("variables", "columns", "notes"):
            if not isinstance(told[name], list) or not all(isinstance(v, str) for v in told[name]):
                raise ValueError(f"{name} of the formula are no list of names")
        levels = told["levels"]
        if not isinstance(levels, dict) or not all(
            name in told["variables"] and isinstance(of, list) and all(isinstance(v, STATES) for v in of)
            for name, of in levels.items()
        ):
            raise ValueError("levels of the formula are malformed")
        require_safe(told["text"], told["variables"])
        if not isinstance(told["state"], dict):
            raise ValueError("the state of the formula is malformed")
        return cls(
            told["text"], told["variables"], levels, told["columns"], _decode(told["state"]), told["notes"]
        )


def _encode(value: Any) -> Any:
    """Return nested dicts and lists of numbers as JSON: keys that are numbers are marked."""
    if isinstance(value, dict):
        return {f"#{k}" if isinstance(k, int) else str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_encode(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, STATES):
        raise ValueError(f"a transformation of the formula keeps a {type(value).__name__}, which JSON cannot")
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {int(k[1:]) if re.fullmatch(r"#-?\d{1,9}", k) else k: _decode(v) for k, v in value.items()}
    return [_decode(v) for v in value] if isinstance(value, list) else value


def _term_variables(term: Any) -> set[str]:
    return set().union(*(factor_variables(factor) for factor in term.factors))


def factor_variables(factor: Any) -> set[str]:
    """Return the names that a factor looks up: columns, or names of the caller."""
    expression = str(factor.expr)
    if factor.eval_method.value == "literal":
        return set()
    if factor.eval_method.value == "lookup":
        return {expression}
    quoted: dict[str, str] = {}

    def hide(match: re.Match[str]) -> str:
        quoted[f"_quoted_{len(quoted)}"] = match[1]
        return f"_quoted_{len(quoted) - 1}"

    tree = ast.parse(re.sub(r"`([^`]+)`", hide, expression), mode="eval")
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    roots = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and id(node) not in called | roots and node.id not in MODULES:
            found.add(quoted.get(node.id, node.id))
    return found - FUNCTIONS


def categories(factor: Any) -> set[str]:
    """Return the columns that ``C(...)`` makes categories.

    Raises
    ------
    ValueError
        If ``C`` is given more than the name of a column.
    """
    if factor.eval_method.value != "python":
        return set()
    found = set()
    for node in ast.walk(ast.parse(str(factor.expr).replace("`", ""), mode="eval")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "C":
            if not (node.args and isinstance(node.args[0], ast.Name)):
                raise ValueError(
                    f"{factor.expr}: C() takes the name of a column; add what is in it as a column"
                )
            found.add(node.args[0].id)
    return found


def learn(
    right: str, data: Any, groups: Any, *, constants: bool, context: Mapping[str, Any]
) -> tuple[FormulaDesign, Any]:
    """Return the design of a formula's right-hand side and its matrix.

    Parameters
    ----------
    right : str
    data : data frame without missing values
    groups : ndarray of int, shape (n,), or None
        Numbers of groups.
    constants : bool
        False where a softmax without an outside good cannot identify what is constant in groups: such columns
        are dropped, and terms added so that interactions with them lose one level.
    """
    package = formulaic()
    terms = list(package.Formula(right))
    in_data = {str(name) for name in data.columns}
    needed = sorted(set().union(*(_term_variables(term) for term in terms)) if terms else set())
    variables = [name for name in needed if name in in_data or name not in context]
    require_columns(variables, data)
    table = nw.from_native(data, eager_only=True)
    made = set().union(*(categories(factor) for term in terms for factor in term.factors))
    levels = {}
    for name in variables:
        kind = column_kind(table[name], name)
        if kind != "number" or name in made:
            levels[name] = levels_of(table[name], kind)
    for name in made & set(levels):
        plain = any(name in factor_variables(f) and not categories(f) for t in terms for f in t.factors)
        if plain and column_kind(table[name], name) == "number":
            raise ValueError(f"{name} is used as a number and as C({name}); copy the column for one of them")
    design = FormulaDesign(right, variables, levels, context=context)
    pandas = to_pandas(data, variables, levels)
    if not constants and groups is not None:
        fixed = {name for name in variables if _constant(pandas[name], groups)}
        added = [_fixed_part(term, fixed) for term in terms]
        terms = ["1", *(term for term in added if term), *(str(term) for term in terms)]
        design.text = " + ".join(dict.fromkeys(terms))
    found, design.state = design._evaluate(pandas)
    design.columns = [str(name) for name in found.columns]
    if not constants:
        asked = set(map(str, package.Formula(right)))
        _drop_constants(design, found, groups, asked)
    if not design.columns:
        raise ValueError("no column of the formula varies within groups; nothing can be estimated")
    for name in levels:
        _note_reference(design, name)
        design.notes += [f"{name}: level {level} has no row" for level in unused_levels(table[name])]
    return design, found[design.columns]


def _constant(values: Any, groups: NDArray[np.intp]) -> bool:
    """Whether a column is the same for all rows of every group."""
    numbers = np.asarray(values.cat.codes if hasattr(values, "cat") else values, dtype=np.float64)
    n = int(groups.max()) + 1
    low, high = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low, groups, numbers)
    np.maximum.at(high, groups, numbers)
    return bool((high - low <= CONSTANT * max(float(np.abs(numbers).max()), 1e-300)).all())


def _fixed_part(term: Any, fixed: set[str]) -> str | None:
    """Return the product of the factors that are constant in groups, where others are not."""
    parts = [factor for factor in term.factors if factor_variables(factor) <= fixed]
    if not parts or len(parts) == len(term.factors):
        return None
    return ":".join(str(factor.expr) for factor in parts)


def _drop_constants(design: FormulaDesign, found: Any, groups: Any, asked: set[str]) -> None:
    numbers = np.zeros(len(found), dtype=np.intp) if groups is None else groups
    kept = []
    for name in design.columns:
        if not _constant(found[name], numbers):
            kept.append(name)
        elif name != "Intercept" and name in asked:
            design.notes.append(f"{name}: the same for all rows of every group, dropped")
    design.columns = kept


def _note_reference(design: FormulaDesign, name: str) -> None:
    base = re.search(rf"C\({re.escape(name)}, *contr\.treatment\((?:base=)?(['\"]?)(.*?)\1\)\)", design.text)
    known = design.levels[name]
    reference = base[2] if base else known[0] if known else ""
    design.notes.append(f"{name}: reference level {reference}")
