"""How the data matrix is stored and streamed."""

from attnfit.designs.base import Design
from attnfit.designs.dense import DenseDesign
from attnfit.designs.gram import Gram, combine_rows, group_rows
from attnfit.designs.kronecker import KroneckerDesign
from attnfit.designs.sparse import SparseDesign

__all__ = ["DenseDesign", "Design", "Gram", "KroneckerDesign", "SparseDesign", "combine_rows", "group_rows"]
