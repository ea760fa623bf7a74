"""Figures of a fit (extra ``plot``). Each function returns a matplotlib Figure; none opens a window."""

from attnfit.plots.coefficients import coefficients
from attnfit.plots.convergence import convergence
from attnfit.plots.fitted import fitted_versus_observed

__all__ = ["coefficients", "convergence", "fitted_versus_observed"]
