"""Fit, certify and invert models whose output is an exponential, a softmax or an attention matrix."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnfit.version import __version__ as __version__

if TYPE_CHECKING:
    from attnfit import (
        audit,
        certificates,
        data,
        datasets,
        estimators,
        heads,
        incontext,
        inference,
        inversion,
        losses,
        metrics,
        model_selection,
        plots,
        problems,
        reshape,
        scorers,
        solvers,
        theory,
    )
    from attnfit.estimators import (
        AttentionRegressor,
        ExponentialRegressor,
        PoissonRegressor,
        RescaledSoftmaxRegressor,
        SoftmaxRegressor,
        TwoLayerRegressor,
        load,
    )
    from attnfit.solvers import minimize, minimize_many

# SciPy and scikit-learn take a second to import: each room is opened when it is first entered.
_ROOMS = (
    "audit",
    "certificates",
    "datasets",
    "data",
    "designs",
    "losses",
    "estimators",
    "heads",
    "incontext",
    "inference",
    "inversion",
    "metrics",
    "model_selection",
    "plots",
    "problems",
    "reshape",
    "scorers",
    "solvers",
    "theory",
)
_HOMES = {
    "minimize": "solvers",
    "minimize_many": "solvers",
    "AttentionRegressor": "estimators",
    "ExponentialRegressor": "estimators",
    "PoissonRegressor": "estimators",
    "RescaledSoftmaxRegressor": "estimators",
    "SoftmaxRegressor": "estimators",
    "TwoLayerRegressor": "estimators",
    "load": "estimators",
}

__all__ = [
    "AttentionRegressor",
    "ExponentialRegressor",
    "PoissonRegressor",
    "RescaledSoftmaxRegressor",
    "SoftmaxRegressor",
    "TwoLayerRegressor",
    "audit",
    "certificates",
    "data",
    "datasets",
    "estimators",
    "heads",
    "incontext",
    "inference",
    "inversion",
    "load",
    "losses",
    "metrics",
    "minimize",
    "minimize_many",
    "model_selection",
    "plots",
    "problems",
    "reshape",
    "scorers",
    "solvers",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"attnfit.{name}")
    if name in _HOMES:
        return getattr(import_module(f"attnfit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'attnfit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
