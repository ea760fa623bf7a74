"""Open a file of data: from a path or standard input, packed or not, and say what it is by its content."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from attnfit.cli.console import note
from attnfit.cli.errors import InputError
from attnfit.cli.output import STREAM, require_input

DELIMITERS = ",;\t|"
HEAD = 4096
# What files begin with.
PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
FORMATS = {b"PAR1": "parquet", b"ARROW1": "feather", b"FEA1": "feather", b"<stata_dta>": "stata"}
FOREIGN = {
    b"\xd0\xcf\x11\xe0": "an old Excel file; save it as .xlsx or CSV",
    b"\x89HDF": "an HDF5 file; save its table as CSV or parquet",
    b"$FL": "an SPSS file; save it as CSV or Stata",
    b"%PDF": "a PDF file; save its table as CSV",
    b"RDX": "a file of R; write it with write.csv",
    b"SQLite": "a database; export the table as CSV",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "packed with 7-Zip; unpack it first",
    b"Rar!": "packed with RAR; unpack it first",
}
Opener = Callable[[], AbstractContextManager[IO[bytes]]]
# An archive packed in a way that Python does not know raises NotImplementedError.
DAMAGE = (
    gzip.BadGzipFile, EOFError, zlib.error, zipfile.BadZipFile, lzma.LZMAError, NotImplementedError,
)  # fmt: skip
# Packages that read a format, any one of the sets.
READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "parquet": (("polars",), ("pyarrow",)),
    "feather": (("polars",), ("pyarrow",)),
    "stata": (("pandas",),),
    "Excel": (("pandas", "openpyxl"), ("pandas", "python_calamine"), ("polars", "fastexcel")),
}


@dataclass
class Source:
    """Data that can be opened more than once.

    Attributes
    ----------
    path : Path
        As the user named it.
    kind : str
        text, parquet, feather, stata or Excel.
    open : callable
        Opens a binary stream at the beginning, unpacked.
    encoding : str
    """

    path: Path
    kind: str
    open: Opener
    encoding: str = "utf-8"

    def native(self) -> Any:
        """Return a data frame of the package that reads the format, as narwhals sees it."""
        import narwhals as nw

        packages = reader_of(self.kind)
        with _complaint(self), self.open() as stream:
            return nw.from_native(_read_native(self.kind, packages, stream, self.path), eager_only=True)

    @contextmanager
    def rows(self) -> Iterator[tuple[Any, str]]:
        """Open text as the standard library's reader; yield it and the delimiter."""
        with self.open() as stream:
            text = io.TextIOWrapper(stream, encoding=self.encoding, newline="")
            try:
                header = text.readline()
                text.seek(0)
                # A byte order mark is no part of the first name.
                if header.startswith("\ufeff"):
                    text.read(1)
                delimiter = max(DELIMITERS, key=header.count)
                yield csv.reader(text, delimiter=delimiter), delimiter
            except csv.Error as error:
                raise InputError(f"{self.path} is not a CSV file: {error}") from None
            except DAMAGE as error:
                raise _damaged(self.path, error) from None


def open_source(path: Path) -> Source:
    """Find out what a file is.

    Raises
    ------
    InputError
        If there is no such file, or it holds no table.
    """
    require_input(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the CSV or parquet file inside it")
    if path == STREAM or not path.is_file():
        # Streams and pipes can be read only once.
        data = read_bytes(path)
        opened: Opener = lambda: io.BytesIO(data)  # noqa: E731
    else:
        opened = lambda: path.open("rb")  # noqa: E731
    try:
        return _look(path, opened)
    except DAMAGE as error:
        raise _damaged(path, error) from None


def read_bytes(path: Path) -> bytes:
    """Return all of a file, a pipe or standard input."""
    if path != STREAM:
        return path.read_bytes()
    if sys.stdin is None:
        raise InputError("Standard input (-) is closed; name a file")
    return sys.stdin.buffer.read()


def with_encoding(source: Source, error: UnicodeDecodeError) -> None:
    """Take text that is not UTF-8 for Windows-1252, or raise InputError where it is damaged UTF-8."""
    before = bytes(error.object[: error.start])
    if source.encoding != "utf-8" or not before.isascii():
        told = source.encoding.upper()
        raise InputError(f"{source.path} is not all {told} text ({error.reason}); save it again as CSV UTF-8")
    source.encoding = "cp1252"
    note(f"{source.path} is not UTF-8 text; it is read as Windows-1252.")


def reader_of(kind: str) -> tuple[str, ...]:
    """Return the installed packages that read a format.

    Raises
    ------
    InputError
        With what to install.
    """
    for packages in READERS[kind]:
        if all(find_spec(package) is not None for package in packages):
            return packages
    wanted = READERS[kind][-1 if kind == "parquet" else 0]
    others = "pyarrow or polars" if kind in ("parquet", "feather") else " and ".join(wanted)
    name = {"parquet": "Parquet", "feather": "Feather", "stata": "Stata"}.get(kind, kind)
    raise InputError(f"{name} files need {others}; type: python -m pip install {' '.join(wanted)}")


def _look(path: Path, opened: Opener) -> Source:
    for _ in range(4):
        with opened() as stream:
            head = stream.read(HEAD)
        unpack = next((tool for magic, tool in PACKED.items() if head.startswith(magic)), None)
        if unpack is not None:
            opened = _unpacked(opened, unpack)
        elif head.startswith(b"PK\x03\x04"):
            member = _member(path, opened)
            if member is None:
                return Source(path, "Excel", opened)
            opened = _unzipped(opened, member)
        else:
            break
    for magic, told in FOREIGN.items():
        if head.startswith(magic):
            raise InputError(f"{path} is {told}")
    kind = next((name for magic, name in FORMATS.items() if head.startswith(magic)), None)
    suffix = [ending.lower() for ending in path.suffixes][-2:]
    if kind is None and ".dta" in suffix:
        kind = "stata"
    if kind is None and is_parquet(path):
        raise InputError(f"{path} is not a readable parquet file; write it again")
    if kind is not None:
        return Source(path, kind, opened)
    return Source(path, "text", opened, _encoding(path, head))


def is_parquet(path: Path) -> bool:
    """Whether a file is written as parquet."""
    return path.suffix.lower() in (".parquet", ".pq")


def _unpacked(opened: Opener, unpack: Callable[[Any], Any]) -> Opener:
    @contextmanager
    def unpacked() -> Iterator[IO[bytes]]:
        with opened() as stream, unpack(stream) as inner:
            yield inner

    return unpacked


def _unzipped(opened: Opener, member: str) -> Opener:
    @contextmanager
    def unzipped() -> Iterator[IO[bytes]]:
        with opened() as stream, zipfile.ZipFile(stream) as archive, archive.open(member) as inner:
            yield inner

    return unzipped


def _member(path: Path, opened: Opener) -> str | None:
    """Return the only file of an archive; None where it is a workbook."""
    with opened() as stream, zipfile.ZipFile(stream) as archive:
        files = [
            entry
            for entry in archive.infolist()
            if not entry.is_dir() and not entry.filename.startswith(("__MACOSX/", "."))
        ]
        names = [entry.filename for entry in files]
        if "xl/workbook.xml" in names:
            return None
        if len(files) != 1:
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise InputError(f"{path} holds {len(files)} files ({listed}); unpack it and give one of them")
        if files[0].flag_bits & 1:
            raise InputError(f"{path} is encrypted; unpack it first")
        return names[0]


def _encoding(path: Path, head: bytes) -> str:
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if head.startswith(mark):
            return name
    if 0 not in head:
        return "utf-8"
    # Every other byte of western text in UTF-16 is zero.
    even, odd = head[0::2], head[1::2]
    letters, zeros, name = (even, odd, "utf-16-le") if odd.count(0) else (odd, even, "utf-16-be")
    if zeros.count(0) > 0.4 * len(zeros) and not any(byte < 32 and byte not in b"\t\r\n" for byte in letters):
        return name
    raise InputError(
        f"{path} is no text and no format that is known; give CSV, Excel (.xlsx), parquet, feather or Stata"
    )


def _read_native(kind: str, packages: tuple[str, ...], stream: IO[bytes], path: Path) -> Any:
    data = io.BytesIO(stream.read())
    if kind in ("parquet", "feather"):
        if packages == ("polars",):
            import polars as pl

            return pl.read_parquet(data) if kind == "parquet" else pl.read_ipc(data)
        import pyarrow.feather
        import pyarrow.parquet

        return pyarrow.parquet.read_table(data) if kind == "parquet" else pyarrow.feather.read_table(data)
    if kind == "Excel" and "polars" in packages:
        import polars as pl

        return pl.read_excel(data)
    import pandas as pd

    if kind == "Excel":
        with pd.ExcelFile(data) as book:
            names = [str(name) for name in book.sheet_names]
            if len(names) > 1:
                note(f"{path} has {len(names)} sheets; the first, {names[0]!r}, is read.")
            return pd.read_excel(book, sheet_name=names[0])
    try:
        return pd.read_stata(data)
    except ValueError as error:
        if "labels" not in str(error):
            raise
        # Labels that stand for several codes: the codes are what is told apart.
        data.seek(0)
        return pd.read_stata(data, convert_categoricals=False)


@contextmanager
def _complaint(source: Source) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        article = "an" if source.kind == "Excel" else "a"
        raise InputError(
            f"{source.path} is not {article} readable {source.kind} file ({type(error).__name__}); "
            "write it again"
        ) from error


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path} is damaged and cannot be unpacked ({error}); get it again")
