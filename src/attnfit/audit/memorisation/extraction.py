"""Extraction: texts of the training data that a model goes on to produce, token for token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.audit.advice import percent
from attnfit.audit.errors import AuditError
from attnfit.audit.intervals import wilson
from attnfit.audit.memorisation.scores import Array, ScoredTexts
from attnfit.audit.models.texts import Tokens
from attnfit.inference.tables import to_frame

# Tokens that the papers let a model produce, draws of them, and the chance that counts as extracted.
SUFFIX, SAMPLES, CHANCE = 50, (1, 100, 10_000), 0.5


@dataclass(frozen=True, eq=False)
class Extraction:
    """Texts whose suffix a model produces after the tokens before it.

    Attributes
    ----------
    suffix : int
        Tokens to be produced.
    prefixes : tuple of int
        Tokens given before them.
    greedy : dict of int to ndarray of bool, shape (n_texts,)
        By prefix, whether greedy decoding produces the suffix of a text.
    log_probabilities : dict of int to ndarray, shape (n_texts,)
        By prefix, the log-probability q of the suffix in nats, at the temperature at which texts were scored.
    samples : tuple of int
        Numbers of draws n of (n, p)-discoverable extraction.
    chance : float
        Its probability p.
    n_duplicates : int
        Texts left out because another one has the same suffix.
    places : tuple of int
        Where the texts tested stand among those given.
    """

    suffix: int
    prefixes: tuple[int, ...]
    greedy: dict[int, NDArray[np.bool_]] = field(repr=False)
    log_probabilities: dict[int, Array] = field(repr=False)
    samples: tuple[int, ...]
    chance: float
    n_duplicates: int
    places: tuple[int, ...] = field(default=(), repr=False)

    @property
    def n_texts(self) -> int:
        """Texts that were tested, no two with the same suffix."""
        return len(self.greedy[self.prefixes[0]])

    def probabilities(self, prefix: int, n_samples: int) -> Array:
        """Return the probability ``1 - (1 - q)^n`` that n draws contain the suffix, shape (n_texts,).

        Parameters
        ----------
        prefix, n_samples : int
        """
        q = np.exp(self.log_probabilities[prefix])
        with np.errstate(divide="ignore"):
            return np.asarray(0.0 - np.expm1(n_samples * np.log1p(-q)))

    def samples_needed(self, prefix: int) -> Array:
        """Return the least n with ``1 - (1 - q)^n >= p``, shape (n_texts,); infinite where q is next to zero.

        Parameters
        ----------
        prefix : int
        """
        q = np.exp(self.log_probabilities[prefix])
        with np.errstate(divide="ignore"):
            return np.asarray(np.maximum(1.0, np.ceil(np.log1p(-self.chance) / np.log1p(-q))))

    def count(self, prefix: int, n_samples: int | None = None) -> int:
        """Return how many texts come back by greedy decoding, or with probability p or more in n draws.

        Parameters
        ----------
        prefix : int
        n_samples : int, optional
        """
        if n_samples is None:
            return int(self.greedy[prefix].sum())
        return int((self.probabilities(prefix, n_samples) >= self.chance).sum())

    @property
    def verdict(self) -> str:
        """What was found, in one sentence, for the longest prefix."""
        prefix = max(self.prefixes)
        return (
            f"{counted(self.count(prefix), self.n_texts)} come back by greedy decoding: the {self.suffix} "
            f"tokens after the {prefix} given."
        )

    def columns(self) -> dict[str, list[Any]]:
        """Return the table, a list for each column, a row for each prefix and way of decoding.

        ``samples`` is 0 for greedy decoding, and else n of (n, p)-discoverable extraction.
        """
        rows = [(prefix, n) for prefix in self.prefixes for n in (0, *self.samples)]
        counts = [self.count(prefix, n or None) for prefix, n in rows]
        ends = [wilson(count, self.n_texts) for count in counts]
        return {
            "prefix": [prefix for prefix, _ in rows],
            "samples": [n for _, n in rows],
            "extracted": counts,
            "texts": [self.n_texts] * len(rows),
            "share": [count / self.n_texts for count in counts],
            "low": [low for low, _ in ends],
            "high": [high for _, high in ends],
        }

    def to_frame(self) -> Any:
        """Return the table as a data frame, of pandas or else polars."""
        return to_frame(self.columns())

    def __str__(self) -> str:
        return self.verdict


def windows(
    texts: Sequence[Tokens], prefixes: Sequence[int], suffix: int = SUFFIX, *, name: str = "texts"
) -> dict[int, list[Tokens]]:
    """Return by prefix the tokens that a model is given and is to produce.

    The suffix stands at the same place for all prefixes, after as many tokens as the longest of them has; a
    shorter prefix is what is right before it. So the shares of a curve are about the same tokens.

    Parameters
    ----------
    texts : sequence of list of int
        Without special tokens around them.
    prefixes : sequence of int
        Numbers of tokens given, at least 1 each.
    suffix : int
        Number of tokens to be produced.
    name : str
        What errors call the texts.

    Returns
    -------
    dict of int to list of list of int

    Raises
    ------
    AuditError
        If a text is shorter than the longest prefix and the suffix together; it is named.

    Examples
    --------
    >>> from attnfit.audit import windows
    >>> windows([[5, 6, 7, 8, 9]], [1, 2], suffix=2)
    {1: [[6, 7, 8]], 2: [[5, 6, 7, 8]]}
    """
    for what, number in (("suffix", suffix), *((f"prefixes[{k}]", size) for k, size in enumerate(prefixes))):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise AuditError(f"{what} must be a number of tokens, 1 or more, not {number!r}")
    if not prefixes:
        raise AuditError("prefixes is empty; pass numbers of tokens, such as [20, 50]")
    longest = max(prefixes)
    for index, tokens in enumerate(texts):
        if len(tokens) < longest + suffix:
            raise AuditError(
                f"{name}[{index}] has {len(tokens)} tokens, and a prefix of {longest} with a suffix of "
                f"{suffix} takes {longest + suffix}; leave it out, or ask for less"
            )
    return {
        size: [list(tokens[longest - size : longest + suffix]) for tokens in texts]
        for size in sorted(set(prefixes))
    }


def extraction(
    scored: Mapping[int, ScoredTexts],
    suffix: int = SUFFIX,
    *,
    samples: Sequence[int] = SAMPLES,
    chance: float = CHANCE,
) -> Extraction:
    """Count the texts whose suffix a model produces after a prefix, token for token.

    Greedy decoding gives the suffix if and only if each of its tokens is the likeliest after the true ones
    before it. And n draws contain a suffix of probability q with probability ``1 - (1 - q)^n``: a text is
    (n, p)-discoverable where that is at least p. Texts are the units of intervals (Wilson's, at 95 %), and
    those with the same suffix are one.

    Parameters
    ----------
    scored : dict of int to ScoredTexts
        By prefix, texts that end with the suffix (`windows`), the same ones in the same order, with
        `likeliest`.
    suffix : int
        Number of last tokens that are to be produced.
    samples : sequence of int
        Numbers of draws n.
    chance : float
        The probability p.

    Returns
    -------
    Extraction

    Raises
    ------
    AuditError
        If a text has no more tokens than the suffix, or `likeliest` is missing.

    References
    ----------
    Carlini et al., "Quantifying Memorization Across Neural Language Models", arXiv:2202.07646, definition
    3.1; Hayes et al., "Measuring memorization in language models via probabilistic extraction",
    arXiv:2410.19482.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import audit
    >>> chain = np.log([[0.9, 0.1], [0.5, 0.5]])
    >>> cut = audit.windows([[0, 0, 0], [0, 1, 1]], [1], suffix=2)
    >>> scored = {size: audit.score_texts(lambda t: chain[t], texts) for size, texts in cut.items()}
    >>> found = audit.extraction(scored, suffix=2, samples=[10])
    >>> found.greedy[1].tolist(), found.probabilities(1, 10).round(4).tolist()
    ([True, False], [1.0, 0.4013])
    """
    if not 0.0 < chance < 1.0:
        raise AuditError(f"chance must be between 0 and 1, not {chance!r}")
    bad = next((k for k, n in enumerate(samples) if n < 1), None)
    if bad is not None:
        raise AuditError(f"samples[{bad}] must be a number of draws, 1 or more, not {samples[bad]!r}")
    if not scored:
        raise AuditError("scored is empty: pass the texts of at least one prefix")
    first = next(iter(scored.values()))
    kept = _different_suffixes(first, suffix)
    greedy, q = {}, {}
    for prefix, texts in sorted(scored.items()):
        if texts.likeliest is None:
            raise AuditError(f"scored[{prefix}].likeliest is missing: say which tokens greedy decoding gives")
        if len(texts) != len(first):
            raise AuditError(
                f"scored[{prefix}] has {len(texts)} texts, not {len(first)}; score the same ones"
            )
        for index, values in enumerate(texts.log_probabilities):
            if len(values) < suffix:
                raise AuditError(
                    f"scored[{prefix}].log_probabilities[{index}] has {len(values)} numbers, fewer than the "
                    f"suffix of {suffix}; leave that text out, or ask for less"
                )
        greedy[prefix] = np.array([texts.likeliest[k][-suffix:].all() for k in kept])
        q[prefix] = np.array([texts.log_probabilities[k][-suffix:].sum() for k in kept])
    n_duplicates = len(first) - len(kept)
    return Extraction(
        suffix, tuple(greedy), greedy, q, tuple(samples), chance, n_duplicates, places=tuple(kept)
    )


def _different_suffixes(scored: ScoredTexts, suffix: int) -> list[int]:
    """Return the places of texts whose suffix did not come before."""
    seen: dict[Any, int] = {}
    keys = scored.keys() if scored.tokens is None else [tuple(t[-suffix:]) for t in scored.tokens]
    for index, key in enumerate(keys):
        seen.setdefault(key, index)
    return list(seen.values())


def counted(count: int, n_texts: int) -> str:
    """Return a count of texts with its share and interval."""
    low, high = map(percent, wilson(count, n_texts))
    return f"{count} of {n_texts} texts ({percent(count / n_texts)}, interval {low} to {high})"
