"""Estimators of shares: rows compete within groups."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from os import PathLike
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import r2_score
from sklearn.utils.validation import check_is_fitted

from attnfit.data.inputs import as_vector, parse_groups
from attnfit.estimators import reading
from attnfit.estimators.absorbing import Absorbed, AbsorbingMixin, read_absorb
from attnfit.estimators.base import BaseRegressor, Limits, with_callbacks
from attnfit.estimators.formula import ChoiceFormulaMixin
from attnfit.estimators.outside import add_zero_rows, outside_shares
from attnfit.estimators.reading import Rows, ShareTotals, normaliser_elsewhere, totals_elsewhere
from attnfit.losses.loss import Loss
from attnfit.objectives.rows import RowProblem
from attnfit.segments import Segments

Array = NDArray[np.float64]

# Shares that sum to more than this are those of several groups, not rounded ones of one.
SEVERAL = 1.5


class ShareRegressor(AbsorbingMixin, ChoiceFormulaMixin, BaseRegressor):
    """What softmax and rescaled regression share: groups, outside good, and the normaliser for `predict`."""

    ridge: float
    row_penalty: Any
    outside_good: bool
    n_groups_: int
    n_unbalanced_groups_: int
    _share_totals: ShareTotals
    _normaliser_name: str

    @abstractmethod
    def _loss(self) -> Loss:
        """Return the loss, whose normaliser and output predictions use."""

    @with_callbacks
    def fit(
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        offset: Any = None,
        *,
        absorb: Any = None,
        clusters: Any = None,
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = True,
        memory_limit: str | int | None = None,
    ) -> Self:
        """Fit the coefficients.

        Parameters
        ----------
        X : array, sparse matrix, memory map or data frame, shape (n, d)
            One row an alternative.
        y : array_like, shape (n,)
            Shares; they need not sum to one in a group.
        groups : array_like, optional
            n labels in any order, or offsets ``0 < ... < n``: rows of a group share a normaliser; or the name
            of a column of the data frame X, which is then no feature. By default all rows form one group.
        sample_weight : array_like, shape (n,) or (n_groups,), optional
            Weights repeat what was sampled. Without ``groups`` that is a row: weight w is the same as the row
            w times, in the normaliser too. With ``groups`` it is a group: the weight multiplies the loss, row
            by row, and a weight w on all rows of a group is the same as the group w times.
        offset : array_like, shape (n,), optional
            Added to the logits.
        absorb : list, optional
            Labels of sets of fixed effects besides the groups, of `SoftmaxRegressor`: names of columns of the
            data frame X, which are then no features, or arrays of shape (n,); a tuple is one set, of
            combinations. By default those of the constructor. See `attnfit.problems.Softmax`.
        clusters : array_like, shape (n,) or (n, 2), optional
            Labels of what was drawn independently, such as persons with several choices, one set or two; or
            the name of a column of X, which is then no feature. They enter the standard errors only.
        checkpoint, resume, memory_limit
            As in `attnfit.minimize`: a file from which the fit goes on after a crash, whether it does, and
            the bytes that the process may hold, such as "1GB".

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        ValueError
            On input that is not finite, of the wrong shape or sign; the message names argument and index.
        NotImplementedError
            For ``absorb`` with data on Dask, a row penalty, a checkpoint or a memory limit.

        Notes
        -----
        With a Dask array or data frame for X, or y on disk (`attnfit.data.open_source`), the data stay
        where they are: what needs all rows at once is then refused, and ``r2_`` is NaN.
        """
        self._loss()
        rows, groups = reading.read_groups(X, groups)
        rows, clusters = reading.read_groups(rows, clusters, "clusters")
        labels: Absorbed | None = None
        absorb = getattr(self, "absorb", None) if absorb is None else absorb
        if absorb is not None:
            rows, labels = read_absorb(rows, absorb)
            if self.outside_good:
                raise ValueError(
                    "outside_good=True does not go with absorb: an outside good has no label; add a row of "
                    "zeros with a label of its own to each group"
                )
            if groups is None and sample_weight is not None:
                raise ValueError(
                    "sample_weight repeats rows where there are no groups, which does not go with absorb; "
                    "pass groups (np.zeros(n) for one group)"
                )
        given = {"groups": groups, "sample_weight": sample_weight, "offset": offset}
        limits = Limits(checkpoint, resume, memory_limit)
        return self._fit(rows, y, given, limits, clusters=clusters, labels=labels)

    def _read(
        self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None, offset: Any = None
    ) -> Rows:
        design = reading.read_features(self, X, reset=True)
        n = n_given = int(design.shape[0])
        y = reading.read_target(self, y, n)
        sets = parse_groups(groups, n)
        shift = reading.read_offset(offset, n)
        weights = reading.read_weights(sample_weight, n, None if groups is None else sets)
        counts: Array | None = None
        kept: NDArray[np.bool_] | None = None
        if groups is None and weights is not None:
            counts, weights = weights, None
            if not counts.all():
                kept = counts > 0.0
                design, y, counts = reading.take_rows(design, kept), y[kept], counts[kept]
                shift, n = None if shift is None else shift[kept], len(y)
                sets = parse_groups(None, n)
        numbers = reading.group_numbers(sets, n)
        ids = None if len(sets) == 1 else numbers
        mass = y if counts is None else counts * y
        outside = outside_weights = np.zeros(0)
        if self.outside_good:
            outside = outside_shares(mass, sets, numbers)
            design = add_zero_rows(design, len(sets))
            if weights is not None:
                outside_weights = np.bincount(numbers, weights=weights) / np.bincount(numbers)
            if ids is not None:
                ids = np.concatenate([numbers, np.arange(len(sets))])
        totals = np.bincount(numbers, weights=mass, minlength=len(sets)) + (outside if len(outside) else 0.0)
        # With an outside good there are two rows at least.
        sizes = () if len(outside) or len(sets) == 1 else np.bincount(numbers)
        # What is given by row, for every row of the design: see `Rows`.
        zeros = np.zeros(len(outside))
        loss_weights = None if weights is None else np.concatenate([weights, outside_weights])
        squared_weights = loss_weights
        penalty = as_vector(self.row_penalty, n_given, "row_penalty", scalar=True)
        if penalty.ndim and kept is not None:
            penalty = penalty[kept]
        if counts is not None:
            squared_weights = np.concatenate([1.0 / counts, np.ones(len(outside))])
            penalty = penalty * np.sqrt(counts) if penalty.any() else penalty
            shift = np.log(counts) + (0.0 if shift is None else shift)
        penalty = np.concatenate([penalty, zeros]) if penalty.ndim else penalty
        shift = None if shift is None else np.concatenate([shift, zeros])
        return Rows(
            design, target=np.concatenate([mass, outside]), groups=ids, n_groups=len(sets),
            loss_weights=loss_weights, squared_weights=squared_weights, logit_offset=shift,
            row_penalty=penalty, y=y, weights=weights, counts=counts, kept=kept, outside=outside,
            outside_weights=outside_weights, totals=ShareTotals.of(totals, sets.labels, sizes),
        )  # fmt: skip

    def _after_fit(self, rows: Rows, problem: RowProblem, y: Any, groups: Any) -> None:
        totals, self.n_groups_ = rows.totals, rows.n_groups
        here = totals is not None
        if totals is None:
            totals, self.n_groups_ = totals_elsewhere(problem, y, groups), problem.n_groups
        self._share_totals, self.n_unbalanced_groups_ = totals, totals.n_above + totals.n_below
        self.__dict__.pop(self._normaliser_name, None)
        if self.n_groups_ > 1:
            return
        if here:
            z = reading.linear_predictor(problem.design, self._point, problem.offset)
            segments = Segments(np.zeros(1, dtype=np.intp), len(z))
            normaliser = float(self._loss().reference(z, segments)[0])
        else:
            normaliser = normaliser_elsewhere(problem, self._point)
        setattr(self, self._normaliser_name, normaliser)

    @property
    def share_totals_(self) -> ShareTotals:
        """Which groups' targets do not sum to one; a saved model does not carry it."""
        if not hasattr(self, "_share_totals"):
            raise AttributeError(
                "share_totals_ is known after fit, and not to a model that was saved; n_unbalanced_groups_ is"
            )
        return self._share_totals

    def _note_targets(self, rows: Rows, *, grouped: bool) -> None:
        """Warn where several groups have become one: a cross-validation hands none on of its own accord."""
        y = rows.y
        total = float(y.sum())
        if not grouped and total > SEVERAL and ((y >= 0.0) & (y <= 1.0)).all():
            warnings.warn(
                f"y sums to {total:.6g}, and the shares of one group to 1: pass groups, also to a "
                "cross-validation (metadata routing: set_fit_request(groups=True) and "
                "set_score_request(groups=True))",
                UserWarning,
                stacklevel=5,
            )

    def _bounded(self, shares: Array) -> Array:
        """Bring shares of rows that were not in the group into the range of a share."""
        return shares

    def predict(self, X: Any, groups: Any = None, offset: Any = None, absorb: Any = None) -> Array:
        """Return the share of each row, shape (n,).

        Parameters
        ----------
        X : array, sparse matrix, memory map or data frame, shape (n, d)
        groups : array_like, optional
            Labels, offsets or the name of a column of X: shares within these groups (and, with
            ``outside_good=True``, an outside good each). Without them the normaliser of the training data
            serves, so that a row's share does not depend on the other rows; where these formed several groups
            there is none, and groups are required.
        offset : array_like, shape (n,), optional
            Added to the logits.
        absorb : list, optional
            Labels of the effects as in `fit`; those that the constructor names are taken from X. Groups with
            a label that the fit has not seen get NaN.

        Raises
        ------
        ValueError
            If the model was fitted on several groups and none are given, or labels are missing.
        OverflowError
            Where the answer exceeds float64.
        """
        check_is_fitted(self)
        X, effects = self._effects_of(X, absorb)
        X, groups = self._rows_of(X, groups)
        design = reading.read_features(self, X, reset=False)
        n = int(design.shape[0])
        self._require_groups(groups)
        z = reading.linear_predictor(design, self._point, reading.read_offset(offset, n))
        z = z if effects is None else z + effects
        sets, loss = parse_groups(groups, n), self._loss()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if groups is None and hasattr(self, self._normaliser_name):
                state = [np.array([getattr(self, self._normaliser_name)])]
            else:
                segments = Segments(sets.starts, n)
                normaliser = loss.reference(sets.sort(z), segments)
                if self.outside_good:
                    alone = Segments(np.arange(len(sets)), len(sets))
                    normaliser = loss.merge_references(normaliser, loss.reference(np.zeros(len(sets)), alone))
                state = [segments.spread(normaliser)]
            shares = self._bounded(sets.unsort(loss.fitted(sets.sort(z), state)))
        bad = ~np.isfinite(shares) if effects is None else np.isinf(shares)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            scale = float(sets.unsort(np.broadcast_to(state[0], (n,)))[i])
            raise OverflowError(
                f"the share of row {i} is not finite (X coef_ + offset is {z[i]:.4g}, the normaliser is "
                f"{scale:.4g}): X is far from the training data, groups are missing, or coef_ and u(0) are 0"
            )
        return shares

    def _require_groups(self, groups: Any) -> None:
        if groups is None and self.n_groups_ > 1:
            raise ValueError(
                f"groups is missing: {type(self).__name__} was fitted on {self.n_groups_:,} groups, and "
                "shares are shares of a group; pass one label a row, or the name of a column of X "
                "(groups=np.zeros(len(X)) if all rows are one group). In cross-validation and searches "
                "enable metadata routing and call set_fit_request(groups=True) and "
                "set_score_request(groups=True); attnfit.estimators.ShareScorer passes groups on to scores"
            )

    def score(
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        offset: Any = None,
        absorb: Any = None,
    ) -> float:
        """Return the coefficient of determination of ``predict(X, groups, offset, absorb)``."""
        check_is_fitted(self)
        X, groups = self._rows_of(X, groups)
        shares = self.predict(X, groups=groups, offset=offset, absorb=absorb)
        n = len(shares)
        weights = reading.read_weights(sample_weight, n, None if groups is None else parse_groups(groups, n))
        return float(r2_score(y, shares, sample_weight=weights))
