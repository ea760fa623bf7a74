"""Load a model from a GGUF file, dequantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as reader

from attnfit.audit.errors import AuditError, MalformedModel, require
from attnfit.audit.models.directory import attention_for
from attnfit.audit.models.memory import check_memory
from attnfit.audit.models.model import Model
from attnfit.audit.models.quiet import quiet
from attnfit.audit.storage import cache_directory, write_atomically

MAGIC = b"GGUF"


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
        with quiet(), _without_bars():
            home = cache_directory() / "gguf" / _identity(file)
            if not home.is_dir():
                write_atomically(home, partial(_convert, file, source))
            config = AutoConfig.from_pretrained(home, local_files_only=True)
            module = AutoModelForCausalLM.from_pretrained(
                **source, config=config, dtype=torch.float32, attn_implementation=attention_for(config)
            )
            tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
    except AuditError:
        raise
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, OverflowError, TypeError) as error:
        raise MalformedModel(f"{file} is not a readable GGUF model: {error}") from error
    return Model(name or file.stem, module, tokenizer, "causal")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the conversion of tensors from drawing bars of its own, which no setting turns off."""
    usual = getattr(reader, "tqdm", None)
    if usual is None:
        yield
        return
    reader.tqdm = partial(usual, disable=True)
    try:
        yield
    finally:
        reader.tqdm = usual


def _convert(file: Path, source: dict[str, Any], directory: Path) -> None:
    """Write the configuration and the tokenizer in the transformers library's own format."""
    tensors = require("gguf").GGUFReader(file).tensors
    check_memory(sum(prod(int(side) for side in tensor.shape) for tensor in tensors), file)
    AutoConfig.from_pretrained(**source).save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def _identity(file: Path) -> str:
    """Return a hash of the file's size and of its first and last mebibyte."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(2**20)
        opened.seek(max(0, size - 2**20))
        return sha256(str(size).encode() + head + opened.read()).hexdigest()[:16]
