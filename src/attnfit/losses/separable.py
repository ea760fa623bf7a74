"""Losses given by one function of an output and its derivatives: what a loss of your own starts from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from attnfit.losses.elementwise import ElementwiseLoss
from attnfit.losses.loss import Accumulated, GramTerm, GroupStatistics
from attnfit.losses.softmax import SoftmaxLoss
from attnfit.segments import Array


class SeparableLoss(SoftmaxLoss):
    """``sum_i w_i phi(f_i, b_i)`` of the outputs ``f = softmax(z)`` within each group.

    A subclass gives ``phi`` and its first two derivatives in f, on arrays of shape (n_rows,); the gradient
    ``f (p - <p, f>)`` and the Hessian of the logits, ``p = w phi'``, follow. `check_loss` compares them.
    Groups longer than a block are read twice, as their outputs are known only after a first pass.

    A subclass whose ``phi'``, ``phi'' f + phi'`` and ``phi''' f^2 + 3 phi'' f + phi'`` are monotone in f may
    define ``third`` and set ``certifiable = True``: certificates then hold for it.

    Source: "In-Context Learning for Attention Scheme", Section 5, with a general phi.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> from attnfit.losses import SeparableLoss
    >>> class Quartic(SeparableLoss):
    ...     def phi(self, f, b):
    ...         return 0.25 * (f - b) ** 4
    ...
    ...     def first(self, f, b):
    ...         return (f - b) ** 3
    ...
    ...     def second(self, f, b):
    ...         return 3.0 * (f - b) ** 2
    >>> problem = problems.Softmax(np.eye(3, 2), [0.7, 0.2, 0.2], loss=Quartic())
    >>> problem.predict(minimize(problem).x).round(3)
    array([0.667, 0.167, 0.167])
    """

    one_pass = False
    compiled = False
    exact_sums = (0,)

    @abstractmethod
    def phi(self, f: Array, b: Array) -> Array:
        """Return phi of outputs and targets, shape (n_rows,)."""

    @abstractmethod
    def first(self, f: Array, b: Array) -> Array:
        """Return its derivative in f."""

    @abstractmethod
    def second(self, f: Array, b: Array) -> Array:
        """Return its second derivative in f."""

    def third(self, f: Array, b: Array) -> Array:
        """Return its third derivative in f, of a `certifiable` loss."""
        raise TypeError(f"{type(self).__name__} states no third derivative")

    def accumulate(  # type: ignore[override]
        self, y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        """Return ``f phi'`` and f, and phi itself."""
        return (v * w * self.first(v, b), v), (w * self.phi(v, b),)

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        """Take the normaliser for exact."""
        gamma = columns[0]
        return GroupStatistics(extras[0], (1.0, -gamma), (reference, gamma), 1.0)

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """Return ``w phi'``."""
        return w * self.first(f, b)

    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """Return ``w (phi'' f + phi')``."""
        return w * (self.second(f, b) * f + self.first(f, b))

    def g3(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """Return ``w (phi''' f^2 + 3 phi'' f + phi')``."""
        return w * (self.third(f, b) * f * f + 3.0 * self.second(f, b) * f + self.first(f, b))


class PointwiseLoss(ElementwiseLoss):
    """``sum_i w_i phi(z_i, b_i)`` of the logits themselves, which need no groups.

    A subclass gives ``phi`` and its first two derivatives in z, and ``output``, what `predict` returns. Set
    ``convex = True`` where it is, and define `third_derivative_bound` and ``certifiable = True`` for
    certificates. `attnfit.problems.RowProblem` takes it.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> from attnfit.losses import PointwiseLoss
    >>> class Logistic(PointwiseLoss):
    ...     convex = True
    ...
    ...     def phi(self, z, b):
    ...         return np.logaddexp(0.0, z) - b * z
    ...
    ...     def first(self, z, b):
    ...         return 1.0 / (1.0 + np.exp(-z)) - b
    ...
    ...     def second(self, z, b):
    ...         return 1.0 / (2.0 + 2.0 * np.cosh(z))
    ...
    ...     def output(self, z):
    ...         return 1.0 / (1.0 + np.exp(-z))
    >>> problem = problems.RowProblem(np.ones((4, 1)), [0.0, 1.0, 1.0, 1.0], loss=Logistic())
    >>> minimize(problem).x.round(4)
    array([1.0986])
    """

    compiled = False

    @abstractmethod
    def phi(self, z: Array, b: Array) -> Array:
        """Return phi of logits and targets, shape (n_rows,)."""

    @abstractmethod
    def first(self, z: Array, b: Array) -> Array:
        """Return its derivative in z."""

    @abstractmethod
    def second(self, z: Array, b: Array) -> Array:
        """Return its second derivative in z."""

    def output(self, z: Array) -> Array:
        """Return the model's output, the logit itself unless overridden."""
        return z

    @staticmethod
    def transform(z: Array, reference: Array | float) -> tuple[Array, Array]:
        """Return the logits."""
        return z, z

    def accumulate(  # type: ignore[override]
        self, y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        """Return phi' and phi."""
        return (w * self.first(y, b),), (w * self.phi(y, b),)

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        """Return ``w phi''``."""
        return [GramTerm(w * self.second(z, b), None, None)], None

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        """Return ``|w phi''|``."""
        return np.abs(w * self.second(z, b))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        """Return the model's output."""
        return self.output(z)
