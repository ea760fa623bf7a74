"""Areas under ROC curves, what texts tell without a model, and what error rates say of privacy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import rankdata

from attnfit.audit.intervals import QUANTILE, clopper_pearson
from attnfit.audit.scored import Array

# Folds of the classifier that does not see the model; each needs a few texts of either kind.
FOLDS, FEWEST_IN_FOLD = 5, 4
# Each fold is judged by fits to the others, so that what is alike in two of them counts twice: where words do
# not tell, the mean of the areas varies twice as much as that of independent ones.
TWICE = 2.0


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
    >>> from attnfit.audit.roc import auc
    >>> print(auc(np.array([2.0, 3.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.5, 0.0])))
    0.84 [0.36, 0.98]
    """
    return _interval(*_components(members, others), min(len(members), len(others)))


def blind_auc(members: Sequence[Any], others: Sequence[Any], *, random_state: int = 0) -> Auc | None:
    """Return how well a classifier that sees words, and not the model, tells members from others.

    Logistic regression on counts of words and marks, in 5 folds: each text is judged by a fit to the other
    folds, and compared with those of its own fold, so that the mean of the 5 areas is 1/2 where words do not
    tell. Its variance is taken as twice that of independent areas, as folds are judged by one another.

    Parameters
    ----------
    members, others : sequence of str or of list of int
        Numbers of tokens are words too.
    random_state : int

    Returns
    -------
    Auc or None
        None with fewer than 20 texts of a kind.

    References
    ----------
    Das et al., "Blind Baselines Beat Membership Inference Attacks for Foundation Models", arXiv:2406.16201.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    if min(len(members), len(others)) < FOLDS * FEWEST_IN_FOLD:
        return None
    texts = np.array(
        [t if isinstance(t, str) else " ".join(map(str, t)) for t in (*members, *others)], object
    )
    labels = np.repeat([1, 0], [len(members), len(others)])
    classifier = make_pipeline(
        CountVectorizer(token_pattern=r"\w+|[^\w\s]"), MaxAbsScaler(), LogisticRegression(max_iter=1000)
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=random_state)
    found = []
    for fitted, judged in folds.split(texts, labels):
        logits = classifier.fit(texts[fitted], labels[fitted]).decision_function(texts[judged])
        own = labels[judged] == 1
        found.append(_components(logits[own], logits[~own]))
    value, variance = np.mean(found, axis=0)
    return _interval(value, TWICE * variance / FOLDS, min(len(members), len(others)))


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
    >>> from attnfit.audit.roc import epsilon_lower_bound
    >>> round(epsilon_lower_bound(100, 100, 0, 100, 0.0), 3)
    3.281
    """
    low, most = clopper_pearson(told, n_members)[0], clopper_pearson(false, n_others)[1]
    ratios = ((low - delta) / most, (1.0 - most - delta) / (1.0 - low))
    return max([0.0, *(float(np.log(ratio)) for ratio in ratios if ratio > 0.0)])


def _components(members: Array, others: Array) -> tuple[float, float]:
    """Return the area under the ROC curve and DeLong's estimate of its variance."""
    n, m = len(members), len(others)
    pooled = rankdata(np.concatenate([members, others]))
    of_members = (pooled[:n] - rankdata(members)) / m
    of_others = 1.0 - (pooled[n:] - rankdata(others)) / n
    variance = of_members.var(ddof=1) / n + of_others.var(ddof=1) / m
    return float(of_members.mean()), float(variance)


def _interval(value: float, variance: float, n_pairs: int) -> Auc:
    if variance <= 0.0 or value in (0.0, 1.0):
        return Auc(value, *clopper_pearson(round(value * n_pairs), n_pairs))
    half = QUANTILE * np.sqrt(variance) / (value * (1.0 - value))
    low, high = expit(logit(value) + np.array([-half, half]))
    return Auc(value, float(low), float(high))
