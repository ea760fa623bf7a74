"""The exponential of the compiled loops against exact arithmetic."""

import mpmath
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnfit.data.kernels import OPTIONS
from attnfit.objectives.compiled import exp


@pytest.fixture(scope="module")
def vector():
    """The exponential within a loop of its user's options."""

    @numba.njit(**OPTIONS)
    def loop(x, y):
        for i in range(len(x)):
            y[i] = exp(x[i])

    def call(x):
        y = np.empty_like(x)
        loop(x, y)
        return y

    return call


@pytest.mark.parametrize("span", [(-1e-8, 1e-8), (-1.0, 1.0), (-708.0, 709.7), (-745.1, -708.0)])
def test_within_one_unit_in_the_last_place(vector, span):
    x = np.random.default_rng(0).uniform(*span, 4000)
    with mpmath.workdps(40):
        exact = [mpmath.exp(mpmath.mpf(v)) for v in x.tolist()]
        units = np.spacing(np.array([float(e) for e in exact]))
        off = [abs(mpmath.mpf(y) - e) / u for y, e, u in zip(vector(x).tolist(), exact, units, strict=True)]
    assert max(off) < 1.0


@pytest.mark.filterwarnings("ignore:overflow")
@given(st.floats())
def test_everywhere(vector, value):
    x = np.full(9, value)
    np.testing.assert_allclose(vector(x), np.exp(x), rtol=4e-16, atol=1e-323)


def test_at_the_ends(vector):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 709.79, -745.2, 1e308, -1e308])
    np.testing.assert_array_equal(vector(x), [1, 1, np.inf, 0, np.nan, np.inf, 0, np.inf, 0])


def test_it_becomes_vector_instructions():
    """Else it would be no faster than the C library."""

    @numba.njit(**OPTIONS)
    def loop(x, y):
        for i in range(len(x)):
            y[i] = exp(x[i])

    loop(np.ones(4), np.ones(4))
    code = loop.inspect_llvm(loop.signatures[0])
    assert any(f"<{width} x double>" in code for width in (2, 4, 8))
