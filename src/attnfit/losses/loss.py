"""What a loss tells the rest of the library: formulas on rows, nothing else.

One read of the data must give the value and the gradient even when a group is far larger than a block of
rows, so its normaliser is known only after its last row. Every loss here is therefore written in *columns*:
with any reference for the normaliser, the gradient in the logits is a combination of a few columns

    s_i = sum_j  coefficient_j(g)  column_j(i),         i in group g,

whose coefficients depend on group sums alone. A block contributes ``A_block^T columns`` and the sums; the
coefficients are applied at the end. With the reference equal to the true normaliser nothing cancels, so the
result keeps full relative accuracy near a perfect fit.

``transform``, ``accumulate`` and ``finalize`` are plain functions that work on arrays and on single numbers
alike: numpy runs them on blocks of rows, and Numba compiles the same functions for large data.

The Hessian of the data term is a sum of signed row Grams, the *centred-Gram rule*:

    H = sum over terms, groups g, rows i of  t_i (r_i a_i - q_i mu_g)(r_i a_i - q_i mu_g)^T,    mu_g = A_g^T
    centre.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from attnfit.segments import Array, Segments

# What makes a loss: a class that overrides one of these is another loss.
FORMULAS = frozenset(
    (
        "transform",
        "normalise",
        "accumulate",
        "finalize",
        "slope",
        "gram_terms",
        "p",
        "g2",
        "g3",
        "third_derivative_bound",
    )
)


class GramTerm(NamedTuple):
    """Rows ``r_i a_i - q_i mu_g`` with signed weights ``t_i``; ``q = None`` means not centred."""

    t: Array
    r: Array | None
    q: Array | float | None


# Columns of the gradient, one array a column, and the rows whose group sums ``finalize`` needs besides.
Accumulated = tuple[tuple[Array, ...], tuple[Array, ...]]


class GroupStatistics(NamedTuple):
    """What the group sums determine. Every array has shape (n_groups,) or is a number;
    ``coefficients`` has one item a column.
    """

    value: Array
    coefficients: tuple[Array | float, ...]
    state: tuple[Array, ...]
    centre: Array | float


class GroupSizes(NamedTuple):
    """What bounds the curvature of a group: the norm of ``w b``, the smallest and the largest weight, the
    number of rows, shape (n_groups,) each.
    """

    target: Array
    low: Array
    high: Array
    sizes: Array


class Loss(ABC):
    """A loss of the logits ``z`` of one block of rows; ``b`` is the target, ``w`` the row weight.

    ``coupled`` says whether rows of a group share a normaliser, ``convex`` whether the loss is convex in z.
    ``logarithmic`` says that the normaliser is the logarithm of a sum over the group, rather than the sum.
    ``exact_sums`` lists the columns whose group sums ``finalize`` needs where the reference is exact: then
    those of ``exp(z - reference)`` are one, and the rest play no part. ``nonnegative_target`` names a loss
    that takes no negative targets, ``has_target`` says whether the target plays a part. ``shift_invariant``
    says that the loss ignores a number added to all logits of a group, ``needs_mass`` that a group whose
    targets sum to zero plays no part.

    ``certifiable`` states that the loss is three times continuously differentiable and that its class says
    by how much at most the third derivative moves the curvature: an uncoupled loss by
    `third_derivative_bound`, a softmax loss by ``g3``, with ``p``, ``g2`` and ``g3`` monotone in f. The
    statement belongs to the formulas beside it: a subclass that overrides one of `FORMULAS` does not
    inherit it and has to make its own.

    ``one_pass`` says that `finalize` corrects for a reference that is not the normaliser; without it groups
    longer than a block are read twice. ``compiled`` says that Numba may compile the formulas. ``n_states`` is
    the number of numbers of a group that `slope` and `gram_terms` take, of a coupled loss.
    """

    coupled: bool = True
    convex: bool = False
    logarithmic: bool = False
    exact_sums: tuple[int, ...] = ()
    nonnegative_target: str = ""
    has_target: bool = True
    shift_invariant: bool = False
    certifiable: bool = False
    needs_mass: bool = False
    one_pass: bool = True
    compiled: bool = True
    n_states: int = 2

    # (z, reference) to the two functions of the logit on which `accumulate` is built: z - reference and its
    # exponential for a softmax, u(z) and its derivative for a hyperbolic function.
    transform: Callable[[Array, Array | float], tuple[Array, Array]]

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not callable(v))
        return f"{type(self).__name__}({fields})"

    def constants(self, b: Array, w: Array, segments: Segments) -> Array:
        """Return group sums that depend on the data alone, shape (n_groups,); zeros where the loss needs
        none.
        """
        return np.zeros(len(segments))

    @staticmethod
    @abstractmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        """Return the columns of the gradient and the further rows whose group sums `finalize` needs; ``y, v``
        as from `transform`.
        """

    @staticmethod
    @abstractmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        """Turn group sums of columns and extras into the value, the coefficients and the state of each
        group.
        """

    def normalise(self, z: Array, segments: Segments) -> tuple[Array, Array, Array]:
        """Return the normaliser of each whole group, and the transform of every row."""
        reference = segments.sum(self.transform(z, 0.0)[0])
        return reference, *self.transform(z, segments.spread(reference))

    def reference(self, z: Array, segments: Segments) -> Array:
        """Return the normaliser of each group, shape (n_groups,), in the form that `accumulate` expects."""
        return self.normalise(z, segments)[0]

    def merge_references(self, one: Array, other: Array) -> Array:
        """Return the normaliser of groups whose rows are split in two."""
        return np.asarray(np.logaddexp(one, other) if self.logarithmic else one + other)

    def extrapolate(self, reference: Array, factor: float) -> Array:
        """Return the normaliser of a group ``factor`` times as large as the part it was found on."""
        return reference + np.log(factor) if self.logarithmic else reference * factor

    def reference_failed(self, reference: Array, state: Array) -> bool:
        """Whether the predicted normaliser was so far from the true one that accuracy is lost."""
        return False

    @abstractmethod
    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        """Return the gradient in the logits, shape (n_rows,), given the state of each row's group."""

    def slope_parts(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[Array, Array, Array] | None:
        """Return o, c and k, shape (n_rows,) each, where the slope is ``o (c - sum k c)``, summed over the
        group: what the difference loses is no share of the slope. None where it is no such difference.
        """
        return None

    @abstractmethod
    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        """Return the terms of the Hessian and the weights of ``mu_g = A_g^T centre``."""

    def gauss_newton_terms(self, z: Array, b: Array, w: Array, state: list[Array]) -> list[GramTerm]:
        """Return the terms of ``J^T J`` with J the Jacobian of the weighted residuals; those of the Hessian
        where
        that is positive semidefinite itself.

        Raises
        ------
        ValueError
            If the loss is neither a sum of squares nor convex.
        """
        if not self.convex:
            raise ValueError(
                f"{type(self).__name__} is no sum of squares and has no Gauss-Newton matrix; use "
                "hessian or hvp"
            )
        return self.gram_terms(z, b, w, state)[0]

    def third_derivative_bound(self, low: Array, high: Array, b: Array, w: Array) -> Array | None:
        """Return a bound of ``|d^3 loss / dz^3|`` of each row over logits in ``[low, high]``, shape
        (n_rows,); None where the loss states none, or couples rows.
        """
        return None

    def negative_curvature(self, groups: GroupSizes, factor: float = 1.0) -> Array:
        """Return a bound of how far below zero an eigenvalue of the Hessian in the logits of a group lies,
        whatever the logits, of the loss times a factor, shape (n_groups,); infinite where none is known.
        """
        return np.full(len(groups.sizes), 0.0 if self.convex and factor >= 0.0 else np.inf)

    @property
    def states_third_derivative(self) -> bool:
        """Whether the class that made the formulas, and no other, says that the loss is `certifiable`."""
        # The base class says so of itself: there is always one.
        speaks = next(
            vars(cls)
            for cls in type(self).__mro__
            if "certifiable" in vars(cls) or not FORMULAS.isdisjoint(vars(cls))
        )
        return bool(speaks.get("certifiable", False))

    @abstractmethod
    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        """Return a positive majorant of the Hessian's row weights, from which rows are sampled."""

    @abstractmethod
    def fitted(self, z: Array, state: list[Array]) -> Array:
        """Return the model's output on each row."""

    def subsample(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array] | None:
        """Targets and weights that make a group kept with these inclusion probabilities stand for the whole
        group.

        The group's logits get the offset ``-log(inclusion)``. None where the loss has no such form.
        """
        return None
