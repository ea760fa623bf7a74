"""Texts that no search was tuned on: drawn by hash from wheels, so that each seed judges on new ones.

A seed is the tag of a release; development uses seeds that begin with "dev-". A passage begins at an offset
of a file of an installed wheel, and the passages of a seed are those with the smallest SHA-256 of seed,
wheel, file and offset. No list of texts is kept anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

# Long descriptions of these are English; code is theirs too.
WHEELS = ("numpy", "scipy", "scikit-learn", "pandas", "dask", "jinja2", "transformers", "joblib")
LANGUAGES = {"German": "de", "French": "fr", "Arabic": "ar", "Chinese": "zh_Hans", "Japanese": "ja"}
KINDS = ("English", *LANGUAGES, "code", "chat")
LENGTHS = (10, 20, 50, 200)
# Characters that are surely enough for a token; passages are cut to tokens afterwards.
CHARACTERS = 12
SHORTEST = 40
# Files of code that are looked at in each wheel, by hash: all of them would take minutes.
FILES = 40
Passage = tuple[str, str, int, str]


def passages(kind: str, seed: str) -> Iterator[str]:
    """Yield the texts of a kind in the order of their hashes."""
    found = sorted((_hash(seed, *place), text) for *place, text in _all(kind, seed))
    for _, text in found:
        yield text


def drawn(model: Any, kind: str, length: int, count: int, seed: str) -> list[list[int]]:
    """Return so many texts of one length as tokens, which their text gives back."""
    texts: list[list[int]] = []
    for text in passages(kind, seed):
        tokens = model.tokenise(text[: CHARACTERS * length])[:length]
        if (
            len(tokens) == length
            and model.tokenise(model.detokenise(tokens)) == tokens
            and tokens not in texts
        ):
            texts.append(tokens)
        if len(texts) == count:
            break
    return texts


def _all(kind: str, seed: str) -> Iterator[Passage]:
    if kind in LANGUAGES:
        yield from _translations(LANGUAGES[kind])
    elif kind == "code":
        yield from _code(seed)
    else:
        for wheel, file, offset, text in _descriptions():
            told = f"<|im_start|>user\n{text[:SHORTEST]}<|im_end|>\n<|im_start|>assistant\n{text}"
            yield wheel, file, offset, told if kind == "chat" else text


def _descriptions() -> Iterator[Passage]:
    """Paragraphs of prose, and what follows them, in the descriptions of wheels."""
    for wheel in WHEELS:
        found = distribution(wheel)
        text = found.metadata.get_payload() or found.metadata.get("Description") or ""
        for match in re.finditer(r"(?m)^[A-Z][a-z]+ [^\n]{40,}$", str(text)):
            yield _name(wheel), "METADATA", match.start(), " ".join(str(text)[match.start() :].split())


def _translations(language: str) -> Iterator[Passage]:
    """Messages of Django, from each on."""
    django = distribution("django")
    path = Path(str(django.locate_file(f"django/conf/locale/{language}/LC_MESSAGES/django.po")))
    text = path.read_text(encoding="utf-8")
    entries = [
        (match.start(), "".join(re.findall(r'"(.*)"', match[1])))
        for match in re.finditer(r'(?m)^msgstr(?:\[0\])? ((?:"[^\n]*"\n)+)', text)
    ]
    told = [(place, one.replace("\\n", "\n").replace('\\"', '"')) for place, one in entries if one][1:]
    for number, (place, one) in enumerate(told):
        if len(one) >= SHORTEST // 2:
            yield _name("django"), path.parts[-3], place, "\n".join(some for _, some in told[number:])


def _code(seed: str) -> Iterator[Passage]:
    """Definitions in Python, and what follows them."""
    for wheel in WHEELS:
        files = [str(file) for file in distribution(wheel).files or () if str(file).endswith(".py")]
        for file in sorted(files, key=lambda name: _hash(seed, wheel, name, 0))[:FILES]:
            path = Path(str(distribution(wheel).locate_file(file)))
            text = path.read_text(encoding="utf-8", errors="replace")
            for match in re.finditer(r"(?m)^ *(def|class) ", text):
                yield _name(wheel), file, match.start(), text[match.start() :]


def _name(wheel: str) -> str:
    return f"{wheel} {distribution(wheel).version}"


def _hash(seed: str, wheel: str, file: str, offset: int) -> str:
    return sha256(f"{seed}|{wheel}|{file}|{offset}".encode()).hexdigest()
