"""What samples tell: intervals of proportions and of areas, p-values, a bound on epsilon, a fitted tail."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtr, owens_t
from scipy.stats import beta, rankdata, skewnorm

Array = NDArray[np.float64]
# The 0.975 quantile of the normal distribution: intervals cover 95 %.
QUANTILE = 1.959963984540054
# Refits to samples of the fitted distribution: they calibrate the test and give the interval.
N_REFITS = 199
# Share of the sample that the second test looks at: it is the tail that is extrapolated.
TAIL = 0.1
# The skewness of a skew-normal distribution stays below.
MOST_SKEWED = 0.995
# The distribution function is computed to about this.
RESOLVED = 1e-15


@dataclass(frozen=True)
class Auc:
    """An area under the ROC curve with its interval at 95 %.

    Attributes
    ----------
    value, low, high : float
    """

    value: float
    low: float
    high: float

    @property
    def conclusive(self) -> bool:
        """Whether the interval leaves out 1/2, what a coin would give."""
        return not self.low <= 0.5 <= self.high

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


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


def conformal_p_values(scores: Any, calibration: Any) -> Array:
    """Return ``(1 + #{calibration >= score}) / (n + 1)`` for each score.

    Below a with probability at most a for a score that is exchangeable with the calibration, for every a.

    Parameters
    ----------
    scores : array_like, shape (k,)
    calibration : array_like, shape (n,)
        Scores of texts that are no members.

    Returns
    -------
    ndarray, shape (k,)

    Examples
    --------
    >>> from attnfit.audit import conformal_p_values
    >>> conformal_p_values([0.0, 2.5], [1.0, 2.0, 3.0]).tolist()
    [1.0, 0.5]
    """
    ordered = np.sort(np.asarray(calibration, dtype=np.float64))
    above = len(ordered) - np.searchsorted(ordered, np.asarray(scores, dtype=np.float64), side="left")
    return np.asarray((1.0 + above) / (len(ordered) + 1.0))


def auc(members: Array, others: Array) -> Auc:
    """Return the chance that a member scores higher than another text, ties counted by half.

    Parameters
    ----------
    members, others : ndarray, shape (n,), (m,)
        At least 2 each.

    Returns
    -------
    Auc
        With DeLong's interval at 95 %, taken on the logit scale. Where all members score higher than all
        others, or none does, the variance is zero; the interval is then Clopper-Pearson's for min(n, m) pairs
        that share no text.

    References
    ----------
    DeLong et al., doi:10.2307/2531595.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.audit.intervals import auc
    >>> print(auc(np.array([2.0, 3.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.5, 0.0])))
    0.84 [0.36, 0.98]
    """
    return auc_interval(*delong(members, others), min(len(members), len(others)))


def delong(members: Array, others: Array) -> tuple[float, float]:
    """Return the area under the ROC curve and DeLong's estimate of its variance.

    Parameters
    ----------
    members, others : ndarray, shape (n,), (m,)
        At least 2 each.
    """
    n, m = len(members), len(others)
    pooled = rankdata(np.concatenate([members, others]))
    of_members = (pooled[:n] - rankdata(members)) / m
    of_others = 1.0 - (pooled[n:] - rankdata(others)) / n
    variance = of_members.var(ddof=1) / n + of_others.var(ddof=1) / m
    return float(of_members.mean()), float(variance)


def auc_interval(value: float, variance: float, n_pairs: int) -> Auc:
    """Return an area with its interval on the logit scale, or Clopper-Pearson's where that has none.

    Parameters
    ----------
    value, variance : float
    n_pairs : int
        Pairs that share no text.
    """
    if variance <= 0.0 or value in (0.0, 1.0):
        return Auc(value, *clopper_pearson(round(value * n_pairs), n_pairs))
    half = QUANTILE * np.sqrt(variance) / (value * (1.0 - value))
    low, high = expit(logit(value) + np.array([-half, half]))
    return Auc(value, float(low), float(high))


def epsilon_lower_bound(told: int, n_members: int, false: int, n_others: int, delta: float) -> float:
    """Return the epsilon that (epsilon, delta)-differential privacy must exceed at 95 %, from counts.

    ``max(log((TPR - delta) / FPR), log((TNR - delta) / FNR))``, TPR and TNR at the lower and FPR and FNR at
    the upper ends of Clopper-Pearson intervals at 95 %; zero where that is negative.

    Parameters
    ----------
    told, n_members : int
        Members found, of all.
    false, n_others : int
        Others taken for members, of all.
    delta : float

    References
    ----------
    Nasr et al., "Adversary Instantiation", arXiv:2101.04535.

    Examples
    --------
    >>> from attnfit.audit.intervals import epsilon_lower_bound
    >>> round(epsilon_lower_bound(100, 100, 0, 100, 0.0), 3)
    3.281
    """
    low, most = clopper_pearson(told, n_members)[0], clopper_pearson(false, n_others)[1]
    ratios = ((low - delta) / most, (1.0 - most - delta) / (1.0 - low))
    return max([0.0, *(float(np.log(ratio)) for ratio in ratios if ratio > 0.0)])


def skew_normal_tails(
    others: Array, own: Array, random_state: int
) -> tuple[tuple[float, float, float], tuple[float, float], Array]:
    """Return what a skew-normal distribution, fitted to a sample and tested on it, makes of its upper tail.

    Parameters
    ----------
    others : ndarray, shape (n,)
        The sample.
    own : ndarray, shape (n_canaries,)
        Where its tail is asked for.
    random_state : int
        Seed of the samples that the distribution is fitted to again.

    Returns
    -------
    fit : tuple of float
        Shape, location and scale.
    p_values : tuple of float
        Of the tests on all and on the tail.
    tails : ndarray, shape (1 + N_REFITS, n_canaries)
        Share of the distribution above each canary, of the fit and of the refits.
    """
    rng = np.random.default_rng(random_state)
    fit = skew_normal_fit(others)
    statistics, tails = [_distances(others, fit)], [skew_normal_above(own, fit)]
    for _ in range(N_REFITS):
        drawn = skewnorm.rvs(*fit, size=len(others), random_state=rng)
        refit = skew_normal_fit(drawn)
        statistics.append(_distances(drawn, refit))
        tails.append(skew_normal_above(own, refit))
    ranked = np.array(statistics)
    whole, tail = (ranked >= ranked[0]).mean(axis=0)
    return fit, (float(whole), float(tail)), np.array(tails)


def skew_normal_fit(values: Array) -> tuple[float, float, float]:
    """Return the skew-normal distribution with the mean, the variance and (up to its largest) the skewness of
    a sample.

    Parameters
    ----------
    values : ndarray, shape (n,)

    Returns
    -------
    shape, location, scale : float
    """
    mean, spread = values.mean(), values.std()
    skewness = float(np.clip(((values - mean) ** 3).mean() / spread**3, -MOST_SKEWED, MOST_SKEWED))
    root = np.abs(skewness) ** (2 / 3)
    delta = np.sign(skewness) * np.sqrt(np.pi / 2 * root / (root + ((4 - np.pi) / 2) ** (2 / 3)))
    scale = spread / np.sqrt(1 - 2 * delta**2 / np.pi)
    shape = delta / np.sqrt(1 - delta**2)
    return float(shape), float(mean - scale * delta * np.sqrt(2 / np.pi)), float(scale)


def skew_normal_above(values: Array, fit: tuple[float, float, float]) -> Array:
    """Return the share of the distribution above values; SciPy's `skewnorm.sf` takes eight times as long.

    Parameters
    ----------
    values : ndarray, shape (k,)
    fit : tuple of float
        Shape, location and scale.
    """
    shape, location, scale = fit
    z = (values - location) / scale
    return np.asarray(np.maximum(ndtr(-z) + 2.0 * owens_t(z, shape), RESOLVED))


def _distances(values: Array, fit: tuple[float, float, float]) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov statistics of all values and of those in the upper tail of the fit, the
    latter times the root of their number.
    """
    above = np.sort(skew_normal_above(values, fit))
    tail = above[above <= TAIL] / TAIL
    return _distance(above), _distance(tail) * np.sqrt(len(tail)) if len(tail) else np.inf


def _distance(ordered: Array) -> float:
    """Return the largest distance of an empirical distribution function from the uniform one."""
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))
