"""Cells that are done, kept on disk so that an audit can be stopped and resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from attnfit.audit.cells import Cell, Key, as_record, from_record
from attnfit.audit.errors import AuditError
from attnfit.writing import write

SCHEMA = 1


class Checkpoint:
    """A file of JSON lines: what the audit is about, then one line a cell.

    Parameters
    ----------
    path : Path or None
        Nothing is kept without one.
    settings : dict
        Model, texts and everything else that cells depend on.

    Raises
    ------
    AuditError
        If the file belongs to another audit, or is none.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self.cells: dict[Key, Cell] = {}
        self._lines: list[str] = []
        header = {"schema": SCHEMA, **settings}
        if path is None:
            return
        lines = self._lines = self._whole_lines(path)
        if not lines:
            self._append(header)
            return
        try:
            first, *records = [json.loads(line) for line in lines]
            differing = [name for name, value in header.items() if first.get(name) != value]
            cells = [] if differing else [from_record(record) for record in records]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AuditError(
                f"checkpoint {path} is not one of an audit ({error}); name another file"
            ) from None
        if differing:
            raise AuditError(
                f"checkpoint {path} is of another audit: {', '.join(differing)} differ; delete it or name "
                "another file"
            )
        self.cells = {cell.key: cell for cell in cells}

    def add(self, cell: Cell) -> None:
        """Keep a cell; one that was cut short will be run again."""
        if cell.status != "cut":
            self._append(as_record(cell))

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is None:
            return
        self._lines.append(json.dumps(record))
        write(self._path, "\n".join(self._lines) + "\n")

    @staticmethod
    def _whole_lines(path: Path) -> list[str]:
        """Return the lines; cut off one that was not written to its end."""
        if not path.exists():
            return []
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise AuditError(
                f"checkpoint {path} is not one of an audit ({error}); name another file"
            ) from None
        whole, _, torn = text.rpartition("\n")
        if torn and whole:
            os.truncate(path, len((whole + "\n").encode()))
        return whole.split("\n") if whole else [torn] if torn else []
