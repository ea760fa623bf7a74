"""Files as they come: packed, of other programs and countries, with columns that are no features."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zipfile

import numpy as np
import pandas as pd
import pytest
from test_cli import messages, one_error, run

from attnfit.cli.spelling import read_spelled

ROLES = ["--target", "share", "--group", "market", "--features", "price,size"]


def make():
    """Shares of three goods in twenty markets, with prices of two decimals."""
    rng = np.random.default_rng(0)
    price, size = rng.uniform(1.0, 3000.0, 60).round(2), rng.uniform(0.0, 1.0, 60).round(3)
    market = np.repeat([f"m{k:02d}" for k in range(20)], 3)
    u = np.exp(-0.001 * price + size + 0.1 * rng.standard_normal(60))
    share = u.reshape(20, 3) / u.reshape(20, 3).sum(axis=1, keepdims=True)
    return pd.DataFrame({"market": market, "price": price, "size": size, "share": share.ravel()})


FRAME = make()
CSV = FRAME.to_csv(index=False)


def coefficients(path, *more, roles=ROLES):
    report = path.parent / "report.json"
    result = run("fit", "softmax", path, *roles, *more, "--json", report)
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())["coefficients"]
    return {row["name"]: row["coefficient"] for row in rows}, result


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "d.csv"
    path.write_text(CSV)
    return coefficients(path)[0]


def zipped(name, data):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("__MACOSX/" + name, b"x")
        archive.writestr(name, data)
    return stream.getvalue()


def in_format(write):
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


FORMATS = {
    "gz": lambda: gzip.compress(CSV.encode()),
    "csv.bz2": lambda: bz2.compress(CSV.encode()),
    "xz": lambda: lzma.compress(CSV.encode()),
    "zip": lambda: zipped("d.csv", CSV),
    "gz in zip": lambda: zipped("d.csv.gz", gzip.compress(CSV.encode())),
    "utf-16": lambda: CSV.encode("utf-16"),
    "utf-16 without a mark": lambda: CSV.encode("utf-16-le"),
    "utf-16-be": lambda: codecs.BOM_UTF16_BE + CSV.encode("utf-16-be"),
    "utf-8-sig": lambda: CSV.encode("utf-8-sig"),
    "tabs": lambda: FRAME.to_csv(index=False, sep="\t").encode(),
    "xlsx": lambda: in_format(lambda s: FRAME.to_excel(s, index=False)),
    "feather": lambda: in_format(FRAME.to_feather),
    "parquet by another name": lambda: in_format(FRAME.to_parquet),
    "parquet in gz": lambda: gzip.compress(in_format(FRAME.to_parquet)),
    "dta": lambda: in_format(lambda s: FRAME.to_stata(s, write_index=False, version=118)),
    "decimal commas": lambda: FRAME.to_csv(index=False, sep=";", decimal=",").encode(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_numbers_in_every_format(name, tmp_path, expected):
    if name == "xlsx":
        pytest.importorskip("openpyxl")
    path = (
        tmp_path / f"d.{name.split()[0] if name in ('gz', 'csv.bz2', 'xz', 'zip', 'xlsx', 'dta') else 'data'}"
    )
    path.write_bytes(FORMATS[name]())
    found, result = coefficients(path)
    assert found == pytest.approx(expected, rel=1e-6)
    assert all("Read as numbers" in line for line in messages(result))
    model = tmp_path / "m"
    assert run("fit", "softmax", path, *ROLES, "--save", model).exit_code == 0
    copied = run("predict", model, path, "--group", "market")
    assert copied.exit_code == 0, copied.output
    delimiter = {"tabs": "\t", "decimal commas": ";"}.get(name, ",")
    header, first, *_ = copied.stdout.splitlines()
    assert header.split(delimiter)[-1] == "predicted" and len(first.split(delimiter)) == 5
    out = tmp_path / "out.csv.gz"
    assert run("predict", model, path, "--group", "market", "--output", out).exit_code == 0
    assert gzip.decompress(out.read_bytes()).decode() == copied.stdout


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\x28\xb5\x2f\xfd\x04\x58" + bytes(20), "packed with zstd; unpack it first"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(20), "packed with 7-Zip; unpack it first"),
        (b"Rar!\x1a\x07" + bytes(20), "packed with RAR; unpack it first"),
        (zipped("d.csv", CSV), None),
    ],
    ids=["zstd", "7z", "rar", "zip"],
)
def test_packages_that_cannot_be_unpacked_are_named(data, told, tmp_path):
    if told is None:
        # A method of packing that Python does not have.
        for place in (data.rindex(b"PK\x01\x02") + 10, data.index(b"PK\x03\x04", 4) + 8):
            data = data[:place] + b"\x09" + data[place + 1 :]
        told = "cannot be unpacked"
    path = tmp_path / "d.data"
    path.write_bytes(data)
    assert told in one_error(run("fit", "softmax", path, *ROLES))


def test_decimal_commas_in_cells_of_text_of_a_workbook(tmp_path, expected):
    pytest.importorskip("openpyxl")
    path = tmp_path / "d.xlsx"
    text = FRAME.astype({"price": str})
    text["price"] = text["price"].str.replace(".", ",")
    text.to_excel(path, index=False)
    found, _ = coefficients(path)
    assert found == pytest.approx(expected, rel=1e-6)
    text["price"] = "1,025"
    text.to_excel(path, index=False)
    assert "add --decimal . or --decimal ," in one_error(run("fit", "softmax", path, *ROLES))
    assert "'1,025' is 1.025" in " ".join(messages(coefficients(path, "--decimal", ",")[1]))


def test_windows_1252_is_said_and_damaged_utf_8_refused(tmp_path, expected):
    path = tmp_path / "d.csv"
    path.write_bytes(CSV.replace("m00", "Größe €").encode("cp1252"))
    found, result = coefficients(path)
    assert found == pytest.approx(expected) and "is not UTF-8 text; it is read as Windows-1252" in " ".join(
        result.stderr.split()
    )
    path.write_bytes(CSV.replace("m00", "é").encode() + b"\xff,1,1,1\n")
    assert "is not all UTF-8 text" in one_error(run("fit", "softmax", path, *ROLES))
    path.write_bytes(CSV.replace("m00", "\x81").encode("latin-1"))
    assert "is not all CP1252 text" in one_error(run("fit", "softmax", path, *ROLES))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xd0\xcf\x11\xe0abc", "is an old Excel file; save it as .xlsx or CSV"),
        (b"\x00\x01\x02\x03" * 9, "is no text and no format that is known"),
        (b"\x1f\x8bnot really", "is damaged and cannot be unpacked"),
        (gzip.compress(CSV.encode())[:-30], "is damaged and cannot be unpacked"),
        (b"PK\x03\x04broken", "is damaged and cannot be unpacked"),
        (b"PAR1broken", "is not a readable parquet file"),
        (b"ARROW1broken", "is not a readable feather file"),
        (b"<stata_dta>broken", "is not a readable stata file"),
    ],
)
def test_what_is_no_table(tmp_path, content, told):
    path = tmp_path / "d.csv"
    path.write_bytes(content)
    assert told in one_error(run("fit", "softmax", path, *ROLES))


def test_archives_of_several_files_are_listed(tmp_path):
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", CSV)
        archive.writestr("b.csv", CSV)
    sentence = one_error(run("fit", "softmax", path, *ROLES))
    assert "holds 2 files (a.csv, b.csv); unpack it and give one of them" in sentence


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "d.xlsx",
            zipped("xl/workbook.xml", "<a/>"),
            "Excel files need pandas and openpyxl; type: python -m pip",
        ),
        ("d.dta", b"<stata_dta>", "Stata files need pandas; type: python -m pip install pandas"),
        ("d.feather", b"ARROW1", "Feather files need pyarrow or polars; type: python -m pip install"),
    ],
)
def test_what_to_install(tmp_path, monkeypatch, name, content, told):
    from attnfit.cli import sources

    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    path = tmp_path / name
    path.write_bytes(content)
    assert told in one_error(run("fit", "softmax", path, *ROLES))


def test_the_first_of_several_sheets_is_named(tmp_path, expected):
    pytest.importorskip("openpyxl")
    path = tmp_path / "d.xlsx"
    with pd.ExcelWriter(path) as book:
        FRAME.to_excel(book, sheet_name="sales", index=False)
        FRAME.head(2).to_excel(book, sheet_name="notes", index=False)
    found, result = coefficients(path)
    assert found == pytest.approx(expected)
    assert "has 2 sheets; the first, 'sales', is read" in " ".join(messages(result))


# ---- numbers as people write them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "delimiter", "values"),
    [
        (["1,234.50", "12", "-3.5"], ",", [1234.5, 12, -3.5]),
        (["1.234,50", "12", "-3,5"], ";", [1234.5, 12, -3.5]),
        (["0,123", "1,234"], ";", [0.123, 1.234]),
        (["1,234,567", "1,234"], ";", [1234567, 1234]),
        (["1.234.567", "1.234"], ";", [1234567, 1234]),
        (["1 234,5", "2\u00a0345", "3\u202f456,25"], ";", [1234.5, 2345, 3456.25]),
        (["1'234.5", "2’345"], ",", [1234.5, 2345]),
        (["45%", "5.5 %", "100%"], ",", [0.45, 0.055, 1.0]),
        (["$1,200", "-$3.50", "$-3", "(4.00)", "$ 5", "$(6)"[0:1] + "6"], ",", [1200, -3.5, -3, -4, 5, 6]),
        (["1.200,50 €", "€3,5"], ";", [1200.5, 3.5]),
        (["\u22125", "+3", "2.5e3", "1E-2"], ",", [-5, 3, 2500, 0.01]),
        (["2,5e3", "1,0E-2"], ";", [2500, 0.01]),
        (["yes", "No", "TRUE", "false", "1"], ",", [1, 0, 1, 0, 1]),
        (["#N/A", "N/A", "", "-nan", "<NA>", "1"], ",", [np.nan] * 5 + [1]),
        (["inf", "-Infinity"], ",", [np.inf, -np.inf]),
        ([".5", "5."], ",", [0.5, 5.0]),
    ],
)
def test_spelled_numbers(cells, delimiter, values):
    found = read_spelled({"x": cells}, delimiter)
    assert not found.text, (found.text, found.doubts)
    np.testing.assert_allclose(found.numbers["x"], values)


@pytest.mark.parametrize(
    ("cells", "delimiter", "doubt"),
    [
        (["1,234", "5,678"], ";", "'1,234' may be 1.234 or 1234: add --decimal . or --decimal ,"),
        (["45%", "0.5"], ",", "'45%' is per cent and '0.5' is not"),
        (["$1", "€2"], ",", "'$1' and '€2' are of two currencies"),
        (["1.5", "2,5"], ";", "'1.5' has a decimal point and '2,5' a decimal comma"),
    ],
)
def test_doubts_are_told(cells, delimiter, doubt):
    found = read_spelled({"x": cells}, delimiter)
    assert "x" not in found.numbers and doubt in found.doubts["x"]


@pytest.mark.parametrize(
    "cell",
    [
        "1,5",
        "12,34",
        "1,2,3",
        "1_000",
        "2020-01-01",
        "01.02.2020",
        "a1",
        "#DIV/0!",
        "1..2",
        "(1",
        "--1",
        "$",
        "%",
    ],
)
def test_what_is_no_number(cell):
    assert read_spelled({"x": [cell]}, ",").text == {"x": (0, cell)}


def test_one_mark_holds_for_the_whole_file():
    """1.234 beside 0,5 is a thousand and some; alone it is one and a bit."""
    assert read_spelled({"x": ["1.234"], "y": ["0,5"]}, ";").numbers["x"] == [1234.0]
    assert read_spelled({"x": ["1.234"], "y": ["5"]}, ";").numbers["x"] == [1.234]
    assert read_spelled({"x": ["1,234"]}, ";", decimal=",").numbers["x"] == [1.234]
    assert read_spelled({"x": ["1,234"]}, ";", decimal=".").numbers["x"] == [1234.0]


def test_a_mark_that_is_not_the_file_s(tmp_path):
    (tmp_path / "d.csv").write_text("g;x;y\na;1,5;0.4\na;2,5;0.6\nb;3,5;0.1\nb;1,5;0.9\n")
    words = ["fit", "softmax", tmp_path / "d.csv", "--target", "y", "--group", "g"]
    assert "has a decimal point and '1,5' a decimal comma: add --decimal" in one_error(run(*words))
    sentence = one_error(run(*words, "--decimal", ","))
    assert "line 2 holds '0.4'; its decimal mark is not the comma of the rest of the file" in sentence


def test_what_was_read_is_said(tmp_path, expected):
    lines = ["market;price;size;share;shop"]
    for row in FRAME.itertuples():
        price = f"{row.price:,.2f} €".replace(",", " ").replace(".", ",")
        share = f"{100 * row.share:.12f} %".replace(".", ",")
        lines.append(f"{row.market};{price};{row.size}".replace(".", ",") + f";{share};yes")
    path = tmp_path / "d.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found, result = coefficients(path)
    assert found == pytest.approx(expected, rel=1e-6)
    (told,) = [line for line in messages(result) if "Read as numbers" in line]
    assert "price ('" in told and "share ('" in told and "shop" not in told
    assert "--decimal must be . or ," in one_error(run("fit", "softmax", path, *ROLES, "--decimal", "x"))
