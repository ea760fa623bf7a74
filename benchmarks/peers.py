"""One function a peer, each with the best settings its documentation and a day of trying allow.

Every function takes ``(case, tol, limit)`` and returns an ``Outcome``. The clock covers everything the
peer does with arrays it can take as they are; conversions it forces on the user are left out, in its favour.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy.optimize import minimize

from benchmarks.data import Array, Case
from benchmarks.meter import Clock, Meter, Outcome, Stop, counted
from benchmarks.objectives import Objective, scaled, unscaled


def scipy_run(objective: Objective, start: Array, fun: Any = None, **call: Any) -> Outcome:
    """Run ``scipy.optimize.minimize`` until it, its meter or its time says stop."""
    meter, clock = objective.meter, Clock()
    iterations, status = np.nan, ""
    try:
        result = minimize(fun or objective, start, jac=True, **call)
        x, iterations = result.x, result.nit
        status = "" if result.success else f"stopped: {result.message}"
    except Stop:
        x = meter.x
    return clock.outcome(
        x,
        iterations=iterations,
        evaluations=meter.evaluations,
        reads=meter.reads,
        status=meter.status or status,
    )


def zeros(case: Case) -> Array:
    """Cold start."""
    return np.zeros(case.A.shape[1])


# Zero tolerances: at kappa = 100 any ftol above zero ends a run before the gradient has fallen to 1e-8.
LBFGS = {"gtol": 0.0, "ftol": 0.0, "maxiter": 20_000, "maxfun": 40_000}


def lbfgs(case: Case, tol: float, limit: float, **changes: float) -> Outcome:
    """L-BFGS-B on the scaled objective, left the moment the relative gradient reaches ``tol``."""
    options = LBFGS | changes | ({"maxcor": 20} if case.spec.nonzeros else {})
    return scipy_run(scaled(case, Meter(tol, limit)), zeros(case), method="L-BFGS-B", options=options)


def lbfgs_tight(case: Case, tol: float, limit: float) -> Outcome:
    """L-BFGS-B on the scaled objective with tight tolerances, run to its own end."""
    return lbfgs(case, 0.0, limit, gtol=1e-12, ftol=1e-15)


def lbfgs_default(case: Case, tol: float, limit: float) -> Outcome:
    """L-BFGS-B as a user meets it: the objective as printed, every option at its default."""
    return scipy_run(unscaled(case, Meter(0.0, limit)), zeros(case), method="L-BFGS-B")


def lbfgs_columns(case: Case, tol: float, limit: float) -> Outcome:
    """L-BFGS-B as ``lbfgs``, by a user who also divides every column by its norm."""
    clock = Clock()
    objective = scaled(case, Meter(tol, limit))
    norms = np.sqrt(column_squares(case.A))
    norms[norms == 0] = 1.0
    norms /= norms.max()
    objective.meter.reads += 1

    def fun(y: Array) -> tuple[float, Array]:
        value, gradient = objective(y / norms)
        return value, gradient / norms

    out = scipy_run(objective, zeros(case), fun, method="L-BFGS-B", options=LBFGS | {"maxcor": 20})
    # The meter keeps x in the user's units; only a run to the solver's own end returns y.
    x = objective.meter.x
    return clock.outcome(
        x, iterations=out.iterations, evaluations=out.evaluations, reads=out.reads, status=out.status
    )


def column_squares(A: Any) -> Array:
    """Sum of squares of every column."""
    if isinstance(A, np.ndarray):
        return np.asarray(np.einsum("ij,ij->j", A, A))
    return np.bincount(A.indices, A.data**2, minlength=A.shape[1])


def newton_cg(case: Case, tol: float, limit: float) -> Outcome:
    """Newton-CG with exact Hessian-vector products on the scaled objective, left at ``tol``."""
    objective = scaled(case, Meter(tol, limit))
    options = {"xtol": 0.0, "maxiter": 2_000}
    return scipy_run(objective, zeros(case), method="Newton-CG", hessp=objective.hessp, options=options)


def sklearn_lbfgs(case: Case, tol: float, limit: float) -> Outcome:
    """TweedieRegressor(power=0, link="log"), L-BFGS."""
    return sklearn_run(case, limit, solver="lbfgs", tol=min(1e-8, largest_entry(case, tol)), max_iter=3_000)


def sklearn_cholesky(case: Case, tol: float, limit: float) -> Outcome:
    """TweedieRegressor(power=0, link="log"), exact Newton."""
    needed = min(1e-8, largest_entry(case, tol))
    return sklearn_run(case, limit, solver="newton-cholesky", tol=needed, max_iter=500)


def sklearn_run(case: Case, limit: float, **settings: Any) -> Outcome:
    """Fit with scikit-learn, counting the products inside its linear loss."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import TweedieRegressor
    from sklearn.linear_model._linear_loss import LinearModelLoss

    meter = Meter(0.0, limit)
    meter.x = zeros(case)

    def evaluation(reads: int) -> Any:
        def charge(coef: Array, *args: Any, **kwargs: Any) -> None:
            meter.x = np.array(coef)
            meter.spend(reads)

        return charge

    charges = {
        "weight_intercept_raw": lambda *a, **k: meter.spend(1, evaluations=0),
        "loss_gradient": evaluation(1),
        "gradient_hessian": evaluation(2),
    }
    model = TweedieRegressor(power=0, link="log", alpha=0, fit_intercept=False, **settings)
    clock, iterations, status = Clock(), np.nan, ""
    with counted(LinearModelLoss, charges), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.fit(case.A, case.b)
            x, iterations = model.coef_, model.n_iter_
        except Stop:
            x = meter.x
    if any(issubclass(w.category, ConvergenceWarning) for w in caught):
        status = f"cap ({iterations:.0f} iterations)" if iterations == settings["max_iter"] else "warned"
    return clock.outcome(
        x,
        iterations=iterations,
        evaluations=meter.evaluations,
        reads=meter.reads,
        status=meter.status or status,
    )


def glum_fixed(case: Case, tol: float, limit: float) -> Outcome:
    """glum, Gaussian family with log link, iteratively reweighted least squares to a gradient of 1e-10."""
    return glum_run(case, limit, 1e-10)


def glum_matched(case: Case, tol: float, limit: float) -> Outcome:
    """glum told the largest gradient entry that still implies a relative gradient of ``tol``.

    Without this it polishes far past ``tol`` and looks slower than it is.
    """
    return glum_run(case, limit, largest_entry(case, tol))


def largest_entry(case: Case, tol: float) -> float:
    """Gradient entry of the mean loss below which the relative gradient is surely below ``tol``."""
    n, d = case.A.shape
    return float(tol * np.linalg.norm(case.A.T @ (1.0 - case.b)) / (n * np.sqrt(d)))


def glum_run(case: Case, limit: float, gradient_tol: float) -> Outcome:
    """Fit with glum, counting the products inside its design matrix."""
    from glum import GeneralizedLinearRegressor
    from tabmat import DenseMatrix

    meter = Meter(0.0, limit)

    def read(*args: Any, **kwargs: Any) -> None:
        meter.spend(1, evaluations=0)

    def evaluation(*args: Any, **kwargs: Any) -> None:
        meter.spend(1)

    model = GeneralizedLinearRegressor(
        family="gaussian",
        link="log",
        alpha=0,
        fit_intercept=False,
        gradient_tol=gradient_tol,
        start_params=zeros(case),
    )
    clock, status, iterations, x = Clock(), "", np.nan, zeros(case)
    charges = {"matvec": read, "transpose_matvec": read, "sandwich": evaluation}
    with counted(DenseMatrix, charges), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.fit(case.A, case.b)
            x, iterations = model.coef_, model.n_iter_
        except Stop:
            pass
    if any("converge" in str(w.message).lower() for w in caught):
        status = "warned: not converged"
    return clock.outcome(
        x,
        iterations=iterations,
        evaluations=meter.evaluations,
        reads=meter.reads,
        status=meter.status or status,
    )


def xlogit_fit(case: Case, tol: float, limit: float) -> Outcome:
    """xlogit's conditional logit, without standard errors, from choice sets padded to the largest one."""
    from xlogit import MultinomialLogit

    assert case.starts is not None
    n, d = case.A.shape
    sizes = np.diff(case.starts, append=n)
    groups, width = len(sizes), int(sizes.max())
    if groups * width > 20 * n:
        raise ValueError(f"padding to {width:,} alternatives multiplies the data by {groups * width // n:,}")
    slot = np.arange(n) - np.repeat(case.starts, sizes) + width * np.repeat(np.arange(groups), sizes)
    X = np.zeros((groups * width, d))
    X[slot] = case.A
    y, available = np.zeros(len(X)), np.zeros(len(X))
    y[slot], available[slot] = case.b, 1
    meter, model = Meter(0.0, limit), MultinomialLogit()

    def charge(*args: Any, return_gradient: bool = True, **kwargs: Any) -> None:
        meter.spend(1 + return_gradient)

    clock = Clock()
    with counted(MultinomialLogit, {"_loglik_gradient": charge}):
        model.fit(
            X,
            y,
            varnames=[f"x{j}" for j in range(d)],
            alts=np.tile(np.arange(width), groups),
            ids=np.repeat(np.arange(groups), width),
            avail=available,
            skip_std_errs=True,
            tol_opts={"ftol": 1e-12},
            verbose=0,
        )
    return clock.outcome(
        model.coeff_,
        iterations=model.total_iter,
        evaluations=meter.evaluations,
        reads=meter.reads,
        status="" if model.convergence else "stopped: " + model.estimation_message,
    )


def statsmodels_fit(case: Case, tol: float, limit: float) -> Outcome:
    """The conditional logit of statsmodels, which walks through the groups in Python."""
    from statsmodels.discrete.conditional_models import ConditionalLogit

    meter = Meter(0.0, limit)
    clock = Clock()
    charges = {
        "loglike": lambda *a, **k: meter.spend(1, evaluations=0),
        "score": lambda *a, **k: meter.spend(2),
    }
    model = ConditionalLogit(case.b, case.A, groups=case.labels)
    with counted(ConditionalLogit, charges):
        result = model.fit(method="bfgs", maxiter=500, gtol=1e-8, disp=False, skip_hessian=True)
    return clock.outcome(result.params, evaluations=meter.evaluations, reads=meter.reads)


def plain_evaluation(case: Case) -> Any:
    """The two-product value and gradient a scipy user pays for, as a function of ``x``."""
    return unscaled(case, Meter(0.0, np.inf))
