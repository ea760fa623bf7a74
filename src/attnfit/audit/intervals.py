"""Intervals of proportions."""

from __future__ import annotations

from math import sqrt

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
