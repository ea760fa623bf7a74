"""Sums of the read that speaks for a sampled curvature, against autodiff and the matrix itself."""

import numpy as np
import pytest
from conftest import shrink_blocks
from instances import ALL_LOSSES, instance, relative
from scipy import sparse

from attnfit.data.gram import GramParts, group_rows


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array], ids=["dense", "csr"])
@pytest.mark.parametrize("own", [False, True], ids=["rows as they are", "scaled rows"])
@pytest.mark.parametrize("q", [1.0, -2.0, "each"])
def test_parts_of_a_gram_are_those_of_the_matrix(storage, own, q, monkeypatch):
    """Of rows that are not centred, of whole groups, and of pieces of a long one; added up over two parts."""
    monkeypatch.setattr("attnfit.data.gram.PART_BYTES", 1)
    rng = np.random.default_rng(0)
    sizes = np.array([40, 1, 7, 22])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    ids, n, d = np.repeat(np.arange(4), sizes), 70, 6
    A = rng.standard_normal((n, d)) * (rng.random((n, d)) < 0.6)
    t, r = rng.standard_normal(n), rng.standard_normal(n) if own else None
    q = rng.standard_normal(n) if q == "each" else q
    V = rng.standard_normal((d, 3))
    block = storage(A)
    mu = group_rows(block, rng.random(n), starts)
    centre = (mu.toarray() if sparse.issparse(mu) else mu)[ids]
    plain = A if r is None else A * r[:, None]
    centred = plain - np.broadcast_to(q, n)[:, None] * centre
    G = (plain * t[:, None]).T @ plain + 2.0 * (centred * t[:, None]).T @ centred
    one, other = GramParts(V), GramParts(V)
    one.add(block, t, r)
    one.add_centred(block, t, r, q, mu, starts)
    for g in range(4):
        part = slice(starts[g], starts[g] + sizes[g])
        own_q = q[part] if isinstance(q, np.ndarray) else q
        own_r = None if r is None else r[part]
        other.add_piece(block[part], t[part], own_r, own_q, centre[starts[g]], g)
    both = one.merge(other)
    assert relative(both.diagonal, np.diag(G)) <= 1e-12
    assert relative(both.along, np.einsum("dk,de,ek->k", V, G, V)) <= 1e-12


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("storage", ["dense", "csr"])
@pytest.mark.parametrize("blocks", ["large", "small"])
def test_a_look_along_directions(family, loss, storage, blocks, monkeypatch):
    """Diagonal, curvature along directions and the move of a step, whatever the storage and the groups."""
    if blocks == "small":
        shrink_blocks(monkeypatch)
    inst, x = instance(family, loss, sizes=(150, 3, 1, 70), d=4, seed=1)
    rng = np.random.default_rng(1)
    inst = inst.replace(
        A=sparse.csr_array(inst.A) if storage == "csr" else inst.A,
        options={"weights": rng.random(224) + 0.2, "row_penalty": 0.1 * rng.random(224), "ridge": 0.3},
    )
    problem, H = inst.problem(), inst.objective().hessian(x)
    step, V = rng.standard_normal(4), rng.standard_normal((4, 7))
    moved, diagonal, along = problem.look_along(problem.evaluate(x), step, V)
    assert relative(diagonal, np.diag(H)) <= 1e-10
    assert relative(along, np.einsum("dk,de,ek->k", V, H, V)) <= 1e-10
    assert np.isclose(moved.largest[0], np.abs(inst.A @ step).max())
