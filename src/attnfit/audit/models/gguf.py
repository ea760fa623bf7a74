"""Load a model from a GGUF file, dequantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from hashlib import sha256
from math import prod
from os import fstat
from pathlib import Path
from struct import calcsize, unpack
from typing import Any, BinaryIO

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as reader
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from attnfit.audit.errors import AuditError, MalformedModel, require
from attnfit.audit.models.directory import attention_for, check_report
from attnfit.audit.models.memory import check_memory
from attnfit.audit.models.model import Model
from attnfit.audit.models.quiet import quiet
from attnfit.audit.storage import cache_directory, kept

MAGIC = b"GGUF"
# Arrays within arrays.
MAX_DEPTH = 4


def load_gguf(file: Path, name: str | None = None) -> Model:
    """Return the causal model in a GGUF file, in float32.

    The configuration and the tokenizer, slow to convert, are kept in the cache.

    Parameters
    ----------
    file : Path
    name : str, optional
        The file's own unless given.

    Raises
    ------
    MalformedModel
        If the file is damaged or of an architecture that transformers does not know.
    ModelTooLarge
        If the weights would not fit into memory.
    """
    require("gguf")
    require("accelerate")
    with file.open("rb") as opened:
        if opened.read(4) != MAGIC:
            raise MalformedModel(f"{file} is not a GGUF file: it does not start with {MAGIC.decode()!r}")
    source = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
    }
    try:
        with quiet(), _read_once():
            home = kept(cache_directory() / "gguf" / _identity(file), partial(_convert, file, source))
            config = AutoConfig.from_pretrained(home, local_files_only=True)
            family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            module, report = family.from_pretrained(
                **source,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention_for(config, family),
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
    except AuditError:
        raise
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, OverflowError, TypeError) as error:
        raise MalformedModel(f"{file} is not a readable GGUF model: {error}") from error
    check_report(report, file)
    return Model(name or file.stem, module, tokenizer, "causal")


@contextmanager
def _read_once() -> Iterator[None]:
    """Keep the library from reading the same file again and again, and from drawing bars, for which there are
    no settings.

    It walks through the metadata for the configuration, for the tokenizer and for the weights, and makes one
    table of names for every module of the model: seconds each time.
    """
    gguf = require("gguf")
    usual = [(gguf, "GGUFReader", gguf.GGUFReader), (gguf, "get_tensor_name_map", gguf.get_tensor_name_map)]
    changed: list[Any] = [cache(known) for _, _, known in usual]
    if hasattr(reader, "tqdm"):
        usual.append((reader, "tqdm", reader.tqdm))
        changed.append(partial(reader.tqdm, disable=True))
    for (place, name, _), other in zip(usual, changed, strict=True):
        setattr(place, name, other)
    try:
        yield
    finally:
        for place, name, known in usual:
            setattr(place, name, known)


def _convert(file: Path, source: dict[str, Any], directory: Path) -> None:
    """Write the configuration and the tokenizer in the transformers library's own format."""
    tensors = require("gguf").GGUFReader(str(file)).tensors
    check_memory(sum(prod(int(side) for side in tensor.shape) for tensor in tensors), file)
    AutoConfig.from_pretrained(**source).save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def _identity(file: Path) -> str:
    """Return a hash of everything before the tensors: configuration, tokenizer, names and shapes.

    The file is walked through here, without the objects of the gguf package: these take seconds for a large
    vocabulary, at every start.
    """
    with file.open("rb") as opened:
        reading = _Header(opened)
        opened.seek(len(MAGIC))
        reading.number("I")
        n_tensors, n_settings = reading.number("Q"), reading.number("Q")
        for _ in range(n_settings):
            reading.skip_text()
            reading.skip_value(reading.number("I"))
        for _ in range(n_tensors):
            reading.skip_text()
            # Sides, then kind and place.
            reading.skip(8 * reading.number("I") + 4 + 8)
        end = opened.tell()
        opened.seek(0)
        return sha256(opened.read(end)).hexdigest()[:16]


# Bytes of each kind of value; 8 is text, 9 an array.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9


class _Header:
    """The metadata of a GGUF file, passed over.

    Raises
    ------
    ValueError
        Where they reach beyond the end of the file or are of an unknown kind.
    """

    def __init__(self, opened: BinaryIO) -> None:
        self._opened = opened
        self._size = fstat(opened.fileno()).st_size

    def number(self, kind: str) -> int:
        """Return one unsigned number."""
        data = self._opened.read(calcsize(kind))
        if len(data) < calcsize(kind):
            raise ValueError("it ends within its metadata")
        return int(unpack(f"<{kind}", data)[0])

    def skip(self, count: int) -> None:
        """Pass over some bytes."""
        if count > self._size - self._opened.tell():
            raise ValueError("it ends within its metadata")
        self._opened.seek(count, 1)

    def skip_text(self) -> None:
        """Pass over a text and its length."""
        self.skip(self.number("Q"))

    def skip_value(self, kind: int, depth: int = 0) -> None:
        """Pass over a value."""
        if kind == TEXT:
            self.skip_text()
        elif kind == ARRAY and depth < MAX_DEPTH:
            inner, count = self.number("I"), self.number("Q")
            if inner in SIZES:
                self.skip(SIZES[inner] * count)
                return
            for _ in range(count):
                self.skip_value(inner, depth + 1)
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"it has metadata of the unknown kind {kind}")
