"""No output of any command can harm an input, or be written by halves: one table of commands and outputs."""

import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from test_cli import one_error, run, write_rows

from attnfit.cli.app import app
from attnfit.writing import write

# Paths that commands only read.
READ = {
    "fit softmax": {"data"},
    "fit exponential": {"data"},
    "fit poisson": {"data"},
    "fit rescaled": {"data"},
    "fit attention": {"queries", "keys", "maps", "mask", "weights", "holdout"},
    "fit mixture": {"signatures", "spectra"},
    "predict": {"model", "data"},
    "score": {"model", "data"},
    "elasticities": {"model", "data"},
    "invert": {"layer", "output", "embedding", "known"},
    "audit": {"texts", "chat", "tokens"},
    "memorised": {"members", "others", "canaries"},
    "reproduce": {"texts"},
}
# What each command is called with here, its inputs first; those without an ending are made below.
CALLS = {
    "fit softmax": (["d.csv"], ["--target", "y", "--group", "g", "--features", "x"]),
    "fit exponential": (["d.csv"], ["--target", "y", "--features", "x,one"]),
    "fit poisson": (["d.csv"], ["--target", "y", "--features", "x,one"]),
    "fit rescaled": (["d.csv"], ["--target", "y", "--group", "g", "--features", "x"]),
    "fit attention": (["q.npy", "k.npy", "maps.npy"], []),
    "fit mixture": (["signatures.csv", "spectra.csv"], []),
    "predict": (["m.safetensors", "d.csv"], ["--group", "g"]),
    "score": (["m.safetensors", "d.csv"], ["--group", "g", "--target", "y"]),
    "elasticities": (["m.safetensors", "d.csv"], ["--group", "g", "--variable", "x"]),
    "example": (["cars"], []),
    "invert": (["layer.safetensors", "b.npy"], ["--starts", "1"]),
    "audit": (["model", "--texts", "texts.txt"], []),
    "memorised": (["model", "--members", "texts.txt"], ["--prefix", "1"]),
    "canaries": (["{digits:3}"], ["--force"]),
    "reproduce": (["data-recovery", "--texts", "texts.txt"], []),
}
NAMES = {
    ("fit attention", "--save"): "out.npy",
    ("invert", "--save"): "out.npy",
    ("fit mixture", "--save"): "out.csv",
    ("predict", "--output"): "out.csv",
}


ENDINGS = {"--plot": "out.png", "--json": "out.json", "--report": "out.html"}


def outputs():
    """Every option of every command that names a file to write."""
    found = []

    def walk(commands, before):
        for command in commands.registered_commands:
            name = f"{before}{command.name or command.callback.__name__}"
            for parameter in inspect.signature(command.callback, eval_str=True).parameters.values():
                kind, *told = get_args(parameter.annotation) or (parameter.annotation,)
                if "Path" in str(kind) and parameter.name not in READ.get(name, ()):
                    spelled = str(told[0].default)
                    found.append((name, spelled if spelled.startswith("-") else f"--{parameter.name}"))
        for group in commands.registered_groups:
            walk(group.typer_instance, f"{group.name} ")

    walk(app, "")
    return found


OUTPUTS = outputs()
FILES = [pair for pair in OUTPUTS if pair != ("reproduce", "--out")]
# What takes seconds has tests of its own.
QUICK = [
    (name, option)
    for name, option in FILES
    if name not in ("audit", "memorised") and option != "--checkpoint"
]


def test_the_table_knows_every_command_that_writes():
    assert {name for name, _ in OUTPUTS} == set(CALLS)
    assert len(OUTPUTS) == 40


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Good inputs of all commands."""
    from layer_reference import planted

    from attnfit.inversion.layer_files import save_layer

    folder = tmp_path_factory.mktemp("originals")
    rows = [["a", 1, 0.4, 1], ["a", 2, 0.6, 1], ["b", 3, 0.1, 1], ["b", 1, 0.9, 1]]
    write_rows(folder / "d.csv", ["g", "x", "y", "one"], rows)
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((12, 2))
    maps = np.exp(tokens @ tokens.T)
    np.save(folder / "q.npy", tokens)
    np.save(folder / "k.npy", tokens)
    np.save(folder / "maps.npy", maps / maps.sum(axis=1, keepdims=True))
    write_rows(folder / "signatures.csv", ["s", "t"], [[1, 0], [0, 1], [1, 1]])
    write_rows(folder / "spectra.csv", ["u"], [[0.3], [0.7], [1.0]])
    problem, _ = planted("half known", n=4, d=2, scale=1.0, seed=0)
    (head,) = problem.layer.heads
    save_layer(folder / "layer.safetensors", W=head.M, V=head.V)
    np.save(folder / "b.npy", problem.B)
    (folder / "texts.txt").write_text("A text.\n")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    options = ["--target", "y", "--group", "g", "--features", "x", "--save", folder / "m.safetensors"]
    assert run("fit", "softmax", folder / "d.csv", *options).exit_code == 0
    return folder


@pytest.fixture
def here(originals, tmp_path, monkeypatch):
    """A copy of the inputs in the current folder."""
    import shutil

    folder = tmp_path / "here"
    shutil.copytree(originals, folder)
    monkeypatch.chdir(folder)
    return folder


def contents(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def call(name, *more):
    inputs, options = CALLS[name]
    return run(*name.split(), *inputs, *options, *more)


def inputs_of(name):
    return [word for word in CALLS[name][0] if "." in word or word == "model"]


# ---- an output is no input --------------------------------------------------------------------------------


def spellings(path):
    """The same file under other names."""
    yield path
    yield Path("..", "here", path)
    yield path.resolve()
    Path("soft").symlink_to(path)
    yield Path("soft")
    if path.is_file():
        os.link(path, "hard")
        yield Path("hard")
    Path("..", "door").symlink_to(".", target_is_directory=True)
    yield Path("..", "door", "here", path)


@pytest.mark.parametrize(("name", "option"), FILES)
def test_no_output_is_an_input(name, option, here):
    for path in inputs_of(name):
        path = Path(path, "config.json") if path == "model" else Path(path)
        for k, spelled in enumerate(spellings(path)):
            before = contents(here)
            sentence = one_error(call(name, option, spelled))
            assert f"{option} ({spelled}) is " in sentence and "would destroy it" in sentence, (k, sentence)
            assert contents(here) == before
        for made in ("soft", "hard", "../door"):
            Path(made).unlink(missing_ok=True)


def test_a_page_is_no_input(here):
    Path("pages").mkdir()
    os.link("texts.txt", "pages/data-recovery.json")
    sentence = one_error(call("reproduce", "--out", "pages"))
    assert "--out data-recovery.json (pages/data-recovery.json) is --texts (texts.txt)" in sentence
    assert "lies below a file" in one_error(call("reproduce", "--out", "texts.txt/pages"))
    assert "is a file; name a folder" in one_error(call("reproduce", "--out", "texts.txt"))


def test_nothing_is_written_into_a_folder_that_is_read(here):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    Path("parts", "deep").mkdir(parents=True)
    pq.write_table(pa.table({"g": [0, 0], "x": [0.0, 1.0], "y": [0.4, 0.6]}), "parts/deep/a.parquet")
    Path("elsewhere").mkdir()
    Path("parts", "linked").symlink_to(Path("elsewhere").resolve(), target_is_directory=True)
    before = contents(here)
    for target in ("parts/b.parquet", "parts/deep/a.parquet", "parts/deep/new", "elsewhere/new"):
        sentence = one_error(run("fit", "softmax", "parts", *CALLS["fit softmax"][1], "--save", target))
        assert f"--save ({target}) is DATA (parts), or lies in it" in sentence
    assert contents(here) == before


def test_streams_are_files_too(here):
    """What the shell has opened is compared as well."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}

    def shell(command):
        return subprocess.run(
            ["bash", "-c", f"{sys.executable} -m attnfit {command}"],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip

    before = contents(here)
    for command, told in (
        ("predict m.safetensors - --group g --output d.csv < d.csv", "--output (d.csv) is DATA (-)"),
        ("predict m.safetensors d.csv --group g >> d.csv", "--output (-) is DATA (d.csv)"),
    ):
        done = shell(command)
        assert done.returncode == 2, done
        assert told in done.stderr
        assert contents(here) == before
    done = shell("predict m.safetensors signatures.csv --output r.json > r.json")
    assert done.returncode == 2 and "standard output are the same file" in done.stderr


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("predict", "reproduce")])
def test_no_two_outputs_are_one(name, here):
    options = [option for command, option in FILES if command == name]
    before = contents(here)
    for k, one in enumerate(options):
        for other in options[:k]:
            for first, second in (("new.npy", "./new.npy"), ("new", "../here/new")):
                sentence = one_error(call(name, one, first, other, second))
                assert f"{one} ({Path(first)})" in sentence and f"{other} ({Path(second)})" in sentence
                assert "are the same file" in sentence
    assert contents(here) == before


# ---- an output is whole or not there ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "option"), FILES)
def test_places_where_nothing_can_be(name, option, here):
    before = contents(here)
    assert "there is no folder no" in one_error(call(name, option, "no/out.csv"))
    assert "d.csv is a file" in one_error(call(name, option, "d.csv/out.csv"))
    assert "is a folder" in one_error(call(name, option, "."))
    assert contents(here) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_protected_is_refused_before_any_work(kind, here, monkeypatch):
    """Root may write anywhere, so the answer of the system is given here."""
    Path("kept.json").write_text("before")
    forbidden = here / "kept.json" if kind == "file" else here
    real = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda p, mode: real(p, mode) and not (mode & os.W_OK and Path(p).resolve() == forbidden),
    )
    sentence = one_error(call("fit softmax", "--json", "kept.json"))
    assert ("is write-protected" if kind == "file" else "nothing may be written into the folder") in sentence
    assert Path("kept.json").read_text() == "before"


def test_json_knows_no_nan():
    from attnfit.cli.output import plain

    told = {"a": np.float64("nan"), "b": [np.inf, np.int64(3), None, True], "c": np.array([0.5, -np.inf])}
    assert json.dumps(plain(told), allow_nan=False) == \
        '{"a": null, "b": [null, 3, null, true], "c": [0.5, null]}'  # fmt: skip


def name_of(name, option):
    return NAMES.get((name, option), ENDINGS.get(option, "out"))


@pytest.fixture
def full_disk(monkeypatch):
    """The kernel refuses what is longer than a few bytes, as a full disk does."""
    from attnfit import writing

    real = writing.replace_file

    def small(path, data):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        try:
            real(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(writing, "replace_file", small)


@pytest.mark.parametrize(("name", "option"), QUICK)
def test_a_full_disk_leaves_what_was_there(name, option, here, full_disk):
    target = Path(name_of(name, option))
    target.write_text("before")
    before = contents(here)
    sentence = one_error(call(name, option, target))
    assert sentence == f"Error: {target}: file too large"
    assert contents(here) == before


@pytest.mark.parametrize(("name", "option"), QUICK)
def test_what_is_written_is_whole(name, option, here):
    target = Path(name_of(name, option))
    target.write_text("before")
    target.chmod(0o600)
    before = contents(here)
    result = call(name, option, target)
    assert result.exit_code in (0, 1, 3), result.output
    assert target.stat().st_size > 6 and target.stat().st_mode & 0o777 == 0o600
    assert set(contents(here)) == set(before)


def test_a_full_disk_in_earnest(here):
    """The limit holds for the whole process, as a disk does."""
    script = (
        "import resource, sys; from attnfit.cli import main; import attnfit.estimators;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40)); sys.argv[0] = 'attnfit'; main()"
    )
    Path("out.csv").write_text("before")
    before = contents(here)
    done = subprocess.run(
        [sys.executable, "-c", script, "predict", "m.safetensors", "d.csv", "--group=g", "--output=out.csv"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done
    assert done.stderr == "Error: out.csv: file too large\n"
    assert contents(here) == before


@pytest.mark.parametrize(
    ("name", "option"), [("predict", "--output"), ("fit softmax", "--json"), ("fit mixture", "--save")]
)
def test_kill_9_leaves_what_was_there(name, option, here):
    target = Path(name_of(name, option))
    target.write_text("before")
    before = contents(here)
    inputs, options = CALLS[name]
    words = [*name.split(), *inputs, *options, option, str(target)]
    # Half of the file is on its way to the disk by then.
    script = (
        "import os, signal, sys; from attnfit.cli import main;"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL); sys.argv[0] = 'attnfit'; main()"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done
    assert {p: c for p, c in contents(here).items() if p in before} == before
    assert call(name, option, target).exit_code == 0
    # What the dead process left is gone with the next run.
    assert set(contents(here)) == set(before) and target.read_text() != "before"


@pytest.mark.parametrize("name", ["predict", "fit softmax"])
def test_names_as_long_as_they_can_be(name, here):
    option = {"predict": "--output", "fit softmax": "--json"}[name]
    target = Path("n" * 251 + ".csv" if name == "predict" else "n" * 255)
    assert call(name, option, target).exit_code == 0
    assert target.stat().st_size > 6
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["report.xlsx", "d.csv.zst", "d.ods", "d.json", "d.npy"])
def test_text_is_not_written_under_the_name_of_another_format(name, here):
    assert "would be CSV by another name" in one_error(call("predict", "--output", name))


def test_pipes_of_the_shell_are_read_and_written(here):
    """What stands behind a name such as /dev/fd/63 can be read only once, and cannot be replaced."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}

    def shell(command):
        command = command.replace("attnfit", f"{sys.executable} -m attnfit")
        return subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env=environment, check=False
        )

    before = contents(here)
    options = "--target y --group g --features x"
    done = shell(f"attnfit fit softmax <(cat d.csv) {options} --json /dev/stderr | cat")
    assert json.loads(done.stderr)["converged"], done
    done = shell(f"cat d.csv | attnfit fit softmax /dev/stdin {options} --json >(cat > out.json)")
    assert done.returncode == 0 and "2 groups" in done.stdout, done
    done = shell(f"attnfit fit softmax d.csv {options} --json /dev/stdout --save /dev/stdout | cat")
    assert "are the same file" in " ".join(done.stderr.split())
    done = shell("attnfit fit attention <(cat q.npy) k.npy maps.npy")
    assert done.returncode == 0, done
    Path("out.json").unlink(missing_ok=True)
    assert contents(here) == before


def test_links_stay_and_devices_are_written_to(here):
    Path("real.json").write_text("before")
    Path("link.json").symlink_to("real.json")
    assert call("fit softmax", "--json", "link.json").exit_code == 0
    assert Path("link.json").is_symlink() and json.loads(Path("real.json").read_text())["converged"]
    assert call("fit softmax", "--json", "/dev/null").exit_code == 0
    assert Path("/dev/null").is_char_device()


def test_a_checkpoint_of_an_audit_is_whole(tmp_path, full_disk):
    from attnfit.audit.checkpoint import Checkpoint

    with pytest.raises(OSError, match="File too large"):
        Checkpoint(tmp_path / "cells.jsonl", {"model": "tiny", "texts": ["a"]})
    assert list(tmp_path.iterdir()) == []


def test_write_names_what_could_not_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError) as caught:
        write(tmp_path / "file" / "below", "text")
    assert caught.value.filename == str(tmp_path / "file" / "below")
