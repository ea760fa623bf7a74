"""Outputs of heads with rotary embeddings: derivatives against PyTorch, and planted heads that come back."""

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from instances import relative
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.objectives.head_maps import MapsAt
from attnfit.solvers import FactorLevenbergMarquardt, VariableProjection

H, D1, D2, V, M, THETA = 4, 3, 2, 2, 3, 50.0
TURN = problems.Rotary(theta=THETA)
CASES = {
    "rotary": {"rotary": TURN},
    "interleaved": {"rotary": problems.Rotary(theta=THETA, layout="interleaved"), "ridge": 0.3},
    "partial": {"rotary": problems.Rotary(theta=THETA, n=2), "n_heads": 2},
    "shared": {"rotary": TURN, "n_heads": 4, "n_key_heads": 2},
    "plain": {"n_heads": 2, "mask": None},
    "softcap": {"rotary": TURN, "softcap": 1.5, "n_heads": 2},
    "sink": {"rotary": TURN, "sink": True, "n_heads": 2},
    "norm": {"rotary": TURN, "qk_norm": 1e-2},
    "all": {
        "rotary": problems.Rotary(theta=THETA, n=2), "softcap": 1.5, "qk_norm": 1e-2, "sink": True,
        "n_heads": 2, "n_key_heads": 1, "ridge": 0.1,
    },
}  # fmt: skip


def turned(y, positions, rotary):
    """Return vectors with each pair of columns turned, by complex multiplication."""
    n = H if rotary.n is None else rotary.n
    w = THETA ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
    half, F = rotary.layout == "half", len(w)
    a, b = (y[:, :F], y[:, F : 2 * F]) if half else (y[:, 0 : 2 * F : 2], y[:, 1 : 2 * F : 2])
    z = torch.complex(a, b) * torch.exp(1j * positions[:, None] * w)
    parts = [z.real, z.imag] if half else [torch.stack([z.real, z.imag], dim=2).flatten(1)]
    return torch.cat([*parts, y[:, 2 * F :]], dim=1)


def instance(rotary=None, softcap=None, sink=False, qk_norm=None, n_heads=1, n_key_heads=None, ridge=0.0,
             mask="causal"):  # fmt: skip
    """Two texts, fewer queries than keys in one of them; the loss and [P_1 A3 ... P_H A3] in torch."""
    rng = np.random.default_rng(0)
    n, k = (12, 14), (13, 14)
    A1, A2, A3, B = (
        [rng.standard_normal((rows, columns)) for rows in sizes]
        for sizes, columns in ((n, D1), (k, D2), (k, V), (n, M))
    )
    weights = [rng.random(rows) + 0.1 for rows in n]
    offset = [rng.standard_normal(shape) for shape in zip(n, k, strict=True)]
    problem = problems.FullAttention(
        A1, A2, A3, B, mask=mask, weights=weights, offset=offset, rank=H, rotary=rotary, softcap=softcap,
        sink=sink, qk_norm=qk_norm, n_heads=n_heads, n_key_heads=n_key_heads, ridge=ridge,
    )  # fmt: skip
    groups = n_key_heads or n_heads
    per = n_heads // groups
    sizes = [per * D1 * H, D2 * H, *([H, H] if qk_norm else [0, 0]), per if sink else 0]

    def shares(z, sigma):
        if sink:
            z = torch.cat([z, sigma.expand(len(z), 1)], dim=1)
        return torch.softmax(z, dim=1)

    def stacked(theta, first_order=False):
        texts = []
        for a, b, c, o in zip(A1, A2, A3, offset, strict=True):
            a, b, c, o = map(as_tensor, (a, b, c, o))
            p = torch.arange(len(b), dtype=torch.float64)
            hidden = torch.tensor(~np.tri(len(a), len(b), len(b) - len(a), dtype=bool)) & (mask is not None)
            rows = []
            for part in torch.split(theta, sum(sizes)):
                W_Q, W_K, g_q, g_k, sigma = torch.split(part, sizes)
                for j, W in enumerate(W_Q.reshape(per, D1, H)):
                    q, key = a @ W, b @ W_K.reshape(D2, H)
                    if qk_norm:
                        q = g_q * q / torch.sqrt((q**2).mean(1, keepdim=True) + qk_norm)
                        key = g_k * key / torch.sqrt((key**2).mean(1, keepdim=True) + qk_norm)
                    if rotary is not None:
                        q, key = turned(q, p[len(b) - len(a) :], rotary), turned(key, p, rotary)
                    z = q @ key.T
                    z = z if softcap is None else softcap * torch.tanh(z / softcap)
                    own = sigma[j] if sink else None
                    if first_order:
                        zero = None if own is None else 0.0 * own
                        U = shares((0.0 * z + o).masked_fill(hidden, -torch.inf), zero)
                        z = z if own is None else torch.cat([z, own.expand(len(z), 1)], dim=1)
                        P = U * (1.0 + z - (U * z).sum(1, keepdim=True))
                    else:
                        P = shares((z + o).masked_fill(hidden, -torch.inf), own)
                    rows.append(P[:, : len(b)] @ c)
            texts.append(torch.cat(rows, dim=1))
        return torch.cat(texts)

    w = as_tensor(np.concatenate(weights))

    def exact(x, first_order=False):
        theta, Y = x[: problem.n_factors], x[problem.n_factors :].reshape(-1, M)
        C = stacked(theta, first_order) @ Y - as_tensor(np.concatenate(B))
        return 0.5 * (w[:, None] * C**2).sum() + 0.5 * ridge * (x @ x)

    x = 0.7 * np.random.default_rng(1).standard_normal(problem.n_unknowns)
    return problem, exact, stacked, x


@pytest.mark.parametrize("name", CASES)
def test_joint_derivatives(name):
    problem, exact, stacked, x = instance(**CASES[name])
    point, v = as_tensor(x).requires_grad_(), np.random.default_rng(2).standard_normal(len(x))
    value = exact(point)
    (gradient,) = torch.autograd.grad(value, point, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ as_tensor(v), point)
    assert relative(problem.value(x), float(value.detach())) < 1e-12
    assert relative(problem.gradient(x), gradient.detach().numpy()) < 1e-11
    assert relative(problem.hvp(x, v), product.numpy()) < 1e-10
    theta, Y = as_tensor(x[: problem.n_factors]), x[problem.n_factors :].reshape(-1, M)
    fitted = problem.predict(x)
    assert [len(f) for f in fitted] == [12, 14]
    assert relative(np.concatenate(fitted), stacked(theta).numpy() @ Y) < 1e-12
    error = np.linalg.norm(np.concatenate(fitted) - problem.B) / np.linalg.norm(problem.B)
    assert problem.relative_error(x) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_projected_derivatives(name):
    problem, exact, stacked, x = instance(**CASES[name])
    projected, size = problem.projected(), problem.n_factors
    theta = x[:size]
    full = as_tensor(np.concatenate([theta, projected.best_values(theta).reshape(-1)]))
    point = full.clone().requires_grad_()
    gradient = torch.autograd.grad(exact(point), point)[0].numpy()
    H_full = torch.autograd.functional.hessian(exact, full).numpy()
    cross = H_full[:size, size:]
    schur = H_full[:size, :size] - cross @ np.linalg.solve(H_full[size:, size:], cross.T)
    assert np.linalg.norm(gradient[size:]) < 1e-9
    assert relative(projected.value(theta), float(exact(full))) < 1e-12
    assert relative(projected.gradient(theta), gradient[:size]) < 1e-8
    assert relative(projected.hessian(theta), schur) < 1e-8
    # Kaufman's Jacobian: what Y cannot follow of the change of the outputs.
    root, ridge = np.sqrt(problem.weights)[:, None], float(problem.ridge)
    Y = full[size:].reshape(-1, M)
    J = torch.autograd.functional.jacobian(lambda t: stacked(t) @ Y, as_tensor(theta)).numpy()
    Z = np.concatenate([root * stacked(as_tensor(theta)).numpy(), np.sqrt(ridge) * np.eye(len(Y))])
    Q = np.linalg.qr(Z)[0][: len(root)]
    moved = root[:, :, None] * J
    normal = np.einsum("imp,imq->pq", moved, moved)
    seen = np.einsum("ij,imp->jmp", Q, moved)
    normal += ridge * np.eye(size) - np.einsum("jmp,jmq->pq", seen, seen)
    product = projected.gauss_newton_operator(projected.evaluate(theta))
    assert relative(np.column_stack([product(e) for e in np.eye(size)]), normal) < 1e-8


@pytest.mark.parametrize("name", ["rotary", "shared", "sink", "plain"])
def test_the_problem_to_first_order(name):
    problem, exact, stacked, x = instance(**CASES[name])
    bilinear, theta = problem.projected().to_first_order(), x[: problem.n_factors]
    maps = MapsAt(problem, theta, first_order=True)
    assert relative(maps.stacked(), stacked(as_tensor(theta), True).numpy()) < 1e-12
    full = np.concatenate([theta, bilinear.best_values(theta).reshape(-1)])
    point = as_tensor(full).requires_grad_()
    gradient = torch.autograd.grad(exact(point, True), point)[0].numpy()
    assert relative(bilinear.gradient(theta), gradient[: len(theta)]) < 1e-8


@pytest.mark.parametrize("name", ["rotary", "shared", "softcap", "sink"])
def test_the_metric_is_the_mean_curvature_of_queries_while_keys_and_values_stand_still(name):
    problem, _, stacked, x = instance(**CASES[name])
    found = problem.reduction()
    white, y = found.problem, found.restrict(x)
    Y = as_tensor(white.best_values(y).reshape(-1, M))
    theta = as_tensor(found.lift(y)[: problem.n_factors])
    J = torch.autograd.functional.jacobian(lambda t: stacked(t) @ Y, theta).numpy()
    own = J[..., : D1 * H].reshape(*J.shape[:2], D1, H)
    own = np.sqrt(problem.weights)[:, None, None, None] * (problem.heads.sides()[0].forward.T @ own)
    # Query t moves outputs by a_t times a matrix: the squares are |a_t|^2 times its block.
    lengths = np.sum(np.concatenate([one.A for one in white.heads.left]) ** 2, axis=1)
    blocks = np.einsum("tmrh,tmrg->thg", own, own) / lengths[:, None, None]
    metric = white.metric(white.evaluate(y)).parts[0]
    assert relative(metric.by_q[0], blocks.mean(axis=0)) < 1e-9


# ---- what comes back


def planted(seed, n, count, d=5, h=4, v=3, m=4, n_heads=1, noise=0.0, size=1.0, mask="causal", **options):
    """A problem whose outputs are those of some heads with logits of a deviation, and their unknown."""
    rng = np.random.default_rng(seed)
    texts = [rng.standard_normal((n, d)) for _ in range(count)]
    values = [rng.standard_normal((n, v)) for _ in range(count)]
    options = {"mask": mask, "rank": h, "n_heads": n_heads, "rotary": problems.Rotary(theta=100.0)} | options
    data = (texts, texts, values) if count > 1 else (texts[0], texts[0], values[0])
    nothing = np.zeros((n, m))
    blank = problems.FullAttention(*data, [nothing] * count if count > 1 else nothing, **options)
    x, projected = rng.standard_normal(blank.n_unknowns), blank.projected()
    factors = x[: blank.n_factors]
    x[: blank.n_factors] = projected.scaled(factors, size / projected.spread(factors))
    B = blank.predict(x)
    if noise:
        B = [b + noise * np.std(b) * rng.standard_normal(b.shape) for b in B]
    return problems.FullAttention(*data, B, **options), x


def head_errors(problem, fitted, x):
    """Return how far the nearest fitted head is from each planted one, in what is identified."""
    (M_, X), (M_0, X_0) = problem.matrices(fitted), problem.matrices(x)

    def flat(M, X, k):
        return np.concatenate([M[k].reshape(-1), X[k].reshape(-1)])

    heads = range(problem.n_heads)
    return [min(relative(flat(M_, X, j), flat(M_0, X_0, k)) for j in heads) for k in heads]


@pytest.mark.parametrize(
    ("n", "count", "options"),
    [
        (25, 3, {}),
        (60, 1, {}),
        (25, 3, {"mask": None}),
        (25, 4, {"n_heads": 2, "v": 4}),
        (25, 4, {"n_heads": 2, "n_key_heads": 1, "v": 4}),
        (25, 3, {"rotary": problems.Rotary(frequencies=[0.7])}),
        (25, 3, {"softcap": 3.0}),
        (25, 3, {"sink": True}),
        (25, 3, {"rotary": None, "h": 2}),
    ],
)
def test_planted_heads_come_back(n, count, options):
    problem, x = planted(2, n, count, **options)
    result = minimize(problem, random_state=0)
    assert result.converged
    assert "exact fit" in result.message
    assert problem.relative_error(result.x) < 1e-9
    assert result.gradient_norm < 1e-6
    assert max(head_errors(problem, result.x, x)) < 1e-6


def test_positions_are_those_of_the_keys():
    rotary = problems.Rotary(frequencies=[0.9, 0.2])
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    places = np.cumsum(rng.integers(1, 4, 30)).astype(float)
    one = problems.FullAttention(A, A, A, B, rank=4, rotary=rotary, positions=places)
    held = problems.Rotary(frequencies=[0.9, 0.2], positions=places)
    other = problems.FullAttention(A, A, A, B, rank=4, rotary=held)
    usual = problems.FullAttention(A, A, A, B, rank=4, rotary=rotary)
    x = rng.standard_normal(one.n_unknowns)
    assert one.value(x) == other.value(x) != usual.value(x)
    moved = problems.FullAttention(A, A, A, B, rank=4, rotary=rotary, positions=places + 50.0)
    assert relative(moved.predict(x), one.predict(x)) < 1e-11


def test_noise_is_no_exact_fit_and_ends_no_higher_than_what_was_planted():
    problem, x = planted(2, 25, 3, noise=0.1)
    near = minimize(problem, x0=x)
    result = minimize(problem, random_state=0)
    assert result.converged
    assert result.value <= near.value * (1.0 + 1e-6)
    assert "exact fit" not in result.message
    assert "lowest of 2 starts, reached 2 times" in result.message
    square = 2.0 * result.value / np.sum(problem.B**2)
    assert f"the squared residual is {square:.1e} of |B|^2" in result.message
    # What equal logits leave: means of what a causal query sees.
    means = [np.cumsum(A, axis=0) / np.arange(1, 26)[:, None] for A in np.split(problem.A3, 3)]
    U = np.concatenate(means)
    left = problem.B - U @ np.linalg.lstsq(U, problem.B, rcond=None)[0]
    assert f"{2.0 * result.value / np.sum(left**2):.1e} of what uniform attention leaves" in result.message


def test_a_zero_residual_of_too_few_equations_is_no_exact_fit():
    problem, x = planted(3, 12, 1, d=6, v=2, m=2, size=0.5)
    assert problem.B.size < problem.n_identified
    result = minimize(problem, x0=x)
    assert problem.relative_error(result.x) < 1e-9
    assert "exact fit" not in result.message
    said = f"{problem.B.size} equations for {problem.n_identified} unknowns leave room"
    assert said in result.message
    with pytest.raises(ValueError, match=r"takes Attention with rotary, .* leave solver out"):
        minimize(problem, solver=FactorLevenbergMarquardt())


@pytest.mark.parametrize("name", ["rotary", "partial", "shared", "plain", "sink", "all"])
def test_identified_numbers_are_the_rank_of_the_jacobian(name):
    rng = np.random.default_rng(0)
    A = [rng.standard_normal((40, D1)) for _ in range(3)]
    values = [rng.standard_normal((40, V)) for _ in A]
    options = {k: v for k, v in CASES[name].items() if k not in ("ridge", "mask")} | {"rank": H}
    problem = problems.FullAttention(A, A, values, [np.zeros((40, M))] * 3, mask="causal", **options)
    x = rng.standard_normal(problem.n_unknowns)
    step = 1e-6
    columns = [
        np.concatenate(problem.predict(x + e)) - np.concatenate(problem.predict(x - e))
        for e in step * np.eye(len(x))
    ]
    J = np.stack([c.reshape(-1) / (2.0 * step) for c in columns])
    sizes = np.linalg.svd(J, compute_uv=False)
    rank = int(np.sum(sizes > 1e-7 * sizes[0]))
    # What norms undo is counted, which makes the claim of an exact fit harder.
    assert rank <= problem.n_identified
    assert name == "all" or rank == problem.n_identified


def test_many_factors_are_fitted_from_the_best_of_a_few_steps(monkeypatch):
    problem, x = planted(2, 20, 2, d=3, v=2, m=3, h=2, noise=0.1)
    monkeypatch.setattr("attnfit.solvers.factor_projection.FEW", 1)
    monkeypatch.setattr("attnfit.solvers.factors.FEW", 1)
    with pytest.warns(ConvergenceWarning, match="precision: warning: reached by one of 1 start"):
        rest = minimize(problem, x0=x)
    assert rest.status == "precision"
    with pytest.warns(ConvergenceWarning, match="max_iter: "):
        short = minimize(problem, random_state=0, max_iter=1)
    assert len(short.local_values) == 4


def test_a_start_of_ones_own_and_a_callback():
    problem, x = planted(1, 25, 3)
    result = minimize(problem, x0=x * 1.01)
    assert list(result.local_values) == ["x0"]
    assert max(head_errors(problem, result.x, x)) < 1e-6
    seen = []
    stopped = minimize(problem, callback=lambda r: seen.append(r.value) or len(seen) == 15, random_state=0)
    assert stopped.status == "interrupted"
    short = minimize(problem, x0=x, solver=VariableProjection(n_starts=1))
    assert short.converged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": None}, "rank must be the width of the head"),
        ({"rank": 2}, "rank 2 is less than the 2 x 2 columns"),
        ({"n_heads": 3, "n_key_heads": 2}, "n_key_heads=2 does not divide n_heads=3"),
        ({"n_key_heads": 0}, "n_key_heads must be an integer >= 1"),
        ({"n_heads": 0}, "n_heads must be an integer >= 1, not 0"),
        ({"n_heads": 12}, "only 20 outputs but A3 has 2 columns in 12 heads"),
        ({"softcap": -1.0}, "softcap must be a positive number"),
        ({"positions": np.arange(19)}, r"positions has shape \(19,\); expected \(20,\)"),
        ({"rotary": None, "positions": np.arange(20)}, "positions are for rotary embeddings"),
        ({"rotary": None, "rank": None, "positions": np.arange(20)}, "positions is for factors of heads"),
        ({"rotary": None, "rank": None, "n_key_heads": 1}, "n_key_heads is for factors of heads"),
        ({"mask": "casual"}, "'causal:W'"),
    ],
)
def test_named_errors(changes, message):
    rng = np.random.default_rng(7)
    A, A3, B = (rng.standard_normal((20, c)) for c in (3, 2, 2))
    options = {"rank": 4, "rotary": problems.Rotary(frequencies=[1.0, 0.1])} | changes
    with pytest.raises(ValueError, match=message):
        problems.FullAttention(A, A, A3, B, **options)


@pytest.mark.parametrize("head", [{}, {"rank": 2, "rotary": problems.Rotary(frequencies=[0.5])}])
def test_outputs_that_are_zero_tell_nothing_of_the_maps(head):
    rng = np.random.default_rng(0)
    texts = [rng.standard_normal((25, 3)) for _ in range(2)]
    nothing = [np.zeros((25, 3))] * 2
    result = minimize(
        problems.FullAttention(texts, texts, texts, nothing, mask="causal", **head), random_state=0
    )
    assert result.value == 0.0
    assert "nothing is known of X" in result.message and "exact" not in result.message


@pytest.mark.parametrize(("noise", "exact"), [(1e-7, False), (1e-12, True)])
@pytest.mark.parametrize("head", [{}, {"rank": 2, "rotary": problems.Rotary(frequencies=[0.5])}])
def test_an_exact_fit_leaves_a_billionth(head, noise, exact):
    rng = np.random.default_rng(0)
    texts = [rng.standard_normal((25, 3)) for _ in range(3)]
    blank = problems.FullAttention(texts, texts, texts, [np.zeros((25, 3))] * 3, mask="causal", **head)
    planted = blank.predict(0.5 * rng.standard_normal(blank.n_unknowns))
    outputs = [B * (1.0 + noise * rng.standard_normal(B.shape)) for B in planted]
    problem = problems.FullAttention(texts, texts, texts, outputs, mask="causal", **head)
    assert ("exact fit" in minimize(problem, random_state=0).message) == exact
