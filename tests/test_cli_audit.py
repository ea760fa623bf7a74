"""``attnfit audit`` and ``attnfit reproduce`` on the packaged model, good and bad."""

import json
import os
import subprocess
import sys

import pytest
from audit_models import audit_cache, tiny  # noqa: F401
from test_cli import messages, run

from attnfit.cli.errors import InputError

pytest.importorskip("torch")
pytest.importorskip("transformers")

SMALL = ("--access", "hidden:1", "--defences", "none,int8", "--budget", 60)
FAST = ("--access", "hidden:1,topk:5", "--defences", "none,int8,noise:4.0", "--budget", 600)


@pytest.fixture
def texts(tiny, tmp_path):  # noqa: F811
    path = tmp_path / "texts.txt"
    path.write_text(f"{tiny.private_texts[0]}\n\n{tiny.private_texts[1]}\n")
    return path


def refused(result):
    """The only sentence on stderr, which came with exit code 2."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (sentence,) = [line for line in messages(result) if not line.startswith("Note: ")]
    return sentence


def test_audit_writes_everything(texts, tmp_path):
    page, told = tmp_path / "out.html", tmp_path / "out.json"
    result = run("audit", "tiny", "--texts", texts, *FAST, "--report", page, "--json", told)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tiny: up to 100 % of tokens recovered without a defence (hidden:1)")
    assert ["access", "none", "int8", "noise:4.0"] in [line.split() for line in lines]
    content = json.loads(told.read_text())
    assert content["settings"]["n_texts"] == 2
    assert {pair["access"] for pair in content["pairs"]} == {"hidden:1", "topk:5"}
    assert "attnfit audit tiny --access hidden:1,topk:5" in content["command"]
    assert "<h1>What tiny gives away</h1>" in page.read_text()


def test_two_tokens_are_read_from_their_last_state(tiny, tmp_path, monkeypatch):  # noqa: F811
    from attnfit.audit.last import LastRowSearch

    # Noise, which is no text of any length, would be searched for at twelve lengths.
    monkeypatch.setitem(LastRowSearch.__init__.__kwdefaults__, "longest", 2)
    path, told = tmp_path / "two.txt", tmp_path / "out.json"
    tokens = [tiny.tokenise(text) for text in tiny.private_texts[:2]]
    path.write_text("".join(f"{tiny.detokenise(ids[:2])}\n" for ids in tokens))
    asked = ("audit", "tiny", "--texts", path, "--access", "last:1", "--defences", "none", "--budget", 600)
    result = run(*asked, "--json", told, "--reveal")
    assert result.exit_code == 0, result.output
    verdict = (
        "tiny: up to 100 % of tokens recovered without a defence (last:1), 4 of 4 tokens, 2 of 2 texts "
        "whole, 95 % at least 51 %"
    )
    assert " ".join(result.stdout.split()).startswith(verdict)
    content = json.loads(told.read_text())
    assert content["verdict"] == verdict
    (pair,) = content["pairs"]
    assert (pair["access"], pair["defence"], pair["tested"], pair["n_open"]) == ("last:1", "none", True, 0)
    assert (pair["tokens_right"], pair["tokens"], pair["verified"], pair["false_claims"]) == (4, 4, 2, 0)
    cells = [cell for cell in content["cells"] if not cell["control"]]
    assert [cell["tokens"] for cell in cells] == [ids[:2] for ids in tokens]
    (control,) = content["controls"]
    assert (control["noise"], control["false_claims"]) == (2, 0)
    # A text that is longer than was looked for is open, which is no protection.
    path.write_text(f"{tiny.detokenise(tokens[0][:3])}\n")
    longer = run(*asked, "--fail-above", 0.5)
    assert longer.exit_code == 3, longer.output
    assert "Not tested to the end, which is no sign of protection: last:1 with none" in longer.stderr


def test_the_gate_sets_the_exit_code(texts):
    open_gate = run("audit", "tiny", "--texts", texts, *SMALL, "--fail-above", 1)
    assert open_gate.exit_code == 0, open_gate.output
    assert "No access with a defence asked for gives away more than 100 %" in open_gate.stderr
    closed = run("audit", "tiny", "--texts", texts, *SMALL, "--fail-above", 0.05)
    assert closed.exit_code == 1
    assert "Error: Above 5 % of tokens: hidden:1 with none 100 %" in closed.stderr


def test_checkpoints_are_resumed(texts, tmp_path):
    kept = ("--checkpoint", tmp_path / "cells.jsonl")
    first = run("audit", "tiny", "--texts", texts, *SMALL, *kept)
    assert first.exit_code == 0, first.output
    size = (tmp_path / "cells.jsonl").stat().st_size
    again = run("audit", "tiny", "--texts", texts, *SMALL, *kept)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "cells.jsonl").stat().st_size == size
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    other = run("audit", "tiny", "--texts", texts, "--access", "hidden:2", *kept)
    assert "is of another audit: access, defences differ" in refused(other)


def test_what_was_cut_can_be_gone_on_with(texts, tmp_path, monkeypatch):
    from attnfit.audit import running

    clock = iter(range(0, 1_000_000, 100))
    with monkeypatch.context() as patch:
        patch.setattr(running, "perf_counter", lambda: float(next(clock)))
        short = run("audit", "tiny", "--texts", texts, *SMALL, "--checkpoint", tmp_path / "cells.jsonl")
    assert short.exit_code == 3, short.output
    assert short.stdout.startswith("Not tested: ")
    assert "cells not run: budget" in short.stderr
    assert "The same command with a larger --budget goes on from" in short.stderr
    whole = run("audit", "tiny", "--texts", texts, *SMALL, "--checkpoint", tmp_path / "cells.jsonl")
    assert whole.exit_code == 0, whole.output
    assert "larger --budget" not in whole.stderr


def test_files_hold_texts_only_on_request(texts, tmp_path):
    secret = texts.read_text().splitlines()[0]
    told = tmp_path / "out.json"
    for option, there in (((), False), (("--redact",), False), (("--reveal",), True)):
        result = run("audit", "tiny", "--texts", texts, *SMALL, "--json", told, *option)
        assert result.exit_code == 0, result.output
        assert (secret in told.read_text()) == there
        assert ("--reveal" in json.loads(told.read_text())["command"]) == there


def test_lines_of_texts_end_as_an_editor_shows_them(tmp_path):
    """Other separators of lines are characters of a text, and of a JSON string."""
    from attnfit.cli.audit import read_lists, read_texts

    path = tmp_path / "t.txt"
    path.write_bytes("one\u2028two\x0bthree\x85four\r\n\nlast\rend".encode())
    assert read_texts(path) == {1: "one\u2028two\x0bthree\x85four", 3: "last", 4: "end"}
    path.write_text('[{"role": "user", "content": "a\u2028b"}]\n')
    assert read_lists(path) == {1: [{"role": "user", "content": "a\u2028b"}]}
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read_lists(path)


CODES = """
import os, signal, sys
from attnfit.audit import cells
from attnfit.cli import main

plain = cells.Attack.run


def run(self, key, seconds):
    if os.environ["WHAT"] == "crash" and key.defence == "int8":
        raise ZeroDivisionError("injected")
    if os.environ["WHAT"] == "stop" and key.defence == "int8":
        os.kill(os.getpid(), signal.SIGINT)
    return plain(self, key, seconds)


cells.Attack.run = run
sys.argv = ["attnfit", "audit", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    ("code", "arguments", "told"),
    [
        # A leak that is seen outweighs what was not tested.
        (1, ["--fail-above", 0.5, "--access", "hidden:1,topk:5", "--defences", "none,drop0"], "Above 50 %"),
        (3, ["--access", "topk:5", "--defences", "drop0", "--fail-above", 1], "topk:5 with drop0"),
    ],
)
def test_a_leak_and_what_was_not_tested(texts, code, arguments, told):
    result = run("audit", "tiny", "--texts", texts, "--budget", 60, *arguments)
    assert result.exit_code == code, result.output
    assert told in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("code", "what", "told"),
    [(70, "crash", "ZeroDivisionError: injected"), (130, "stop", "Stopped before the end")],
)
def test_exit_codes_of_a_process(texts, tmp_path, code, what, told):
    usual = [
        "tiny",
        "--texts",
        str(texts),
        "--access",
        "hidden:1",
        "--defences",
        "none,int8",
        "--budget",
        "60",
    ]
    done = subprocess.run(
        [sys.executable, "-c", CODES, *usual, "--fail-above", "0"],
        env=os.environ | {"WHAT": what, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert told in " ".join(done.stderr.split())
    kept = list(tmp_path.glob("attnfit-*.txt"))
    assert len(kept) == (code == 70)
    if kept:
        assert "in run" in kept[0].read_text() and "injected" in kept[0].read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "MODEL is missing: tiny, smollm2, minilm"),
        (["nowhere"], "nowhere does not exist; give a path or one of tiny, smollm2, minilm"),
        (["tiny", "--texts", "nowhere.txt"], "There is no file nowhere.txt; check the path"),
        (["tiny", "--access", "hidden:15"], "layer must be 1 to 5 for 'tiny', not 15"),
        (["tiny", "--access", "weights"], "topk:COUNT, masked"),
        (["tiny", "--defences", "rot13"], "defence 'rot13' is not known"),
        (["tiny", "--budget", "0"], "--budget must be a positive number of seconds, not 0"),
        (["tiny", "--report", "no/where/out.html"], "--report: there is no folder no/where; make it first"),
    ],
)
def test_bad_input(tiny, arguments, expected):  # noqa: F811
    assert expected in refused(run("audit", *arguments))


def test_bad_texts_are_named_by_their_lines(tiny, tmp_path):  # noqa: F811
    path = tmp_path / "texts.txt"
    path.write_text("A train.\n\n" + 300 * "a" + "\n")
    partly = run("audit", "tiny", "--texts", path, "--access", "hidden:1", "--defences", "none")
    assert partly.exit_code == 3, partly.output
    assert "line 3: it has 150 tokens; 'tiny' takes 128: shorten it" in " ".join(partly.stdout.split())
    assert "100 % *" in partly.stdout
    path.write_text("\n" + 300 * "a" + "\n")
    assert "line 2: it has 150 tokens" in refused(run("audit", "tiny", "--texts", path))
    path.write_text("\n \n")
    assert "holds no text: one text a line" in refused(run("audit", "tiny", "--texts", path))
    path.write_bytes(b"caf\xe9\n")
    assert "is not text in UTF-8 (byte 3)" in refused(run("audit", "tiny", "--texts", path))


def test_self_test_names_every_access(tiny):  # noqa: F811
    result = run("audit", "--self-test")
    for name in ("hidden:1", "attention:0", "logits", "topk:5", "masked", "states of another layer"):
        assert f"pass  {name}" in result.stdout, result.output
    assert result.exit_code == 0


# ---- reproduce ---------------------------------------------------------------------------------------------


def test_reproduce_data_recovery(tiny, tmp_path, monkeypatch):  # noqa: F811
    from attnfit.audit import reproduction

    monkeypatch.setattr(reproduction, "QUICK_STEPS", 30)
    monkeypatch.setattr(reproduction, "N_TEXTS", 2)
    monkeypatch.setattr(reproduction, "N_REPEATS", 4)
    result = run("reproduce", "data-recovery", "--quick", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "not held: share of runs that end with the hidden tokens: claimed 0.92" in result.stdout
    assert "recover_masked: 2 of 2 texts" in result.stdout
    told = json.loads((tmp_path / "out" / "data-recovery.json").read_text())
    assert told["recover_masked"]["right"] == 2
    assert len(told["figure_3"]["step"]) == len(told["figure_3"]["mean_loss"]) > 10
    assert [row["step"] for row in told["table_1"]][-1] == 30
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "data-recovery.json", "data-recovery.html", "data-recovery-loss.svg", "data-recovery-success.svg",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data-recovry"], "There is no paper 'data-recovry'; did you mean 'data-recovery'"),
        (["data-recovery", "--model", "nowhere"], "nowhere does not exist"),
        (["data-recovery", "--texts", "nowhere.txt"], "There is no file nowhere.txt"),
    ],
)
def test_reproduce_bad_input(tiny, arguments, expected):  # noqa: F811
    assert expected in refused(run("reproduce", *arguments))
