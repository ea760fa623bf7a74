"""How the data matrix is stored and streamed."""

from attnfit.data.gram import Gram, combine_rows, group_rows
from attnfit.data.matrix import DenseDesign, Design, SparseDesign
from attnfit.data.on_disk import Column, DenseOnDisk, SparseOnDisk
from attnfit.data.pairs import KroneckerDesign
from attnfit.data.sources import DriftError, open_source

__all__ = [
    "Column",
    "DenseDesign",
    "DenseOnDisk",
    "Design",
    "DriftError",
    "Gram",
    "KroneckerDesign",
    "SparseDesign",
    "SparseOnDisk",
    "combine_rows",
    "group_rows",
    "open_source",
]
