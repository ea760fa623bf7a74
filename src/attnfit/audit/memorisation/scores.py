"""Log-probabilities of the tokens of texts: all that measures of memorisation ask of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.models.texts import Text, is_chat

Array = NDArray[np.float64]
# Logits of the next token after every token of a text, shape (n, n_vocabulary), for a text as token ids.
Scorer = Model | Callable[[Tokens], Any]
# Logits held at once.
BATCH = 1 << 23
# A logarithm of a probability may exceed zero by rounding.
ROUNDING = 1e-4


@dataclass(frozen=True, eq=False)
class ScoredTexts:
    """Texts with the log-probability of each of their tokens given those before it.

    `score_texts` makes it; make it yourself where the model runs elsewhere.

    Attributes
    ----------
    texts : sequence of str or of list of int
        Text i of n_i tokens. Measures that compare characters or words take a list of ids for words.
    log_probabilities : sequence of array_like, shape (n_i - 1,)
        ``log p(x_t | x_1, ..., x_(t-1))`` in nats, for t = 2, ..., n_i: nothing predicts the first token. A
        service that predicts it too may give all n_i, provided that it does so for every text.
    likeliest : sequence of array_like of bool, optional
        Whether each of these tokens is the one that greedy decoding would choose, in the same shapes.
    tokens : sequence of list of int, optional
        The texts as tokens.

    Raises
    ------
    AuditError
        If there are no texts, lists differ in length, or a number is no log-probability.

    Examples
    --------
    >>> from attnfit.audit import ScoredTexts
    >>> scored = ScoredTexts(["a b c", "a c"], [[-0.5, -1.5], [-3.0]])
    >>> scored.sums.tolist(), scored.means.tolist()
    ([-2.0, -3.0], [-1.0, -3.0])
    """

    texts: Sequence[Any]
    log_probabilities: Sequence[Any] = field(repr=False)
    likeliest: Sequence[Any] | None = field(default=None, repr=False)
    tokens: Sequence[Tokens] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not len(self.texts):
            raise AuditError("texts is empty: there is nothing to score; pass at least one text")
        for name in ("log_probabilities", "likeliest", "tokens"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.texts):
                raise AuditError(
                    f"{name} has {len(given)} entries for {len(self.texts)} texts; pass one each"
                )
        found = tuple(_checked(index, values) for index, values in enumerate(self.log_probabilities))
        object.__setattr__(self, "log_probabilities", found)
        if self.likeliest is not None:
            flags = tuple(np.asarray(values, dtype=bool) for values in self.likeliest)
            for index, (own, values) in enumerate(zip(flags, found, strict=True)):
                if own.shape != values.shape:
                    raise AuditError(
                        f"likeliest[{index}] has shape {own.shape}, not {values.shape}; pass a flag for each "
                        "log-probability"
                    )
            object.__setattr__(self, "likeliest", flags)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sums(self) -> Array:
        """Log-probability of each text in nats, shape (len(texts),)."""
        return np.array([values.sum() for values in self.log_probabilities])

    @property
    def means(self) -> Array:
        """Mean log-probability of a token of each text in nats, shape (len(texts),)."""
        return np.array([values.mean() for values in self.log_probabilities])

    def keys(self) -> list[Any]:
        """Return what tells texts apart: their characters but for space around, or else their tokens."""
        return [text.strip() if isinstance(text, str) else tuple(text) for text in self.texts]

    def take(self, places: Sequence[int]) -> ScoredTexts:
        """Return some of the texts.

        Parameters
        ----------
        places : sequence of int
        """

        def some(values: Sequence[Any] | None) -> Sequence[Any] | None:
            return None if values is None else [values[place] for place in places]

        chosen = [self.texts[place] for place in places]
        scored = [self.log_probabilities[place] for place in places]
        return ScoredTexts(chosen, scored, some(self.likeliest), some(self.tokens))


def score_texts(
    model: Scorer, texts: Sequence[Text], *, temperature: float = 1.0, name: str = "texts"
) -> ScoredTexts:
    """Return the log-probabilities that a model gives to the tokens of texts.

    Parameters
    ----------
    model : Model or callable
        A causal model; or a function of a list of n token ids that returns the logits (or log-probabilities)
        of the next token after each of them, shape (n, n_vocabulary).
    texts : sequence of str, list of int or list of dict
        As `Model.tokenise` takes them; lists of token ids for a callable.
    temperature : float
        Logits are divided by it, as where tokens are sampled at that temperature.
    name : str
        What errors call the texts.

    Returns
    -------
    ScoredTexts
        With `likeliest` and `tokens`. Where logits are equal, greedy decoding takes the lowest id.

    Raises
    ------
    AuditError
        If there is no text, or one is too short or too long; if the model predicts nothing, or a number is
        not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import audit
    >>> chain = np.log([[0.9, 0.1], [0.5, 0.5]])
    >>> scored = audit.score_texts(lambda tokens: chain[tokens], [[0, 0, 1]])
    >>> np.exp(scored.log_probabilities[0]).round(6).tolist(), scored.likeliest[0].tolist()
    ([0.9, 0.1], [True, False])
    """
    if not temperature > 0:
        raise AuditError(f"temperature must be positive, not {temperature!r}")
    rows = tokens_of(model, texts, name)
    for index, tokens in enumerate(rows):
        if len(tokens) < 2:
            raise AuditError(f"{name}[{index}] has a single token, which nothing predicts; leave it out")
    batches = _logits_of(model, rows, name) if isinstance(model, Model) else _called(model, rows, name)
    found: list[Any] = [None] * len(rows)
    for part, logits in batches:
        values, likeliest = (one.numpy() for one in _scored(logits / temperature, _padded(rows, part)))
        for place, index in enumerate(part):
            n = len(rows[index]) - 1
            found[index] = values[place, :n], likeliest[place, :n].copy()
    shown = texts
    if isinstance(model, Model):
        shown = [t if isinstance(t, str) else model.detokenise(r) for t, r in zip(texts, rows, strict=True)]
    try:
        return ScoredTexts(shown, [one for one, _ in found], [flags for _, flags in found], rows)
    except AuditError as error:
        raise AuditError(f"{name}: {error}") from error


def tokens_of(model: Scorer, texts: Sequence[Text], name: str = "texts") -> list[Tokens]:
    """Return the tokens of texts.

    Parameters
    ----------
    model : Model or callable
        A callable has no tokenizer: its texts are token ids.
    texts : sequence of str, list of int or list of dict
    name : str
        What errors call them.

    Raises
    ------
    AuditError
        If there are none, or one is no text; it is named.
    """
    if isinstance(texts, str) or not len(texts):
        what = "is one text" if len(texts) else "is empty"
        raise AuditError(f"{name} {what}: pass a list of texts")
    rows = []
    for index, text in enumerate(texts):
        if isinstance(model, Model):
            try:
                rows.append(model.tokenise(text))
            except AuditError as error:
                raise type(error)(f"{name}[{index}]: {error}") from error
        elif isinstance(text, str) or is_chat(text):
            raise AuditError(f"{name}[{index}] is no list of token ids, and a callable has no tokenizer")
        else:
            rows.append([int(token) for token in text])  # type: ignore[arg-type]
    return rows


def _checked(index: int, values: Any) -> Array:
    found = np.array(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise AuditError(
            f"log_probabilities[{index}] has shape {found.shape}; pass one number for each token predicted"
        )
    bad = ~np.isfinite(found)
    if bad.any():
        place = int(bad.argmax())
        raise AuditError(
            f"log_probabilities[{index}][{place}] is {found[place]}: it must be finite; leave that text out"
        )
    if found.max() > ROUNDING:
        place = int(found.argmax())
        raise AuditError(
            f"log_probabilities[{index}][{place}] is {found[place]:g}, above zero: pass logarithms of "
            "probabilities, not losses or logits"
        )
    found = np.minimum(found, 0.0)
    found.flags.writeable = False
    return found


def _scored(logits: Any, tokens: Any) -> tuple[Any, Any]:
    """Return log-probabilities and whether each token is the likeliest, both of shape (k, n - 1).

    Of a whole batch at once: temporary arrays of single texts between results to keep fragment the memory.
    """
    before, after = logits[:, :-1].double(), tokens[:, 1:]
    own = before.gather(-1, after[..., None])[..., 0]
    return own - before.logsumexp(-1), before.argmax(-1) == after


def _called(model: Callable[[Tokens], Any], rows: list[Tokens], name: str) -> Iterator[tuple[list[int], Any]]:
    for index, tokens in enumerate(rows):
        logits = np.asarray(model(tokens), dtype=np.float64)
        if logits.ndim != 2 or len(logits) != len(tokens):
            raise AuditError(
                f"model returned shape {logits.shape} for the {len(tokens)} tokens of {name}[{index}]; it "
                "must return the logits of the next token after each, shape (n, n_vocabulary)"
            )
        outside = next((token for token in tokens if not 0 <= token < logits.shape[1]), None)
        if outside is not None:
            raise AuditError(f"{name}[{index}] has token {outside}; model has {logits.shape[1]}")
        yield [index], torch.tensor(logits)[None]


def _logits_of(model: Model, rows: list[Tokens], name: str) -> Iterator[tuple[list[int], Any]]:
    """Yield the model's own logits, texts of like length together."""
    # What has no head says so first.
    _ = model.head
    longest = model.max_length
    for index, tokens in enumerate(rows):
        if len(tokens) > longest:
            raise AuditError(
                f"{name}[{index}] has {len(tokens)} tokens, and {model.name!r} takes {longest}; shorten it"
            )
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while order:
        count = max(1, BATCH // (len(rows[order[-1]]) * model.n_vocabulary))
        part, order = order[-count:], order[:-count]
        with torch.no_grad():
            yield part, model.module(input_ids=_padded(rows, part), use_cache=False).logits


def _padded(rows: list[Tokens], part: list[int]) -> Any:
    """Return texts as a batch; a causal model does not see what comes after a text."""
    length = max(len(rows[index]) for index in part)
    return torch.tensor([rows[index] + [0] * (length - len(rows[index])) for index in part])
