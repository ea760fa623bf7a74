"""Attention layers in safetensors files: tensors and a few words, nothing that is executed."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from attnfit.objectives.inverse_curvature import heads_of_projections
from attnfit.objectives.inverse_layer import CONVENTIONS, read_heads
from attnfit.problems import LayerInversion

# The tensors of the two forms of a layer: those it needs, and those it may have.
FORMS = {
    "bilinear": (("W", "V"), ("key_bias", "mask")),
    "projections": (("W_Q", "W_K", "W_V"), ("W_O", "b_Q", "b_V", "b_O", "mask")),
}
WORDS = ("n_heads", "convention", "mask")
EXPECTED = "a layer has W and V, or W_Q, W_K, W_V and W_O"
# As safetensors calls them; NumPy has no others.
DTYPES = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")

Tensors = Mapping[str, NDArray[Any]]


class LayerFileError(ValueError):
    """A layer file that is malformed, lacks a tensor, or contradicts itself."""


def save_layer(
    path: str | PathLike[str],
    *,
    n_heads: int = 1,
    convention: str = "rows",
    mask: Any = None,
    **tensors: Any,
) -> None:
    """Write the weights of an attention layer.

    Parameters
    ----------
    path : str or path-like
        Of a file ``.safetensors``.
    n_heads : int
        Heads side by side in the projections.
    convention : {"rows", "columns"}
        Of W, as in `attnfit.problems.LayerInversion`.
    mask : "causal" or array_like of bool, shape (n, n), optional
    **tensors : array_like
        ``W`` and ``V`` (perhaps ``key_bias``), or ``W_Q``, ``W_K``, ``W_V`` and ``W_O`` (perhaps ``b_Q``,
        ``b_V``, ``b_O``), each as in `attnfit.problems.LayerInversion` and its ``from_projections``; those of
        several heads may be stacked.

    Raises
    ------
    ValueError
        If a tensor is missing or unknown, or shapes do not agree.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "layer.safetensors")
    >>> save_layer(path, W=np.eye(3), V=np.ones((3, 2)), mask="causal")
    >>> load_layer(path, np.zeros((4, 2))).shape
    (3, 4)
    """
    arrays = {name: np.ascontiguousarray(np.asarray(value)) for name, value in tensors.items()}
    words = {} if mask is None or not isinstance(mask, str) else {"mask": mask}
    if mask is not None and not isinstance(mask, str):
        arrays["mask"] = np.ascontiguousarray(np.asarray(mask, dtype=bool))
    words |= {"n_heads": str(n_heads)} if "W_Q" in arrays else {"convention": convention}
    _check(arrays, words)
    save_file(arrays, path, metadata=words)


def load_layer(path: str | PathLike[str], B: Any, *, known: Any = None, mask: Any = None) -> LayerInversion:
    """Read the weights of a layer and make the problem of inverting its output.

    Parameters
    ----------
    path : str or path-like
        A file that `save_layer` wrote, or any safetensors file with the same tensors.
    B : array_like, shape (n, m)
        The output of the layer.
    known : array_like or mapping, optional
        Tokens that are given, as in `attnfit.problems.LayerInversion`.
    mask : "causal" or array_like of bool, shape (n, n), optional
        Where the file has none.

    Returns
    -------
    LayerInversion

    Raises
    ------
    LayerFileError
        If the file is no layer; it names the tensor and the remedy.
    FileNotFoundError
    ValueError
        If B or known does not fit the layer.
    """
    arrays, words = _read(path)
    try:
        _check(arrays, words)
        if mask is not None and ("mask" in arrays or "mask" in words):
            raise ValueError("it has a mask of its own; give no other")
    except ValueError as error:
        raise LayerFileError(f"{path}: {error}") from None
    own = arrays.get("mask", words.get("mask"))
    seen = own if mask is None else mask
    if "W" in arrays:
        return LayerInversion(
            arrays["W"],
            arrays["V"],
            B,
            mask=seen,
            known=known,
            convention=words.get("convention", "rows"),
            key_bias=arrays.get("key_bias"),
        )
    return LayerInversion.from_projections(
        arrays["W_Q"],
        arrays["W_K"],
        arrays["W_V"],
        arrays.get("W_O"),
        B,
        n_heads=_n_heads(arrays, words),
        b_Q=arrays.get("b_Q"),
        b_V=arrays.get("b_V"),
        b_O=arrays.get("b_O"),
        mask=seen,
        known=known,
    )


def _read(path: str | PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the tensors and the metadata of a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no layer file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise LayerFileError(
                        f"{path}: tensor {name!r} has type {dtype}, which NumPy cannot read; store it as F32"
                    )
            return {name: file.get_tensor(name) for name in file.keys()}, dict(  # noqa: SIM118
                file.metadata() or {}
            )
    except (SafetensorError, OSError) as error:
        raise LayerFileError(
            f"{path} is not a whole safetensors file ({error}); write it with attnfit.inversion.save_layer, "
            "or copy it again"
        ) from None


def _check(arrays: Tensors, words: Mapping[str, str]) -> None:
    """Raise ValueError unless tensors and metadata make one layer."""
    form = "bilinear" if {"W", "V"} & set(arrays) else "projections"
    needed, optional = FORMS[form]
    extra = [name for name in arrays if name not in needed + optional]
    missing = [name for name in needed if name not in arrays]
    if extra:
        raise ValueError(
            f"tensor {extra[0]!r} (of {len(arrays)}) is none of a layer: {EXPECTED}; may have "
            f"{', '.join(optional)}; rename or remove it"
        )
    if missing:
        raise ValueError(
            f"tensor {missing[0]!r} is missing: {EXPECTED}; it has {', '.join(arrays) or 'none'}"
        )
    if "mask" in words and ("mask" in arrays or words["mask"] != "causal"):
        raise ValueError(f"mask={words['mask']!r} in the metadata must be 'causal', and the only mask")
    convention = words.get("convention", "rows")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} in the metadata must be one of {', '.join(CONVENTIONS)}")
    if form == "bilinear":
        read_heads(arrays["W"], arrays["V"], arrays.get("key_bias"), convention)
    else:
        projections = (arrays["W_Q"], arrays["W_K"], arrays["W_V"], arrays.get("W_O"))
        biases = (arrays.get("b_Q"), arrays.get("b_V"), arrays.get("b_O"))
        heads_of_projections(*projections, _n_heads(arrays, words), *biases)


def _n_heads(arrays: Tensors, words: Mapping[str, str]) -> int:
    """Return the number of heads: of stacked projections, their number."""
    stacked = len(arrays["W_Q"]) if arrays["W_Q"].ndim == 3 else 1
    text = words.get("n_heads", str(stacked))
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"n_heads={text!r} in the metadata must be a positive integer")
    return int(text)
