"""The formulas of every loss on the rows of a block, by autodiff of its definition in the logits."""

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from instances import relative

from attnfit.losses.elementwise import LeastSquares, PoissonDeviance, SquaredExponential, Total
from attnfit.losses.loss import Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.separable import PointwiseLoss, SeparableLoss
from attnfit.losses.softmax import LOSSES, CrossEntropy, LogRatio, SoftmaxLoss, Squared
from attnfit.segments import Segments

U = {"exp": torch.exp, "cosh": torch.cosh, "sinh": torch.sinh}


def shares(z):
    return torch.softmax(z, 0)


def least_squares_of_logs(z, b, w):
    r = z - b
    return 0.5 * w * (r - (w * r).sum() / w.sum()) ** 2


class Quartic(SeparableLoss):
    """A loss of shares of one's own, with derivatives of every order."""

    certifiable = True

    def phi(self, f, b):
        return (f - b) ** 4

    def first(self, f, b):
        return 4.0 * (f - b) ** 3

    def second(self, f, b):
        return 12.0 * (f - b) ** 2

    def third(self, f, b):
        return 24.0 * (f - b)


class Sine(PointwiseLoss):
    """A loss of logits of one's own, whose curvature has both signs."""

    certifiable = True

    def phi(self, z, b):
        return -torch.sin(as_tensor(z - b)).numpy()

    def first(self, z, b):
        return -np.cos(z - b)

    def second(self, z, b):
        return np.sin(z - b)

    def third_derivative_bound(self, low, high, b, w):
        return w


# What each row of a group adds to the loss, by name: the loss, its definition, and its residuals if any.
PLAIN = {
    "squared": (
        LOSSES["squared"],
        lambda z, b, w: 0.5 * w * (shares(z) - b) ** 2,
        lambda z, b: shares(z) - b,
    ),
    "cross_entropy": (LOSSES["cross_entropy"], lambda z, b, w: -w * b * torch.log_softmax(z, 0), None),
    "kl": (
        LOSSES["kl"],
        lambda z, b, w: w * (torch.xlogy(b, b) - b * torch.log_softmax(z, 0)),
        None,
    ),
    "linear_cross_entropy": (LOSSES["linear_cross_entropy"], lambda z, b, w: -w * b * shares(z), None),
    "entropy": (LOSSES["entropy"], lambda z, b, w: -w * shares(z) * torch.log_softmax(z, 0), None),
    "poisson": (PoissonDeviance(), lambda z, b, w: w * (torch.exp(z) - b * z), None),
    "total": (Total(), lambda z, b, w: w * torch.exp(z), None),
    "least squares": (LeastSquares(), lambda z, b, w: 0.5 * w * (z - b) ** 2, lambda z, b: z - b),
    "logs": (LogRatio(), least_squares_of_logs, None),
    "quartic": (Quartic(), lambda z, b, w: w * (shares(z) - b) ** 4, None),
    "sine": (Sine(), lambda z, b, w: -w * torch.sin(z - b), None),
}
for name, u in U.items():
    PLAIN[f"squared {name}"] = (
        SquaredExponential(name),
        lambda z, b, w, u=u: 0.5 * w * (u(z) - b) ** 2,
        lambda z, b, u=u: u(z) - b,
    )
    PLAIN[f"rescaled {name}"] = (
        SquaredRescaled(name),
        lambda z, b, w, u=u: 0.5 * w * (u(z) - u(z).sum() * b) ** 2,
        lambda z, b, u=u: u(z) - u(z).sum() * b,
    )
SIZES = {"uneven": (4, 1, 6, 3), "even": (3, 3, 3), "one": (5,)}


class Block:
    """Rows of some groups, and the derivatives of their loss."""

    def __init__(self, name, sizes="uneven", seed=0):
        rng = np.random.default_rng(seed)
        self.loss, self.rows, self.residuals = PLAIN[name]
        # Rows that share no normaliser are one block, whatever their groups.
        self.sizes = np.array(SIZES[sizes] if self.loss.coupled else [sum(SIZES[sizes])])
        self.n = int(self.sizes.sum())
        self.segments = Segments(np.concatenate([[0], np.cumsum(self.sizes)[:-1]]), self.n)
        self.ids = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.z, self.w = rng.standard_normal(self.n), rng.random(self.n) + 0.3
        self.b = rng.random(self.n)
        self.b[::4] = 0.0
        self.z[2] = 0.0
        self.constants = self.loss.constants(self.b, self.w, self.segments)

    def groups(self):
        return [np.flatnonzero(self.ids == g) for g in range(len(self.sizes))]

    def value(self, z):
        parts = [self.rows(z[g], as_tensor(self.b)[g], as_tensor(self.w)[g]).sum() for g in self.groups()]
        return torch.stack(parts).sum()

    def derivatives(self):
        point = as_tensor(self.z)
        gradient = torch.autograd.functional.jacobian(self.value, point).numpy()
        return gradient, torch.autograd.functional.hessian(self.value, point).numpy()

    def finalize(self, reference, only=None):
        """Columns, and what their sums say; with ``only`` these sums and no others."""
        spread = self.segments.spread
        y, v = self.loss.transform(self.z, spread(reference))
        columns, extras = self.loss.accumulate(
            y, v, self.b, self.w, spread(reference), spread(self.constants)
        )
        sums = [self.segments.sum(c) for c in columns]
        if only is not None:
            sums = [s if j in only else np.ones_like(s) for j, s in enumerate(sums)]
        closed = self.loss.finalize(sums, [self.segments.sum(e) for e in extras], reference, self.constants)
        return columns, closed

    def spread(self, values):
        values = np.asarray(values, dtype=float)
        return np.broadcast_to(values if values.ndim == 0 else self.segments.spread(values), self.n)

    def state(self):
        reference = self.loss.reference(self.z, self.segments)
        return [self.segments.spread(s) for s in self.finalize(reference)[1].state]

    def matrix(self, terms, weights):
        """The signed Gram of the terms where every logit is an unknown."""
        H = np.zeros((self.n, self.n))
        for t, r, q in terms:
            for g in self.groups():
                centre = np.zeros(self.n)
                if weights is not None:
                    centre[g] = np.broadcast_to(weights, self.n)[g]
                for i in g:
                    row = np.zeros(self.n)
                    row[i] = 1.0 if r is None else r[i]
                    if q is not None:
                        row = row - np.broadcast_to(q, self.n)[i] * centre
                    H += np.broadcast_to(t, self.n)[i] * np.multiply.outer(row, row)
        return H


def references(block):
    """The normaliser, and others that are off."""
    exact = block.loss.reference(block.z, block.segments)
    shift = np.linspace(-1.0, 1.2, len(np.atleast_1d(exact)))
    if isinstance(block.loss, SquaredRescaled):
        return exact, exact * (1.0 + shift)
    return (exact, exact + shift) if block.loss.logarithmic and block.loss.one_pass else (exact,)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_one_read_gives_value_and_gradient(name, sizes):
    """With any reference for the normaliser; and of groups sums alone follow state and centre."""
    block = Block(name, sizes)
    gradient, _ = block.derivatives()
    value = float(block.value(as_tensor(block.z)))
    for reference in references(block):
        columns, closed = block.finalize(reference)
        assert np.isclose(np.sum(closed.value), value, rtol=1e-11, atol=1e-12)
        slope = sum(block.spread(c) * column for c, column in zip(closed.coefficients, columns, strict=True))
        assert relative(slope, gradient) <= 1e-11
        own = block.loss.slope(block.z, block.b, block.w, [block.segments.spread(s) for s in closed.state])
        assert relative(own, gradient) <= 1e-11
        weights = block.loss.gram_terms(block.z, block.b, block.w, block.state())[1]
        if weights is not None:
            assert relative(block.spread(closed.centre) * columns[-1], weights) <= 1e-12


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_the_hessian_is_a_signed_gram(name, sizes):
    block = Block(name, sizes)
    _, hessian = block.derivatives()
    H = block.matrix(*block.loss.gram_terms(block.z, block.b, block.w, block.state()))
    assert relative(H, hessian) <= 1e-11
    if block.loss.convex:
        assert np.linalg.eigvalsh(hessian)[0] >= -1e-12


@pytest.mark.parametrize("name", PLAIN)
def test_the_slope_is_the_difference_that_it_is_said_to_be(name):
    """``o (c - sum k c)`` by group, whose parts tell what the difference loses; none is made up of sums."""
    for seed in range(3):
        block = Block(name, seed=seed)
        parts = block.loss.slope_parts(block.z, block.b, block.w, block.state())
        if parts is None:
            # The slope has no cancellation of its own: it is as large as the rows' own terms.
            assert not block.loss.coupled or block.loss.needs_mass
            return
        outer, inner, share = (np.broadcast_to(part, block.n) for part in parts)
        slope = outer * (inner - block.spread(block.segments.sum(share * inner)))
        assert relative(slope, block.derivatives()[0]) <= 1e-11
        # Taken for a sum, it would be larger.
        size = np.abs(outer) * (np.abs(inner) + block.spread(block.segments.sum(np.abs(share * inner))))
        assert (size >= np.abs(slope) * (1 - 1e-12)).all()


@pytest.mark.parametrize("name", PLAIN)
def test_the_gauss_newton_matrix(name):
    block = Block(name)
    state = block.state()
    if block.residuals is None and not block.loss.convex:
        with pytest.raises(ValueError, match="Gauss-Newton"):
            block.loss.gauss_newton_terms(block.z, block.b, block.w, state)
        return
    terms = block.loss.gauss_newton_terms(block.z, block.b, block.w, state)
    weights = block.loss.gram_terms(block.z, block.b, block.w, state)[1]
    if block.residuals is None:
        assert relative(block.matrix(terms, weights), block.derivatives()[1]) <= 1e-11
        return

    def residuals(z):
        return torch.cat(
            [
                as_tensor(np.sqrt(block.w[g])) * block.residuals(z[g], as_tensor(block.b)[g])
                for g in block.groups()
            ]
        )

    J = torch.autograd.functional.jacobian(residuals, as_tensor(block.z)).numpy()
    assert relative(block.matrix(terms, weights), J.T @ J) <= 1e-11


def test_the_terms_of_a_loss_of_ones_own_are_derivatives():
    """p, g2 and g3 from their definition in f."""
    rng = np.random.default_rng(0)
    f, b, w = rng.random(50), rng.random(50), rng.random(50) + 0.1
    point = as_tensor(f).requires_grad_()
    found, last = [], (as_tensor(w) * (point - as_tensor(b)) ** 4).sum()
    for _ in range(3):
        (grown,) = torch.autograd.grad(last, point, create_graph=True)
        found.append(grown.detach().numpy())
        last = grown.sum()
    d1, d2, d3 = found
    expected = {"p": d1, "g2": d2 * f + d1, "g3": d3 * f**2 + 3.0 * d2 * f + d1}
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(Quartic(), name)(f, np.log(f), b, w), values, rtol=1e-9)
    with pytest.raises(TypeError, match="states no third derivative"):
        SeparableLoss.third(Quartic(), f, b)


@pytest.mark.parametrize("name", PLAIN)
def test_importance_majorises_the_weights_of_rows(name):
    """And is them where all parts of a weight have one sign."""
    for seed in range(5):
        block = Block(name, seed=seed)
        state = block.state()
        terms, _ = block.loss.gram_terms(block.z, block.b, block.w, state)
        weights = sum(np.abs(t) * (1.0 if r is None else np.asarray(r) ** 2) for t, r, q in terms)
        importance = block.loss.importance(block.z, block.b, block.w, state)
        assert (importance >= weights * (1 - 1e-12)).all()
        if block.loss.shift_invariant and not isinstance(block.loss, LogRatio):
            f, gamma = np.exp(block.z - state[0]), np.abs(state[1])
            assert (importance <= weights + 2.0 * f * gamma + 1e-12).all()
        block.b = np.zeros(block.n)
        if not block.loss.shift_invariant:
            state = block.state()
            terms, _ = block.loss.gram_terms(block.z, block.b, block.w, state)
            weights = sum(np.abs(t) * (1.0 if r is None else np.asarray(r) ** 2) for t, r, q in terms)
            # A sum over a group pulls by the absolute value of what it adds.
            extra = 0.0
            if block.loss.coupled:
                u, _ = block.loss.transform(block.z, 0.0)
                extra = 2.0 * np.abs(u * state[1])
            importance = block.loss.importance(block.z, block.b, block.w, state)
            assert (importance <= weights + extra + 1e-12).all()


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_said_of_a_loss_is_true(name):
    """Its flags, by trying."""
    block = Block(name)
    loss, z = block.loss, as_tensor(block.z)
    value = float(block.value(z))
    shifted = z + as_tensor(block.spread(np.arange(len(block.sizes)) + 1.0))
    assert np.isclose(float(block.value(shifted)), value) == loss.shift_invariant
    b, block.b = block.b, block.b + 0.5 * np.arange(block.n)
    # A part of the target that no logit sees makes no loss of another one.
    assert (relative(block.derivatives()[0], Block(name).derivatives()[0]) > 1e-9) == (
        loss.has_target and name != "total"
    )
    block.b = b
    _, hessian = block.derivatives()
    across = hessian * (block.ids[:, None] == block.ids) * (1.0 - np.eye(block.n))
    assert (np.abs(across).max() > 1e-12) == loss.coupled
    assert loss.states_third_derivative
    # Numba compiles the library's own formulas, which use no fields.
    assert loss.compiled == (name not in ("quartic", "sine"))
    # One's own takes the normaliser for exact; the others correct it, as `finalize` is tested to do.
    assert loss.one_pass == (name != "quartic")
    others = [Block(name, seed=seed) for seed in range(12)]
    for other in others[::2]:
        other.b *= 6.0
    assert any(np.linalg.eigvalsh(o.derivatives()[1])[0] < -1e-9 for o in others) != loss.convex
    if loss.nonnegative_target and loss.coupled:
        assert LOSSES[loss.nonnegative_target] is loss
    assert bool(loss.nonnegative_target) == isinstance(loss, CrossEntropy | PoissonDeviance)
    assert isinstance(loss, CrossEntropy) == loss.needs_mass
    if type(loss).constants is Loss.constants:
        assert not block.constants.any()
    if loss.needs_mass:
        block.b[:] = 0.0
        assert not block.derivatives()[0].any()
    if loss.exact_sums:
        reference = loss.reference(block.z, block.segments)
        one, other = block.finalize(reference)[1], block.finalize(reference, only=loss.exact_sums)[1]
        np.testing.assert_allclose(np.concatenate(one.state), np.concatenate(other.state), atol=1e-12)
        np.testing.assert_allclose(one.value, other.value, atol=1e-12)
        for c, d in zip(one.coefficients, other.coefficients, strict=True):
            np.testing.assert_allclose(block.spread(c), block.spread(d), atol=1e-12)


def test_a_formula_of_ones_own_states_nothing():
    class Twice(Squared):
        def p(self, f, h, b, w):
            return 2.0 * super().p(f, h, b, w)

    class Same(Squared):
        pass

    class New(SoftmaxLoss):
        accumulate, finalize, p, g2 = Squared.accumulate, Squared.finalize, Squared.p, Squared.g2

    class States(Twice):
        certifiable = True

    stated = [cls().states_third_derivative for cls in (Twice, Same, States, New)]
    assert stated == [False, True, True, False]
    assert not New().certifiable
    for name in (
        "transform",
        "normalise",
        "accumulate",
        "finalize",
        "slope",
        "gram_terms",
        "g2",
        "g3",
        "third_derivative_bound",
    ):
        assert not type("Own", (Squared,), {name: getattr(Squared, name)})().states_third_derivative


@pytest.mark.parametrize("name", [n for n in PLAIN if PLAIN[n][0].coupled and n != "logs"])
def test_normalisers_of_parts(name):
    """Merge to that of the whole, and grow with the number of rows."""
    block = Block(name, "one")
    loss, z = block.loss, block.z
    whole = loss.reference(z, Segments(np.array([0]), 5))
    u = U.get(name.split()[-1], torch.exp)(as_tensor(z)).sum().item()
    np.testing.assert_allclose(whole, u if name.startswith("rescaled") else np.log(u), rtol=1e-12)
    one, other = (loss.reference(part, Segments(np.array([0]), len(part))) for part in (z[:2], z[2:]))
    np.testing.assert_allclose(loss.merge_references(one, other), whole, rtol=1e-12)
    thrice = loss.reference(np.tile(z, 3), Segments(np.array([0]), 15))
    np.testing.assert_allclose(loss.extrapolate(whole, 3.0), thrice, rtol=1e-12)


@pytest.mark.parametrize("name", [*LOSSES])
@pytest.mark.parametrize("c", [-1000.0, 0.0, 1000.0])
def test_a_softmax_of_any_size(name, c):
    block = Block(name)
    reference, h, f = block.loss.normalise(block.z + c, block.segments)
    for g in block.groups():
        expected = torch.log_softmax(as_tensor(block.z[g] + c), 0).numpy()
        np.testing.assert_allclose(h[g], expected, atol=1e-12)
        np.testing.assert_allclose(f[g], np.exp(expected), atol=1e-13)
    np.testing.assert_allclose(reference, np.log([np.exp(block.z[g]).sum() for g in block.groups()]) + c)


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_model_predicts(name):
    block = Block(name)
    fitted = block.loss.fitted(block.z, block.state())
    for g in block.groups():
        z, w = block.z[g], block.w[g]
        kind = name.split()[-1]
        u = U[kind](as_tensor(z)).numpy() if kind in U else np.exp(z)
        expected = {
            "rescaled": u / u.sum(),
            "least": z,
            "sine": z,
            "logs": np.exp(z - np.average(z - block.b[g], weights=w)),
            "poisson": u,
            "total": u,
        }.get(name.split()[0], u if " " in name else u / u.sum())
        np.testing.assert_allclose(fitted[g], expected, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_stand_for_others(name):
    """Of m copies of every row one is kept, with its targets and weights for all of them."""
    m, block = 4, Block(name, "one")
    loss, z, b, w = block.loss, block.z, block.b, block.w
    one = as_tensor(np.repeat(z, m))
    rows = PLAIN[name][1]
    full = float(rows(one, as_tensor(np.repeat(b, m)), as_tensor(np.repeat(w, m))).sum())
    thin_b, thin_w = loss.subsample(b, w, np.full(5, 1.0 / m))
    if name == "kl":
        # Up to what the target alone determines.
        full -= float((np.repeat(w * b, m) * np.log(np.maximum(np.repeat(b, m), 1e-300))).sum())
        kept = -float((as_tensor(thin_w * thin_b) * torch.log_softmax(as_tensor(z), 0)).sum())
        assert np.isclose(kept + (w * b).sum() * m * np.log(m), full)
        return
    kept = rows(as_tensor(z), as_tensor(thin_b), as_tensor(thin_w)).sum()
    if name == "cross_entropy":
        kept = kept + (w * b).sum() * m * np.log(m)
    if name == "entropy":
        kept = kept + np.log(m) * (as_tensor(w) * shares(as_tensor(z))).sum()
    assert np.isclose(float(kept), full)
    assert Total().subsample(b, w, np.ones(5)) is None
