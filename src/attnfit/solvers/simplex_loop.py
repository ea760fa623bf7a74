"""The active-set method for mixtures as one compiled loop over right-hand sides.

It starts from the best single signature, and a vertex joins at each step, so that a face never has many more
vertices than the answer. On a face the unknowns are differences from its first vertex b: with ``H_jk = G_jk -
G_jb - G_bk + G_bb`` the condition ``sum f = 1`` holds by itself, and the Cholesky factor of H grows by a row
where a vertex joins, and is made anew from the row of one that leaves.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from attnfit.data.kernels import Compiled
from attnfit.segments import Array, Index

# A difference from the first vertex keeps less than this share of its square off the others: it depends on
# them, and no step along it is sound.
DEPENDENT = 1e-11
# A vertex off the face whose slope is the same up to this share of the largest numbers could have weight as
# well: which of several answers is returned is for the method by faces to say.
TIED = 1e-10


def over_simplex(gram: Array, c: Array, tolerance: Array, limit: int) -> tuple[Array, Index]:
    """Minimise ``0.5 f^T G f - c^T f`` over ``f >= 0, sum f = 1`` for each row of c.

    Parameters
    ----------
    gram : ndarray, shape (1, n, n) or (k, n, n)
        One for all or one each.
    c : ndarray, shape (k, n)
    tolerance : ndarray, shape (k,)
        Stop at a duality gap of this size.
    limit : int
        Changes of the face that a problem may take.

    Returns
    -------
    f : ndarray, shape (k, n)
    changes : ndarray of int, shape (k,)
        -1 where signatures depend on one another, the answer may be one of several, or the limit was reached:
        f is then no answer.
    """
    f, changes = np.zeros_like(c), np.zeros(len(c), dtype=np.intp)
    loop()(np.ascontiguousarray(gram), np.ascontiguousarray(c), tolerance, limit, DEPENDENT, TIED, f, changes)
    return f, changes


@cache
def loop() -> Compiled:
    """Return the compiled loop."""
    return Compiled(_loop, nogil=True, error_model="numpy")


def _loop(gram, c, tolerance, limit, dependent, tied, f, changes):  # type: ignore[no-untyped-def]  # Numba's
    k, n = c.shape
    L, y, goal, g = np.empty((n, n)), np.empty(n), np.empty(n), np.empty(n)
    face, member, blocked = np.empty(n, np.intp), np.empty(n, np.bool_), np.empty(n, np.bool_)
    for s in range(k):
        G = gram[s if gram.shape[0] > 1 else 0]
        cs, fs = c[s], f[s]
        first = 0
        for j in range(1, n):
            if 0.5 * G[j, j] - cs[j] < 0.5 * G[first, first] - cs[first]:
                first = j
        for j in range(n):
            member[j] = blocked[j] = False
        face[0], member[first], fs[first] = first, True, 1.0
        p, n_changes, joined = 1, 0, -1
        while True:
            # The slope, and the vertex that promises most.
            mean = 0.0
            for j in range(n):
                g[j] = -cs[j]
            for i in range(p):
                row, share = G[face[i]], fs[face[i]]
                for j in range(n):
                    g[j] += share * row[j]
            for i in range(p):
                mean += fs[face[i]] * g[face[i]]
            joined, promise = -1, tolerance[s]
            for j in range(n):
                if not member[j] and not blocked[j] and mean - g[j] > promise:
                    joined, promise = j, mean - g[j]
            if joined < 0:
                size = 0.0
                for j in range(n):
                    size = max(size, abs(cs[j]) + G[j, j])
                for j in range(n):
                    if not member[j] and g[j] - mean <= tied * size:
                        n_changes = -1
                break
            if n_changes == limit:
                n_changes = -1
                break
            n_changes += 1
            face[p], member[joined] = joined, True
            p += 1
            made = p - 1
            while p > 1:
                # Rows of the factor from the first one that is not known.
                b = face[0]
                sound = True
                for q in range(made, p):
                    j = face[q]
                    square = G[j, j] - 2.0 * G[j, b] + G[b, b]
                    rest = square
                    for i in range(1, q):
                        o = face[i]
                        value = G[j, o] - G[j, b] - G[b, o] + G[b, b]
                        for t in range(1, i):
                            value -= L[q, t] * L[i, t]
                        value /= L[i, i]
                        L[q, i] = value
                        rest -= value * value
                    if not rest > dependent * square:
                        sound = False
                        break
                    L[q, q] = np.sqrt(rest)
                if not sound:
                    n_changes = -1
                    break
                made = p
                for q in range(1, p):
                    value = cs[face[q]] - cs[b] - G[face[q], b] + G[b, b]
                    for t in range(1, q):
                        value -= L[q, t] * y[t]
                    y[q] = value / L[q, q]
                total = 0.0
                for q in range(p - 1, 0, -1):
                    value = y[q]
                    for t in range(q + 1, p):
                        value -= L[t, q] * goal[t]
                    goal[q] = value / L[q, q]
                    total += goal[q]
                goal[0] = 1.0 - total
                # As far as no share gets negative.
                room, leaving = 1.0, -1
                for q in range(p):
                    if goal[q] <= 0.0:
                        here = fs[face[q]]
                        own = here / (here - goal[q]) if here > 0.0 else 0.0
                        if leaving < 0 or own < room:
                            room, leaving = own, q
                for q in range(p):
                    here = fs[face[q]]
                    fs[face[q]] = max(here + room * (goal[q] - here), 0.0)
                if leaving < 0:
                    break
                member[face[leaving]] = False
                fs[face[leaving]] = 0.0
                for q in range(leaving, p - 1):
                    face[q] = face[q + 1]
                p -= 1
                made = max(leaving, 1)
            if n_changes < 0:
                break
            if p == 1:
                fs[face[0]] = 1.0
            # A vertex that leaves at once joined because of rounding: it waits until another one stays.
            if member[joined]:
                for j in range(n):
                    blocked[j] = False
            else:
                blocked[joined] = True
        changes[s] = n_changes
