"""Regression on the exponential kernel of self-attention, whose n x n matrix is never formed.

With ``K = exp(A A^T / tau)`` entrywise and ``S = diag(exp(|a_i|^2 / (2 tau)))``, ``K = S G S`` with
``G_ij = exp(-|a_i - a_j|^2 / (2 tau))``: nothing overflows in G, whose diagonal is one. With D the row sums
of K the softmax ``D^-1 K`` is similar to ``D^-1/2 K D^-1/2``, whose eigenvalues lie in (0, 1]. Both are
``M_ij = exp(a_i . a_j / tau - s_i - s_j)`` with ``s = |a|^2 / (2 tau)`` and ``s = log(D) / 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.special import logsumexp

from attnfit.data.inputs import as_point, as_ridge, choose
from attnfit.objectives.layer_inputs import as_columns, as_matrix
from attnfit.objectives.objective import MAX_DENSE, Evaluation, Moved, Offer, Problem

Array = NDArray[np.float64]
Penalty = Literal["function", "coefficients"]

# Bytes of a block of the kernel.
BLOCK_BYTES = 1 << 24
# Without a penalty the smallest eigenvalue must be this share of the largest, by as many Lanczos steps; of a
# kernel no larger than EXACT the eigenvalues themselves tell.
SEPARATE, LANCZOS_STEPS, EXACT = 1e-12, 30, 200
# A pivot with less of its diagonal left is rounding.
PIVOT = 1e-13
# The shift of a preconditioner, as a share of the largest eigenvalue.
SHIFT = 1e-12
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class LowRank:
    """``P^-1 v = (v - F middle F^T v) / shift``: the inverse of ``F F^T + shift``, or of its square plus
    shift.

    Attributes
    ----------
    F : ndarray, shape (n, r)
        Partial Cholesky factor of the kernel.
    middle : ndarray, shape (r, r)
    shift : float
    effective_rank : int
        Number of eigenvalues of ``F F^T`` above the penalty: how many directions the data decide.
    """

    F: Array
    middle: Array
    shift: float
    effective_rank: int

    @property
    def rank(self) -> int:
        """The number of pivots."""
        return int(self.F.shape[1])

    def __call__(self, V: Array) -> Array:
        """Return ``P^-1 V``, shape (n, k)."""
        return np.asarray((V - self.F @ (self.middle @ (self.F.T @ V))) / self.shift)


class KernelRegression(Problem):
    """Least squares on the kernel of self-attention, ``|exp(A A^T / temperature) x - b|``, penalised.

    The unknown is ``y = S x`` (see Notes), in which nothing overflows:

    ============== ============================================================
    penalty        the objective of y, with ``b' = S^-1 b``
    ============== ============================================================
    "function"     ``0.5 y^T (G + ridge) y - b'^T y``: the dual of kernel ridge
                   regression, which minimises ``|G y - b'|^2 + ridge y^T G y``
    "coefficients" ``0.5 |G y - b'|^2 + 0.5 ridge |y|^2``
    ============== ============================================================

    Parameters
    ----------
    A : array_like, shape (n, d)
        Tokens, which are queries and keys.
    b : array_like, shape (n,) or (n, k)
        k right sides are solved together.
    temperature : float
        tau.
    ridge : float
        At least 0; zero is taken only where G is not singular in float64.
    penalty : {"function", "coefficients"}
    normalise : bool
        Take the softmax ``D^-1 K`` of each row, ``D = diag(K 1)``, in place of K: then ``G = D^-1/2 K
        D^-1/2``, ``y = D^1/2 x`` and ``b' = D^1/2 b``.

    Raises
    ------
    ValueError
        On input that is not finite or of the wrong shape; if ridge is zero and the kernel is singular, as
        with rows that occur twice; if rows are so long that ``b'`` leaves the range of float64.

    Notes
    -----
    ``K = S G S`` with ``S = diag(exp(|a_i|^2 / (2 tau)))`` and ``G_ij = exp(-|a_i - a_j|^2 / (2 tau))``. The
    first penalty is solved as ``(G + ridge) y = b'``, the second as ``(G^2 + ridge) y = G b'``, by conjugate
    gradients: see `attnfit.solvers.ConjugateGradients`. Each product with G forms blocks of its rows, and n
    x n numbers are never held. Source: Song, Yin and Zhang, "Solving Attention Kernel Regression Problem via
    Pre-conditioner" (2023), arXiv:2308.14304, which has no penalty.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> A = np.random.default_rng(0).standard_normal((300, 2))
    >>> problem = problems.KernelRegression(A, np.sin(A[:, 0]), ridge=1e-2)
    >>> result = minimize(problem)
    >>> result.status
    'converged'
    >>> bool(abs(problem.predict(result.x) - np.sin(A[:, 0])).max() < 0.5)
    True
    """

    offers = frozenset({Offer.LINEAR_SYSTEM})
    best_hessian = "matrix_free"

    def __init__(
        self,
        A: Any,
        b: Any,
        *,
        temperature: float = 1.0,
        ridge: float,
        penalty: Penalty = "function",
        normalise: bool = False,
    ) -> None:
        choose(penalty, dict.fromkeys(("function", "coefficients")), "penalty")
        if sparse.issparse(A):
            raise ValueError("A is a sparse matrix; the kernel of its rows is dense: pass A.toarray()")
        known = isinstance(temperature, int | float | np.number)
        if not (known and 0.0 < float(temperature) < np.inf):
            raise ValueError(f"temperature must be a positive number, not {temperature!r}")
        self.A = as_matrix(A, "A") / np.sqrt(temperature)
        self.b = as_columns(b, len(self.A), "b", "A")
        self.ridge, self.penalty, self.normalise = as_ridge(ridge), penalty, normalise
        self._batch, self._products = np.ndim(b) == 2, 0.0
        self.block_rows = max(1, BLOCK_BYTES // (8 * len(self.A)))
        self.s = 0.5 * np.einsum("ij,ij->i", self.A, self.A)
        if normalise:
            sums = [logsumexp(rows @ self.A.T, axis=1) for _, rows in self._blocks()]
            self.s = 0.5 * np.concatenate(sums)
        self.sign = 1.0 if normalise else -1.0
        self.right = self._scaled(self.sign)
        least = self._require_regular() if self.ridge == 0.0 else 0.0
        # The norm of ``G (G + ridge)^-1``, or of ``G (G^2 + ridge)^-1``.
        coefficients = penalty == "coefficients"
        gain = (0.5 / np.sqrt(self.ridge) if self.ridge else 1.0 / least) if coefficients else 1.0
        targets = np.abs(self.b).max(axis=0)
        with np.errstate(over="ignore"):
            longest = np.exp((-self.sign * self.s).max())
        self._reach = np.divide(gain * longest, targets, out=np.zeros(len(targets)), where=targets > 0.0)

    def _scaled(self, sign: float) -> Array:
        with np.errstate(over="ignore", under="ignore"):
            right = np.exp(sign * self.s)[:, None] * self.b
        lost = ~np.isfinite(right) | ((right == 0.0) & (self.b != 0.0))
        if lost.any():
            i = int(np.flatnonzero(lost.any(axis=1))[0])
            raise ValueError(
                f"row {i} of A is so long that the scaled right side leaves the range of float64; "
                f"scale A, or "
                "raise temperature"
            )
        return np.asarray(right)

    def _require_regular(self) -> float:
        """Return the smallest eigenvalue of the kernel, as far as it is known; refuse one that is singular in
        float64.
        """
        n = len(self.A)
        values = linalg.eigvalsh(self.kernel_product(np.eye(n))) if n <= EXACT else self._ritz_values()
        if n > EXACT:
            # The mean of the eigenvalues that a partial factor leaves is no less than the smallest one.
            F = self.partial_cholesky(max(EXACT, _usual_rank(n)), 0.0, np.random.default_rng(0))
            left = max(float(self._diagonal().sum() - np.sum(F * F)), 0.0) / (n - F.shape[1])
            values = np.append(min(values[0], left), values)
        if not values[0] > SEPARATE * values[-1]:
            raise ValueError(
                f"ridge is zero, but the kernel is singular in float64 (eigenvalues from {values[0]:.1e} to "
                f"{values[-1]:.1e}): rows of A that occur twice or lie close make it so; give ridge > 0"
            )
        return float(values[0])

    def _ritz_values(self) -> Array:
        q = np.random.default_rng(0).standard_normal(len(self.A))
        basis, diagonal, beside = [q / np.linalg.norm(q)], [], []
        for _ in range(LANCZOS_STEPS):
            v = self.kernel_product(basis[-1][:, None])[:, 0]
            diagonal.append(float(v @ basis[-1]))
            Q = np.stack(basis, axis=1)
            v -= Q @ (Q.T @ v)
            v -= Q @ (Q.T @ v)
            size = float(np.linalg.norm(v))
            if size <= 1e-14 * abs(diagonal[0]):
                break
            beside.append(size)
            basis.append(v / size)
        return np.asarray(linalg.eigvalsh_tridiagonal(diagonal, beside[: len(diagonal) - 1]))

    # ---- sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """(n,), or (n, k) for k right sides in two dimensions."""
        return self.b.shape if self._batch else (len(self.b),)

    @property
    def n_passes(self) -> float:
        """Products with the kernel since the problem was made, of all right sides together; a column of the
        kernel counts as its share.
        """
        return self._products

    @property
    def convex(self) -> bool:
        """True: a quadratic."""
        return True

    # ---- the kernel

    def _blocks(self) -> Iterator[tuple[slice, Array]]:
        for first in range(0, len(self.A), self.block_rows):
            block = slice(first, min(first + self.block_rows, len(self.A)))
            yield block, self.A[block]

    def kernel_rows(self, rows: slice | NDArray[np.intp]) -> Array:
        """Return rows of G, shape (n_rows, n)."""
        block = self.A[rows] @ self.A.T
        block -= self.s[rows][:, None]
        block -= self.s
        np.exp(block, out=block)
        return np.asarray(block, dtype=np.float64)

    def _diagonal(self) -> Array:
        return np.asarray(np.exp(np.einsum("ij,ij->i", self.A, self.A) - 2.0 * self.s))

    def kernel_product(self, V: Array) -> Array:
        """Return ``G V``, shape (n, k), block by block."""
        out = np.empty_like(V)
        for block, _ in self._blocks():
            out[block] = self.kernel_rows(block) @ V
        self._products += 1.0
        return out

    def partial_cholesky(self, rank: int, enough: float, rng: np.random.Generator) -> Array:
        """Return F, shape (n, r), with ``F F^T`` close to G: Cholesky's method with random pivots.

        Pivots are drawn with probabilities proportional to what is left of the diagonal (Chen, Epperly, Tropp
        and Webber, "Randomly pivoted Cholesky" (2023), arXiv:2207.06503), until so many are there, or what is
        left adds up to no more than ``enough``.
        """
        n = len(self.A)
        left = self._diagonal()
        floor, F = PIVOT * float(left.max()), np.empty((n, rank), order="F")
        count = 0
        while count < rank:
            left[left < floor] = 0.0
            total = float(left.sum())
            if total <= enough:
                break
            pivot = int(rng.choice(n, p=left / total))
            column = self.kernel_rows(np.array([pivot]))[0] - F[:, :count] @ F[pivot, :count]
            F[:, count] = column / np.sqrt(column[pivot])
            left -= F[:, count] ** 2
            left[pivot] = 0.0
            count += 1
        self._products += count / n
        return F[:, :count]

    # ---- the linear system

    @property
    def right_sides(self) -> Array:
        """The right side of the linear system, shape (n, k)."""
        return self.right if self.penalty == "function" else self.kernel_product(self.right)

    def operator(self, V: Array) -> Array:
        """Return the system's matrix times V, shape (n, k)."""
        found = self.kernel_product(V)
        if self.penalty == "coefficients":
            found = self.kernel_product(found)
        return found + self.ridge * V

    def preconditioner(self, rank: int | None, rng: np.random.Generator) -> LowRank:
        """Return one of this rank, or less where the kernel has no more; by default of rank ``max(50, 2
        sqrt(n))``, or less where what is left of the kernel is small beside the penalty.
        """
        n, enough = len(self.A), 0.0
        if rank is None:
            rank = _usual_rank(n)
            # The norm of what is left is at most its trace.
            enough = self.ridge if self.penalty == "function" else np.sqrt(self.ridge)
        F = self.partial_cholesky(min(rank, n), enough, rng)
        values, vectors = linalg.eigh(F.T @ F) if F.shape[1] else (np.zeros(0), np.zeros((0, 0)))
        values = np.maximum(values, 0.0)
        power = 1 if self.penalty == "function" else 2
        # A smaller shift would drown in the rounding of what is subtracted.
        shift = max(self.ridge, SHIFT * float(values.max(initial=1.0)) ** power)
        inner = values ** (power - 1) / (values**power + shift)
        seen = values**power > self.ridge
        return LowRank(F, (vectors * inner) @ vectors.T, shift, int(seen.sum()))

    def output_errors(self, residuals: Array) -> Array:
        """Return bounds of the errors of `predict`, relative to the largest target, shape (k,), given the
        norms of the residuals of the linear system.

        With r the residual, those of ``G y`` are ``G (G + ridge)^-1 r``, or ``G (G^2 + ridge)^-1 r``, no
        longer than ``|r|``, or ``|r| / (2 ridge^(1/2))``; a row's output is that times ``exp(s)``, or
        ``exp(-s)`` of the normalised form.
        """
        out = np.zeros(len(residuals))
        np.multiply(self._reach, residuals, out=out, where=residuals > 0.0)
        return out

    def residual_rounding(self, Y: Array) -> Array:
        """Return how much of a residual is rounding, shape (k,): entries of G have the relative error of
        their logarithm, and errors of sums are taken for independent. One product, or two.
        """
        unit = np.finfo(np.float64).eps * (np.sqrt(len(self.A)) + 4.0 * float(np.abs(self.s).max()))
        sizes = self.kernel_product(np.abs(Y)) + np.abs(self.right)
        if self.penalty == "coefficients":
            sizes = self.kernel_product(sizes)
        return np.asarray(unit * np.linalg.norm(sizes + self.ridge * np.abs(Y), axis=0))

    def value_of(self, Y: Array, residual: Array, right: Array) -> float:
        """Return the objective at Y whose residual in the linear system with this right side is known."""
        constant = 0.0 if self.penalty == "function" else np.sum(self.right**2)
        return 0.5 * float(constant - np.sum(Y * (right + residual)))

    # ---- what the solvers use

    def _columns(self, y: Array) -> Array:
        return y.reshape(self.b.shape)

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient at y from one product, or two."""
        Y = self._columns(x)
        fitted = self.kernel_product(Y)
        misfit = fitted - self.right
        if self.penalty == "function":
            gradient = misfit + self.ridge * Y
            value = np.sum(Y * (gradient - self.right))
        else:
            gradient = self.kernel_product(misfit) + self.ridge * Y
            value = np.sum(misfit * misfit) + self.ridge * np.sum(Y * Y)
        zero = -self.right_sides.reshape(-1) if at_zero else None
        return Evaluation(x, 0.5 * float(value), gradient.reshape(-1), gradient_at_zero=zero)

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return the largest change of an output along each step, relative to the largest target."""
        scale = np.exp(-self.sign * self.s)[:, None] / np.maximum(np.abs(self.b).max(axis=0), TINY)
        changes = [np.abs(scale * self.kernel_product(self._columns(p))).max() for p in steps.T]
        return Moved(np.array(changes))

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v: one product, or two."""
        return lambda v: self.operator(self._columns(v)).reshape(-1)

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian, block diagonal for several right sides; of small problems only.

        Raises
        ------
        ValueError
            If there are too many unknowns.
        """
        if self.n_unknowns > MAX_DENSE:
            raise ValueError(
                f"the Hessian of {self.n_unknowns:,} unknowns is not formed; use hvp, or "
                "solver=ConjugateGradients()"
            )
        block = self.operator(np.eye(len(self.A)))
        return np.asarray(np.kron(block, np.eye(self.b.shape[1])), dtype=np.float64)

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of the Hessian, shape (n_unknowns,)."""
        own = self._diagonal()
        if self.penalty == "function":
            return np.repeat(own + self.ridge, self.b.shape[1])
        squares = np.concatenate(
            [np.sum(self.kernel_rows(block) ** 2, axis=1) for block, _ in self._blocks()]
        )
        return np.repeat(squares + self.ridge, self.b.shape[1])

    # ---- what users call

    def predict(self, x: Any) -> Array:
        """Return the fitted values ``K x``, or ``D^-1 K x``, at y, shape of b."""
        fitted = self.kernel_product(self._columns(as_point(x, self.shape)))
        return self._natural(np.exp(-self.sign * self.s)[:, None] * fitted)

    def coefficients(self, x: Any) -> Array:
        """Return x of ``K x``, shape of b, given y."""
        return self._natural(np.exp(-self.s)[:, None] * self._columns(as_point(x, self.shape)))

    def _natural(self, columns: Any) -> Array:
        return np.asarray(columns if self._batch else columns[:, 0])


def _usual_rank(n: int) -> int:
    return max(50, int(2.0 * np.sqrt(n)))
