"""One matrix in every format that rows are read from."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from scipy import sparse

N, D = 1003, 7


def small_pieces(monkeypatch):
    """Make blocks of some 1,000 bytes, runs of neighbours 64 bytes apart: small files have many."""
    monkeypatch.setattr("attnfit.data.sources.npy.BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr("attnfit.data.sources.npy.PAGE_BYTES", 1 << 6)
    monkeypatch.setattr("attnfit.data.sources.parquet.DECODED_BYTES", 3 << 12)


def matrix(n=N, d=D, dtype=float, seed=0):
    rng = np.random.default_rng(seed)
    return (50 * rng.standard_normal((n, d))).astype(dtype)


def write_npy(at, a):
    np.save(at / "a.npy", a)
    return at / "a.npy"


def write_fortran(at, a):
    np.save(at / "a.npy", np.asfortranarray(a))
    return at / "a.npy"


def write_memmap(at, a):
    np.save(at / "a.npy", np.concatenate([np.resize(a, (13, *a.shape[1:])), a, a[:5]]))
    return np.load(at / "a.npy", mmap_mode="r")[13 : 13 + len(a)]


def write_zarr(at, a, **options):
    options = {"chunks": (100, 3)[: a.ndim]} | options
    zarr.create_array(at / "a.zarr", shape=a.shape, dtype=a.dtype, **options)[:] = a
    return at / "a.zarr"


def write_shards(at, a):
    return write_zarr(at, a, chunks=(50, 2)[: a.ndim], shards=(200, 6)[: a.ndim])


def write_zarr2(at, a):
    return write_zarr(at, a, zarr_format=2, chunks=(100, 7)[: a.ndim])


def write_zip(at, a):
    return shutil.make_archive(str(at / "a"), "zip", write_zarr(at, a))


def write_parquet(at, a, cuts=(0, 3, 400, 403)):
    """Three files of unequal length, an empty one, and unequal row groups within."""
    names = [f"x{j}" for j in range(a.shape[1])]
    (at / "a").mkdir()
    for k, (low, high) in enumerate(zip(cuts, [*cuts[1:], len(a)], strict=True)):
        low, high = min(low, len(a)), min(high, len(a))
        table = pa.table({name: a[low:high, j] for j, name in enumerate(names)})
        pq.write_table(table, at / "a" / f"part-{8 + k}.parquet", row_group_size=90)
    pq.write_table(table.slice(0, 0), at / "a" / "part-9-empty.parquet")
    return at / "a"


def write_csr(at, a, cuts=(0, 3, 400, 403)):
    (at / "a").mkdir()
    for k, (low, high) in enumerate(zip(cuts, [*cuts[1:], len(a)], strict=True)):
        low, high = min(low, len(a)), min(high, len(a))
        sparse.save_npz(at / "a" / f"{8 + k}.npz", sparse.csr_array(a[low:high]), compressed=k % 2 == 0)
    return at / "a"


DENSE = {
    "npy": write_npy,
    "fortran": write_fortran,
    "memmap": write_memmap,
    "zarr": write_zarr,
    "sharded": write_shards,
    "zarr2": write_zarr2,
    "zip": write_zip,
    "parquet": write_parquet,
}
ALL = DENSE | {"csr": write_csr}


def dense(rows):
    return rows.toarray() if sparse.issparse(rows) else rows
