"""Rotary heads against PyTorch: values, derivatives, and what a fit recovers."""

import warnings

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from sklearn.exceptions import ConvergenceWarning

from attnfit import AttentionRegressor, minimize, problems
from attnfit.solvers import FactorLevenbergMarquardt

H, D1, THETA = 4, 5, 50.0
SETTINGS = {
    "rotary": {"rotary": problems.Rotary(theta=THETA)},
    "interleaved": {"rotary": problems.Rotary(theta=THETA, layout="interleaved")},
    "partial": {"rotary": problems.Rotary(theta=THETA, n=2)},
    "softcap": {"rotary": problems.Rotary(theta=THETA), "softcap": 1.5},
    "sink": {"sink": True},
    "norm": {"rotary": problems.Rotary(theta=THETA), "qk_norm": 1e-2},
    "all": {"rotary": problems.Rotary(theta=THETA, n=2), "softcap": 1.5, "qk_norm": 1e-2, "sink": True},
}
LOSSES = ("log_ratio", "squared", "cross_entropy", "kl")


def turned(y, positions, frequencies, layout):
    """Return vectors with each pair of columns turned, by complex multiplication."""
    F = len(frequencies)
    half = layout == "half"
    a, b = (y[:, :F], y[:, F : 2 * F]) if half else (y[:, 0 : 2 * F : 2], y[:, 1 : 2 * F : 2])
    z = torch.complex(a, b) * torch.exp(1j * positions[:, None] * frequencies)
    rest = y[:, 2 * F :]
    if half:
        return torch.cat([z.real, z.imag, rest], dim=1)
    return torch.cat([torch.stack([z.real, z.imag], dim=2).flatten(1), rest], dim=1)


def torch_value(theta, texts, maps, loss, n_heads, rotary=None, softcap=None, sink=False, qk_norm=None):
    """Return the loss of all unknowns, written from the definition, causal."""
    sizes = [n_heads * D1 * H, D1 * H, *([H, H] if qk_norm else [0, 0]), n_heads if sink else 0]
    W_Q, W_K, g_q, g_k, sigma = torch.split(theta, sizes)
    W_Q, W_K = W_Q.reshape(n_heads, D1, H), W_K.reshape(D1, H)
    total = 0.0
    for A, B in zip(texts, maps, strict=True):
        n = len(A)
        seen = torch.tril(torch.ones(n, n)).bool()
        for k in range(n_heads):
            q, key = A @ W_Q[k], A @ W_K
            if qk_norm:
                q = g_q * q / torch.sqrt((q**2).mean(1, keepdim=True) + qk_norm)
                key = g_k * key / torch.sqrt((key**2).mean(1, keepdim=True) + qk_norm)
            if rotary is not None:
                count = H if rotary.n is None else rotary.n
                w = THETA ** (-torch.arange(0, count, 2, dtype=torch.float64) / count)
                p = torch.arange(n, dtype=torch.float64)
                q, key = turned(q, p, w, rotary.layout), turned(key, p, w, rotary.layout)
            z = q @ key.T
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            b, own = B[k], seen
            if sink:
                null = 1.0 - torch.where(seen, b, 0.0).sum(1)
                z = torch.cat([z, sigma[k].expand(n, 1)], dim=1)
                b = torch.cat([b, null[:, None]], dim=1)
                own = torch.cat([seen, torch.ones(n, 1).bool()], dim=1)
            for t in range(n):
                zt, bt = z[t][own[t]], b[t][own[t]]
                h = torch.log_softmax(zt, 0)
                if loss == "squared":
                    total = total + 0.5 * ((h.exp() - bt) ** 2).sum()
                elif loss == "cross_entropy":
                    total = total - (bt * h).sum()
                elif loss == "kl":
                    total = total + (torch.xlogy(bt, bt) - bt * h).sum()
                else:
                    r = zt - torch.log(bt)
                    total = total + 0.5 * ((r - r.mean()) ** 2).sum()
    return total


def instance(n_heads, sink, lengths=(6, 4), seed=0):
    rng = np.random.default_rng(seed)
    texts = [rng.standard_normal((n, D1)) for n in lengths]
    maps = []
    for n in lengths:
        e = np.where(np.tri(n, dtype=bool), np.exp(rng.standard_normal((n_heads, n, n))), 0.0)
        maps.append(e / e.sum(axis=2, keepdims=True) * (0.75 if sink else 1.0))
    return texts, maps


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("n_heads", [1, 2])
def test_value_and_derivatives_agree_with_autodiff(name, loss, n_heads):
    settings = SETTINGS[name]
    texts, maps = instance(n_heads, settings.get("sink", False))
    given = maps if n_heads > 1 else [m[0] for m in maps]
    problem = problems.Attention(texts, texts, given, loss, "causal", rank=H, **settings)
    rng = np.random.default_rng(1)
    x, v = rng.standard_normal((2, problem.n_unknowns)) * 0.5

    def value(theta):
        tensors = [as_tensor(A) for A in texts], [as_tensor(B) for B in maps]
        return torch_value(theta, *tensors, loss, n_heads, **settings)

    theta = as_tensor(x).requires_grad_()
    expected = value(theta)
    (gradient,) = torch.autograd.grad(expected, theta, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ as_tensor(v), theta)
    gradient = gradient.detach().numpy()
    assert problem.value(x) == pytest.approx(float(expected.detach()), rel=1e-12)
    scale = np.abs(gradient).max()
    assert np.abs(problem.gradient(x).reshape(-1) - gradient).max() < 1e-11 * scale
    scale = float(product.abs().max())
    assert np.abs(problem.hvp(x, v).reshape(-1) - product.numpy()).max() < 1e-10 * scale


@pytest.mark.parametrize("name", ["rotary", "softcap", "sink", "norm"])
def test_gauss_newton_is_the_hessian_where_residuals_vanish(name):
    settings = SETTINGS[name]
    texts, maps = instance(1, settings.get("sink", False))
    blank = problems.Attention(texts, texts, [m[0] for m in maps], "log_ratio", "causal", rank=H, **settings)
    x = blank.initial_point(3).reshape(-1)
    exact = problems.Attention(texts, texts, blank.predict(x), "log_ratio", "causal", rank=H, **settings)
    v = np.random.default_rng(0).standard_normal(x.size)
    at = exact.evaluate(x)
    assert at.value < 1e-20
    product = exact.gauss_newton_operator(at)(v)
    assert np.abs(product - exact.hvp(x, v).reshape(-1)).max() < 1e-7 * np.abs(product).max()
    assert np.all(np.linalg.eigvalsh(exact.hessian(x)) > -1e-8 * np.abs(product).max())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("n_heads", [1, 2])
def test_products_in_single_precision(name, loss, n_heads):
    """They are right to its digits, and precision stays double where its range would not do."""
    settings = SETTINGS[name]
    texts, maps = instance(n_heads, settings.get("sink", False))
    given = maps if n_heads > 1 else [m[0] for m in maps]
    for weight, rounded in ((1.0, True), (1e14, True), (1e20, False), (1e-20, False)):
        weights = [np.full(len(A), weight) for A in texts]
        problem = problems.Attention(texts, texts, given, loss, "causal", rank=H, weights=weights, **settings)
        x, v = np.random.default_rng(1).standard_normal((2, problem.n_unknowns)) * 0.5
        at = problem.evaluate(x)
        double = problem.gauss_newton_operator(at)(v)
        found = problem.gauss_newton_operator(at, single=True)(v)
        assert found.dtype == np.float64
        assert np.abs(found - double).max() <= 1e-5 * np.abs(double).max()
        assert np.array_equal(found, double) != rounded


def test_single_precision_ends_where_double_does(monkeypatch):
    """An exact fit needs the last digits, whatever the products on the way to it had."""
    texts, maps, *_ = planted(torch.float64, seed=1)
    problem = problems.Attention(texts[0], texts[0], maps[0], "log_ratio", "causal", rank=H,
                                 rotary=problems.Rotary(theta=THETA))  # fmt: skip
    monkeypatch.setattr("attnfit.solvers.factors.FEW", 0)
    asked, own = [], type(problem).gauss_newton_operator

    def watched(self, at, *, single=False):
        asked.append(single)
        return own(self, at, single=single)

    monkeypatch.setattr(type(problem), "gauss_newton_operator", watched)
    result = minimize(problem, random_state=0)
    assert "exact fit" in result.message
    assert asked[0] and not asked[-1]


def test_logits_depend_on_distances_only():
    texts, maps = instance(1, False)
    one = problems.Attention(texts[0], texts[0], maps[0][0], "log_ratio", "causal", rank=H,
                             rotary=problems.Rotary(theta=THETA))  # fmt: skip
    moved = problems.Attention(texts[0], texts[0], maps[0][0], "log_ratio", "causal", rank=H,
                               rotary=problems.Rotary(theta=THETA, positions=np.arange(90, 96)))  # fmt: skip
    x = one.initial_point(0)
    assert np.abs(one.predict(x) - moved.predict(x)).max() < 1e-13


def planted(dtype, cap=None, seed=0, n=80, d=6, mean=0.0):
    rng = np.random.default_rng(seed)
    W_Q, W_K = rng.standard_normal((2, d, H))
    texts = [mean + rng.standard_normal((n, d)) for _ in range(2)]
    w = THETA ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)

    def attend(A):
        p = torch.arange(len(A), dtype=torch.float64)
        q, k = (turned(as_tensor(A @ W), p, w, "half") for W in (W_Q, W_K))
        z = q @ k.T / 3.0
        z = z if cap is None else cap * torch.tanh(z / cap)
        hidden = torch.triu(torch.ones(len(A), len(A)), 1).bool()
        return torch.softmax(z.masked_fill(hidden, -torch.inf), dim=1).to(dtype)

    return texts, [attend(A) for A in texts], W_Q / 3.0, W_K


@pytest.mark.parametrize(
    ("dtype", "cap", "limit"),
    [
        (torch.float64, None, 1e-9),
        (torch.float16, None, 3e-3),
        (torch.bfloat16, None, 2e-2),
        (torch.float64, 2.0, 1e-9),
    ],
)
def test_a_planted_head_comes_back(dtype, cap, limit):
    texts, maps, W_Q, W_K = planted(dtype, cap)
    model = AttentionRegressor(
        rank=H, mask="causal", rotary=problems.Rotary(theta=THETA), softcap=cap, random_state=0
    )
    model.fit(texts[0], maps[0])
    assert model.result_.converged
    assert model.relative_error(texts[1], maps[1]) < limit
    if cap is None:
        M, X_0 = model.rotary_matrices_()
        q, k = W_Q[:, :2] + 1j * W_Q[:, 2:], W_K[:, :2] + 1j * W_K[:, 2:]
        truth = np.einsum("if,jf->fij", q, k.conj())
        assert np.abs(M - truth).max() < 10.0 * limit * np.abs(truth).max()
        assert not X_0.any()
        assert (np.linalg.matrix_rank(M, tol=1e-8) == 1).all()


def test_without_rotary_the_residual_points_to_the_distance():
    # Tokens of a model have a mean, through which distances show by themselves.
    texts, maps, *_ = planted(torch.float64, mean=1.0)
    said = r"the distance of query and key explains \d+% of the residual: pass rotary"
    for loss in ("log_ratio", "auto"):
        with pytest.warns(UserWarning, match=said):
            AttentionRegressor(rank=H, mask="causal", loss=loss).fit(texts[0], maps[0])


def test_frequencies_and_unseen_distances():
    texts, maps, *_ = planted(torch.float64, n=30)
    slow = problems.Rotary(frequencies=[1.0, 0.01])
    model = AttentionRegressor(rank=H, mask="causal", rotary=slow, max_iter=2, n_starts=1, random_state=0)
    with pytest.warns(ConvergenceWarning):
        model.fit(texts[0][:20], maps[0][:20, :20])
    assert model.frequencies_identified_.tolist() == [True, False]
    assert model.distances_ == (0.0, 19.0)
    with pytest.warns(
        UserWarning, match=r"distances 0 to 29 are asked .*, the fit saw 0 to 19; of 2 .* 1 turned"
    ):
        model.predict(texts[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(texts[1][:20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary": problems.Rotary(frequencies=np.ones(3))}, "rank 4 is less than the 2 x 3 columns"),
        ({"rotary": problems.Rotary(positions=np.arange(5))}, r"positions has shape \(5,\); expected"),
        ({"rotary": problems.Rotary(positions=[0, 1, np.nan, 3, 4, 5.0])}, "not finite at index 2"),
        ({"rotary": problems.Rotary(), "loss": "rescaled"}, "'rescaled' is not offered with rotary"),
        ({"softcap": 0.0}, "softcap must be a positive number"),
        ({"qk_norm": -1.0}, "qk_norm must be a positive number"),
        ({"sink": True, "rank": None}, "rank must be the width of the head"),
        ({"sink": True, "row_penalty": 1.0}, "row_penalty is not offered"),
        ({"sink": True, "mask": "causal:0"}, "without a key"),
        ({"sink": True, "mask": "casual"}, "'causal:W'"),
    ],
)  # fmt: skip
def test_what_is_refused(options, message):
    texts, maps = instance(1, False)
    with pytest.raises(ValueError, match=message):
        problems.Attention(texts[0], texts[0], maps[0][0], **({"rank": H, "loss": "log_ratio"} | options))


@pytest.mark.parametrize("options", [{"layout": "other"}, {"theta": 0.0}, {"n": 3}, {"n": 0}])
def test_a_rotary_embedding_that_is_none(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        problems.Rotary(**options)


def test_the_solver_takes_heads_only():
    texts, maps = instance(1, False)
    plain = problems.Attention(texts[0], texts[0], maps[0][0])
    with pytest.raises(ValueError, match="takes Attention with rotary"):
        minimize(plain, solver=FactorLevenbergMarquardt())
    with pytest.raises(ValueError, match="n_starts must be"):
        FactorLevenbergMarquardt(n_starts=0)


def test_starts_are_counted_and_reported():
    texts, maps, *_ = planted(torch.float64, seed=1)
    problem = problems.Attention(texts[0], texts[0], maps[0], "log_ratio", "causal", rank=H,
                                 rotary=problems.Rotary(theta=THETA))  # fmt: skip
    result = minimize(problem, random_state=0, n_starts=1)
    assert len(result.local_values) == 1
    again = minimize(problem, x0=result.x)
    assert again.n_iter <= 2 and again.converged and "exact fit" in again.message


def test_with_many_unknowns_an_end_that_is_not_exact_is_not_called_converged(monkeypatch):
    texts, maps, *_ = planted(torch.float16, seed=2)
    problem = problems.Attention(texts[0], texts[0], maps[0], "log_ratio", "causal", rank=H,
                                 rotary=problems.Rotary(theta=THETA))  # fmt: skip
    few = minimize(problem, random_state=0)
    assert few.converged and "exact fit" not in few.message
    monkeypatch.setattr("attnfit.solvers.factors.FEW", problem.n_unknowns - 1)
    with pytest.warns(ConvergenceWarning, match="not decided whether this is a minimum"):
        many = minimize(problem, x0=few.x)
    assert many.status == "precision"
