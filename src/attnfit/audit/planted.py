"""Canaries: made-up secrets to plant in training data, drawn at random from all that a template allows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from string import Formatter

from attnfit.audit.errors import AuditError
from attnfit.audit.models.tiny_text import NOUNS

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
    size = 1
    for name, count in parts:
        size *= _base(name, words) ** count
    return size


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
