"""Files that are replaced as a whole and executed by nobody: arrays in safetensors, the rest as JSON in its
metadata.
"""

from __future__ import annotations

import hashlib
import json
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from attnfit.solvers.record import CheckpointError
from attnfit.writing import replace_file

HEADER, DIGEST = "attnfit_checkpoint", "sha256"
Arrays = dict[str, NDArray[Any]]


def write(path: Path, arrays: Arrays, header: dict[str, Any]) -> None:
    """Replace the file in one step, so that whatever happens it is the last one or this one.

    Raises
    ------
    OSError
        If the file cannot be written; the last one is intact then.
    """
    text = json.dumps(_finite(header), allow_nan=False, default=_plain)
    data = to_bytes(arrays, metadata={HEADER: text, DIGEST: _digest(arrays, text)})
    try:
        replace_file(path, data)
    except OSError as error:
        left = "the one before is intact" if path.exists() else "there is none yet"
        raise OSError(
            error.errno,
            f"checkpoint {path} cannot be written ({error.strerror or error}) and {left}; make room or allow "
            "writing there, and make the same call again, or name another file",
        ) from error


def read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Return arrays and header of a file whose digest is right.

    Raises
    ------
    CheckpointError
        If it is no such file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            # Copies, since arrays in a buffer may lie askew.
            arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is not a readable safetensors file ({error}); name another file, or pass "
            "resume=False to start afresh"
        ) from None
    if HEADER not in metadata or DIGEST not in metadata:
        raise CheckpointError(f"{path} is a safetensors file but not a checkpoint; name another file")
    if _digest(arrays, metadata[HEADER]) != metadata[DIGEST]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its contents do not match its checksum; restore it from a copy, "
            "or pass resume=False to start afresh"
        )
    try:
        header = json.loads(metadata[HEADER], parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} has a header that is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"checkpoint {path} has a header that is not a JSON object")
    return arrays, header


def _digest(arrays: Arrays, header: str) -> str:
    """Guard against damage, not against forgery: whoever writes a file can write its digest."""
    digest = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _finite(value: Any) -> Any:
    """Return None for numbers that JSON has no form for."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
