"""Canaries: made-up secrets to plant in training data, and how far a model trained on them exposes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from random import Random
from string import Formatter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnfit.audit.errors import AuditError
from attnfit.audit.intervals import Array, clopper_pearson, conformal_p_values, skew_normal_tails
from attnfit.audit.memorisation.scores import ScoredTexts
from attnfit.audit.models.tiny_text import NOUNS
from attnfit.inference.tables import to_frame

Method = Literal["exact", "sampled", "bounded"]
# A tail that so many sampled candidates lie in is counted; farther out a sample only bounds an exposure.
ENOUGH = 10
# With fewer candidates the test would miss a distribution that is none of ours.
FEWEST_FITTED = 1000
# Where the fit is refused, and where a canary counts as exposed, over all canaries together.
LEVEL = 0.05
# Candidates that are compared unless asked otherwise: a space of four digits is enumerated.
MOST_COMPARED = 10_000


@dataclass(frozen=True, eq=False)
class Canaries:
    """Texts drawn at random from all that a template allows.

    Attributes
    ----------
    template : str
        Text with placeholders: ``{digits:4}`` is four digits, ``{words:2}`` two words with a space between.
    texts : tuple of str
        The canaries, no two alike.
    repeats : tuple of int, optional
        How often each is to stand in the training data; 0 for controls, which must not. None where that is
        not known.
    words : tuple of str, optional
        What ``{words}`` draws from; 33 common nouns unless given.
    random_state : int
        Seed of the draws.
    """

    template: str
    texts: tuple[str, ...]
    repeats: tuple[int, ...] | None = None
    words: tuple[str, ...] = field(default=(), repr=False)
    random_state: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words) or NOUNS)
        pattern = re.compile(
            "".join(_pattern(part, self.words) for part in _parts(self.template, self.words))
        )
        for index, text in enumerate(self.texts):
            if not pattern.fullmatch(text):
                raise AuditError(
                    f"canaries[{index}] does not fit the template {self.template!r}; leave it out"
                )
            if text in self.texts[:index]:
                raise AuditError(
                    f"canaries[{index}] is canaries[{self.texts.index(text)}] again; leave it out"
                )
        if len(self.texts) >= self.n_possible:
            raise AuditError(
                f"the template allows {self.n_possible} texts and there are {len(self.texts)} canaries, so "
                "that none is left to compare with; add digits or words"
            )
        if self.repeats is not None and len(self.repeats) != len(self.texts):
            raise AuditError(f"repeats has {len(self.repeats)} entries for {len(self.texts)} canaries")

    @property
    def n_possible(self) -> int:
        """Number of texts that the template allows."""
        return _size(_parts(self.template, self.words), self.words)

    def inserted(self) -> list[str]:
        """Return what goes into the training data: each canary as often as `repeats` says, or once."""
        repeats = self.repeats or (1,) * len(self.texts)
        return [text for text, count in zip(self.texts, repeats, strict=True) for _ in range(count)]

    def compared(self, max_texts: int = MOST_COMPARED) -> list[str]:
        """Return texts of the template that are no canaries, to compare with.

        Parameters
        ----------
        max_texts : int
            All of them where there are no more than that, or else so many drawn at random without
            replacement, by a seed that follows from `random_state`.
        """
        if max_texts < 1:
            raise AuditError(f"max_texts must be at least 1, not {max_texts}")
        parts = _parts(self.template, self.words)
        known = set(self.texts)
        if self.n_possible - len(known) <= max_texts:
            every = (_text(parts, self.words, number) for number in range(self.n_possible))
            return [text for text in every if text not in known]
        return _drawn(parts, self.words, max_texts, Random(f"compared|{self.random_state}"), known)


def canaries(
    template: str,
    count: int,
    *,
    repeats: int | Sequence[int] = 1,
    words: Sequence[str] | None = None,
    random_state: int = 0,
) -> Canaries:
    """Draw canaries from a template, to be inserted in training data.

    Parameters
    ----------
    template : str
        Text with placeholders: ``{digits:4}`` is four digits, ``{words:2}`` two words with a space between;
        ``{digits}`` and ``{words}`` are one. A brace is written ``{{`` or ``}}``.
    count : int
        Number of canaries.
    repeats : int or sequence of int
        How often each is to stand in the training data. Give some 0: they are controls, and show what
        exposure a canary has by chance.
    words : sequence of str, optional
        Words to draw from, letters only; 33 common nouns unless given.
    random_state : int
        Seed. Keep it, and the canaries, from whoever trains on anything else.

    Returns
    -------
    Canaries

    Raises
    ------
    AuditError
        If the template has no placeholder or an unknown one, or allows too few texts.

    Examples
    --------
    >>> from attnfit import audit
    >>> secrets = audit.canaries("The code of the {words} is {digits:3}.", 4, repeats=[16, 4, 1, 0])
    >>> secrets.texts[0], secrets.n_possible, len(secrets.inserted())
    ('The code of the doctor is 247.', 33000, 21)
    """
    given = tuple(NOUNS if words is None else words)
    parts = _parts(template, given)
    times = [repeats] * count if isinstance(repeats, int) else list(repeats)
    bad = next((index for index, number in enumerate(times) if number < 0), None)
    if bad is not None:
        raise AuditError(f"repeats[{bad}] is {times[bad]}; give how often that canary is inserted, 0 or more")
    size = _size(parts, given)
    if not 1 <= count < size:
        raise AuditError(f"count must be 1 to {size - 1}, as the template allows {size} texts, not {count}")
    texts = _drawn(parts, given, count, Random(random_state), set())
    return Canaries(template, tuple(texts), tuple(times), given, random_state)


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
            fit, checks, tails = skew_normal_tails(others, own[beyond], random_state)
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


def _parts(template: str, words: Sequence[str]) -> list[tuple[str, int]]:
    """Return the template as literals (the text, 0) and placeholders (their kind, how many).

    Raises
    ------
    AuditError
        If a text could come about in two ways, or a placeholder is none.
    """
    parts: list[tuple[str, int]] = []
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise AuditError(f"template has an open brace ({error}); write {{{{ or }}}} for a brace") from error
    for literal, name, count, conversion in parsed:
        parts += [(literal, 0)] if literal else []
        if name is None:
            continue
        if name not in ("digits", "words") or conversion or not re.fullmatch(r"([1-9]\d?)?", count or ""):
            raise AuditError(
                f"template has the placeholder {{{name}}}; write {{digits:4}} or {{words:2}}, and {{{{ for a "
                "brace"
            )
        parts.append((name, int(count or 1)))
    if not any(count for _, count in parts):
        raise AuditError("template has no placeholder; write {digits:4} or {words:2} where the secret stands")
    shown = "".join("\0" if name == "words" and count else "1" if count else name for name, count in parts)
    if re.search(r"[^\W\d_]\0|\0[^\W\d_]|\0\0", shown):
        raise AuditError("template has a letter or other words next to {words}; put a space between")
    if any(name == "words" and count for name, count in parts):
        repeated = Counter(words)
        for index, word in enumerate(words):
            if not word.isalpha() or repeated[word] > 1:
                raise AuditError(f"words[{index}] is {word!r}; words must be letters, and no two alike")
    return parts


def _base(name: str, words: Sequence[str]) -> int:
    return 10 if name == "digits" else len(words)


def _size(parts: Sequence[tuple[str, int]], words: Sequence[str]) -> int:
    return prod(_base(name, words) ** count for name, count in parts)


def _text(parts: Sequence[tuple[str, int]], words: Sequence[str], number: int) -> str:
    """Return the text of a number from 0 to the size of the space minus 1."""
    told = []
    for name, count in reversed(parts):
        chosen = []
        for _ in range(count):
            number, digit = divmod(number, _base(name, words))
            chosen.append(str(digit) if name == "digits" else words[digit])
        told.append((" " if name == "words" else "").join(reversed(chosen)) if count else name)
    return "".join(reversed(told))


def _drawn(
    parts: Sequence[tuple[str, int]], words: Sequence[str], count: int, random: Random, known: set[str]
) -> list[str]:
    """Return texts drawn without replacement, none of them known."""
    size, found = _size(parts, words), dict.fromkeys(known)
    while len(found) < count + len(known):
        found[_text(parts, words, random.randrange(size))] = None
    return list(found)[len(known) :]


def _pattern(part: tuple[str, int], words: Sequence[str]) -> str:
    name, count = part
    if not count:
        return re.escape(name)
    one = "[0-9]" if name == "digits" else "(?:" + "|".join(words) + ")"
    return (" " if name == "words" else "").join([one] * count)
