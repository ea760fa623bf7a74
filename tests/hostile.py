"""A small matrix in the formats that tests damage, and how they read it."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from scipy import sparse

from attnfit.data.sources import FileFormatError, open_source

A = np.round(np.random.default_rng(0).standard_normal((60, 5)), 1)


def write_npy(at):
    np.save(at / "a.npy", A)
    return at / "a.npy"


def write_npz(at):
    sparse.save_npz(at / "a.npz", sparse.csr_array(np.where(A > 0, A, 0.0)), compressed=False)
    return at / "a.npz"


def write_compressed(at):
    sparse.save_npz(at / "a.npz", sparse.csr_array(np.where(A > 0, A, 0.0)))
    return at / "a.npz"


def write_parquet(at):
    pq.write_table(pa.table({f"x{j}": A[:, j] for j in range(5)}), at / "a.parquet", row_group_size=25)
    return at / "a.parquet"


def write_zarr(at, **options):
    shutil.rmtree(at / "a.zarr", ignore_errors=True)
    zarr.create_array(at / "a.zarr", shape=A.shape, dtype=A.dtype, **{"chunks": (25, 5)} | options)[:] = A
    return at / "a.zarr"


FORMATS = {
    "npy": write_npy,
    "npz": write_npz,
    "compressed": write_compressed,
    "parquet": write_parquet,
    "zarr": write_zarr,
}


def read_all(path):
    """Return the message of the error that a file gives; None where it can be read."""
    try:
        source = open_source(path)
        rows = source.read(0, min(source.shape[0], 10**6))
        source.take(np.array([0, source.shape[0] - 1]))
        source.close()
    except FileFormatError as error:
        assert Path(path).stem in str(error)
        return str(error)
    if sparse.issparse(rows):
        # What the compiled loops index with.
        assert rows.indptr[0] == 0 and (np.diff(rows.indptr) >= 0).all() and rows.indptr[-1] == rows.nnz
        assert rows.nnz == 0 or 0 <= rows.indices.min() <= rows.indices.max() < rows.shape[1]
        assert len(rows.indptr) == rows.shape[0] + 1 and len(rows.indices) == len(rows.data) == rows.nnz
    return None
