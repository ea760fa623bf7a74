"""Intervals of proportions."""

from __future__ import annotations

from math import sqrt

from scipy.stats import beta

# The 0.975 quantile of the normal distribution: intervals cover 95 %.
QUANTILE = 1.959963984540054


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion at 95 %.

    Parameters
    ----------
    successes, trials : int

    Returns
    -------
    low, high : float
        0 and 1 without trials.

    Raises
    ------
    ValueError
        If there are more successes than trials, or either is negative.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be 0 to trials = {trials}, not {successes}")
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, QUANTILE**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # Rounding must not leave a share outside its own interval.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion, each end missed with at most half of what is left of one.

    Parameters
    ----------
    successes, trials : int
    level : float
        Cover of the interval; each end by itself is a bound at ``(1 + level) / 2``.

    Returns
    -------
    low, high : float
        0 and 1 without trials.

    Raises
    ------
    ValueError
        If there are more successes than trials, or either is negative.

    References
    ----------
    C. J. Clopper and E. S. Pearson, doi:10.1093/biomet/26.4.404.

    Examples
    --------
    >>> from attnfit.audit.intervals import clopper_pearson
    >>> [round(end, 4) for end in clopper_pearson(0, 10)]
    [0.0, 0.3085]
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be 0 to trials = {trials}, not {successes}")
    missed = (1.0 - level) / 2.0
    low = beta.ppf(missed, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1.0 - missed, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)
