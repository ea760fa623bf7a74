"""Exposure of canaries: how much likelier a planted secret is than others of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, owens_t
from scipy.stats import skewnorm

from attnfit.audit.errors import AuditError
from attnfit.audit.intervals import clopper_pearson
from attnfit.audit.roc import conformal_p_values
from attnfit.audit.scored import Array, ScoredTexts
from attnfit.inference.tables import to_frame

Method = Literal["exact", "sampled", "bounded"]
# A tail that so many sampled candidates lie in is counted; farther out a sample only bounds an exposure.
ENOUGH = 10
# With fewer candidates the test would miss a distribution that is none of ours.
FEWEST_FITTED = 1000
# Refits to samples of the fitted distribution: they calibrate the test and give the interval.
N_REFITS = 199
# Share of the candidates that the second test looks at: it is the tail that is extrapolated.
TAIL = 0.1
# Where the fit is refused, and where a canary counts as exposed, over all canaries together.
LEVEL = 0.05
# The skewness of a skew-normal distribution stays below.
MOST_SKEWED = 0.995
# The distribution function is computed to about this.
RESOLVED = 1e-15


@dataclass(frozen=True, eq=False)
class Exposure:
    """How far canaries are exposed, ``log2 |R| - log2 rank`` bits among the |R| texts of their template.

    Attributes
    ----------
    texts : tuple of str
        The canaries.
    repeats : tuple of int, optional
        How often each was inserted, where that is known.
    bits : ndarray, shape (n_canaries,)
        Exposure.
    interval : ndarray, shape (n_canaries, 2)
        At 95 %, Clopper-Pearson's, where candidates were sampled; both ends are `bits` where all were
        compared.
    p_values : ndarray, shape (n_canaries,)
        ``(1 + #{candidates at least as likely}) / (n_compared + 1)``: the chance of a rank that good for a
        canary that the model has never seen. Counted, never extrapolated.
    method : tuple of {"exact", "sampled", "bounded"}
        All candidates compared; counted among those sampled; or, where fewer than ten of these are as likely,
        the least that the sample shows.
    n_compared, n_possible : int
        Candidates scored, and all that there are, without the other canaries but with the one ranked.
    extrapolated : ndarray, shape (n_canaries, 3)
        Exposure of bounded canaries by the tail of a fitted skew-normal distribution, in bits, with the
        interval at 95 % that refits give. NaN for others, where the fit is refused and where few candidates
        were sampled. It holds if texts that no sample shows go on as the fit does.
    fit : tuple of float or None
        Shape, location and scale of the skew-normal distribution of log-probabilities, as SciPy's `skewnorm`.
    fit_p_values : tuple of float or None
        Of the Kolmogorov-Smirnov tests of that fit, on all candidates and on the likeliest tenth of them.
    """

    texts: tuple[str, ...]
    repeats: tuple[int, ...] | None
    bits: Array
    interval: Array
    p_values: Array
    method: tuple[Method, ...]
    n_compared: int
    n_possible: int
    extrapolated: Array
    fit: tuple[float, float, float] | None = None
    fit_p_values: tuple[float, float] | None = None

    @property
    def exposed(self) -> NDArray[np.bool_]:
        """Canaries more likely than chance allows, at 5 % over all of them (Holm), shape (n_canaries,)."""
        order = np.argsort(self.p_values, kind="stable")
        adjusted = self.p_values[order] * np.arange(len(order), 0, -1)
        found = np.zeros(len(order), dtype=bool)
        found[order] = np.maximum.accumulate(adjusted) <= LEVEL
        return found

    @property
    def largest(self) -> float:
        """The exposure in bits of the likeliest of all texts."""
        return float(np.log2(self.n_possible))

    @property
    def decidable(self) -> bool:
        """Whether enough candidates were compared for any canary to count as exposed."""
        return (self.n_compared + 1) * LEVEL >= len(self.texts)

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        n, found = len(self.texts), int(self.exposed.sum())
        if not self.decidable:
            return (
                f"Whether any of {n} canaries is exposed cannot be told: {self.n_compared} candidates were "
                f"compared, and it takes {int(np.ceil(n / LEVEL)) - 1}."
            )
        beyond = np.nan_to_num(self.extrapolated[:, 0])
        best = max(range(n), key=lambda k: (self.bits[k], beyond[k]))
        low, high = self.interval[best]
        told = f"{self.bits[best]:.1f} of {self.largest:.1f} bits"
        if self.method[best] != "exact":
            told += f", {self.method[best]}, interval {low:.1f} to {high:.1f}"
        if beyond[best]:
            told += f" (extrapolated: {beyond[best]:.1f})"
        return (
            f"{found} of {n} canaries are likelier than chance allows for a text never seen (5 % over all of "
            f"them); the most exposed has {told}."
        )

    def columns(self) -> dict[str, list[Any]]:
        """Return the table, a list for each column, a row for each canary."""
        rest = {
            "exposure": self.bits.tolist(),
            "low": self.interval[:, 0].tolist(),
            "high": self.interval[:, 1].tolist(),
            "method": list(self.method),
            "extrapolated": self.extrapolated[:, 0].tolist(),
            "p_value": self.p_values.tolist(),
            "exposed": self.exposed.tolist(),
        }
        inserted = {} if self.repeats is None else {"repeats": list(self.repeats)}
        return {"canary": list(range(len(self.texts))), **inserted, **rest}

    def to_frame(self) -> Any:
        """Return the table as a data frame, of pandas or else polars."""
        return to_frame(self.columns())

    def __str__(self) -> str:
        return self.verdict


def exposure(
    scored: ScoredTexts,
    compared: ScoredTexts,
    n_possible: int | None = None,
    *,
    repeats: Sequence[int] | None = None,
    random_state: int = 0,
) -> Exposure:
    """Rank canaries by likelihood among other texts of their template.

    Exposure is ``log2 |R| - log2 rank``, where |R| counts the texts of the template without the other
    canaries, and the rank those at least as likely as the canary, itself included. A canary that was drawn at
    random and never seen has exposure e or more with probability at most ``2^-e``.

    Parameters
    ----------
    scored : ScoredTexts
        The canaries, of one template.
    compared : ScoredTexts
        Other texts of that template (`Canaries.compared`), scored by the same model.
    n_possible : int, optional
        Number of texts that the template allows, canaries included. If it is larger than the number of texts
        given, the others count as a random sample; all texts were given unless it is.
    repeats : sequence of int, optional
        How often each canary was inserted, for the table.
    random_state : int
        Seed of the samples that calibrate the test of the fit.

    Returns
    -------
    Exposure

    Raises
    ------
    AuditError
        If `n_possible` is too small, or a canary is among the texts compared.

    Notes
    -----
    Of a sample, a canary that at least ten sampled texts are as likely as is ranked by their share. Beyond,
    exposure is bounded by what the sample shows. Beside that stands an extrapolation: a skew-normal
    distribution with the mean, variance and skewness of the sampled log-probabilities tells the tail, unless
    a Kolmogorov-Smirnov test on all of them, or on the likeliest tenth, refuses it (at 5 % together,
    calibrated by refits to samples of the fitted distribution, whose exposures also give the interval). No
    sample can test a tail where it has no text.

    References
    ----------
    Carlini et al., "The Secret Sharer", arXiv:1802.08232 (exposure, and its extrapolation by a skew-normal
    distribution).

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.audit import ScoredTexts, exposure
    >>> others = ScoredTexts([f"{k:03d}" for k in range(1, 1000)], -np.arange(1.0, 1000.0)[:, None])
    >>> found = exposure(ScoredTexts(["000"], [[-0.5]]), others)
    >>> float(found.bits[0].round(3)), found.method[0]
    (9.966, 'exact')
    """
    n, m = len(compared), len(scored)
    known = {key: index for index, key in enumerate(compared.keys())}
    for index, key in enumerate(scored.keys()):
        if key in known:
            raise AuditError(f"compared[{known[key]}] is canary {index}; leave the canaries out of it")
    if n_possible is not None and n_possible < n + m:
        raise AuditError(f"n_possible is {n_possible}, but {n + m} texts were given; count those that exist")
    size = n + 1 if n_possible is None else n_possible - m + 1
    others, own = np.sort(compared.sums), scored.sums
    counts = n - np.searchsorted(others, own, side="left")
    p_values = conformal_p_values(own, others)
    bits = 0.0 - np.log2(p_values)
    interval, extrapolated = np.stack([bits, bits], 1), np.full((m, 3), np.nan)
    method: list[Method] = ["exact"] * m
    fit, checks = None, None
    if size > n + 1:
        ends = np.array([clopper_pearson(int(count), n) for count in counts])
        interval = _bits(ends[:, ::-1], size)
        beyond = counts < ENOUGH
        method = ["bounded" if far else "sampled" for far in beyond]
        if beyond.any() and n >= FEWEST_FITTED and others[0] < others[-1]:
            fit, checks, tails = _extrapolated(others, own[beyond], random_state)
            if min(checks) > LEVEL / 2:
                every = _bits(tails, size)
                ends = np.quantile(every, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
                extrapolated[beyond] = np.stack([every[0], *ends], 1)
    return Exposure(
        texts=tuple(map(str, scored.texts)),
        repeats=None if repeats is None else tuple(repeats),
        bits=bits,
        interval=interval,
        p_values=p_values,
        method=tuple(method),
        n_compared=n,
        n_possible=size,
        extrapolated=extrapolated,
        fit=fit,
        fit_p_values=checks,
    )


def _bits(share: Array, size: int) -> Array:
    """Return the exposure of a text that a share of all others is as likely as."""
    return np.asarray(np.log2(size) - np.log2(1.0 + (size - 1) * share))


def _extrapolated(
    others: Array, own: Array, random_state: int
) -> tuple[tuple[float, float, float], tuple[float, float], Array]:
    """Fit and test a skew-normal distribution.

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
    fit = _moments_fit(others)
    statistics, tails = [_distances(others, fit)], [_above(own, fit)]
    for _ in range(N_REFITS):
        drawn = skewnorm.rvs(*fit, size=len(others), random_state=rng)
        refit = _moments_fit(drawn)
        statistics.append(_distances(drawn, refit))
        tails.append(_above(own, refit))
    ranked = np.array(statistics)
    whole, tail = (ranked >= ranked[0]).mean(axis=0)
    return fit, (float(whole), float(tail)), np.array(tails)


def _moments_fit(values: Array) -> tuple[float, float, float]:
    """Return the skew-normal distribution with the mean, the variance and (up to its largest) the skewness of
    a sample.
    """
    mean, spread = values.mean(), values.std()
    skewness = float(np.clip(((values - mean) ** 3).mean() / spread**3, -MOST_SKEWED, MOST_SKEWED))
    root = np.abs(skewness) ** (2 / 3)
    delta = np.sign(skewness) * np.sqrt(np.pi / 2 * root / (root + ((4 - np.pi) / 2) ** (2 / 3)))
    scale = spread / np.sqrt(1 - 2 * delta**2 / np.pi)
    shape = delta / np.sqrt(1 - delta**2)
    return float(shape), float(mean - scale * delta * np.sqrt(2 / np.pi)), float(scale)


def _above(values: Array, fit: tuple[float, float, float]) -> Array:
    """Return the share of the distribution above values; SciPy's `skewnorm.sf` takes eight times as long."""
    shape, location, scale = fit
    z = (values - location) / scale
    return np.asarray(np.maximum(ndtr(-z) + 2.0 * owens_t(z, shape), RESOLVED))


def _distances(values: Array, fit: tuple[float, float, float]) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov statistics of all values and of those in the upper tail of the fit, the
    latter times the root of their number.
    """
    above = np.sort(_above(values, fit))
    tail = above[above <= TAIL] / TAIL
    return _distance(above), _distance(tail) * np.sqrt(len(tail)) if len(tail) else np.inf


def _distance(ordered: Array) -> float:
    """Return the largest distance of an empirical distribution function from the uniform one."""
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))
