"""Standard errors of a fit with absorbed effects: those of a fit with a dummy for every level."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import xlogy

from attnfit.effects.problem import AbsorbedEnd, AbsorbedProblem
from attnfit.effects.rows import eliminated
from attnfit.effects.schur import Factors
from attnfit.effects.squared import SquaredRows
from attnfit.effects.values import fitted_rows
from attnfit.inference.fitted import Fitted
from attnfit.inference.sweep import TIE, Known, LongFacts, Sums, Wanted
from attnfit.inference.units import Labels
from attnfit.segments import Array, Index, Segments


class AbsorbedFitted(Fitted):
    """What inference sees of a fit with absorbed effects.

    Parameters
    ----------
    problem : AbsorbedProblem
    end : AbsorbedEnd
    x : ndarray, shape (K,)
        A finite point.

    Notes
    -----
    The information on the coefficients is the inverse of their block of the inverse of the whole information
    matrix. Scores of rows are ``Xt_i e_i`` with ``Xt = X - D_0 C_0 - R C``, what regressions of the columns
    on all effects in the metric of the curvature leave (Frisch and Waugh, 1933, doi:10.2307/1907330):
    sandwiches are those of the fit with dummies.
    """

    def __init__(self, problem: AbsorbedProblem, end: AbsorbedEnd, x: Array, **options: Any) -> None:
        super().__init__(problem.plain, x, **options)
        self.absorbed, self.end = problem, end

    @property
    def _reduced(self) -> tuple[Any, Array, Array]:
        """Columns keep their units: they were standardised for the fit."""
        return self.given, self.point, np.ones(len(self.point))

    @property
    def n_effects(self) -> int:
        """Parameters that the effects take up besides the constants of groups."""
        prepared = self.end.prepared
        return prepared.rank() - (prepared.rows.cells.n_first if prepared.data.grouped else 0)

    def sums(self, wanted: Wanted, labels: Labels | None) -> Sums:
        """Return the sums over rows: one read."""
        end = self.end
        prepared, rows, scale = end.prepared, end.prepared.rows, end.prepared.rows.features.scale
        d, moments = len(self.x), end.point.moments
        G, sizes = self._information()
        residual = moments.residual
        places = rows.features.places
        copies = np.ones(len(places)) if not wanted.frequency else prepared.data.w[places]
        by_row, score = np.zeros((d, d)), np.zeros(d)
        n_sets = () if labels is None else labels.numbers
        units = {k: np.zeros((wanted.n_units[k], d)) for k in range(len(n_sets))}
        first = rows.level_of_row()
        by_level = np.zeros((rows.cells.n_first if wanted.by_group else 0, d))
        for where, block in rows.residual_rows(end.precise.C_first, end.precise.C):
            scores = block * (residual[where][:, None] * scale)
            score += scores.sum(axis=0)
            by_row += (scores / copies[where][:, None]).T @ scores
            if wanted.by_group:
                np.add.at(by_level, first[where], scores)
            for k, of_row in enumerate(n_sets):
                np.add.at(units[k], of_row[places[where]], scores)
        mean = self._copies_by_level(copies) if wanted.by_group else np.ones(0)
        by_group = (by_level / mean[:, None]).T @ by_level if wanted.by_group else np.zeros((d, d))
        jacobian = self._jacobian() if wanted.jacobian else None
        found = Sums(
            Known(G), None, Known(by_group), Known(by_row), jacobian, sizes, score, np.zeros((0, d)),
            np.zeros((0, 2)), LongFacts.empty(len(wanted.n_units), 0),
        )  # fmt: skip
        found.totals = self._totals()
        for k, of_row in enumerate(n_sets):
            found.unit_scores[k] = units[k]
            found.unit_rows[k] = np.bincount(of_row[places], minlength=wanted.n_units[k]).astype(np.float64)
            if prepared.data.grouped:
                numbers = prepared.data.sets[0].codes
                low, high = np.full(numbers.max() + 1, len(of_row)), np.full(numbers.max() + 1, -1)
                np.minimum.at(low, numbers, of_row)
                np.maximum.at(high, numbers, of_row)
                found.totals[f"split_{k}"] = float(np.count_nonzero(low != high))
        return found

    def _jacobian(self) -> Known:
        """Return the Gram of the residuals' Jacobian, effects eliminated: one read."""
        prepared, moments = self.end.prepared, self.end.point.moments
        rows, metric = prepared.rows, moments.metric
        assert isinstance(rows, SquaredRows)
        _, ((H, B_first, B_rest),) = rows.products(moments.residual, rows.w * moments.mu**2)
        within, B, _ = eliminated(metric, H, B_first, B_rest)
        if len(B):
            B = rows.consistent(B)
            solved = Factors().solve(metric, B, None, np.full(len(H), 1e-10), 1e-26 * np.diag(H))
            within = within - B.T @ solved.x
        scale = rows.features.scale
        return Known(np.asarray(within * scale * scale[:, None]))

    def _information(self) -> tuple[Array, Array]:
        """Return the information without what the effects explain, and the squares before elimination."""
        here, scale = self.end.precise, self.end.prepared.rows.features.scale
        unit = np.sqrt(here.sizes)
        scaled = here.G / unit / unit[:, None]
        left = np.eye(len(unit)) - here.open @ here.open.T
        G = (left @ scaled @ left) * unit * unit[:, None]
        return np.asarray(G * scale * scale[:, None]), here.sizes * scale**2

    def _copies_by_level(self, copies: Array) -> Array:
        first = self.end.prepared.rows.level_of_row()
        found = np.bincount(first, weights=copies) / np.bincount(first)
        return np.where(found > 0.0, found, 1.0)

    def _totals(self) -> dict[str, float]:
        """Return what compares outputs with targets."""
        prepared = self.end.prepared
        data = prepared.data
        f = fitted_rows(prepared, self.end.point.moments.mu)
        y, w, known = data.b, data.w, np.isfinite(f)
        f, y, w = f[known], y[known], w[known]
        found = {"brier": float(np.sum(w * (f - y) ** 2))}
        if data.squared and not data.grouped:
            return found
        if not data.grouped:
            apart = np.where(y > 0.0, xlogy(y, y) - xlogy(y, np.where(f > 0.0, f, 1.0)), 0.0)
            found["deviance"] = 2.0 * float(np.sum(w * (apart - y + f)))
            return found
        found["log_loss"] = -float(np.sum(xlogy(w * y, np.where(y > 0.0, f, 1.0))))
        order: Index = np.argsort(data.sets[0].codes[known], kind="stable")
        codes = data.sets[0].codes[known][order]
        segments = Segments(np.flatnonzero(np.diff(codes, prepend=-1)), len(codes))
        f, y, w = f[order], y[order], w[order]
        largest = f >= segments.spread(segments.max(f)) - TIE
        ties = segments.spread(segments.sum(largest.astype(np.float64)))
        found["hits"] = float(np.sum(np.where(largest & (y > 0), w / ties, 0.0)))
        return found
