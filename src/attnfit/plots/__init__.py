"""Figures of a fit (extra ``plot``). Each function returns a matplotlib Figure; none opens a window."""

from attnfit.plots.coefficients import coefficients
from attnfit.plots.convergence import convergence
from attnfit.plots.fitted import fitted_versus_observed
from attnfit.plots.inversion import inversion_progress, jacobian_spectrum, success_map
from attnfit.plots.maps import attention_maps

__all__ = [
    "attention_maps",
    "coefficients",
    "convergence",
    "fitted_versus_observed",
    "inversion_progress",
    "jacobian_spectrum",
    "success_map",
]
