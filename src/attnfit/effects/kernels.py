"""Compiled loops over cells and rows; formulas are stated where they are called from."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from attnfit.data.kernels import OPTIONS, Compiled, U


def _place_rows(values, starts, order):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        level = values[i]
        order[starts[level]] = i
        starts[level] += 1


@cache
def place_rows() -> Any:
    """Compile the second half of a counting sort."""
    return Compiled(_place_rows, **OPTIONS)


def _profile_levels(z, measure, target, level_starts, row_starts, rest, a, mu, W, log_sums):  # type: ignore[no-untyped-def]
    # z comes in as X beta + offset and leaves with the effects of the other sets added.
    loss = 0.0
    for i in range(len(level_starts) - 1):
        top, mass, cross = -np.inf, 0.0, 0.0
        for c in range(level_starts[i], level_starts[i + 1]):
            effect = 0.0
            for s in range(rest.shape[1]):
                effect += a[rest[c, s]]
            for r in range(row_starts[c], row_starts[c + 1]):
                z[r] += effect
                top = max(top, z[r])
        total = 0.0
        for r in range(row_starts[level_starts[i]], row_starts[level_starts[i + 1]]):
            e = measure[r] * np.exp(z[r] - top)
            mu[r] = e
            total += e
            mass += target[r]
            cross += target[r] * z[r]
        log_sums[i] = top + np.log(total)
        loss += mass * log_sums[i] - cross
        share = mass / total
        for c in range(level_starts[i], level_starts[i + 1]):
            weight = 0.0
            for r in range(row_starts[c], row_starts[c + 1]):
                mu[r] *= share
                weight += mu[r]
            W[c] = weight
    return loss


@cache
def profile_levels() -> Any:
    """Compile: expected outcomes with the effects of set 0 at their optimum."""
    return Compiled(_profile_levels, **OPTIONS)


def _add_products(X, weights, level_starts, row_starts, rest, first_level, WX, B_first, B_rest):  # type: ignore[no-untyped-def]
    # WX = diag(weights) X, and its sums over the rows of each level of each set.
    K = X.shape[1]
    total = np.zeros(K)
    for i in range(len(level_starts) - 1):
        for c in range(level_starts[i], level_starts[i + 1]):
            total[:] = 0.0
            for r in range(row_starts[c], row_starts[c + 1]):
                w = weights[r]
                for k in range(K):
                    v = w * X[r, k]
                    WX[r, k] = v
                    total[k] += v
            for k in range(K):
                B_first[first_level + i, k] += total[k]
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(K):
                    B_rest[j, k] += total[k]


@cache
def add_products() -> Any:
    """Compile: sums of weighted rows by level."""
    return Compiled(_add_products, **OPTIONS)


def _add_scattered(X, weights, place, first, rest_of_row, WX, B_first, B_rest):  # type: ignore[no-untyped-def]
    # The same for rows in any order: `place` is where a row stands in the order of the cells.
    K = X.shape[1]
    for i in range(len(X)):
        r = place[i]
        w, j0 = weights[r], first[r]
        for k in range(K):
            v = w * X[i, k]
            WX[i, k] = v
            B_first[j0, k] += v
        for s in range(rest_of_row.shape[1]):
            j = rest_of_row[r, s]
            for k in range(K):
                B_rest[j, k] += WX[i, k]


@cache
def add_scattered() -> Any:
    """Compile: sums of weighted rows by level, of rows in any order."""
    return Compiled(_add_scattered, **OPTIONS)


def _sum_by_rest(values, rest, out):  # type: ignore[no-untyped-def]
    for c in range(len(values)):
        for s in range(rest.shape[1]):
            out[rest[c, s]] += values[c]


@cache
def sum_by_rest() -> Any:
    """Compile ``R' v`` of one number a cell."""
    return Compiled(_sum_by_rest, **OPTIONS)


def _apply_schur(V, W, d, level_starts, rest, out):  # type: ignore[no-untyped-def]
    # out = R' W (R V - D_0 d^-1 D_0' W R V), all columns at once.
    m = V.shape[1]
    total, here = np.zeros(m), np.zeros(m)
    for i in range(len(level_starts) - 1):
        if d[i] == 0.0:
            continue
        total[:] = 0.0
        for c in range(level_starts[i], level_starts[i + 1]):
            w = W[c]
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(m):
                    total[k] += w * V[j, k]
        for k in range(m):
            total[k] /= d[i]
        for c in range(level_starts[i], level_starts[i + 1]):
            w = W[c]
            for k in range(m):
                here[k] = -total[k]
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(m):
                    here[k] += V[j, k]
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(m):
                    out[j, k] += w * here[k]


@cache
def apply_schur() -> Any:
    """Compile the product with the Schur complement of the levels of set 0."""
    return Compiled(_apply_schur, **OPTIONS)


def _apply_schur_of_two(V, W, d, level_starts, rest, out):  # type: ignore[no-untyped-def]
    # The same for two sets, where a cell has one level to look up.
    m = V.shape[1]
    total = np.zeros(m)
    for i in range(len(level_starts) - 1):
        # A level with one cell tells nothing of the levels of the other set.
        if d[i] == 0.0 or level_starts[i + 1] - level_starts[i] == 1:
            continue
        total[:] = 0.0
        for c in range(level_starts[i], level_starts[i + 1]):
            w, j = W[c], U(rest[c])
            for k in range(m):
                total[k] += w * V[j, k]
        for k in range(m):
            total[k] /= d[i]
        for c in range(level_starts[i], level_starts[i + 1]):
            w, j = W[c], U(rest[c])
            for k in range(m):
                out[j, k] += w * (V[j, k] - total[k])


@cache
def apply_schur_of_two() -> Any:
    """Compile the product for two sets."""
    return Compiled(_apply_schur_of_two, **OPTIONS)


def _apply_softmax(V, t, f, tau, level_starts, rest, out):  # type: ignore[no-untyped-def]
    # out = R' (t z' - f sum t z') with z' = R V less its mean over the group.
    m = V.shape[1]
    mean, total, here = np.zeros(m), np.zeros(m), np.zeros(m)
    for i in range(len(level_starts) - 1):
        mean[:] = 0.0
        total[:] = 0.0
        for c in range(level_starts[i], level_starts[i + 1]):
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(m):
                    mean[k] += f[c] * V[j, k]
                    total[k] += t[c] * V[j, k]
        for k in range(m):
            total[k] -= tau[i] * mean[k]
        for c in range(level_starts[i], level_starts[i + 1]):
            for k in range(m):
                here[k] = -t[c] * mean[k] - f[c] * total[k]
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(m):
                    here[k] += t[c] * V[j, k]
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(m):
                    out[j, k] += here[k]


@cache
def apply_softmax() -> Any:
    """Compile the product with the curvature of a squared loss of a softmax."""
    return Compiled(_apply_softmax, **OPTIONS)


def _eliminate_first(B_first, W, d, level_starts, rest, out):  # type: ignore[no-untyped-def]
    # out -= R' W D_0 d^-1 B_first.
    for i in range(len(level_starts) - 1):
        if d[i] == 0.0:
            continue
        for c in range(level_starts[i], level_starts[i + 1]):
            share = W[c] / d[i]
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(out.shape[1]):
                    out[j, k] -= share * B_first[i, k]


@cache
def eliminate_first() -> Any:
    """Compile the elimination of set 0 from the cross products."""
    return Compiled(_eliminate_first, **OPTIONS)


def _average_first(V, W, d, level_starts, rest, out):  # type: ignore[no-untyped-def]
    # out = d^-1 D_0' W R V.
    for i in range(len(level_starts) - 1):
        out[i] = 0.0
        if d[i] == 0.0:
            continue
        for c in range(level_starts[i], level_starts[i + 1]):
            share = W[c] / d[i]
            for s in range(rest.shape[1]):
                j = rest[c, s]
                for k in range(V.shape[1]):
                    out[i, k] += share * V[j, k]


@cache
def average_first() -> Any:
    """Compile the weighted means over the levels of set 0 of what the other sets add up to."""
    return Compiled(_average_first, **OPTIONS)


def _schur_diagonal(W, d, level_starts, rest, seen, out):  # type: ignore[no-untyped-def]
    # diag(R'WR - R'W D_0 d^-1 D_0'WR); with three sets and more a level may be in several cells of one level
    # of set 0, so that weights are added up before they are squared.
    for i in range(len(level_starts) - 1):
        if d[i] == 0.0:
            continue
        for c in range(level_starts[i], level_starts[i + 1]):
            for s in range(rest.shape[1]):
                seen[rest[c, s]] += W[c]
        for c in range(level_starts[i], level_starts[i + 1]):
            for s in range(rest.shape[1]):
                j = rest[c, s]
                w = seen[j]
                if w != 0.0:
                    out[j] += w - w * w / d[i]
                    seen[j] = 0.0


@cache
def schur_diagonal() -> Any:
    """Compile the diagonal of the Schur complement."""
    return Compiled(_schur_diagonal, **OPTIONS)


def _largest_move(a, first, level_starts, rest):  # type: ignore[no-untyped-def]
    largest = 0.0
    for i in range(len(level_starts) - 1):
        for c in range(level_starts[i], level_starts[i + 1]):
            change = first[i]
            for s in range(rest.shape[1]):
                change += a[rest[c, s]]
            largest = max(largest, abs(change))
    return largest


@cache
def largest_move() -> Any:
    """Compile the largest change of a cell's effects."""
    return Compiled(_largest_move, **OPTIONS)
