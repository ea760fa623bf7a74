"""Membership: whether scores of a model tell the texts that it was trained on from others like them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import beta

from attnfit.audit.advice import percent
from attnfit.audit.errors import AuditError
from attnfit.audit.intervals import (
    Auc,
    auc,
    auc_interval,
    conformal_p_values,
    delong,
    epsilon_lower_bound,
    wilson,
)
from attnfit.audit.memorisation.scores import Array, ScoredTexts
from attnfit.inference.tables import to_frame

Conclusion = Literal["told apart", "not told apart", "confounded"]
RATES = (0.01, 0.001)
# The share of tokens that min-k % looks at, and the level that zlib compresses at in the published code.
LEAST_LIKELY, COMPRESSION = 0.2, 6
# Texts of either kind below which no bound on epsilon is looked for, and thresholds tried for it.
FEWEST_FOR_EPSILON, THRESHOLDS = 20, 100
# A product of a rate and a count may miss an integer by rounding.
ROUNDING = 1e-9
# Folds of the classifier that does not see the model; each needs a few texts of either kind.
FOLDS, FEWEST_IN_FOLD = 5, 4
# Each fold is judged by fits to the others, so that what is alike in two of them counts twice: where words do
# not tell, the mean of the areas varies twice as much as that of independent ones.
TWICE = 2.0


@dataclass(frozen=True)
class AtRate:
    """Members told from others at a false-positive rate.

    Attributes
    ----------
    rate : float
        The largest false-positive rate allowed.
    n_told : int or None
        Members with a conformal p-value of at most `rate`; None where there are too few others for it.
    n_members : int
    realised : float
        The rate that the threshold keeps below with probability 97.5 %, over draws of the others: `rate`
        itself holds on average over them. NaN where there are too few.
    """

    rate: float
    n_told: int | None
    n_members: int
    realised: float

    @property
    def share(self) -> float:
        """True-positive rate; NaN where there are too few others."""
        return float("nan") if self.n_told is None else self.n_told / self.n_members

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the true-positive rate at 95 %, for that threshold."""
        return (float("nan"),) * 2 if self.n_told is None else wilson(self.n_told, self.n_members)


@dataclass(frozen=True, eq=False)
class MembershipScore:
    """What one score tells.

    Attributes
    ----------
    name : {"loss", "zlib", "min-k", "reference"}
    members, others : ndarray, shape (n_members,), (n_others,)
        Scores, higher for texts that look like members.
    auc : Auc
    at_rates : tuple of AtRate
    """

    name: str
    members: Array = field(repr=False)
    others: Array = field(repr=False)
    auc: Auc
    at_rates: tuple[AtRate, ...]

    @property
    def p_values(self) -> Array:
        """Conformal p-values of the members, shape (n_members,)."""
        return conformal_p_values(self.members, self.others)


@dataclass(frozen=True, eq=False)
class Membership:
    """Whether scores of a model tell members of its training data from other texts.

    Attributes
    ----------
    scores : tuple of MembershipScore
        The first one is what the verdict is about: the difference from a reference model where there is one,
        or else the loss. Choosing the best afterwards would make it look better than it is.
    blind : Auc or None
        Of a classifier that sees the words of the texts and not the model, on texts that it was not fitted
        on; None where there are too few texts to tell.
    epsilon : float or None
        Lower bound at 95 % on the epsilon of (epsilon, delta)-differential privacy, from Clopper-Pearson
        bounds on both error rates of the first score, on half of the texts, at the threshold that is best on
        the other half. Zero says nothing of privacy. It takes texts for independent trials, members by a
        draw of their own, which texts of one training run are not quite. None where there are too few.
    delta : float
    n_duplicates : int
        Texts left out because they came twice.
    """

    scores: tuple[MembershipScore, ...]
    blind: Auc | None
    epsilon: float | None
    delta: float
    n_duplicates: int

    @property
    def conclusion(self) -> Conclusion:
        """What the figures can be read as: "confounded" where words alone tell members from others."""
        if self.blind is not None and self.blind.conclusive:
            return "confounded"
        return "told apart" if self.scores[0].auc.low > 0.5 else "not told apart"

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        first = self.scores[0]
        n, m = len(first.members), len(first.others)
        told = f"by {first.name}, {n} members against {m} others have AUC {first.auc}"
        at = next((at for at in first.at_rates if at.n_told is not None), None)
        if at is not None:
            low, high = map(percent, at.interval)
            told += (
                f", and {at.n_told} of them ({percent(at.share)}, interval {low} to {high}) are told at a "
                f"false-positive rate of at most {percent(at.rate)}"
            )
        if self.conclusion == "confounded":
            return (
                "The figures cannot be read as membership, as words alone, without the model, tell members "
                f"from others with AUC {self.blind}: {told}."
            )
        checked = f"words alone have AUC {self.blind}"
        if self.blind is None:
            checked = "there are too few texts to see whether words alone tell them"
        found = "" if self.conclusion == "told apart" else "not "
        rest = "" if self.conclusion == "told apart" else ", which is no proof that they cannot be"
        return f"Members are {found}told apart{rest}: {told}; {checked}."

    def columns(self) -> dict[str, list[Any]]:
        """Return the table, a list for each column, a row for each score and rate.

        Where a rate would take more others, its figures are NaN.
        """
        rows = [(score, at) for score in self.scores for at in score.at_rates]
        return {
            "score": [score.name for score, _ in rows],
            "auc": [score.auc.value for score, _ in rows],
            "auc_low": [score.auc.low for score, _ in rows],
            "auc_high": [score.auc.high for score, _ in rows],
            "false_positive_rate": [at.rate for _, at in rows],
            "realised_at_most": [at.realised for _, at in rows],
            "true_positive_rate": [at.share for _, at in rows],
            "low": [at.interval[0] for _, at in rows],
            "high": [at.interval[1] for _, at in rows],
        }

    def to_frame(self) -> Any:
        """Return the table as a data frame, of pandas or else polars."""
        return to_frame(self.columns())

    def __str__(self) -> str:
        return self.verdict


def membership(
    members: ScoredTexts,
    others: ScoredTexts,
    *,
    reference: tuple[ScoredTexts, ScoredTexts] | None = None,
    rates: Sequence[float] | None = None,
    delta: float = 1e-5,
    random_state: int = 0,
) -> Membership:
    """Measure how well scores of a model tell members of its training data from other texts.

    Scores, higher for likelier members, of a text of log-probabilities ``l_1, ..., l_n`` (nats):

    - ``loss``: ``mean(l)``;
    - ``zlib``: ``mean(l)`` over the bytes that zlib compresses the text to (texts as `str` only);
    - ``min-k``: the mean of the least 20 % of ``l``, of one at least;
    - ``reference``: ``mean(l)`` minus that of a model that was not trained on the members.

    Thresholds come from the others: a member is told at false-positive rate a if its conformal p-value
    ``(1 + #{others with at least its score}) / (n_others + 1)`` is at most a. A text that is exchangeable
    with the others is then told with probability at most a, whatever the distribution.

    Parameters
    ----------
    members, others : ScoredTexts
        Texts of the training data, and texts like them that are not in it. Texts that come twice count once.
    reference : tuple of ScoredTexts, optional
        The same members and others, as another model with the same tokenizer scores them.
    rates : sequence of float, optional
        False-positive rates; 0.01 and 0.001 unless given, as far as there are enough others.
    delta : float
        Of differential privacy.
    random_state : int
        Seed of the folds of the classifier and of the halves that bound epsilon.

    Returns
    -------
    Membership

    Raises
    ------
    AuditError
        If a text is a member and another, the reference has other tokens, or there are fewer than 2 texts of
        a kind or fewer than ``1 / rate - 1`` others for a rate that was asked for.

    References
    ----------
    Carlini et al., "Extracting Training Data from Large Language Models", arXiv:2012.07805 (zlib, reference);
    Shi et al., arXiv:2310.16789 (min-k %); Vovk et al., "Algorithmic Learning in a Random World" (conformal
    p-values); DeLong et al., doi:10.2307/2531595 (interval of the AUC); Nasr et al., arXiv:2101.04535
    (epsilon); Das et al., arXiv:2406.16201 (blind baselines).

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.audit import ScoredTexts, membership
    >>> rng = np.random.default_rng(0)
    >>> def texts(mean):
    ...     words = ["".join(letters) for letters in rng.choice(list("abc def "), (150, 20))]
    ...     return ScoredTexts(words, -rng.gamma(9, mean / 9, (150, 20)))
    >>> found = membership(texts(2.0), texts(2.5))
    >>> found.scores[0].auc.conclusive, found.blind.conclusive, found.conclusion
    (True, False, 'told apart')
    """
    given = (members, others)
    members_kept, others_kept = _distinct(members, others)
    kept = (members_kept, others_kept)
    for name, places in (("members", members_kept), ("others", others_kept)):
        if len(places) < 2:
            raise AuditError(f"{name} has {len(places)} different text; an interval takes 2 or more")
    asked = _supported(RATES if rates is None else rates, len(others_kept), required=rates is not None)
    if not 0.0 <= delta < 1.0:
        raise AuditError(f"delta must be at least 0 and below 1, not {delta!r}")
    if reference is not None:
        for name, own, its in zip(("members", "others"), given, reference, strict=True):
            _require_same_tokens(name, own, its)
    chosen = tuple(texts.take(places) for texts, places in zip(given, kept, strict=True))
    referred = (
        None
        if reference is None
        else tuple(texts.take(places) for texts, places in zip(reference, kept, strict=True))
    )
    scores = tuple(
        MembershipScore(name, own, rest, auc(own, rest), _at_rates(own, rest, asked))
        for name, (own, rest) in _all_scores(chosen, referred).items()
    )
    rng = np.random.default_rng(random_state)
    first = scores[0]
    return Membership(
        scores=scores,
        blind=blind_auc(chosen[0].texts, chosen[1].texts, random_state=random_state),
        epsilon=_epsilon(first.members, first.others, delta, rng),
        delta=delta,
        n_duplicates=sum(map(len, given)) - sum(map(len, kept)),
    )


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
        found.append(delong(logits[own], logits[~own]))
    value, variance = np.mean(found, axis=0)
    return auc_interval(value, TWICE * variance / FOLDS, min(len(members), len(others)))


def _distinct(members: ScoredTexts, others: ScoredTexts) -> tuple[list[int], list[int]]:
    """Return the places of texts that did not come before."""
    first: list[dict[Any, int]] = [{}, {}]
    for seen, texts in zip(first, (members, others), strict=True):
        for index, key in enumerate(texts.keys()):
            seen.setdefault(key, index)
    both = next((key for key in first[0] if key in first[1]), None)
    if both is not None:
        raise AuditError(
            f"members[{first[0][both]}] is others[{first[1][both]}] too: a text cannot be both; leave one "
            "of them out"
        )
    return list(first[0].values()), list(first[1].values())


def _require_same_tokens(name: str, own: ScoredTexts, its: ScoredTexts) -> None:
    if len(own) != len(its):
        raise AuditError(f"reference scored {len(its)} {name}, the model {len(own)}; score the same texts")
    for index, (key, its_key) in enumerate(zip(own.keys(), its.keys(), strict=True)):
        # Ids stand for other texts where the tokenizer is another one.
        same = key == its_key and len(own.log_probabilities[index]) == len(its.log_probabilities[index])
        if own.tokens is not None and its.tokens is not None:
            same = same and list(own.tokens[index]) == list(its.tokens[index])
        if not same:
            raise AuditError(
                f"reference has other tokens for {name}[{index}]; it must have the tokenizer of the model"
            )


def _supported(rates: Sequence[float], n_others: int, *, required: bool) -> dict[float, int]:
    """Return by false-positive rate how many of the others, and the text judged, may be at the threshold or
    above; 0 where there are too few.
    """
    found = {}
    for index, rate in enumerate(rates):
        if not 0.0 < rate < 1.0:
            raise AuditError(f"rates[{index}] must be between 0 and 1, not {rate!r}")
        found[rate] = int(rate * (n_others + 1) + ROUNDING)
        if required and not found[rate]:
            raise AuditError(
                f"rates[{index}] is {rate:g}, which takes {int(np.ceil(1 / rate - ROUNDING)) - 1} others, "
                f"and there are {n_others}; pass more of them, or a larger rate"
            )
    return found


def _at_rates(members: Array, others: Array, allowed: dict[float, int]) -> tuple[AtRate, ...]:
    p_values, n = conformal_p_values(members, others), len(others)
    found = []
    for rate, count in allowed.items():
        told = int((p_values <= rate + ROUNDING).sum()) if count else None
        realised = float(beta.ppf(0.975, count, n + 1 - count)) if count else float("nan")
        found.append(AtRate(rate, told, len(members), realised))
    return tuple(found)


def _all_scores(
    texts: tuple[ScoredTexts, ...], reference: tuple[ScoredTexts, ...] | None
) -> dict[str, list[Array]]:
    means = [one.means for one in texts]
    found = {"loss": means}
    if reference is not None:
        found = {"reference": [a - b.means for a, b in zip(means, reference, strict=True)], **found}
    if all(isinstance(text, str) for one in texts for text in one.texts):
        sizes = [np.array([_compressed(text) for text in one.texts]) for one in texts]
        found["zlib"] = [a / size for a, size in zip(means, sizes, strict=True)]
    found["min-k"] = [np.array([_least(values) for values in one.log_probabilities]) for one in texts]
    return found


def _compressed(text: str) -> int:
    return len(zlib.compress(text.encode("utf-8", "surrogatepass"), COMPRESSION))


def _least(values: Array) -> float:
    count = max(1, int(LEAST_LIKELY * len(values) + ROUNDING))
    return float(np.sort(values)[:count].mean())


def _epsilon(members: Array, others: Array, delta: float, rng: np.random.Generator) -> float | None:
    """Choose a threshold on half of the texts, and bound epsilon on the other half."""
    if min(len(members), len(others)) < FEWEST_FOR_EPSILON:
        return None
    shuffled = [rng.permutation(values) for values in (members, others)]
    chosen_on = [values[: len(values) // 2] for values in shuffled]
    judged_on = [values[len(values) // 2 :] for values in shuffled]
    thresholds = np.unique(np.quantile(np.concatenate(chosen_on), np.linspace(0.0, 1.0, THRESHOLDS)))
    best = max(thresholds, key=lambda threshold: _epsilon_at(threshold, chosen_on, delta))
    return _epsilon_at(best, judged_on, delta)


def _epsilon_at(threshold: float, halves: list[Array], delta: float) -> float:
    told, false = (int((values >= threshold).sum()) for values in halves)
    return epsilon_lower_bound(told, len(halves[0]), false, len(halves[1]), delta)
