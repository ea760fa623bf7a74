"""The same rows in every storage: what the conformance suite ranges over."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from attnfit.data import open_source

# Rows of the pieces in which n rows are stored: one piece, many, unequal ones.
PIECES = {
    "one": lambda n: (n,),
    "many": lambda n: (50,) * (n // 50) + ((n % 50,) if n % 50 else ()),
    "unequal": lambda n: (n // 2, 1, n - n // 2 - 1 - 77, 77),
}


def ends(pieces):
    return np.concatenate([[0], np.cumsum(pieces)])


def memory(columns: dict[str, Any], pieces, at: Path):
    return columns


def memmap(columns, pieces, at):
    for name, values in columns.items():
        np.save(at / f"{name}.npy", values)
    return {name: np.load(at / f"{name}.npy", mmap_mode="r") for name in columns}


def npy(columns, pieces, at):
    memmap(columns, pieces, at)
    return {name: open_source(at / f"{name}.npy") for name in columns}


def zarr(columns, pieces, at):
    import zarr

    out = {}
    for name, values in columns.items():
        # Chunks of one array are alike: their length need not divide the number of rows.
        chunks = (max(pieces), *values.shape[1:])
        array = zarr.create_array(at / f"{name}.zarr", shape=values.shape, chunks=chunks, dtype=values.dtype)
        array[...] = values
        out[name] = array
    return out


def parquet(columns, pieces, at):
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = [f"x{j}" for j in range(columns["A"].shape[1])]
    table = {name: columns["A"][:, j] for j, name in enumerate(features)}
    table |= {name: values for name, values in columns.items() if name != "A"}
    table = pa.table(table)
    # Unequal row groups, in two files.
    bounds = ends(pieces)
    (at / "rows").mkdir()
    for part, runs in enumerate(np.array_split(np.arange(len(pieces)), min(2, len(pieces)))):
        with pq.ParquetWriter(at / "rows" / f"part-{part}.parquet", table.schema) as writer:
            for k in runs:
                writer.write_table(table.slice(bounds[k], pieces[k]), row_group_size=pieces[k])
    return {name: open_source(at / "rows", features if name == "A" else name) for name in columns}


def shards(columns, pieces, at):
    bounds = ends(pieces)
    (at / "shards").mkdir()
    for k, (first, last) in enumerate(pairwise(bounds)):
        sparse.save_npz(at / "shards" / f"{k}.npz", sparse.csr_array(columns["A"][first:last]))
    out = npy({name: values for name, values in columns.items() if name != "A"}, pieces, at)
    return out | {"A": open_source(at / "shards")}


def dask_array(columns, pieces, at):
    import dask.array as da

    return {n: da.from_array(v, chunks=(tuple(pieces), *v.shape[1:])) for n, v in columns.items()}


def dask_sparse(columns, pieces, at):
    lazy = dask_array(columns, pieces, at)
    return lazy | {"A": lazy["A"].map_blocks(sparse.csr_array, dtype=float, meta=sparse.csr_array((0, 0)))}


def dask_frame(columns, pieces, at):
    import dask.dataframe as dd
    from dask import delayed

    features = [f"x{j}" for j in range(columns["A"].shape[1])]
    table = pd.DataFrame(columns["A"], columns=features).assign(
        **{name: values for name, values in columns.items() if name != "A"}
    )
    bounds = ends(pieces)
    frame = dd.from_delayed(
        [delayed(table.iloc[first:last]) for first, last in pairwise(bounds)],
        meta=table,
    )
    return {name: frame[features] if name == "A" else frame[name] for name in columns}


STORAGES = {
    f.__name__: f for f in (memory, memmap, npy, zarr, parquet, shards, dask_array, dask_sparse, dask_frame)
}
