"""How the data matrix is stored and streamed."""

from attnfit.data.gram import Gram, combine_rows, group_rows
from attnfit.data.matrix import DenseDesign, Design, SparseDesign
from attnfit.data.on_disk import Column, DenseOnDisk, SparseOnDisk
from attnfit.data.pairs import KroneckerDesign
from attnfit.data.sources import DriftError, FileFormatError, Source, open_source
from attnfit.data.sources.check import check_source
from attnfit.data.sources.npy import DenseBlockSource

__all__ = [
    "Column",
    "DenseBlockSource",
    "DenseDesign",
    "DenseOnDisk",
    "Design",
    "DriftError",
    "FileFormatError",
    "Gram",
    "KroneckerDesign",
    "Source",
    "SparseDesign",
    "SparseOnDisk",
    "check_source",
    "combine_rows",
    "group_rows",
    "open_source",
]
