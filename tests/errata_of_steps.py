"""Errata of single steps: of proofs, series and algorithms, each on the smallest instance that shows it."""

import math

import mpmath
import numpy as np
from errata_of_recovery import E
from errata_shown import RIGHT, reproduces

from attnfit import problems, theory
from attnfit.theory import instances

RNG = np.random.default_rng(11)


@reproduces("WS-e13")
def the_shift_without_a_bound_on_the_data():
    A, R, beta, move = np.array([1000.0, 0.0]), 4.0, 0.99, 0.1
    u, moved = np.ones(2), np.exp(A * move)
    shift = np.linalg.norm(moved - u) / u.sum()
    assert shift > 1e30 * (2 / beta * math.sqrt(2) * R * math.exp(R**2) * move)
    # What the lemma leaves out is among the assumptions of the bound.
    i = instances.Regression(A[:, None], [0.5, 0.5], [0.0], [move], R=R)
    assert any(text.startswith("|A|") for text in theory.check("WS-5.5.2", i).violated)


@reproduces("RH-e22")
def series_of_cosh():
    z = mpmath.mpf("1.3")

    def sum_of(term):
        return float(mpmath.nsum(lambda i: term(int(i)) / mpmath.factorial(2 * int(i)), [0, 40]))

    yield sum_of(lambda i: z**2), sum_of(lambda i: z ** (2 * i)), float(mpmath.cosh(z))
    assert abs(sum_of(lambda i: z**2) - float(z**2 * mpmath.cosh(1))) < RIGHT


@reproduces("RH-e24")
def the_shift_of_the_target_grows_with_it():
    R, x, y = 4, mpmath.mpf(1), mpmath.mpf("1.001")
    for u in (mpmath.exp, mpmath.cosh, mpmath.sinh):
        for size in (mpmath.mpf(10) ** 150, mpmath.mpf(10) ** 300):
            # One row: the change of c = u - alpha b, over alpha.
            shift = abs((u(y) - u(x)) * (1 - size) / u(x))
            assert shift > mpmath.exp(20 * R**2) * abs(x - y)


@reproduces("RH-e26")
def factors_at_the_other_point():
    b, x, y = 0.5, 1.3, 0.0
    u, moved = math.exp(x), math.exp(y)
    du, dc = u - moved, (1 - b) * (u - moved)
    part = abs(du + dc) * u
    assert part > 3.6 * (abs(du) + abs(dc)) * moved
    assert part <= (abs(du) + abs(dc)) * u
    # The third part, u = cosh: its derivative is zero at zero.
    v, moved = math.sinh(0.0), math.sinh(x)
    part = b**2 * abs(moved * (v - moved))
    assert part > b**2 * abs(v - moved) * abs(v) == 0.0
    assert part <= b**2 * abs(v - moved) * abs(moved)


@reproduces("TT-e21")
def a_difference_of_squares():
    f, moved = (problems.Softmax(RNG.standard_normal((5, 2)), np.full(5, 0.2)).predict([0.3, -0.4])
                for _ in range(2))  # fmt: skip
    c, d = f - moved, moved - moved[::-1]
    for last, truth in ((c @ d, False), (d @ d, True)):
        line = c @ c - c @ d + c @ d - last
        assert (abs(line - (c @ c - d @ d)) < RIGHT) == truth
    # A fit that is exact at the first data makes the printed line zero.
    zero = np.zeros(5)
    assert abs(zero @ zero - zero @ d + zero @ d - zero @ d) == 0.0 < d @ d


@reproduces("TT-e22")
def the_size_of_a_column_in_place_of_that_of_the_softmax():
    f, g = (np.exp(z) / np.exp(z).sum() for z in RNG.standard_normal((2, 4)))
    column, moved = np.zeros(4), RNG.standard_normal(4)
    left = abs(f @ (column - moved)) * abs(g @ np.ones(4))
    change, ones = np.linalg.norm(column - moved), np.linalg.norm(np.ones(4))
    assert left > np.linalg.norm(column) * change * ones == 0.0
    assert left <= np.linalg.norm(f) * change * ones


@reproduces("TL-e35")
def the_normaliser_is_a_number():
    u = np.exp(RNG.standard_normal(4))
    assert np.linalg.matrix_rank(np.outer(u, np.ones(4))) == 1
    assert abs(np.linalg.norm(u / (np.ones(4) @ u), 1) - 1.0) < RIGHT


@reproduces("TL-e37")
def a_loss_of_zero():
    A1, A2, x = RNG.standard_normal((5, 2)), RNG.standard_normal((3, 5)), RNG.standard_normal(2)
    exact = problems.TwoLayer(A1, A2, np.zeros(3), "tanh").predict(x)
    assert problems.TwoLayer(A1, A2, exact, "tanh").value(x) == 0.0


@reproduces("UT-e45")
def the_last_iterate_is_never_computed():
    problem = problems.LayerInversion(E.W, E.V, E.B)
    T, points, losses = 5, {0: E.X}, {}
    t = 1
    while t < T:
        losses[t] = problem.value(points[t - 1])
        points[t] = points[t - 1] - 1e-3 * problem.gradient(points[t - 1])
        t += 1
    assert max(points) == T - 1 and T not in losses
    # The last loss is that of the iterate before the last.
    assert problem.value(points[T - 1]) < losses[T - 1] == problem.value(points[T - 2])


@reproduces("UT-e48")
def the_values_move_by_less_than_the_product_of_norms():
    rng = np.random.default_rng(1)
    change, column = rng.standard_normal((3, 4)), rng.standard_normal(3)
    left, right = np.linalg.norm(change.T @ column), np.linalg.norm(column) * np.linalg.norm(change)
    assert left < 0.9 * right


@reproduces("UT-e52")
def a_term_that_is_zero():
    def step(f, g, x, y, last):
        return abs(g(x)) * abs(f(x) - f(y)) + abs(g(x) - g(y)) * last

    f, g, x, y = (lambda t: 1.0), (lambda t: t), 1.0, 0.0
    assert abs(f(x) * g(x) - f(y) * g(y)) > step(f, g, x, y, abs(f(y) - f(y))) == 0.0
    assert abs(f(x) * g(x) - f(y) * g(y)) <= step(f, g, x, y, abs(f(y)))
