"""What commands print: data as they are, lines that break at spaces, and one table of exit codes."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import messages, run, write_data, write_rows

from attnfit import datasets
from attnfit.cli.console import literal
from attnfit.cli.errors import EXIT_CODES, MEANINGS, Exit

# Names that a terminal, rich or matplotlib could take for something else than names.
NAMES = [
    "x [/km]", "time [min]", "time [h]", "[red]", "[/]", "[bold]x[/bold]", "[link=a]", ":smile:", "a\\[b",
    "$x_1$", "$", "{x}", "%s",
    "\x1b[31mred", "bell\x07", "tab\tname", "two\nlines", "\u202eback", "c1\x9b31m",
    "café ü 日本", "<b>",
]  # fmt: skip


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((90, len(NAMES))).round(3)
    u = np.exp(0.3 * X.sum(axis=1))
    groups = np.repeat(np.arange(30), 3)
    y = u / np.bincount(groups, weights=u)[groups]
    rows = [[f"m[{g}]", *map(float, x), float(share)] for g, x, share in zip(groups, X, y, strict=True)]
    return write_rows(tmp_path_factory.mktemp("named") / "n.csv", ["[group]", *NAMES, "[y]"], rows)


def test_names_are_shown_as_they_are(named, tmp_path):
    picture = tmp_path / "fit.png"
    result = run(
        "fit", "softmax", named, "--target", "[y]", "--group", "[group]", "--plot", picture,
        "--json", tmp_path / "r.json", "--save", tmp_path / "m.safetensors", width="10000",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()[3:]
    for name in NAMES:
        assert any(line.startswith(f"{literal(name)} ") for line in lines), name
    assert picture.stat().st_size > 10_000
    for character in "\x1b\x07\t\x9b\u202e":
        assert character not in result.output
    told = json.loads((tmp_path / "r.json").read_text())
    assert [row["name"] for row in told["coefficients"]] == NAMES
    predicted = run("predict", tmp_path / "m.safetensors", named, "--group", "[group]")
    assert predicted.exit_code == 0


def test_names_of_signatures_and_messages_are_literal(tmp_path):
    write_rows(tmp_path / "s.csv", ["[/s]", "t\x1b[0m"], [[1, 0], [0, 1], [1, 1]])
    write_rows(tmp_path / "b.csv", ["[red]u"], [[0.3], [0.7], [1.0]])
    result = run("fit", "mixture", tmp_path / "s.csv", tmp_path / "b.csv", width="10000")
    assert result.exit_code == 0, result.output
    assert "[/s]" in result.stdout and "t\\x1b[0m" in result.stdout and "[red]u" in result.stdout
    sentence = run("fit", "softmax", tmp_path / "s.csv", "--target", "[/no]").stderr
    assert "has no column '[/no]'" in sentence


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a b", "a b"), ("é日", "é日"), ("\x1b[0m", "\\x1b[0m"), ("\x85", "\\x85"), ("\u2028", "\\u2028"),
     ("\udcff", "\\udcff"), ("\u202e", "\\u202e"), ("a\r", "a\\r"), ("\U0001f600", "\U0001f600")],
)  # fmt: skip
def test_literal(text, shown):
    assert literal(text) == shown


# ---- lines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 60])
def test_lines_break_at_spaces(named, width, tmp_path):
    cars = write_data(tmp_path / "cars.csv", datasets.load_car_shares())
    for words in (
        ["fit", "softmax", cars, "--target", "share", "--group", "market"],
        ["fit", "softmax", cars, "--target", "shar", "--group", "market"],
        ["fit", "softmax", cars, "--target", "share", "--max-iter", "1"],
    ):
        wide, narrow = run(*words, width="100000"), run(*words, width=str(width))
        assert wide.exit_code == narrow.exit_code
        assert messages(narrow) == messages(wide)
        text = re.sub(r"\S*/\S*", "", narrow.stderr)
        assert max(len(line) for line in text.splitlines()) <= width
    for line in run("--help", width=str(width)).stdout.splitlines():
        assert len(line) <= max(width, 78)


def test_a_terminal_of_80_columns(tmp_path):
    """A real one: a pseudo-terminal with a width of its own and no COLUMNS."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    import struct

    cars = write_data(tmp_path / "cars.csv", datasets.load_car_shares())
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm", "NO_COLOR": "1"}
    words = ["fit", "softmax", "cars.csv", "--target", "share", "--group", "market"]
    child = subprocess.Popen(
        [sys.executable, "-m", "attnfit", *words], stdin=slave, stdout=slave, stderr=slave, env=environment,
        cwd=cars.parent, close_fds=True,
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while child.poll() is None or select.select([master], [], [], 0.2)[0]:
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:
                break
    os.close(master)
    assert child.wait() == 0, seen
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    # The progress bar writes over itself.
    lines = [line.rstrip() for line in re.split("[\r\n]+", shown) if "━" not in line]
    assert max(map(len, lines)) <= 80
    assert "in 20 groups" in " ".join(lines) and "certified within" in " ".join(lines)


def test_a_reader_that_leaves_changes_no_exit_code(tmp_path):
    """`attnfit ... | head -1` is silent, and what the command found is still told."""
    cars = write_data(tmp_path / "cars.csv", datasets.load_car_shares())
    words = ["fit", "softmax", cars.name, "--target", "share", "--group", "market"]
    for more, code in (([], 0), (["--max-iter", "1"], 1)):
        command = shlex.join([sys.executable, "-m", "attnfit", *words, *more])
        done = subprocess.run(
            ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == code, done
        assert "Broken" not in done.stderr and "Traceback" not in done.stderr


# ---- streams ----------------------------------------------------------------------------------------------


def test_standard_input_and_output(named, tmp_path):
    """`-` is a stream, for tables, arrays, models and reports alike."""

    def attnfit(words, data=None):
        return subprocess.run(
            [sys.executable, "-m", "attnfit", *map(str, words)],
            input=data, capture_output=True, cwd=tmp_path, check=False,
        )  # fmt: skip

    table = named.read_bytes()
    roles = ["--target", "[y]", "--group", "[group]"]
    model = attnfit(["fit", "softmax", "-", *roles, "--save", "-"], table)
    assert model.returncode == 0, model.stderr
    (tmp_path / "m").write_bytes(model.stdout)
    assert b"certified within" in b" ".join(model.stderr.split())
    printed = attnfit(["predict", "m", "-", "--group", "[group]", "--output", "-"], table)
    plain = attnfit(["predict", "m", named, "--group", "[group]"])
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == plain.stdout and printed.stdout.count(b"predicted") == 1
    report = attnfit(["fit", "softmax", "-", *roles, "--json", "-"], table)
    assert json.loads(report.stdout)["converged"]
    both = attnfit(["fit", "softmax", "-", *roles, "--json", "-", "--save", "-"], table)
    assert both.returncode == 2 and b"are the same file" in b" ".join(both.stderr.split())
    kept = attnfit(["fit", "softmax", "-", *roles, "--checkpoint", "-"], table)
    assert kept.returncode == 2 and b"cannot be -" in b" ".join(kept.stderr.split())
    twice = attnfit(["fit", "mixture", "-", "-"], table)
    assert twice.returncode == 2 and b"are both standard input" in b" ".join(twice.stderr.split())
    np.save(tmp_path / "t.npy", np.eye(2))
    tokens = (tmp_path / "t.npy").read_bytes()
    maps = np.full((2, 2), 0.5)
    np.save(tmp_path / "maps.npy", maps)
    found = attnfit(["fit", "attention", "t.npy", "-", "maps.npy"], tokens)
    assert found.returncode == 0, found.stderr


# ---- exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [[], ["fit"], ["fit", "softmax"], ["fit", "attention"], ["fit", "mixture"], ["predict"],
                ["invert"], ["audit"], ["memorised"], ["canaries"], ["reproduce"], ["demo"], ["bench"],
                ["warmup"]], ids="-".join,
)  # fmt: skip
def test_every_help_has_the_table(command):
    shown = run(*command, "--help", width="80").stdout
    assert EXIT_CODES.removeprefix("\b\n") in "\n".join(line[2:] for line in shown.splitlines())


def test_the_table_is_in_the_docs():
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    for code in Exit:
        assert f"| {int(code)} | {MEANINGS[code]} |" in page


@pytest.mark.parametrize(
    "words", [["--no"], ["no"], ["fit", "no"], ["fit", "softmax", "--target"], ["predict"]]
)
def test_wrong_usage_is_bad_input(words):
    assert run(*words).exit_code == 2


def test_ctrl_c_during_a_fit(tmp_path):
    """The first evaluation is interrupted: nothing is written, and the code says who ended it."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((3000, 3))
    rows = [[k // 3, *x, u] for k, (x, u) in enumerate(zip(X, rng.random(3000), strict=True))]
    path = write_rows(tmp_path / "d.csv", ["g", "a", "b", "c", "y"], rows)
    script = (
        "import os, signal, sys; from attnfit.cli import main; from attnfit.cli.progress import FitProgress;"
        "FitProgress.record = lambda *_: signal.raise_signal(signal.SIGINT); sys.argv[0] = 'attnfit'; main()"
    )
    words = [
        "fit",
        "softmax",
        str(path),
        "--target",
        "y",
        "--group",
        "g",
        "--features",
        "a,b",
        "--json",
        "r.json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 130, done
    assert "Stopped before the end; nothing was written." in done.stderr
    assert not (tmp_path / "r.json").exists()


def test_ctrl_c_before_any_work(tmp_path):
    """While it waits for its data: to open a pipe takes both ends, so that it is known to wait."""
    os.mkfifo(tmp_path / "pipe")
    child = subprocess.Popen(
        [sys.executable, "-m", "attnfit", "fit", "softmax", "pipe", "--target", "y"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    with (tmp_path / "pipe").open("wb"):
        child.send_signal(signal.SIGINT)
        _, told = child.communicate()
    assert child.returncode == 130, told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("closed", "code", "told"),
    [("2>&-", 0, ""), (">&-", 0, "Note: "), ("<&-", 2, "Standard input (-) is closed; name a file")],
)
def test_a_stream_that_is_closed_is_no_error(closed, code, told, tmp_path):
    cars = write_data(tmp_path / "cars.csv", datasets.load_car_shares())
    data = "-" if closed == "<&-" else cars.name
    words = ["fit", "softmax", data, "--target", "share", "--group", "market"]
    command = shlex.join([sys.executable, "-m", "attnfit", *words])
    done = subprocess.run(
        ["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == code, done
    assert told in done.stderr and "Traceback" not in done.stderr


def test_as_a_module_and_its_completion():
    done = subprocess.run(
        [sys.executable, "-m", "attnfit", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("attnfit ")
    words = {"_ATTNFIT_COMPLETE": "complete_bash", "COMP_WORDS": "attnfit fit so", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "attnfit"],
        capture_output=True,
        text=True,
        env={**os.environ, **words},
        check=False,
    )
    assert done.stdout.split() == ["softmax"], done
    shown = run("--help").stdout
    assert "--install-completion" in shown and "--show-completion" in shown
