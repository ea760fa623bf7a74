"""A tokenizer of whole words that falls back to characters and bytes, so that every text comes back."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
END = "<|end|>"
SPACE = "▁"


def build_tokenizer(texts: Iterable[str]) -> Any:
    """Return a tokenizer of exactly 1,024 tokens: bytes, characters and the commonest words of some texts.

    Parameters
    ----------
    texts : iterable of str

    Returns
    -------
    transformers.PreTrainedTokenizerFast
    """
    words = Counter(word for text in texts for word in _words(text))
    pieces = [(END, 0.0), *((f"<0x{byte:02X}>", -30.0) for byte in range(256))]
    pieces += [(char, -12.0) for char in [*string.printable[:95].replace(" ", SPACE)]]
    common = [word for word, _ in words.most_common() if len(word) > 1]
    # Any whole word beats its pieces; rows without a word are common pairs of letters.
    pairs = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    for word in [*common, *pairs]:
        if len(pieces) == VOCABULARY:
            break
        if word not in {piece for piece, _ in pieces}:
            pieces.append((word, -8.0 if word in words else -20.0))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=END)


def _words(text: str) -> list[str]:
    """Return the words with the space before them, punctuation apart."""
    for mark in ".,":
        text = text.replace(mark, f"\n{mark}")
    parts = text.replace(" ", f"\n{SPACE}").split("\n")
    return [part for part in parts if part]
