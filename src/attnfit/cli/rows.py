"""The rows of a fit, wherever they are: in memory, on disk, or in the partitions of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.cli import columns
from attnfit.cli.cluster import connected
from attnfit.cli.columns import Roles
from attnfit.cli.console import note
from attnfit.cli.errors import InputError, suggest
from attnfit.cli.models import CONSTANT
from attnfit.cli.options import ReadOptions, ScaleOptions
from attnfit.cli.output import STREAM, require_input
from attnfit.cli.sources import is_parquet
from attnfit.cli.suspects import refuse_codes
from attnfit.cli.tables import MISSING, Table, read_table

# Rows of large data that tell what a column is; rows of one group among which repeated ones are sought.
SEEN, MOST = 1_000_000, 5_000_000
# Rows that a picture shows of data that are not in memory.
SHOWN = 20_000


@dataclass
class Rows:
    """What goes into ``fit``.

    Attributes
    ----------
    X : matrix
    inputs : dict
        The other arguments.
    names : list of str
        Of the columns of X.
    repeated : callable
        Returns how many rows of some groups repeat another one exactly.
    here : bool
        Whether they are in memory.
    some : callable, optional
        Where they are not, returns the rows of some groups, or so many, as a table.
    training : Training, optional
        What a formula made of them.
    target, formula : str
        What is explained, and by which formula.
    """

    X: Any
    inputs: dict[str, Any]
    names: list[str]
    repeated: Callable[[Sequence[Any]], int]
    here: bool = field(default=False)
    some: Callable[[Any], Any] | None = None
    training: Any = None
    target: str = ""
    formula: str = ""

    def with_constant(self) -> Rows:
        """Return the rows with a column of ones in front."""
        if self.here:
            X: Any = np.column_stack([np.ones(len(self.X)), self.X])
        elif hasattr(self.X, "read"):
            from attnfit.data.sources.with_constant import WithConstant

            X = WithConstant(self.X)
        else:
            X = self.X.assign(**{CONSTANT: 1.0})[[CONSTANT, *self.names]]
        return replace(self, X=X, names=[CONSTANT, *self.names])

    def require_here(self) -> None:
        """Raise InputError where some rows would be shown whose shares depend on all of them."""
        if not self.here:
            raise InputError(
                "--plot shows fitted shares, and without --group each depends on all rows: name the column "
                "of the market, or leave out --dask and --memory-limit"
            )

    def drawn(self, roles: Roles, n_rows: int, n_groups: int) -> tuple[Any, dict[str, Any]]:
        """Return the matrix and the other arguments of rows that a picture can show: all, or whole groups."""
        if self.here:
            return self.X, self.inputs
        assert self.some is not None
        chosen: Any = SHOWN
        if roles.group is not None:
            labels = np.asarray(_first(self.inputs["groups"]))
            _, firsts = np.unique(labels, return_index=True)
            # As many groups as have so many rows, if all are alike.
            count = max(1, SHOWN * n_groups // n_rows)
            chosen = [_plain(label) for label in labels[np.sort(firsts)[:count]]]
        table = self.some(chosen)
        columns = {
            argument: np.asarray(table[name])
            for argument, name in _arguments(roles).items() if name is not None
        }  # fmt: skip
        X = [np.ones(len(columns["y"])) if n == CONSTANT else np.asarray(table[n]) for n in self.names]
        note(f"The picture shows {len(columns['y']):,} of the rows.")
        return np.column_stack(X).astype(np.float64), columns


def read_rows(
    data: Path,
    roles: Roles,
    scale: ScaleOptions,
    reading: ReadOptions,
    stack: ExitStack,
    *,
    shares: bool,
    positive: bool,
) -> Rows:
    """Read a file, or find out what is in it where it stays on disk.

    Parameters
    ----------
    data : Path
    roles : Roles
    scale, reading
    stack : ExitStack
        The workers are there until it is closed.
    shares : bool
        Whether the target should be shares, so that codes are refused.
    positive : bool
        Whether it must not be negative.

    Raises
    ------
    InputError
        If the file has no such columns, or an option has no meaning here.
    """
    require_input(data)
    stored = data != STREAM and (data.is_dir() or is_parquet(data))
    away = scale.dask is not None or (scale.memory_limit is not None and stored)
    columns.check_missing(reading.missing)
    if away and len(roles.clusters) > 1:
        raise InputError("--cluster takes one column where the data stay on disk or on workers")
    if scale.dask is not None:
        if data == STREAM:
            raise InputError("--dask needs a file that all workers can read, not standard input")
        if reading.decimal is not None and not stored:
            raise InputError(
                "--decimal is for files in memory; leave --dask out, or convert the file to parquet"
            )
        stack.enter_context(connected(scale.dask))
        rows = _in_dask(data, roles, stored, drop=reading.missing == "drop")
    elif away:
        rows = _on_disk(data, roles, drop=reading.missing == "drop")
    else:
        if data != STREAM and data.is_dir():
            raise InputError(
                f"{data} is a folder; give one file of it, or add --memory-limit to read all of them"
            )
        return _in_memory(data, roles, reading, shares=shares, positive=positive)
    if shares:
        refuse_codes(_first(rows.inputs["y"]), roles.target, rows.names)
    return rows


def _in_memory(data: Path, roles: Roles, reading: ReadOptions, *, shares: bool, positive: bool) -> Rows:
    table = read_table(data, roles.labelled, reading.decimal)
    # The target first: a slip there should not read as a complaint about some feature.
    for name, option in roles.taken.items():
        columns.require(table, name, option)
    if roles.target in table.text:
        columns.numbers(table, roles.target, "--target")
    names = columns.features_of(table, roles)
    used = [*(name for name in roles.taken if name not in roles.labelled), *names]
    table = columns.without_missing(table, used, roles.labelled, reading.missing)
    table.tell(used)
    inputs: dict[str, Any] = {"y": columns.numbers(table, roles.target, "--target", non_negative=positive)}
    if shares:
        refuse_codes(inputs["y"], roles.target, table.names)
    if roles.group is not None:
        inputs["groups"] = columns.labels(table, roles.group)
    if roles.clusters:
        labels = [columns.labels(table, name, "--cluster") for name in roles.clusters]
        inputs["clusters"] = labels[0] if len(labels) == 1 else np.column_stack(labels)
    if roles.absorb:
        inputs["absorb"] = absorbed(roles.absorb, lambda name: columns.labels(table, name, "--absorb"))
    if roles.weight is not None:
        inputs["sample_weight"] = columns.numbers(table, roles.weight, "--weight", non_negative=True)
    if roles.offset is not None:
        inputs["offset"] = columns.numbers(table, roles.offset, "--offset")
    X = columns.matrix(table, names)
    repeated = partial(_repeated_here, X, inputs, table)
    return Rows(X, inputs, names, repeated, here=True, target=roles.target)


def absorbed(sets: Sequence[tuple[str, ...]], labels: Callable[[str], Any]) -> Any:
    """Return the labels of sets of effects, which the model keeps with the names of their columns."""
    from attnfit.estimators.absorbing import Absorbed, name_of

    columns_of = [parts[0] if len(parts) == 1 else parts for parts in sets]
    found = [labels(one) if isinstance(one, str) else tuple(map(labels, one)) for one in columns_of]
    return Absorbed(found, [name_of(one, k) for k, one in enumerate(columns_of)], columns_of)


def _repeated_here(X: Any, inputs: dict[str, Any], table: Table, labels: Sequence[Any]) -> int:
    everything = np.column_stack([X, inputs["y"]])
    if "groups" not in inputs:
        return len(everything) - len(np.unique(everything, axis=0))
    count = 0
    for label in labels:
        rows = everything[inputs["groups"] == label]
        count += len(rows) - len(np.unique(rows, axis=0))
    return count


def _on_disk(data: Path, roles: Roles, *, drop: bool) -> Rows:
    import pyarrow.dataset as ds

    from attnfit.data import open_source
    from attnfit.data.sources.opening import SomeRows

    with _readable(data, "parquet"):
        dataset = ds.dataset(data, format="parquet")
    numeric = [f.name for f in dataset.schema if _is_numeric(f.type)]

    def opened(names: Any) -> Any:
        source: Any = open_source(data, names)
        return source.filled() if drop else source

    def head(name: str) -> Any:
        return np.asarray(_first(opened(name)), dtype=np.float64)

    groups = None
    if roles.group is not None and roles.group in dataset.schema.names:
        groups = np.asarray(_first(opened(roles.group)))
    names = _names(data, roles, list(dataset.schema.names), numeric, head, groups)
    used = [*names, *(name for name in roles.taken if name != roles.group)]
    paths = opened(names).paths
    kept = _complete(paths, data, used, roles.group) if drop else None
    if not drop and roles.group is not None and roles.group not in numeric:
        _require_labels(paths, roles.group)

    def final(columns: Any) -> Any:
        return open_source(data, columns) if kept is None else SomeRows(opened(columns), kept)

    def some(chosen: Any) -> Any:
        wanted = [*used, *([] if roles.group is None else [roles.group])]
        if isinstance(chosen, int):
            table = dataset.head(chosen, columns=wanted)
        else:
            table = dataset.to_table(columns=wanted, filter=ds.field(roles.group).isin(chosen))
        frame = table.to_pandas()
        return frame.dropna() if drop else frame

    inputs = {argument: final(name) for argument, name in _arguments(roles).items() if name is not None}
    if roles.clusters:
        # Labels are needed all at once, and are small beside the features.
        inputs["clusters"] = np.asarray(inputs["clusters"].read(0, int(inputs["y"].shape[0])))

    def repeated(labels: Sequence[Any]) -> int:
        if roles.group is None and dataset.count_rows() > MOST:
            return 0
        chosen = (
            None if roles.group is None else ds.field(roles.group).isin([_plain(label) for label in labels])
        )
        whole = [*names, roles.target, *([] if roles.group is None else [roles.group])]
        table = dataset.to_table(columns=whole, filter=chosen)
        return int(table.num_rows - table.group_by(whole).aggregate([]).num_rows)

    return Rows(final(names), inputs, names, repeated, some=some, target=roles.target)


def _complete(paths: Sequence[str], data: Path, used: list[str], group: str | None) -> Any:
    """Return the numbers of the rows with a value in all columns; None where these are all rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = list(dict.fromkeys([*used, *([] if group is None else [group])]))
    counts, keep = dict.fromkeys(wanted, 0), []
    for path in paths:
        with pq.ParquetFile(path, memory_map=False) as file:
            for batch in file.iter_batches(columns=wanted):
                empty = {}
                for name in wanted:
                    column = batch.column(name)
                    there = pc.is_null(column, nan_is_null=_is_numeric(column.type))
                    empty[name] = np.asarray(there.to_numpy(zero_copy_only=False), dtype=bool)
                    if name == group and not _is_numeric(column.type):
                        empty[name] |= _stand_for_nothing(column)
                    counts[name] += int(empty[name].sum())
                keep.append(~np.logical_or.reduce(list(empty.values())))
    kept = np.concatenate(keep)
    columns.tell_missing(data, counts, int(kept.sum()), len(kept))
    return None if kept.all() else np.flatnonzero(kept)


def _require_labels(paths: Sequence[str], group: str) -> None:
    """Raise InputError where a label stands for no value, as in memory."""
    import pyarrow.parquet as pq

    for path in paths:
        n_before = 0
        with pq.ParquetFile(path, memory_map=False) as file:
            for batch in file.iter_batches(columns=[group]):
                column = batch.column(group)
                empty = _stand_for_nothing(column)
                if empty.any():
                    k = int(np.argmax(empty))
                    where = f"row {n_before + k + 1} of {path}"
                    raise InputError(columns.no_label(group, where, column[k].as_py()))
                n_before += len(empty)


def _stand_for_nothing(labels: Any) -> Any:
    """Return which labels of a column of text are words such as NA."""
    import pyarrow as pa
    import pyarrow.compute as pc

    words = pc.utf8_lower(pc.utf8_trim_whitespace(labels.cast("string")))
    found = pc.is_in(words, value_set=pa.array([*sorted(MISSING), None], pa.string()))
    return np.asarray(found.to_numpy(zero_copy_only=False), dtype=bool)


def _in_dask(data: Path, roles: Roles, parquet: bool, *, drop: bool) -> Rows:
    import dask.dataframe as dd

    path = str(data.absolute())
    if not parquet and data.suffix.lower() not in (".csv", ".txt"):
        raise InputError(f"--dask reads parquet and plain CSV, not {data}; convert it to parquet")
    with _readable(data, "parquet" if parquet else "CSV"):
        frame = dd.read_parquet(path) if parquet else dd.read_csv(path)
    numeric = [name for name, dtype in frame.dtypes.items() if getattr(dtype, "kind", "O") in "fiub"]

    def head(name: str) -> Any:
        return np.asarray(_first(frame[name]), dtype=np.float64)

    groups = None
    if roles.group is not None and roles.group in frame.columns:
        groups = np.asarray(_first(frame[roles.group]))
    names = _names(data, roles, list(frame.columns), numeric, head, groups)
    whole = list(dict.fromkeys([*names, *roles.taken]))
    if roles.group is not None and roles.group not in numeric:
        labels = frame[roles.group]
        # As in memory, some words stand for no value.
        words = labels.astype(str).str.strip().str.lower()
        frame = frame.assign(**{roles.group: labels.mask(words.isin(sorted(MISSING)))})
    if drop:
        frame = _without_missing(frame[whole], data)
    inputs = {argument: frame[name] for argument, name in _arguments(roles).items() if name is not None}

    def some(chosen: Any) -> Any:
        if isinstance(chosen, int):
            return frame[whole].head(chosen, npartitions=-1)
        return frame[whole][frame[roles.group].isin(chosen)].compute()

    def repeated(labels: Sequence[Any]) -> int:
        seen = [*names, roles.target]
        if roles.group is None:
            return int(frame[seen].compute().duplicated().sum()) if len(frame) <= MOST else 0
        rows = frame[frame[roles.group].isin([_plain(label) for label in labels])]
        return int(rows[[*seen, roles.group]].compute().duplicated().sum())

    return Rows(frame[names], inputs, names, repeated, some=some, target=roles.target)


def _without_missing(frame: Any, data: Path) -> Any:
    """Return the rows of a Dask data frame with a value in all columns; say how many are left out."""
    from dask import compute

    kept = frame.dropna()
    counts, n_kept, n_rows = compute(frame.isna().sum(), kept.shape[0], frame.shape[0])
    columns.tell_missing(data, dict(counts.items()), int(n_kept), int(n_rows))
    return kept


def _arguments(roles: Roles) -> dict[str, str | None]:
    return {
        "y": roles.target,
        "groups": roles.group,
        "sample_weight": roles.weight,
        "offset": roles.offset,
        "clusters": roles.clusters[0] if roles.clusters else None,
    }


def _first(values: Any) -> Any:
    """Return the first rows of a column that is not in memory."""
    if hasattr(values, "read"):
        return values.read(0, min(SEEN, int(values.shape[0])))
    found: list[Any] = []
    first, count = 0, 1
    # Small files hold few rows, or none.
    while first < values.npartitions and sum(map(len, found)) < SEEN:
        found.append(values.partitions[first : first + count].compute().to_numpy())
        first, count = first + count, 2 * count
    if not any(map(len, found)):
        raise InputError("The files have a header but no rows; give files with data")
    return np.concatenate(found)[:SEEN]


@contextmanager
def _readable(data: Path, kind: str) -> Iterator[None]:
    """Turn what other packages say of a file that they cannot read into a sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        remedy = (
            "save it as CSV in UTF-8 with commas, or convert it to parquet"
            if kind == "CSV"
            else "write it again"
        )
        raise InputError(f"{data} is not readable {kind} ({type(error).__name__}); {remedy}") from error


def _names(
    data: Path, roles: Roles, known: list[str], numeric: list[str], head: Callable[[str], Any], groups: Any
) -> list[str]:
    for name, option in roles.taken.items():
        if name not in known:
            hint = suggest(name, known, "its columns are")
            raise InputError(f"{data} has no column {name!r}, which {option} needs{hint}")
        if option not in ("--group", "--cluster"):
            _require_numbers(data, name, numeric)
    for name in roles.features or ():
        if name in known:
            _require_numbers(data, name, numeric)
    text = [name for name in known if name not in numeric and name not in roles.taken]
    return columns.choose_features(roles, data, known, numeric, head, groups, text)


def _require_numbers(data: Path, name: str, numeric: list[str]) -> None:
    if name not in numeric:
        raise InputError(
            f"Column {name!r} of {data} is not numeric; encode it as numbers (one 0/1 column a category) or "
            "leave it out"
        )


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label


def _is_numeric(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(
        types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)
    )
