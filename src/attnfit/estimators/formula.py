"""Models from formulas: how they are fitted, and how new data become their columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

from attnfit.estimators.absorbing import Absorbed, name_of, named_columns
from attnfit.estimators.reading import read_groups
from attnfit.formulas import FormulaDesign, Training, read_training

# Attributes that a formula leaves on a model; a fit on arrays forgets them.
ATTRIBUTES = (
    *("_formula", "_names_of", "_alternatives", "_data", "_library", "_index", "notes_", "formula_"),
    "_absorb_names",
)


def caller(depth: int) -> Mapping[str, Any]:
    """Return the names that the caller of the calling function sees."""
    frame = sys._getframe(depth)
    return {**frame.f_globals, **frame.f_locals}


def keep(model: Any, training: Training, formula: str) -> None:
    """Keep on a fitted model what predictions and effects need of its formula."""
    from attnfit.data.inputs import library_and_index

    model._formula, model._names_of, model.formula_ = training.design, training.names, formula
    model._alternatives = training.given.get("alternatives")
    model._data = training.frame
    model._library, model._index = library_and_index(training.frame)
    model.notes_ = tuple(training.design.notes)


def absorbed_columns(absorb: Any) -> dict[str, Any]:
    """Return the columns of the sets of effects by a name for each: of a set of combinations several."""
    if absorb is None:
        return {}
    sets = [absorb] if isinstance(absorb, str) else list(absorb)
    parts = [list(entry) if isinstance(entry, tuple) else [entry] for entry in sets]
    return {f"absorb {s} {k}": part for s, entry in enumerate(parts) for k, part in enumerate(entry)}


def absorbed_labels(absorb: Any, given: dict[str, Any]) -> Absorbed | None:
    """Return the labels of the rows that are left, from what `absorbed_columns` named."""
    if absorb is None:
        return None
    sets = [absorb] if isinstance(absorb, str) else list(absorb)
    labels, names = [], []
    for s, entry in enumerate(sets):
        n_parts = len(entry) if isinstance(entry, tuple) else 1
        columns = tuple(given[f"absorb {s} {k}"] for k in range(n_parts))
        labels.append(columns if n_parts > 1 else columns[0])
        names.append(name_of(entry, s))
    return Absorbed(labels, names, named_columns(absorb))


def without_constant(training: Training) -> Training:
    """Return the training data without the constant, which effects hold already."""
    constant = "Intercept"
    if constant not in training.design.columns:
        return training
    training.design.columns.remove(constant)
    if not training.design.columns:
        raise ValueError("the formula has no column but the constant, which the effects hold already")
    return replace(training, matrix=training.matrix.drop(columns=[constant]))


class FormulaMixin:
    """Rows of new data for models with a formula and without."""

    def _columns_of(self, X: Any) -> Any:
        """Return the features of new data: the columns of the formula, if the model has one."""
        design: FormulaDesign | None = self.__dict__.get("_formula")
        return X if design is None else design.matrix(X)

    def _column_named(self, name: str, X: Any) -> Any:
        """Return the column of X that the fit took by name for groups or alternatives, None without."""
        column = self.__dict__.get("_names_of", {}).get(name)
        if column is None or column not in list(getattr(X, "columns", [])):
            return None
        return X[column].to_numpy()


class ChoiceFormulaMixin(FormulaMixin):
    """`from_formula` of models with groups."""

    @classmethod
    def from_formula(
        cls,
        formula: str,
        data: Any,
        groups: Any,
        alternatives: Any = None,
        clusters: Any = None,
        absorb: Any = None,
        weights: Any = None,
        offset: Any = None,
        missing: Literal["drop", "drop_rows", "raise"] = "drop",
        **constructor: Any,
    ) -> Self:
        """Fit a model given by a formula on a data frame.

        Parameters
        ----------
        formula : str
            ``"choice ~ cost + time + C(mode) + income:C(mode)"``: the target, which is a number, a truth
            value or the label of the chosen alternative, and terms as formulaic reads them. Text, categories
            and truth values are categories; integer codes become one by ``C()``.
        data : pandas or polars data frame, one row an alternative
        groups, alternatives, clusters, weights, offset : str or array_like, shape (n,)
            Columns by name, or values; of clusters also two.
        absorb : str, or list of str, of tuples of str or of array_like, optional
            Sets of fixed effects besides the groups, fitted without a column each: see
            `attnfit.problems.Softmax`. Few levels can as well be terms of the formula, ``C(destination)``.
        missing : {"drop", "drop_rows", "raise"}
            What becomes of missing values: the whole group is left out, or the row, or an error.
        **constructor
            Parameters of the class.

        Returns
        -------
        SoftmaxRegressor
            Fitted; ``predict`` and effects take data frames with the same columns, and ``notes_`` says what
            was dropped and which levels are references.

        Notes
        -----
        Columns that are the same for all rows of every group cannot be identified without an outside good:
        they are dropped, and interactions with them (``income:C(mode)``) lose one level. The formula can name
        what the caller sees; such a model cannot be saved.

        Raises
        ------
        KeyError
            If the data lack a column.
        ValueError
            For dates, infinite entries, repeated alternatives, or a target that cannot be read.
        """
        given = {
            "groups": groups,
            "alternatives": alternatives,
            "clusters": clusters,
            "weights": weights,
            "offset": offset,
            **absorbed_columns(absorb),
        }
        if groups is None:
            raise ValueError("groups is missing: the column that says which rows compete")
        model = cls(**constructor)
        outside = bool(constructor.get("outside_good", False))
        found = read_training(formula, data, given, missing, constants=outside, context=caller(2))
        model.fit(  # type: ignore[attr-defined]
            found.matrix,
            found.y,
            groups=found.given["groups"],
            sample_weight=found.given.get("weights"),
            offset=found.given.get("offset"),
            clusters=found.given.get("clusters"),
            absorb=absorbed_labels(absorb, found.given),
        )
        keep(model, found, formula)
        return model

    def _rows_of(self, X: Any, groups: Any) -> tuple[Any, Any]:
        """Return features and groups of new data."""
        if self.__dict__.get("_formula") is None:
            return read_groups(X, groups)
        if isinstance(groups, str):
            groups = X[groups].to_numpy()
        return self._columns_of(X), self._column_named("groups", X) if groups is None else groups


class OutcomeFormulaMixin(FormulaMixin):
    """`from_formula` of models without groups."""

    @classmethod
    def from_formula(
        cls,
        formula: str,
        data: Any,
        clusters: Any = None,
        absorb: Any = None,
        weights: Any = None,
        offset: Any = None,
        missing: Literal["drop", "drop_rows", "raise"] = "drop",
        **constructor: Any,
    ) -> Self:
        """Fit a model given by a formula on a data frame.

        Parameters
        ----------
        formula : str
            ``"trade ~ log(distance) + C(origin) + C(destination)"``; there is a constant unless it says
            ``0 +``.
        data : pandas or polars data frame
        clusters, weights, offset : str or array_like, shape (n,)
            Columns by name, or values; of clusters also two.
        absorb : str, or list of str, of tuples of str or of array_like, optional
            Sets of fixed effects, fitted without a column each: see `attnfit.problems.Poisson`. The constant
            is then one of them.
        missing : {"drop", "drop_rows", "raise"}
            What becomes of rows with missing values: left out, or an error.
        **constructor
            Parameters of the class.

        Raises
        ------
        KeyError
            If the data lack a column.
        ValueError
            For dates, infinite entries, or a target that cannot be read.
        """
        given = {"clusters": clusters, "weights": weights, "offset": offset, **absorbed_columns(absorb)}
        model = cls(**constructor)
        found = read_training(formula, data, given, missing, constants=True, context=caller(2))
        found = found if absorb is None else without_constant(found)
        model.fit(  # type: ignore[attr-defined]
            found.matrix,
            found.y,
            sample_weight=found.given.get("weights"),
            offset=found.given.get("offset"),
            clusters=found.given.get("clusters"),
            absorb=absorbed_labels(absorb, found.given),
        )
        keep(model, found, formula)
        return model

    def _rows_of(self, X: Any) -> Any:
        """Return the features of new data."""
        return self._columns_of(X)
