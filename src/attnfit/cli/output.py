"""What commands read and write: no output can harm an input, and nothing is written by halves."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.cli.console import Literal, silence, stderr, stdout
from attnfit.cli.errors import InputError
from attnfit.writing import is_special, write

# Standard input or output instead of a file.
STREAM = Path("-")

Node = tuple[Any, ...]


@dataclass(frozen=True)
class Place:
    """Where a path leads, whether or not there is a file yet.

    Attributes
    ----------
    node : tuple
        Device and number of the file, or of the nearest folder that exists.
    tail : tuple of str
        What does not exist below it.
    above : frozenset of tuple
        The node and all folders above it.
    """

    node: Node
    tail: tuple[str, ...] = ()
    above: frozenset[Node] = field(default=frozenset(), compare=False)


def check_paths(
    inputs: Mapping[str, Path | None],
    outputs: Mapping[str, Path | None],
    kept: Mapping[str, Path | None] | None = None,
) -> None:
    """Raise InputError before any work if an output cannot be written, or is an input or another output.

    Files are compared, not names: through links, other spellings, open streams, and within folders.

    Parameters
    ----------
    inputs, outputs : dict of Path or None
        By the name that the user knows them by; those that are None were not given.
    kept : dict of Path or None
        Outputs from which a later run goes on: they cannot be streams.
    """
    read = {name: path for name, path in inputs.items() if path is not None}
    again = {name: path for name, path in (kept or {}).items() if path is not None}
    written = {name: path for name, path in outputs.items() if path is not None} | again
    for name, path in again.items():
        if path == STREAM:
            raise InputError(f"{name} is read again by the next run, so it cannot be -; name a file")
    for name, path in written.items():
        _require_writable(name, path)
    piped = [name for name, path in read.items() if path == STREAM]
    if len(piped) > 1:
        raise InputError(
            f"{piped[0]} and {piped[1]} are both standard input (-); name a file for one of them"
        )
    places = [(_called(name, path), _place(path)) for name, path in written.items()]
    places += _redirected(STREAM in written.values())
    for name, path in read.items():
        members = _members(path) if places else frozenset()
        for output, place in places:
            if place.above & members:
                raise InputError(
                    f"{output} is {_called(name, path)}, or lies in it, and would destroy it; "
                    "name another file"
                )
    for k, (output, place) in enumerate(places):
        for other, other_place in places[:k]:
            if place == other_place:
                raise InputError(f"{other} and {output} are the same file; name another one for one of them")


def put(path: Path, data: bytes | str) -> None:
    """Write a file in one step, or to standard output."""
    if path != STREAM:
        write(path, data)
        return
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)


def put_json(path: Path | None, report: Any) -> None:
    """Write a report as JSON where one is asked for."""
    if path is not None:
        put(path, json.dumps(plain(report), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Return plain data: JSON knows no NumPy, and neither NaN nor infinity."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Sequence | np.ndarray):
        return [plain(item) for item in value]
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def results(*outputs: Path | None) -> Literal:
    """Return where a report is printed: not among the bytes of an output that goes to stdout."""
    return stderr() if STREAM in outputs else stdout()


def require_input(path: Path) -> None:
    """Raise InputError if there is no such file."""
    if path != STREAM and not path.exists():
        raise InputError(f"There is no file {path}; check the path (the current folder is {Path.cwd()})")


def _called(name: str, path: Path) -> str:
    return f"{name} ({path})"


def _require_writable(option: str, path: Path) -> None:
    if path == STREAM:
        return
    if is_special(path):
        return
    # Of a link, the folder of what it points to.
    target = Path(os.path.realpath(path))
    folder = target.parent
    if not folder.is_dir():
        nearest = next(p for p in (folder, *folder.parents) if p.exists())
        why = "" if nearest.is_dir() else f" ({nearest} is a file)"
        raise InputError(f"{option}: there is no folder {path.parent}{why}; make it first")
    if target.is_dir():
        raise InputError(f"{option}: {path} is a folder; add the name of a file")
    if target.exists() and not os.access(target, os.W_OK):
        raise InputError(f"{option}: {path} is write-protected; name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option}: nothing may be written into the folder {folder}; name another one")


def _node(found: os.stat_result) -> Node:
    return found.st_dev, found.st_ino


def _place(path: Path) -> Place:
    if path == STREAM:
        try:
            node = _node(os.fstat(sys.stdout.fileno()))
        except (OSError, ValueError, AttributeError):
            node = ("standard output",)
        return Place(node, above=frozenset([node]))
    if is_special(path):
        node = _node(path.stat())
        return Place(node, above=frozenset([node]))
    target = Path(os.path.realpath(path))
    tail: list[str] = []
    while not target.exists() and target != target.parent:
        tail.append(target.name)
        target = target.parent
    nodes = [_node(p.stat()) for p in (target, *target.parents)]
    return Place(nodes[0], tuple(reversed(tail)), frozenset(nodes))


def _redirected(stdout_is_named: bool) -> list[tuple[str, Place]]:
    """Return the files that the shell has opened for what is printed."""
    found: list[tuple[str, Place]] = []
    for name, stream in (("standard output", sys.stdout), ("standard error", sys.stderr)):
        try:
            opened = os.fstat(stream.fileno())
        except (OSError, ValueError, AttributeError):
            continue
        place = Place(_node(opened), above=frozenset([_node(opened)]))
        named = stdout_is_named and stream is sys.stdout
        if stat.S_ISREG(opened.st_mode) and not named and place not in [other for _, other in found]:
            found.append((name, place))
    return found


def _members(path: Path) -> frozenset[Node]:
    """Return the file, or a folder with all that is in it or linked from it."""
    try:
        if path == STREAM:
            opened = os.fstat(sys.stdin.fileno())
            return frozenset([_node(opened)] if stat.S_ISREG(opened.st_mode) else [])
        nodes = {_node(path.stat())}
        if not path.is_dir():
            return frozenset(nodes)
    except (OSError, ValueError, AttributeError):
        return frozenset()
    folders = [path]
    while folders:
        for entry in os.scandir(folders.pop()):
            try:
                node = _node(entry.stat())
            except OSError:
                # A link that leads nowhere.
                continue
            if node not in nodes and entry.is_dir():
                folders.append(Path(entry.path))
            nodes.add(node)
    return frozenset(nodes)
