"""Pages of the papers: their numbers, and that one file is all there is to them."""

import json
import re

import numpy as np
import pytest

from attnfit.inversion import recover
from attnfit.reproduction import NAMES, Claim, Curve, Page, Table, reproduce
from attnfit.reproduction.layer_recovery import bias_rows, outcome, planted
from attnfit.reproduction.weight_shifting import run


@pytest.mark.parametrize("name", ["rescaled-hyperbolic", "tensor-trick", "two-layer"])
def test_quick_pages(name, tmp_path):
    pytest.importorskip("matplotlib")
    page = reproduce(name, quick=True)
    held = {claim.claimed[:30]: claim.held for claim in page.claims}
    assert True in held.values()
    assert not all(value is True for value in held.values())
    page.to_html(tmp_path / "page.html", f"attnfit reproduce {name}")
    page.to_json(tmp_path / "page.json")
    text = (tmp_path / "page.html").read_text()
    assert f"attnfit reproduce {name}" in text
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*', text)
    data = json.loads((tmp_path / "page.json").read_text())
    assert [claim["held"] for claim in data["claims"]] == [claim.held for claim in page.claims]


def test_numbers_are_stable_to_the_printed_digits(tmp_path):
    texts = []
    for k in range(2):
        reproduce("tensor-trick", quick=True).to_json(tmp_path / f"{k}.json")
        texts.append((tmp_path / f"{k}.json").read_text())
    assert texts[0] == texts[1]


def test_the_corrected_step_contracts_and_the_regulariser_erases():
    page = reproduce("rescaled-hyperbolic", quick=True)
    assert [claim.held for claim in page.claims[:2]] == [True, False]
    biases = next(part for part in page.parts if "row penalty" in part.title).rows
    assert [row[2] for row in biases] == sorted(row[2] for row in biases)
    assert biases[-1][2] > 0.9


def test_weight_shifting_is_wired_to_the_experiment(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("attnfit.reproduction.weight_shifting.QUICK_SHAPES", ((6, 3),))
    page = run(True)
    assert page.claims[0].held
    assert page.claims[1].held is False
    assert any(isinstance(part, Curve) for part in page.parts)


@pytest.mark.parametrize("setting", ["two outputs", "base, vocabulary of 1000"])
def test_layer_recovery(setting):
    error, zero, verdict = outcome(setting, 1.0, 0)
    assert error < 1e-6
    assert zero
    assert verdict == "recovered"


def test_known_halves_are_known():
    layer, X, vocabulary = planted("half known", 1.0, 3)
    assert len(layer.unknown) == 8
    assert vocabulary is None
    assert np.allclose(layer.output(X[:, layer.unknown]), layer.B)
    assert recover(layer, n_starts=1).identifiability.n_unknowns == 64


def test_the_theorems_regulariser_destroys_the_data():
    rows = bias_rows(1)
    assert rows[0][2] > 0.99
    assert rows[-1][2] < 1e-3


def test_what_is_written_is_escaped(tmp_path):
    page = Page("x", "A <b> & c", "s", [Claim("1 < 2", "yes", None)], [Table("t", ("h",), [(0.00001234,)])])
    page.to_html(tmp_path / "p.html", "c")
    text = (tmp_path / "p.html").read_text()
    assert "A &lt;b&gt; &amp; c" in text
    assert "1.23e-05" in text
    assert ">open<" in text


def test_unknown_papers_list_close_ones():
    with pytest.raises(ValueError, match="did you mean two-layer"):
        reproduce("twolayer")
    assert len(NAMES) == 6


def test_the_command_line_knows_every_page():
    pytest.importorskip("typer")
    from attnfit.cli.reproduce import NAMES as SHOWN

    assert SHOWN == NAMES


def test_a_page_from_the_shell(tmp_path):
    from typer.testing import CliRunner

    from attnfit.cli.app import app

    done = CliRunner().invoke(app, ["reproduce", "tensor-trick", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "held: claimed: the matrix problem is a softmax regression" in " ".join(done.output.split())
    assert (tmp_path / "tensor-trick.html").exists()
    assert json.loads((tmp_path / "tensor-trick.json").read_text())["id"] == "tensor-trick"
