"""Recover the tokens of causal blocks one after the other, and judge what was found.

With the tokens before it given, row i of the output is a map of token i alone, from d numbers to d. Where
branches are bounded it is onto, of degree one: a wrong token never leads to a contradiction later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates import certify
from attnfit.inversion.block_bounds import ROUNDING, contracts, proven_radius
from attnfit.inversion.homotopy import Equation, follow, newton, sign
from attnfit.inversion.recovered import COUNTING, RANK_TOLERANCE, Given, Identifiability, Recovery, count
from attnfit.objectives.block_problem import BlockInversion
from attnfit.objectives.block_stack import TokenMap

Array = NDArray[np.float64]

# Inputs closer than this, relative to their size, are one; with an uncertain output, this many times its
# error.
SAME, SAME_ERRORS = 1e-6, 1e3
# Beyond this condition number neither the sign of a determinant nor a digit of the input is to be trusted.
WORST_CONDITION = 1e12
# Tokens up to this width are searched for other inputs along a path too.
NARROW = 128
# Crossings of the path, and inputs that are listed.
CROSSINGS, LISTED = 3, 10


@dataclass
class TokenFound:
    """What is known of one token, those before it as found.

    Attributes
    ----------
    singular_values : ndarray, shape (d,)
        Of the Jacobian.
    sign : int
        Of its determinant.
    radius : float
    proven : bool
    contracts : bool
        Whether no other token gives the row.
    others : list of ndarray, shape (d,)
        Other tokens that do.
    """

    singular_values: Array
    sign: int
    radius: float
    proven: bool
    contracts: bool
    others: list[Array] = field(default_factory=list)

    @property
    def condition(self) -> float:
        """Largest over smallest singular value, infinite where the rank is short."""
        s = self.singular_values
        return float(s[0] / s[-1]) if s[-1] > RANK_TOLERANCE * s[0] else np.inf


@dataclass
class InOrder:
    """The search for the tokens of a causal stack.

    Parameters
    ----------
    problem : BlockInversion
    precision : float
    n_starts : int
        Starts of Newton's method a token; with more than one a path is followed for others too.
    rng : numpy.random.Generator
    """

    problem: BlockInversion
    precision: float
    n_starts: int
    rng: np.random.Generator
    n_made: int = 0
    homotopy_steps: int = 0

    def complete(
        self, T: Array, first: int, callback: Callable[[float, int], object] | None = None
    ) -> tuple[Array, int]:
        """Return the tokens, shape (n, d), with those from the first on found, and how many were.

        What could not be found is left as in T, with all after it.
        """
        problem, T = self.problem, T.copy()
        unknown = set(problem.unknown.tolist())
        token = TokenMap(problem.stack, first, problem.stack.caches(T[:first]))
        for i in range(first, problem.n):
            if i in unknown:
                x = self._token(token, problem.B[i])
                if x is None:
                    return T, i
                T[i] = x
            token = token.after(T[i])
            if callback is not None:
                callback(i + 1, problem.n)
        return T, problem.n

    def examine(self, T: Array, i: int, *, further: bool) -> TokenFound:
        """Return what is known of token i, looking for others on request."""
        token = TokenMap(self.problem.stack, i, self.problem.stack.caches(T[:i]))
        y, x = self.problem.B[i], T[i]
        J = token.jacobian(x)
        s = np.linalg.svd(J, compute_uv=False)
        found = TokenFound(s, 0, np.inf, False, False)
        if found.condition <= WORST_CONDITION:
            found.sign = sign(J)
            r = token.output(x[None])[0] - y
            inverse = 1.0 / float(s[-1])
            error = (self.precision + ROUNDING) * float(np.linalg.norm(y))
            step = inverse * (float(np.linalg.norm(r)) + error)
            found.radius = proven_radius(token, x, inverse, step)
            found.proven = bool(np.isfinite(found.radius))
            if not found.proven:
                moves = np.abs(np.linalg.inv(J)) @ (np.abs(r) + (self.precision + ROUNDING) * np.abs(y))
                found.radius = float(np.linalg.norm(moves))
            found.contracts = contracts(token, y)
        if further and not found.contracts:
            found.others = self._others(token, x, y)
        return found

    def _token(self, token: TokenMap, y: Array) -> Array | None:
        """Return a token that gives a row of the output; None if none is found."""
        equation = _equation(token, y)
        x, left = newton(equation, y)
        self.n_made += 1
        if left <= self.precision:
            return x
        if self.problem.bounded:
            path, steps = follow(equation, 1)
            self.homotopy_steps += steps
            if path:
                return path[0]
        for start in self._starts(y, x):
            x, left = newton(equation, start)
            self.n_made += 1
            if left <= self.precision:
                return x
        return None

    def _others(self, token: TokenMap, x: Array, y: Array) -> list[Array]:
        """Return tokens other than x that give the same row."""
        equation, found = _equation(token, y), [x]
        same = max(SAME, SAME_ERRORS * self.precision)

        def add(other: Array) -> None:
            if not any(np.linalg.norm(other - one) <= same * np.linalg.norm(one) for one in found):
                found.append(other)

        for start in self._starts(y, x):
            other, left = newton(equation, start)
            self.n_made += 1
            if left <= self.precision:
                add(other)
        if self.n_starts > 1 and self.problem.bounded and self.problem.d <= NARROW:
            crossings, steps = follow(equation, CROSSINGS)
            self.homotopy_steps += steps
            for other in crossings:
                add(other)
        return found[1:]

    def _starts(self, y: Array, x: Array) -> list[Array]:
        """Return normal starts: about the row, as far as x is from it, and of its size about zero."""
        apart = float(np.sqrt(np.mean((x - y) ** 2)))
        size = float(np.sqrt(np.mean(y**2)))
        noise = self.rng.standard_normal((max(self.n_starts - 1, 0), len(y)))
        return [y + apart * e if k % 2 else size * e for k, e in enumerate(noise)]


def recover_in_order(
    given: Given, n_starts: int, rng: np.random.Generator, callback: Callable[[float, int], object]
) -> Recovery:
    """Recover the tokens of a causal stack whose known tokens come first."""
    problem = given.layer
    assert isinstance(problem, BlockInversion)
    search = InOrder(problem, given.precision, n_starts, rng)
    T, done = search.complete(problem.rows_with(problem.B[problem.unknown, : problem.d]), 0, callback)
    square = float(np.sum((problem.stack.forward(T).output - problem.B) ** 2))
    solved = done == problem.n and square <= given.enough
    tokens = {int(i): search.examine(T, int(i), further=solved) for i in problem.unknown if i < done}
    inputs = _inputs(search, given, T, tokens) if solved else []
    signs = np.array(
        [_sign(search, one, tokens if k == 0 else None) for k, one in enumerate(inputs)], dtype=int
    )
    verdict, message = _judge(given, search, tokens, inputs, done if not solved else None, square)
    radius = np.array([tokens[int(i)].radius if int(i) in tokens else np.inf for i in problem.unknown])
    x = problem.columns(T)
    return Recovery(
        verdict=verdict,
        message=message,
        x=x,
        residual=float(np.sqrt(square / given.size)),
        inputs=[problem.columns(one) for one in inputs],
        n_starts=search.n_made,
        identifiability=_identifiability(problem, tokens),
        residual_floor=given.floor,
        certificate=certify(problem, x),
        signs=signs,
        sign_sum=int(signs.sum()),
        homotopy_steps=search.homotopy_steps,
        radius=radius,
        radius_proven=solved and all(token.proven for token in tokens.values()),
    )


def _inputs(search: InOrder, given: Given, T: Array, tokens: dict[int, TokenFound]) -> list[Array]:
    """Return the input found and those with one token replaced by another that gives its row, completed."""
    problem, inputs = search.problem, [T]
    for i, token in tokens.items():
        for other in token.others:
            if len(inputs) == LISTED:
                return inputs
            changed = T.copy()
            changed[i] = other
            whole, done = search.complete(changed, i + 1)
            square = float(np.sum((problem.stack.forward(whole).output - problem.B) ** 2))
            if done == problem.n and square <= given.enough:
                inputs.append(whole)
    return inputs


def _sign(search: InOrder, T: Array, tokens: dict[int, TokenFound] | None) -> int:
    """Return the sign of the determinant of the whole Jacobian: block triangular, it is a product."""
    known = tokens or {int(i): search.examine(T, int(i), further=False) for i in search.problem.unknown}
    return int(np.prod([token.sign for token in known.values()]))


def _identifiability(problem: BlockInversion, tokens: dict[int, TokenFound]) -> Identifiability:
    """Return counts, and the singular values of each token's own map: the largest condition decides."""
    counted = count(problem)
    some = list(tokens.values())
    values = np.sort(np.concatenate([token.singular_values for token in some]))[::-1] if some else None
    rank = sum(int(np.sum(t.singular_values > RANK_TOLERANCE * t.singular_values[0])) for t in some)
    return Identifiability(
        counted.n_equations,
        counted.n_unknowns,
        problem.value_rank,
        COUNTING[counted.excess],
        values,
        rank if len(some) == len(problem.unknown) else None,
        max((token.condition for token in some), default=None),
    )


def _judge(
    given: Given,
    search: InOrder,
    tokens: dict[int, TokenFound],
    inputs: list[Array],
    stopped: int | None,
    square: float,
) -> tuple[str, str]:
    """Return the verdict and the message."""
    problem = search.problem
    exists = "; an input exists, the search did not find it" if problem.bounded else ""
    if stopped is not None:
        where = f"token {stopped} was not found" if stopped < problem.n else "no zero residual"
        return "not recovered", (
            f"not recovered: {where} (residual {np.sqrt(square / given.size):.1e} of the output after "
            f"{search.n_made} starts and {search.homotopy_steps} points of a path){exists}; use more "
            "starts, a vocabulary, or the output's precision"
        )
    worst = max(tokens, key=lambda i: tokens[i].condition)
    condition = tokens[worst].condition
    if not np.isfinite(condition):
        s = tokens[worst].singular_values
        return "ambiguous", (
            f"ambiguous: row {worst} of the output does not move along "
            f"{int(np.sum(s <= RANK_TOLERANCE * s[0]))} of {problem.d} directions of its token"
        )
    if condition > min(WORST_CONDITION, 0.1 / given.precision):
        return "ambiguous", (
            f"ambiguous: the Jacobian at token {worst} has condition {condition:.1e}: errors of the output "
            "decide"
        )
    negative = [i for i, token in tokens.items() if token.sign < 0]
    if negative and problem.bounded:
        listed = f"; {len(inputs)} were found" if len(inputs) > 1 else ""
        return "ambiguous", (
            f"ambiguous: proven: the determinant of the Jacobian is negative at token {negative[0]}, so that "
            f"other inputs give this output{listed}"
        )
    if len(inputs) > 1:
        return "ambiguous", f"ambiguous: {len(inputs)} different inputs give this output"
    if all(token.contracts for token in tokens.values()):
        return "recovered", (
            "recovered: one input gives this output: what branches add contracts wherever another could be"
        )
    proven = all(token.proven for token in tokens.values())
    within = max(token.radius for token in tokens.values())
    return "ambiguous", (
        f"ambiguous (one input found): {search.n_made} starts found no other, and determinants are positive "
        f"(condition {condition:.1e}, {'proven' if proven else 'estimated'} radius {within:.1e}), but there "
        "are as many numbers as unknowns; known tokens after these or a vocabulary settle it"
    )


def _equation(token: TokenMap, y: Array) -> Equation:
    return Equation(lambda x: token.output(x[None])[0], token.jacobian, y)
