"""What can be wrong with data on disk: files that are malformed, and files that change."""

from __future__ import annotations


class FileFormatError(ValueError):
    """A data file that is malformed, damaged, or holds what cannot be read as rows of numbers."""


class DriftError(RuntimeError):
    """A data file that was changed, replaced or deleted while it was being read."""
