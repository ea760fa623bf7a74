"""Every reader of files: how a sound file is written, how it is read, and which errors may come out."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hostile import FORMATS, read_all


class Target(NamedTuple):
    """A reader; ``write`` returns the file that is damaged and the path that is read."""

    write: Callable[[Path], tuple[Path, Path]]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = ()


def _rows(name: str) -> Target:
    def write(at: Path) -> tuple[Path, Path]:
        path = FORMATS[name](at)
        return (path / "zarr.json", path) if path.is_dir() else (path, path)

    return Target(write, read_all)


def _zarr_chunk(at: Path) -> tuple[Path, Path]:
    path = FORMATS["zarr"](at)
    return path / "c" / "1" / "0", path


def _model(at: Path) -> tuple[Path, Path]:
    from attnfit import SoftmaxRegressor

    rng = np.random.default_rng(0)
    X, groups = rng.standard_normal((40, 3)), np.repeat(np.arange(10), 4)
    y = np.exp(X @ [0.5, -0.2, 0.1])
    model = SoftmaxRegressor(loss="cross_entropy").fit(X, y / np.bincount(groups, y)[groups], groups=groups)
    model.save(at / "a.safetensors")
    return at / "a.safetensors", at / "a.safetensors"


def _load_model(path: Path) -> Any:
    import attnfit

    return attnfit.load(path)


def _checkpoint(at: Path) -> tuple[Path, Path]:
    from attnfit import minimize, problems

    A = np.random.default_rng(0).standard_normal((30, 2))
    minimize(problems.Exponential(A, np.exp(A @ [0.3, 0.1])), checkpoint=at / "a.ckpt", random_state=0)
    return at / "a.ckpt", at / "a.ckpt"


def _resume(path: Path) -> Any:
    from attnfit import minimize, problems

    A = np.random.default_rng(0).standard_normal((30, 2))
    return minimize(problems.Exponential(A, np.exp(A @ [0.3, 0.1])), checkpoint=path, random_state=0)


def _layer(at: Path) -> tuple[Path, Path]:
    from attnfit.inversion import save_layer

    rng = np.random.default_rng(0)
    save_layer(
        at / "a.safetensors", W=rng.standard_normal((3, 3)), V=rng.standard_normal((3, 4)), mask="causal"
    )
    return at / "a.safetensors", at / "a.safetensors"


def _load_layer(path: Path) -> Any:
    from attnfit.inversion import load_layer

    return load_layer(path, np.random.default_rng(0).standard_normal((2, 4)))


def _csv(at: Path) -> tuple[Path, Path]:
    lines = ["market,share,price,name"] + [f'{k // 4},0.{k % 7 + 1},{k * 1.5},"a, {k}"' for k in range(40)]
    (at / "a.csv").write_text("\n".join(lines) + "\n")
    return at / "a.csv", at / "a.csv"


def _read_csv(path: Path) -> Any:
    from attnfit.cli.tables import read_table

    return read_table(path)


def _config(at: Path) -> tuple[Path, Path]:
    from attnfit.audit import models

    folder = at / "a"
    shutil.copytree(Path(models.__file__).parent / "tiny_weights", folder)
    return folder / "config.json", folder


def _weights(at: Path) -> tuple[Path, Path]:
    _, folder = _config(at)
    return folder / "model.safetensors", folder


def _load_directory(path: Path) -> Any:
    from attnfit.audit.models.directory import load_directory

    return load_directory(path)


def _gguf(at: Path) -> tuple[Path, Path]:
    from gguf import GGUFWriter

    writer = GGUFWriter(at / "a.gguf", "llama")
    writer.add_context_length(32)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return at / "a.gguf", at / "a.gguf"


def _load_gguf(path: Path) -> Any:
    from attnfit.audit.models.gguf import load_gguf

    return load_gguf(path)


def targets() -> dict[str, Target]:
    """Return the readers by name."""
    from attnfit.audit.errors import AuditError
    from attnfit.cli.errors import InputError
    from attnfit.estimators.model_header import ModelFileError
    from attnfit.inversion.layer_files import LayerFileError
    from attnfit.solvers.record import CheckpointError

    rows = {name: _rows(name) for name in FORMATS}
    return rows | {
        "zarr chunk": Target(_zarr_chunk, read_all),
        "model": Target(_model, _load_model, (ModelFileError,)),
        "checkpoint": Target(_checkpoint, _resume, (CheckpointError,)),
        "layer": Target(_layer, _load_layer, (LayerFileError,)),
        "csv": Target(_csv, _read_csv, (InputError,)),
        "config": Target(_config, _load_directory, (AuditError,)),
        "weights": Target(_weights, _load_directory, (AuditError,)),
        "gguf": Target(_gguf, _load_gguf, (AuditError,)),
    }


# What breaks readers: ends of integers, numbers that are none, brackets, separators.
TOKENS = [
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x80",
    b"-1",
    b"1e999",
    b"nan",
    b"null",
    b"{",
    b"]",
    b'"',
    b",",
    b"\n",
    b"\r",
]
TOKENS += [b"9" * 25, b"../", b"\xef\xbb\xbf", json.dumps("\ud800").encode(), "µ".encode("latin-1")]


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """Return bytes with a few changes."""
    data = bytearray(whole)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(0, len(data) + 1))
        # Most of what can go wrong is at the beginning.
        place = min(place, int(rng.integers(0, 400))) if rng.random() < 0.5 else place
        match int(rng.integers(0, 6)):
            case 0:
                data[place : place + 1] = bytes([int(rng.integers(0, 256))])
            case 1:
                data[place:place] = TOKENS[int(rng.integers(0, len(TOKENS)))]
            case 2:
                token = TOKENS[int(rng.integers(0, len(TOKENS)))]
                data[place : place + len(token)] = token
            case 3:
                del data[place : place + int(rng.integers(1, 64))]
            case 4:
                data[place:place] = data[place : place + int(rng.integers(1, 64))]
            case 5:
                del data[place:]
    return bytes(data)


def complaint(target: Target, path: Path) -> str | None:
    """Return the error that a file gives and that is none of the reader's own; None where all is well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(path)
    except target.errors as error:
        return None if str(error) else f"{type(error).__name__} says nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
