"""Absorbed effects in estimators: labels by name or as arrays, and effects in predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import narwhals as nw
import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import is_dask
from attnfit.effects.prepared import Data
from attnfit.effects.problem import DASK, AbsorbedProblem, require_absorbable
from attnfit.estimators.reading import column_of
from attnfit.solvers import Result

Array = NDArray[np.float64]


class Absorbed(NamedTuple):
    """Labels of the sets of effects, the names of the sets, and their columns if all have names."""

    labels: list[Any]
    names: list[str]
    columns: list[Any] | None = None

    def rows(self, keep: Any) -> Absorbed:
        """Return the labels of some of the rows."""
        some = [tuple(part[keep] for part in c) if isinstance(c, tuple) else c[keep] for c in self.labels]
        return self._replace(labels=some)


def read_absorb(X: Any, absorb: Any) -> tuple[Any, Absorbed | None]:
    """Return X without the columns that hold labels, and the labels.

    Parameters
    ----------
    X : array_like or data frame
    absorb : list of str, of tuples of str, or of array_like; or one of them
        Names of columns of X, which are then no features; a tuple is one set, of combinations.

    Raises
    ------
    ValueError
        If X has no such column.
    NotImplementedError
        For data on Dask.
    """
    if absorb is None or isinstance(absorb, Absorbed):
        return X, absorb
    if isinstance(absorb, str):
        absorb = [absorb]
    if nw.dependencies.is_into_dataframe(absorb):
        frame = nw.from_native(absorb, eager_only=True)
        return X, Absorbed(
            [frame[name].to_numpy() for name in frame.columns], list(frame.columns), list(frame.columns)
        )
    if not isinstance(absorb, list | tuple) or not len(absorb):
        absorb = list(np.asarray(absorb).T) if np.ndim(absorb) == 2 else [absorb]
    if not any(map(_is_named, absorb)) and np.ndim(absorb[0]) == 0:
        absorb = [absorb]
    if is_dask(X):
        raise NotImplementedError(DASK)
    labels: list[Any] = []
    names: list[str] = []
    used: list[str] = []
    for k, entry in enumerate(absorb):
        names.append(name_of(entry, k))
        if not _is_named(entry):
            labels.append(entry)
            continue
        parts = (entry,) if isinstance(entry, str) else tuple(entry)
        columns = tuple(column_of(X, name, "absorb")[0] for name in parts)
        labels.append(columns[0] if len(columns) == 1 else columns)
        used += parts
    if used:
        X = nw.from_native(X, eager_only=True).drop(list(dict.fromkeys(used))).to_native()
    return X, Absorbed(labels, names, named_columns(absorb))


def named_columns(absorb: Any) -> list[Any] | None:
    """Return the sets of effects as names of columns; None where one is given as values."""
    sets = [absorb] if isinstance(absorb, str) else list(absorb)
    return sets if all(map(_is_named, sets)) else None


def flat_names(columns: Sequence[Any]) -> list[str]:
    """Return the columns of all sets, each once."""
    parts = [[entry] if isinstance(entry, str) else list(entry) for entry in columns]
    return list(dict.fromkeys(name for part in parts for name in part))


def name_of(entry: Any, place: int) -> str:
    """Return what messages call a set of effects."""
    if not _is_named(entry):
        return f"absorb[{place}]"
    return entry if isinstance(entry, str) else " x ".join(entry)


def _is_named(entry: Any) -> bool:
    return isinstance(entry, str) or (
        isinstance(entry, tuple) and len(entry) > 0 and all(isinstance(part, str) for part in entry)
    )


class AbsorbingMixin:
    """Effects in the fit and in the predictions of an estimator."""

    absorb: Any
    result_: Result
    _absorb_names: list[Any] | None

    def _objective(self, problem: Any, labels: Absorbed | None) -> Any:
        """Return what is minimised."""
        if labels is None:
            return problem
        require_absorbable(problem)
        self._absorb_names = labels.columns
        data = Data(problem, problem.design, labels.labels, drop_singletons=False, names=labels.names)
        return AbsorbedProblem(data)

    def _effects_of(self, X: Any, absorb: Any) -> tuple[Any, Array | None]:
        """Return the features of new data and the sum of the effects of their rows, shape (n,).

        Raises
        ------
        ValueError
            If labels are missing that the model was fitted with, or given to one that was not.
        """
        effects = self.result_.effects
        if effects is None:
            if absorb is not None:
                raise ValueError("absorb is given, but the model was fitted without; leave it out")
            return X, None
        names = self.__dict__.get("_absorb_names")
        known = set(getattr(X, "columns", ()))
        if absorb is None and names is not None and known.issuperset(flat_names(names)):
            absorb = names
        if absorb is None:
            raise ValueError(
                "absorb is missing: the model was fitted with effects of "
                f"{', '.join(s.name for s in effects)}; pass their labels"
            )
        features, labels = read_absorb(X, absorb)
        # A formula picks its columns itself, and may use one of labels too.
        X = X if "_formula" in self.__dict__ else features
        assert labels is not None
        if len(labels.labels) != len(effects):
            raise ValueError(
                f"absorb has {len(labels.labels)} sets of labels; the model was fitted with {len(effects)}"
            )
        return X, effects.sum_of(labels.labels)

    def _require_no_effects(self, what: str) -> None:
        """Refuse what has no form with absorbed effects.

        Raises
        ------
        NotImplementedError
        """
        if self.result_.effects is not None:
            raise NotImplementedError(
                f"{what} is not available with absorbed effects; where they are few, pass them as dummies"
            )
