"""Rows of numbers in files: .npy, zarr, Parquet, shards of CSR matrices."""

from attnfit.data.sources.base import DriftError, FileFormatError, Source
from attnfit.data.sources.opening import open_source

__all__ = ["DriftError", "FileFormatError", "Source", "open_source"]
