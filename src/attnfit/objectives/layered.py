"""Squared loss of an activation of a linear map of a softmax: what the layered problems share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point
from attnfit.losses.vector_activations import AnyActivation, VectorActivation
from attnfit.objectives.kinks import Kink, Settled, kinks_at, settle
from attnfit.objectives.layer_curvature import (
    Escape,
    LayeredEvaluation,
    Layers,
    column_diagonals,
    column_hessians,
    weighted_outputs,
)
from attnfit.objectives.layer_inputs import LinearMap, ReluMap
from attnfit.objectives.objective import Evaluation, Moved, Offer, Problem

Array = NDArray[np.float64]
Columns = slice | NDArray[np.intp]

# Columns are taken together until their intermediate arrays hold this many numbers.
CHUNK_ENTRIES = 2**22


class LayeredProblem(Problem):
    """``0.5 sum w (h(A_out softmax(z(x) + offset)) - b)^2 + 0.5 ||diag(row_penalty) z(x)||^2 + 0.5 ridge
    ||x||^2``.

    ``z(x)`` is a `LinearMap` or a `ReluMap`, and A_out = None the identity. Several right-hand sides are
    columns with an unknown each; everything is computed for all of them at once.
    """

    # One costs as much as d gradients, but away from a minimum an old one is no use: curvature changes sign
    # there.
    best_hessian = "exact"

    @property
    def offers(self) -> frozenset[Offer]:  # type: ignore[override]
        """Independent right-hand sides; of mixtures the faces of the simplex."""
        own = {Offer.MIXTURE} if self.is_mixture else set()
        return frozenset({Offer.COLUMNS} | own | ({Offer.KINKS} if self.activation.kink else set()))

    @property
    def is_mixture(self) -> bool:
        """Whether the problem is convex in the softmax outputs, over all of the simplex."""
        return False

    def __init__(
        self,
        logit_map: LinearMap | ReluMap,
        outer: Any,
        b: Array,
        activation: AnyActivation,
        *,
        batch: bool,
        weights: Array | None,
        offset: Array | None,
        penalty: Array | None,
        ridge: float,
    ) -> None:
        self.logit_map = logit_map
        self.outer = outer
        self.b = b
        self.activation = activation
        self.weights = weights
        self.offset = offset
        self.penalty = penalty
        self.ridge = ridge
        self._batch = batch
        self._require_outputs_off_kinks()
        self._reads = [0.0]
        self._share = 1.0

    def _require_outputs_off_kinks(self) -> None:
        """Refuse outputs that sit on a kink of the activation wherever x is."""
        if self.activation.kink is None or self.outer is None:
            return
        empty = np.flatnonzero(np.asarray(abs(self.outer).sum(axis=1)).reshape(-1) == 0.0)
        if len(empty):
            raise ValueError(
                f"row {empty[0]} of the last matrix is zero: its output sits on the kink of "
                f"{self.activation.name} whatever x is; leave this row and its target out"
            )

    # ---- sizes

    @property
    def n_columns(self) -> int:
        """Number of right-hand sides."""
        return int(self.b.shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(d,), or (d, k) for k right-hand sides in two dimensions."""
        d = self.logit_map.shape[1]
        return (d, self.n_columns) if self._batch else (d,)

    @property
    def n_passes(self) -> float:
        """Products with the first matrix and its Grams since the problem was made; a product of some columns
        counts by their share.
        """
        return self._reads[0]

    def columns(self, index: Columns) -> LayeredProblem:
        """Return the problem of some right-hand sides; it shares the data and the count of reads."""

        def take(array: Array | None) -> Array | None:
            return array if array is None or array.shape[1] == 1 < self.n_columns else array[:, index]

        part = copy.copy(self)
        part.b = self.b[:, index]
        part.weights, part.offset = take(self.weights), take(self.offset)
        part._batch = True
        part._share = self._share * part.n_columns / self.n_columns
        return part

    def chunks(self, entries: int = CHUNK_ENTRIES) -> Iterator[slice]:
        """Yield runs of columns that are taken together."""
        step = max(1, entries // (sum(self.logit_map.shape) + len(self.b)))
        for first in range(0, self.n_columns, step):
            yield slice(first, min(first + step, self.n_columns))

    # ---- the layers

    def _matrix(self, x: Array) -> Array:
        return x.reshape(-1, self.n_columns)

    def _forward(self, X: Array) -> tuple[Any, Array, Array, Array]:
        """Return pattern, logits without offset, softmax and the argument of the activation."""
        self._reads[0] += self._share
        linear, pattern = self.logit_map.logits(X)
        z = linear if self.offset is None else linear + self.offset
        f = np.exp(z - z.max(axis=0))
        f /= f.sum(axis=0)
        return pattern, linear, f, self._out(f)

    def _out(self, f: Array) -> Array:
        return f if self.outer is None else np.asarray(self.outer @ f)

    def _back(self, r: Array) -> Array:
        return r if self.outer is None else np.asarray(self.outer.T @ r)

    def _adjoint(self, pattern: Any, R: Array) -> Array:
        self._reads[0] += self._share
        return self.logit_map.adjoint(pattern, R)

    def layers_at(self, X: Array) -> Layers:
        """Return the layers at unknowns of shape (d, k)."""
        pattern, linear, f, y = self._forward(X)
        residual, slope, gauss, curvature = self.activation.derivatives(y, self.b, self.weights)
        q = self._back(slope)
        a = f * (q - np.sum(f * q, axis=0))
        return Layers(pattern, linear, f, q, a, residual, slope, curvature, gauss)

    def _values(self, X: Array, layers: Layers) -> Array:
        squares = layers.residual**2 if self.weights is None else self.weights * layers.residual**2
        values = 0.5 * squares.sum(axis=0) + 0.5 * self.ridge * np.sum(X * X, axis=0)
        if self.penalty is not None:
            values += 0.5 * np.sum(self.penalty * layers.linear**2, axis=0)
        return np.asarray(values)

    def _gradient(self, X: Array, layers: Layers) -> Array:
        return self._adjoint(layers.pattern, self.logit_slope(layers)) + self.ridge * X

    def logit_slope(self, layers: Layers) -> Array:
        """Return the gradient with respect to the logits, penalty included, shape (n, k)."""
        return layers.a if self.penalty is None else layers.a + self.penalty * layers.linear

    # ---- what the solvers use

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> LayeredEvaluation:
        """Return value and gradient at x, and on request the gradient at zero; the Hessian is withheld."""
        X = self._matrix(x)
        values, gradient = np.empty(self.n_columns), np.empty_like(X)
        runs = list(self.chunks())
        layers = None
        for run in runs:
            part = self if len(runs) == 1 else self.columns(run)
            layers = part.layers_at(X[:, run])
            values[run] = part._values(X[:, run], layers)
            gradient[:, run] = part._gradient(X[:, run], layers)
        zero = self.evaluate(np.zeros_like(x)).gradient if at_zero else None
        return LayeredEvaluation(
            x,
            float(values.sum()),
            gradient.reshape(-1),
            gradient_at_zero=zero,
            column_values=values,
            layers=layers if len(runs) == 1 else None,
        )

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step changes a log-odds of the softmax at most, halved."""
        X = self._matrix(at.x)
        return Moved(np.array([self.column_moves(X, self._matrix(p)).max() for p in steps.T]))

    def column_moves(self, X: Array, P: Array) -> Array:
        """Return half the largest change of a log-odds of each column along its step, shape (k,); to first
        order where a ReLU comes before the softmax.
        """
        out = np.empty(self.n_columns)
        for run in self.chunks():
            part = self if run.stop - run.start == self.n_columns else self.columns(run)
            first: Any = part.logit_map
            pattern = None if isinstance(first, LinearMap) else first.logits(X[:, run])[1]
            self._reads[0] += part._share
            along = first.forward(pattern, P[:, run])
            out[run] = 0.5 * (along.max(axis=0) - along.min(axis=0))
        return out

    def layers_of(self, at: Evaluation) -> Layers:
        """Return the layers at an evaluated point, kept or computed again."""
        layers = at.layers if isinstance(at, LayeredEvaluation) else None
        return self.layers_at(self._matrix(at.x)) if layers is None else layers

    def column_hessians(self, at: Evaluation, kind: str = "full") -> Array:
        """Return the Hessian of each column, shape (k, d, d).

        Parameters
        ----------
        at : Evaluation
        kind : {"full", "gauss_newton", "absolute"}
            "absolute" takes both diagonals by absolute value: a positive semidefinite majorant.
        """
        d = self.logit_map.shape[1]
        out = np.empty((self.n_columns, d, d))
        for run, part, layers in self._parts(at, d):
            out[run] = column_hessians(part, layers, kind)
        return out

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian at an evaluated point, block diagonal for several columns, in C order of (d,
        k).
        """
        return self._assembled(self.column_hessians(at, "absolute" if absolute else "full"))

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of a positive majorant of the Hessian, shape (n_unknowns,)."""
        d = self.logit_map.shape[1]
        out = np.empty((d, self.n_columns))
        for run, part, layers in self._parts(at, d):
            out[:, run] = column_diagonals(part, layers)
        return out.reshape(-1)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v at an evaluated point: two products with every matrix."""
        layers = self.layers_of(at)
        return lambda v: self._product(layers, v, gauss_newton=False)

    def _product(self, layers: Layers, v: Array, *, gauss_newton: bool) -> Array:
        V = self._matrix(v)
        self._reads[0] += self._share
        U = self.logit_map.forward(layers.pattern, V)
        f = layers.f
        centred = U - np.sum(f * U, axis=0)
        weights = layers.gauss if gauss_newton else layers.curvature
        t = self._back(weighted_outputs(weights, self._out(f * centred)))
        r = f * (t - np.sum(f * t, axis=0))
        if not gauss_newton:
            r += layers.a * centred - f * np.sum(layers.a * centred, axis=0)
        if self.penalty is not None:
            r += self.penalty * U
        return np.asarray((self._adjoint(layers.pattern, r) + self.ridge * V).reshape(-1))

    def _parts(self, at: Evaluation, d: int) -> Iterator[tuple[slice, LayeredProblem, Layers]]:
        """Yield runs of columns, their problem and their layers; d arrays of their size fit into memory."""
        runs = list(self.chunks(CHUNK_ENTRIES // d))
        if len(runs) == 1:
            yield runs[0], self, self.layers_of(at)
            return
        X = self._matrix(at.x)
        for run in runs:
            part = self.columns(run)
            yield run, part, part.layers_at(X[:, run])

    def _assembled(self, blocks: Array) -> Array:
        k, d, _ = blocks.shape
        if k == 1:
            return np.asarray(blocks[0])
        out = np.zeros((d, k, d, k))
        out[:, np.arange(k), :, np.arange(k)] = blocks
        return out.reshape(d * k, d * k)

    # ---- what users call

    def predict(self, x: Any) -> Array:
        """Return ``h(A_out softmax(z(x)))``, shape (m,) or (m, k)."""
        return self._natural(self.activation(self._forward(self._matrix(as_point(x, self.shape)))[3]))

    def proportions(self, x: Any) -> Array:
        """Return the softmax, shape (n,) or (n, k); each column sums to one."""
        return self._natural(self._forward(self._matrix(as_point(x, self.shape)))[2])

    def column_values(self, x: Any) -> Array:
        """Return the value of each right-hand side, shape (k,)."""
        return self.evaluate(as_point(x, self.shape)).column_values

    def gauss_newton(self, x: Any) -> Array:
        """Return the Gauss-Newton matrix at x, shape (n_unknowns, n_unknowns): positive semidefinite, and the
        Hessian where the residual is zero.
        """
        return self._assembled(self.column_hessians(self._evaluate_checked(x), "gauss_newton"))

    def gauss_newton_product(self, x: Any, v: Any) -> Array:
        """Return the product of the Gauss-Newton matrix at x with v, in the natural shape."""
        layers = self.layers_of(self._evaluate_checked(x))
        product = self._product(layers, as_point(v, self.shape, "v"), gauss_newton=True)
        return product.reshape(self.shape)

    def false_optimum(self, at: Evaluation) -> str | None:
        """Return why a point without gradient is no minimum, None if nothing speaks against it.

        An output of the softmax that underflows takes its part of the gradient with it: a loss that falls
        when the output is raised is proof that the point is no minimum.
        """
        X = self._matrix(at.x)
        for run in self.chunks():
            layers = self.columns(run).layers_at(X[:, run])
            if layers.pattern is not None and not layers.pattern.any(axis=0).all():
                return "no row of relu(A1 x) is active, so the gradient vanishes whatever the data"
        for column, (output, _) in self.escapes(at).items():
            where = f" of right-hand side {column}" if self._batch else ""
            return (
                f"softmax output {output}{where} has underflowed and its gradient with it, but the loss "
                "falls "
                "where it is raised"
            )
        return None

    @property
    def note(self) -> str:  # type: ignore[override]
        """What the Hessian leaves out."""
        bare = isinstance(self.activation, VectorActivation) and self.activation.bend is None
        return "Gauss-Newton in h, whose second derivatives are not given" if bare else ""

    def kinks(self, x: Any) -> list[Kink]:
        """Return the outputs that x puts on a kink of the activation, up to rounding: see
        `attnfit.objectives.kinks`.
        """
        return kinks_at(self, self._matrix(as_point(x, self.shape)))

    def end(self, at: Evaluation, tol: float) -> Settled | None:
        """Return what kinks and dead outputs say of the end of a fit; None where there are none."""
        return settle(self, self._matrix(at.x), tol)

    def escapes(self, at: Evaluation) -> dict[int, Escape]:
        """Return the columns at a false optimum, each with an output that was left out and a lower point."""
        from attnfit.objectives.saturation import false_optima

        X, found = self._matrix(at.x), {}
        for run in self.chunks():
            part = self.columns(run)
            layers = part.layers_at(X[:, run])
            for column, escape in false_optima(
                part, X[:, run], part._values(X[:, run], layers), layers
            ).items():
                found[run.start + column] = escape
        return found

    def _natural(self, columns: Array) -> Array:
        return columns if self._batch else columns[:, 0]
