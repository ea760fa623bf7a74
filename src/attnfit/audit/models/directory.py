"""Load a model from a local directory of the transformers library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from attnfit.audit.errors import AuditError, MalformedModel, PickleRefused
from attnfit.audit.models.memory import check_memory, count_parameters
from attnfit.audit.models.model import Model
from attnfit.audit.models.quiet import quiet

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_directory(directory: Path, name: str | None = None, allow_pickle: bool = False) -> Model:
    """Return the causal model or encoder in a directory with config.json, tokenizer and safetensors.

    Nothing is downloaded, and no code of the directory is run.

    Parameters
    ----------
    directory : Path
    name : str, optional
        The directory's own unless given.
    allow_pickle : bool
        Also read checkpoints that are pickles, which can run any code: only your own.

    Raises
    ------
    PickleRefused
        If there are only pickled weights, and allow_pickle is false.
    MalformedModel
        If a file is missing or damaged.
    ModelTooLarge
        If the weights would not fit into memory.
    """
    safe = not _only_pickles(directory, allow_pickle)
    check_memory(_size(directory, safe), directory)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, **local)
            causal = any("CausalLM" in kind or "LMHead" in kind for kind in config.architectures or [])
            family = AutoModelForCausalLM if causal else AutoModel
            module = family.from_pretrained(
                directory,
                dtype=torch.float32,
                use_safetensors=safe,
                attn_implementation=attention_for(config),
                **local,
            )
            tokenizer = AutoTokenizer.from_pretrained(directory, **local)
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        if isinstance(error, AuditError):
            raise
        raise MalformedModel(f"{directory} does not hold a readable model: {error}") from error
    return Model(name or directory.name, module, tokenizer, "causal" if causal else "encoder")


def attention_for(config: Any) -> str:
    """Return the implementation of attention that computes all that a configuration asks for."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if capped is None else "eager"


def _only_pickles(directory: Path, allowed: bool) -> bool:
    """Return whether the weights are pickles, if that is allowed."""
    if any(directory.glob("*.safetensors")):
        return False
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if not pickles:
        raise MalformedModel(f"{directory} holds no weights: *.safetensors are expected")
    if not allowed:
        raise PickleRefused(
            f"{directory / pickles[0]} is a pickle, which runs code when it is read; convert it to "
            "safetensors, or "
            "pass allow_pickle=True if you made it yourself"
        )
    return True


def _size(directory: Path, safe: bool) -> int:
    """Return the number of parameters; of pickles no more is known than that each takes two bytes or more."""
    if safe:
        return count_parameters(sorted(directory.glob("*.safetensors")))
    return sum(file.stat().st_size for pattern in PICKLES for file in directory.glob(pattern)) // 2
