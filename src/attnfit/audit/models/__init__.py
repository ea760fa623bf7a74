"""The models an audit can look into, all of them local."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from attnfit.audit.errors import MalformedModel, PickleRefused
from attnfit.audit.models.directory import PICKLES, load_directory
from attnfit.audit.models.gguf import load_gguf
from attnfit.audit.models.model import Model
from attnfit.audit.models.packaged import load_minilm, load_smollm2
from attnfit.audit.models.tiny import load_tiny

__all__ = ["Model", "load"]

NAMED = {"tiny": load_tiny, "smollm2": load_smollm2, "minilm": load_minilm}


def load(source: str | PathLike[str], *, allow_pickle: bool = False) -> Model:
    """Load a language model. Nothing is downloaded.

    Parameters
    ----------
    source : {"tiny", "smollm2", "minilm"} or path
        "tiny" comes with this package and has memorised private sentences (``model.private_texts``);
        "smollm2" and "minilm" come in packages of their own. A path is a directory in the format of the
        transformers library (causal model or encoder, safetensors) or a GGUF file.
    allow_pickle : bool, default=False
        Also read checkpoints that are pickles, which can run any code: only your own.

    Returns
    -------
    Model

    Raises
    ------
    FileNotFoundError
        If the path does not exist.
    PickleRefused, MalformedModel, ModelTooLarge
        If the weights are unsafe, damaged or too large to read.
    """
    if source in NAMED:
        return NAMED[str(source)]()
    path = Path(source)
    if path.is_dir():
        return load_directory(path, allow_pickle=allow_pickle)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a path or one of {', '.join(NAMED)}")
    if path.suffix == ".gguf":
        return load_gguf(path)
    if any(path.match(pattern) for pattern in PICKLES):
        raise PickleRefused(f"{path} is a pickle without a configuration; give the directory of the model")
    raise MalformedModel(f"{path} is neither a directory nor a .gguf file")
