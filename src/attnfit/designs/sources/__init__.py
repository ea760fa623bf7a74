"""Rows of numbers in files: .npy, zarr, Parquet, shards of CSR matrices."""

from attnfit.designs.sources.base import Source
from attnfit.designs.sources.errors import DriftError, FileFormatError
from attnfit.designs.sources.opening import open_source

__all__ = ["DriftError", "FileFormatError", "Source", "open_source"]
