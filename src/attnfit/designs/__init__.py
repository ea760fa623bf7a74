"""How the data matrix is stored and streamed."""

from attnfit.designs.base import Design
from attnfit.designs.column import Column
from attnfit.designs.dense import DenseDesign
from attnfit.designs.gram import Gram, combine_rows, group_rows
from attnfit.designs.kronecker import KroneckerDesign
from attnfit.designs.on_disk import DenseOnDisk, SparseOnDisk
from attnfit.designs.sources import DriftError, open_source
from attnfit.designs.sparse import SparseDesign

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
