"""What a recovery says, and what an input is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates import Certificate, certify
from attnfit.inversion.identifiable import Identifiability, identifiable
from attnfit.objectives.block_problem import BlockInversion
from attnfit.objectives.objective import MAX_DENSE
from attnfit.problems import LayerInversion

Array = NDArray[np.float64]
AnyInversion = LayerInversion | BlockInversion

# Numbers that a message lists.
SHOWN = 8


@dataclass(frozen=True)
class Recovery:
    """What was found; ``print`` it for a sentence.

    Attributes
    ----------
    verdict : {"recovered", "ambiguous", "not recovered"}
        A small residual alone is never called recovery. "recovered": one input with a zero residual was
        found, all directions are identified there, and more independent equations than unknowns depend on
        every set of unknown tokens there, so that another one would be a coincidence; or rows of the
        vocabulary reproduce the output, and no other rows that were tried in the place of one or two of them
        do.
        "ambiguous": several inputs give this output, or nothing speaks against others.
    message : str
        The same as a sentence, with the reason.
    x : ndarray, shape (d, n_unknown)
        The best input: unknown tokens as columns.
    residual : float
        ``||output(x) - B||_F / ||B||_F``. It counts as zero where what is left of it beside `residual_floor`
        is at most the precision.
    inputs : list of ndarray
        The distinct zero-residual inputs found; with a vocabulary at most ten beside x. Where uniform
        attention leaves the order open, the tokens in the order of their rows.
    n_starts : int
        Descents made, or decodings with a vocabulary.
    identifiability : Identifiability
        At x: counting, rank and condition of the Jacobian, directions that the output does not determine.
    residual_floor : float
        The share of ``||B||_F`` that no input produces: the part outside the row space of the value maps
        below one another. It is taken off before the search.
    certificate : Certificate
        The ball around x that holds exactly one stationary point, or why there is none.
    tokens : ndarray of int, shape (n_unknown,), optional
        With a vocabulary: the row of each unknown token.
    margins : ndarray, shape (n_unknown,), optional
        With a vocabulary: the relative residual after the best exchange of that token alone.
    equal_rows : list of ndarray of int, optional
        With a vocabulary: the rows that are equal to that of each unknown token, its own among them. Nothing
        tells these apart, and they count as one token.
    signs : ndarray of int, shape (len(inputs),), optional
        Of blocks with as many equations as unknowns: the sign of the determinant of the Jacobian at each
        input; 0 where it is lost in rounding. A negative one proves that there are other inputs.
    sign_sum : int, optional
        Their sum. Over all inputs it is one: another sum proves that inputs are missing.
    homotopy_steps : int
        Of blocks: points of the paths that were followed where Newton's method stalled, or for other inputs.
    radius : ndarray, shape (n_unknown,), optional
        Of blocks: how far each token can be from that of an exact input, in the 2-norm, for outputs within
        the precision of B; of causal blocks with the tokens before it as found.
    radius_proven : bool
        Whether these are proven up to rounding (Newton-Kantorovich), or estimates to first order.
    """

    verdict: str
    message: str
    x: Array
    residual: float
    inputs: list[Array]
    n_starts: int
    identifiability: Identifiability
    residual_floor: float
    certificate: Certificate
    tokens: NDArray[np.intp] | None = None
    margins: Array | None = None
    equal_rows: list[NDArray[np.intp]] | None = None
    signs: NDArray[np.intp] | None = None
    sign_sum: int | None = None
    homotopy_steps: int = 0
    radius: Array | None = None
    radius_proven: bool = False

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Given:
    """What an input is judged by.

    Attributes
    ----------
    layer : LayerInversion or BlockInversion
        With the rows of B projected on what the value maps produce.
    size : float
        ``||B||_F^2`` before; 1 for an output of zero, whose residuals are what they are.
    floor : float
        Share of ``||B||_F`` that the projection takes off.
    precision : float
    """

    layer: AnyInversion
    size: float
    floor: float
    precision: float

    @classmethod
    def of(cls, layer: AnyInversion, precision: float) -> Given:
        """Return what inputs of a layer with this relative error of its output are judged by."""
        size = float(np.sum(layer.B**2)) or 1.0
        projected = layer.projected()
        floor = float(np.linalg.norm(layer.B - projected.B) / np.sqrt(size))
        return cls(projected, size, floor, precision)

    @property
    def enough(self) -> float:
        """Squared residual that counts as zero."""
        return self.precision**2 * self.size

    def report(self, x: Array, square: float, n_starts: int) -> Recovery:
        """Return what there is to say of an input before a verdict."""
        layer = self.layer
        return Recovery(
            verdict="not recovered",
            message="",
            x=x.reshape(layer.shape),
            residual=float(np.hypot(np.sqrt(square / self.size), self.floor)),
            inputs=[],
            n_starts=n_starts,
            identifiability=identifiable(layer, x if layer.n_unknowns <= MAX_DENSE else None),
            residual_floor=self.floor,
            certificate=certify(layer, x),
        )

    @property
    def outside(self) -> str:
        """Why no input gives the output, empty where one may."""
        if self.floor <= self.precision:
            return ""
        return (
            f"no input gives this output: a share {self.floor:.1e} of it lies outside what the value maps "
            "produce; check V, or give the output's precision"
        )


def listed(numbers: NDArray[np.intp]) -> str:
    """Return numbers as words: 3, 5 and 8."""
    shown = [str(number) for number in numbers[:SHOWN]]
    if len(numbers) > SHOWN:
        shown.append(f"{len(numbers) - SHOWN} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
