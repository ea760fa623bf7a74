"""Responses of shares: sums over groups from which elasticities, effects and diversion follow, one sweep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part, merged
from attnfit.segments import Array, Chunk, Index

# Numbers of a table of gradients that is worked on at a time.
TABLE = 1 << 22


class Variable(NamedTuple):
    """How the logit of each row depends on a variable v: ``dz/dv = h^T x``.

    Attributes
    ----------
    column : int or None
        The column that it is; h is then a unit vector.
    values, slopes : ndarray or None
        Else v, shape (n,), and h, shape (n, d), of the user's rows.
    relative : bool
        Whether the change is by one per cent of v rather than by one.
    """

    column: int | None = None
    values: Array | None = None
    slopes: Array | None = None
    relative: bool = False


class Wanted(NamedTuple):
    """Which responses to add up: of ``n_labels`` alternatives, of each to itself only if ``own``."""

    n_labels: int
    own: bool
    variable: Variable | None


@dataclass
class Responses:
    """Sums over groups g with weight W.

    Attributes
    ----------
    shares, d_shares : ndarray, shapes (J,) and (J, d)
        ``S_j = sum W F_gj`` with F the share of an alternative in a group, and the gradient.
    changes, d_changes : ndarray, shapes (J, J) and (J, J, d), or (J,) and (J, d)
        ``N_jk = delta_jk sum W P_gj - sum W F_gj P_gk`` with ``P_gj = sum f v D``, and the gradient.
    weight : float
        ``sum W``.
    tables, weights : ndarray
        F, P and their gradients of groups longer than a block, shape (2, n_long, J, 1 + d), and the sums of
        their weights and rows, shape (n_long, 2).
    """

    shares: Array
    d_shares: Array
    changes: Array
    d_changes: Array
    weight: float
    tables: Array
    weights: Array

    def merge(self, other: Responses) -> Responses:
        """Return the sums over both parts."""
        return Responses(*(merged(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def add(self, F: Array, P: Array, W: Array, *, own: bool) -> None:
        """Add whole groups: tables of shape (G, J, 1 + d), a value followed by its gradient."""
        f, df, p, dp = F[..., 0], F[..., 1:], P[..., 0], P[..., 1:]
        w = W[:, None]
        self.weight += float(W.sum())
        self.shares += (w * f).sum(axis=0)
        self.d_shares += np.tensordot(W, df, 1)
        if own:
            self.changes += (w * p * (1.0 - f)).sum(axis=0)
            self.d_changes += np.einsum("gj,gjd->jd", w * (1.0 - f), dp) - np.einsum("gj,gjd->jd", w * p, df)
            return
        j = np.arange(f.shape[1])
        self.changes[j, j] += (w * p).sum(axis=0)
        self.changes -= (w * f).T @ p
        self.d_changes[j, j] += np.tensordot(W, dp, 1)
        n, d = len(W), df.shape[2]
        across = df.reshape(n, -1).T @ (w * p)
        self.d_changes -= across.reshape(len(j), d, len(j)).transpose(0, 2, 1)
        self.d_changes -= ((w * f).T @ dp.reshape(n, -1)).reshape(len(j), len(j), d)

    def finish(self, *, own: bool) -> Responses:
        """Add the groups longer than a block."""
        if len(self.weights):
            W = self.weights[:, 0] / np.maximum(self.weights[:, 1], 1.0)
            self.add(self.tables[0], self.tables[1], W, own=own)
        return self


class Rows(NamedTuple):
    """Some rows of whole groups, or of one group longer than a block."""

    index: Any
    block: Array
    f: Array
    c: Array
    groups: Index
    weights: Array
    long: int


def rows_of(
    part: Part, chunks: list[Chunk], at: Evaluation, weights: Array | None, width: int
) -> Iterator[Rows]:
    """Yield dense rows with their shares f and centred rows c, in pieces of whole groups with at most TABLE
    numbers in tables of ``width`` numbers a group.
    """
    for chunk in part.prefetch(chunks):
        block, z = part.logits(chunk, at.x)
        state = part.row_state(chunk, z, at)
        f = part.loss.fitted(z, state)
        w = part.targets(chunk)[1] if weights is None else weights[chunk.index]
        w = np.broadcast_to(w, z.shape)
        starts, sizes = chunk.segments.starts, chunk.segments.sizes
        if chunk.long >= 0:
            mu = at.centre[chunk.long][None, :]
        else:
            mu = part.design.group_rows(block, f, starts)
            mu = np.asarray(mu.toarray() if sparse.issparse(mu) else mu)
        index = chunk.index
        if isinstance(index, slice):
            index = np.arange(index.start, index.stop)
        step = max(1, TABLE // max(width, int(sizes.max()) * block.shape[1]))
        for g in range(0, len(starts), step):
            first, last = int(starts[g]), int(np.append(starts, len(z))[min(g + step, len(starts))])
            piece = slice(first, last)
            dense = np.asarray(block[piece].toarray() if sparse.issparse(block) else block[piece])
            groups = np.repeat(np.arange(len(sizes[g : g + step])), sizes[g : g + step])
            yield Rows(
                index[piece], dense, f[piece], dense - mu[g : g + step][groups], groups, w[piece], chunk.long
            )


def slope_of(rows: Rows, variable: Variable | None, x: Array) -> tuple[Array, Array, Array]:
    """Return v, D and h of some rows, shapes (n,), (n,) and (n, d); one, one and zeros without a variable."""
    n, d = rows.block.shape
    if variable is None:
        return np.ones(n), np.ones(n), np.zeros((n, d))
    if variable.column is not None:
        h = np.zeros((n, d))
        h[:, variable.column] = 1.0
        return rows.block[:, variable.column], np.full(n, x[variable.column]), h
    assert variable.slopes is not None and variable.values is not None
    # Outside goods are the last rows and depend on nothing.
    inside = rows.index < len(variable.values)
    place = np.where(inside, rows.index, 0)
    h = np.where(inside[:, None], variable.slopes[place], 0.0)
    return np.where(inside, variable.values[place], 0.0), h @ x, h


def response_sum(
    part: Part,
    chunks: list[Chunk],
    at: Evaluation,
    wanted: Wanted,
    labels: tuple[Index, ...],
    weights: Array | None,
) -> Responses:
    """Add up responses over some chunks; ``labels[0]`` numbers the alternative of each row."""
    d, J = part.n_unknowns, wanted.n_labels
    pairs = (J,) if wanted.own else (J, J)
    sums = Responses(
        np.zeros(J), np.zeros((J, d)), np.zeros(pairs), np.zeros((*pairs, d)), 0.0,
        np.zeros((2, part.n_long, J, 1 + d)), np.zeros((part.n_long, 2)),
    )  # fmt: skip
    for rows in rows_of(part, chunks, at, weights, J * (1 + d)):
        v, D, h = slope_of(rows, wanted.variable, at.x)
        if wanted.variable is None or not wanted.variable.relative:
            v = np.ones_like(v)
        n_groups, n = int(rows.groups[-1]) + 1, len(v)
        place = rows.groups * J + labels[0][rows.index]
        own = np.column_stack([rows.f, rows.f[:, None] * rows.c])
        moved = np.column_stack([rows.f * v * D, (rows.f * v)[:, None] * (h + D[:, None] * rows.c)])
        indicator = sparse.csr_array((np.ones(n), (place, np.arange(n))), shape=(n_groups * J, n))
        F, P = ((indicator @ table).reshape(n_groups, J, 1 + d) for table in (own, moved))
        if rows.long >= 0:
            sums.tables[:, rows.long] += np.stack([F[0], P[0]])
            sums.weights[rows.long] += rows.weights.sum(), n
        else:
            W = np.bincount(rows.groups, weights=rows.weights) / np.bincount(rows.groups)
            sums.add(F, P, W, own=wanted.own)
    return sums


def log_sum(
    part: Part, chunks: list[Chunk], at: Evaluation, weights: Array | None
) -> dict[Any, tuple[float, Array, float]]:
    """Return by group its log sum, the gradient (the mean row) and its weight."""
    found: dict[Any, tuple[float, Array, float]] = {}
    for chunk in part.prefetch(chunks):
        block, z = part.logits(chunk, at.x)
        w = np.broadcast_to(part.targets(chunk)[1] if weights is None else weights[chunk.index], z.shape)
        labels = part.groups.labels[chunk.groups].tolist()
        if chunk.long >= 0:
            found[labels[0]] = float(at.state[0, chunk.long]), at.centre[chunk.long], float(w[0])
            continue
        normaliser, _, f = part.loss.normalise(z, chunk.segments)
        mu = part.design.group_rows(block, f, chunk.segments.starts)
        mu = np.asarray(mu.toarray() if sparse.issparse(mu) else mu)
        mean = chunk.segments.sum(w) / chunk.segments.sizes
        found |= {label: (float(normaliser[g]), mu[g], float(mean[g])) for g, label in enumerate(labels)}
    return found
