"""Whether a model fits into memory, estimated before it is read."""

from __future__ import annotations

from math import prod
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

from attnfit.audit.errors import MalformedModel, ModelTooLarge

# Share of the available memory that weights may take: the rest is for states and tables.
SHARE = 0.8
BYTES = 4


def check_memory(n_parameters: int, source: Path) -> None:
    """Raise ModelTooLarge if so many numbers in float32 exceed what is available."""
    needed, free = BYTES * n_parameters, int(psutil.virtual_memory().available)
    if needed > SHARE * free:
        raise ModelTooLarge(
            f"{source} needs about {needed / 2**30:.1f} GiB in float32, and {free / 2**30:.1f} GiB are "
            "available"
        )


def count_parameters(files: list[Path]) -> int:
    """Return how many numbers some safetensors files hold, from their headers.

    Raises
    ------
    MalformedModel
        If a header is damaged.
    """
    total = 0
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                total += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise MalformedModel(f"{file} is not a readable safetensors file: {error}") from error
    return total
