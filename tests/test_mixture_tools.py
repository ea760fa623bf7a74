"""Mixtures and two layers from scikit-learn and from the command line."""

from __future__ import annotations

import csv
import json
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import typer
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from typer.testing import CliRunner

from attnfit.cli.mixture import fit_mixture
from attnfit.estimators import TwoLayerRegressor


@parametrize_with_checks(
    [TwoLayerRegressor(), TwoLayerRegressor("tanh", ridge=0.1), TwoLayerRegressor("softplus")]
)
def test_scikit_learn_conventions(estimator, check):
    # The checks fit arbitrary targets, whose best proportions may lie at infinity: a warning is the right
    # answer.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


def data(m=30, n=4, k=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.random((m, n))
    shares = rng.dirichlet(np.full(n, 0.5), size=k).T
    return X, X @ shares + 0.01 * rng.standard_normal((m, k)), shares


def test_mixture_estimator():
    X, y, shares = data()
    model = TwoLayerRegressor().fit(X, y)
    assert model.is_mixture_
    np.testing.assert_allclose(model.proportions_, shares, atol=0.03)
    np.testing.assert_allclose(model.predict(X), X @ model.proportions_)
    assert model.score(X, y) > 0.98
    assert (model.duality_gap_ <= 1e-9 * 0.5 * np.sum(y**2, axis=0)).all()
    assert model.certificate_.valid
    assert model.coef_.shape == (4, 3)
    one = TwoLayerRegressor().fit(X, y[:, 0])
    assert one.proportions_.shape == (4,)
    assert one.predict(X).shape == (30,)
    for table in (sparse.csr_matrix(X), pd.DataFrame(X, columns=list("abcd"))):
        other = TwoLayerRegressor().fit(table, y)
        np.testing.assert_allclose(other.predict(table), model.predict(X), atol=1e-9)
    assert other.feature_names_in_.tolist() == list("abcd")


def test_two_layer_estimator():
    X, _, _ = data()
    rng = np.random.default_rng(1)
    features = rng.standard_normal((4, 2))
    logits = features @ np.array([0.5, -1.0])
    exact = np.exp(logits) / np.exp(logits).sum()
    y = np.tanh(X @ exact)
    model = TwoLayerRegressor("tanh", logit_features=features).fit(X, y)
    assert not model.is_mixture_
    np.testing.assert_allclose(model.coef_, [0.5, -1.0], rtol=1e-5)
    np.testing.assert_allclose(model.proportions_, exact, rtol=1e-5)
    np.testing.assert_allclose(model.predict(X), y, rtol=1e-6)
    assert model.certificate_.valid
    with pytest.raises(AttributeError, match="mixtures only"):
        _ = model.duality_gap_
    weighted = TwoLayerRegressor("tanh", logit_features=features).fit(X, y, sample_weight=np.arange(30.0))
    np.testing.assert_allclose(weighted.coef_, [0.5, -1.0], rtol=1e-5)
    with pytest.raises(ValueError, match="sample_weight is negative at index 0"):
        model.fit(X, y, sample_weight=np.full(30, -1.0))
    with pytest.raises(ValueError, match="A1 has 3 rows but A2 has 4 columns"):
        TwoLayerRegressor(logit_features=np.ones((3, 2))).fit(X, y)


def test_pickle_leaves_the_data_behind():
    X, y, _ = data(m=5000)
    model = TwoLayerRegressor().fit(X, y)
    blind = pickle.loads(pickle.dumps(model))
    assert len(pickle.dumps(model)) < X.nbytes / 2
    np.testing.assert_array_equal(blind.predict(X), model.predict(X))
    with pytest.raises(AttributeError, match="training data"):
        _ = blind.certificate_
    with pytest.raises(NotFittedError):
        _ = TwoLayerRegressor().certificate_


@pytest.fixture
def run(tmp_path):
    """Run the command on files named by their suffix; text, arrays and tables are written first."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(fit_mixture)

    def call(one, other, *options):
        paths = []
        for name, content in (("one", one), ("other", other)):
            suffix = {str: "csv", np.ndarray: "npy"}.get(type(content), "parquet")
            path = tmp_path / f"{name}.{suffix}"
            if isinstance(content, str):
                path.write_text(content)
            elif isinstance(content, np.ndarray):
                np.save(path, content)
            else:
                content.to_parquet(path)
            paths.append(str(path))
        return CliRunner().invoke(app, [*paths, *map(str, options)], env={"COLUMNS": "200"})

    return call


def as_csv(values, names, bands=False):
    frame = pd.DataFrame(values, columns=names)
    if bands:
        frame.insert(0, "band", [f"b{k}" for k in range(len(frame))])
    return frame.to_csv(index=False)


def test_command_line(run, tmp_path):
    X, y, _ = data(k=25)
    model = TwoLayerRegressor().fit(X, y)
    names = ["quartz", "clay", "water", "shade"]
    pixels = [f"p{k}" for k in range(25)]
    save, report = tmp_path / "out.csv", tmp_path / "out.json"
    done = run(as_csv(X, names), as_csv(y, pixels), "--save", save, "--json", report)
    assert done.exit_code == 0
    for part in ("quartz", "p19", "25 of 25 certified optimal to 1e-9", "30 bands", "4 signatures", "5 more"):
        assert part in done.output
    assert "p20" not in done.output
    with save.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["mixture"] for row in rows] == pixels
    saved = np.array([[float(row[name]) for name in names] for row in rows])
    np.testing.assert_allclose(saved.T, model.proportions_, atol=1e-12)
    facts = json.loads(report.read_text())
    assert facts["certificate"]["valid"]
    assert facts["signatures"] == names
    assert len(facts["mixtures"]) == 25
    norms = [entry["residual_norm"] for entry in facts["mixtures"]]
    np.testing.assert_allclose(norms, np.linalg.norm(model.predict(X) - y, axis=0))


def test_formats_agree(run):
    X, y, _ = data()
    names, pixels = list("abcd"), ["x", "y", "z"]
    plain = run(as_csv(X, names), as_csv(y, pixels)).output
    frames = run(pd.DataFrame(X, columns=names), pd.DataFrame(y, columns=pixels)).output
    named = run(as_csv(X, names, bands=True), as_csv(y, pixels, bands=True), "--band", "band").output
    tables = [text[: text.index("right-hand")] for text in (plain, frames, named)]
    assert tables[0] == tables[1] == tables[2]
    assert run(X, y).exit_code == 0
    assert run(X, y[:, 0]).exit_code == 0


GOOD = "a,b\n1,2\n3,4\n5,7\n"
MISTAKES = [
    (GOOD, "x\n1\n2\n", "one.csv has 3 bands (rows) but"),
    ("a,b\n1,2\n3,\n5,7\n", "x\n1\n2\n3\n", "one.csv: Column 'b' has no value in line 3"),
    (GOOD, "x\n1\nnan\n3\n", "other.csv: Column 'x' has no value in line 3"),
    ("name,b\nu,2\nv,4\nw,7\n", "x\n1\n2\n3\n", "if it names the bands, add --band name"),
    (GOOD, "", "other.csv is empty"),
    (GOOD, np.array([[1.0], [np.nan], [0.0]]), "other.npy has nan in row 2, column 1"),
    (GOOD, np.array(["x", "y"]), "needs real numbers"),
]


@pytest.mark.parametrize(("one", "other", "sentence"), MISTAKES)
def test_mistakes_end_in_one_sentence(run, one, other, sentence):
    done = run(one, other)
    assert done.exit_code == 2
    assert sentence in done.output
    assert done.output.count("Error:") == 1
    assert "Traceback" not in done.output


def test_bands_are_no_spectra(run):
    """A column that both files share names the bands, and one without a name is no signature."""
    told = run("band,a,b\n1,1,2\n2,3,4\n4,5,7\n", "band,x\n1,1\n2,2\n4,3\n").output
    assert "Column 'band' is the same in" in told and "add --band band" in told
    assert "A column of " in run(",a,b\n0,1,2\n1,3,4\n2,5,7\n", "x\n1\n2\n3\n").output
    noted = run("n,a,b\n1,1,2\n2,3,4\n3,5,7\n", "x\n1\n2\n3\n")
    assert noted.exit_code == 0 and "holds row numbers; it is taken for a spectrum" in noted.output
    done = run(GOOD, "x\n1\nnan\n3\n").output
    assert "--missing" not in done


def test_mistakes_with_bands(run, tmp_path):
    one = "band,a,b\nu,1,2\nv,3,4\n"
    assert "The bands differ: 'v' in line 3" in run(one, "band,x\nu,1\nw,2\n", "--band", "band").output
    assert "no column 'bnd'" in run(one, one, "--band", "bnd").output
    assert "no column besides" in run(one, "band\nu\nv\n", "--band", "band").output
    assert "no column names" in run(one, np.ones((2, 1)), "--band", "band").output
    assert "there is no folder" in run(GOOD, GOOD, "--save", tmp_path / "no" / "out.csv").output
    assert "--save writes CSV" in run(GOOD, GOOD, "--save", tmp_path / "out.parquet").output
