"""What a user's type checker sees: `make lint` runs pyright on this file. It is never executed."""

from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import attnfit
from attnfit import (
    AttentionRegressor,
    ExponentialRegressor,
    PoissonRegressor,
    RescaledSoftmaxRegressor,
    SoftmaxRegressor,
    TwoLayerRegressor,
    minimize,
    problems,
)
from attnfit.certificates import Certificate
from attnfit.solvers import GradientDescent, LevenbergMarquardt, Newton, Result, Separation, Status

Array = NDArray[np.float64]

A = np.ones((6, 2))
b = np.ones(6)

# What a fit returns.
problem = problems.Softmax(A, b, [0, 0, 0, 1, 1, 1], loss="cross_entropy")
result = minimize(problem, solver=Newton(hessian="exact"), n_starts="auto", separation="drop")
assert_type(result, Result)
assert_type(result.x, Array)
assert_type(result.value, float)
assert_type(result.converged, bool)
assert_type(result.status, Status)
assert_type(result.message, str)
assert_type(result.n_iter, int)
assert_type(result.n_passes, float)
assert_type(result.move, float)
assert_type(result.separation, Separation | None)
certificate = result.certificate()
assert_type(certificate.valid, bool)
assert_type(certificate.radius, float)
assert_type(certificate.reason, str)
assert_type(problem.value(result.x), float)
assert_type(problem.gradient(result.x), Array)
assert_type(problem.hessian(result.x), Array)
assert_type(problem.hvp(result.x, result.x), Array)
assert_type(problem.initial_point(0), Array)
assert_type(problem.n_unknowns, int)
assert_type(problem.shape, tuple[int, ...])

# Estimators keep their type, and predict arrays.
assert_type(SoftmaxRegressor(loss="kl").fit(A, b, groups=[0, 0, 0, 1, 1, 1]), SoftmaxRegressor)
assert_type(ExponentialRegressor(function="cosh").fit(A, b), ExponentialRegressor)
assert_type(PoissonRegressor().fit(A, b), PoissonRegressor)
assert_type(RescaledSoftmaxRegressor().fit(A, b), RescaledSoftmaxRegressor)
assert_type(TwoLayerRegressor(A).fit(A, b), TwoLayerRegressor)
assert_type(AttentionRegressor().fit(A, A, np.ones((6, 6))), AttentionRegressor)
model = SoftmaxRegressor().fit(A, b)
assert_type(model.predict(A), Array)
assert_type(model.score(A, b), float)
assert_type(model.certificate_, Certificate)
assert_type(model.result_, Result)
assert_type(model.n_iter_, int)
model.save("model.safetensors")
assert_type(attnfit.load("model.safetensors").result_, Result)

# Choices are told apart; each of these is an error, which pyright must see.
problems.Softmax(A, b, loss="cross-entropy")  # pyright: ignore[reportArgumentType]
problems.Exponential(A, b, function="tan")  # pyright: ignore[reportArgumentType]
problems.Rescaled(A, b, function="exponential")  # pyright: ignore[reportArgumentType]
problems.Attention(A, A, A, loss="l2")  # pyright: ignore[reportCallIssue, reportArgumentType]
SoftmaxRegressor(loss="logit")  # pyright: ignore[reportArgumentType]
SoftmaxRegressor(separation="ignore")  # pyright: ignore[reportArgumentType]
ExponentialRegressor(function="log")  # pyright: ignore[reportArgumentType]
RescaledSoftmaxRegressor(function="log")  # pyright: ignore[reportArgumentType]
AttentionRegressor(loss="l2")  # pyright: ignore[reportArgumentType]
model.covariance(kind="hc3")  # pyright: ignore[reportArgumentType]
minimize(problem, separation="no")  # pyright: ignore[reportArgumentType]
minimize(problem, solver="newton")  # pyright: ignore[reportArgumentType]
Newton(hessian="bfgs")  # pyright: ignore[reportArgumentType]
GradientDescent(step="long")  # pyright: ignore[reportCallIssue]
LevenbergMarquardt(n_restarts="many")  # pyright: ignore[reportArgumentType]
