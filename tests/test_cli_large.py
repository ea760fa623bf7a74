"""``attnfit fit`` of files that are read in pieces, on workers, or with a checkpoint."""

import json

import numpy as np
import pandas as pd
import pytest
from test_cli import one_error, run

from attnfit import datasets, estimators


@pytest.fixture(scope="module")
def travel(tmp_path_factory):
    data = datasets.load_travel_mode()
    frame = pd.DataFrame(data.A, columns=data.feature_names)
    frame["traveller"], frame["choice"] = data.groups, data.b
    folder = tmp_path_factory.mktemp("travel")
    frame.to_parquet(folder / "travel.parquet", row_group_size=101)
    frame.to_csv(folder / "travel.csv", index=False)
    return folder


ROLES = ["--target", "choice", "--group", "traveller"]


def coefficients(path):
    return {row["name"]: row["coefficient"] for row in json.loads(path.read_text())["coefficients"]}


@pytest.mark.parametrize("file", ["travel.parquet", "travel.csv"])
@pytest.mark.parametrize("options", [["--memory-limit", "4GB"], ["--checkpoint", "fit.ckpt"]])
def test_the_same_coefficients(file, options, travel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = run("fit", "softmax", travel / "travel.csv", *ROLES, "--json", "plain.json")
    assert plain.exit_code == 0, plain.output
    large = run(
        "fit", "softmax", travel / file, *ROLES, *options, "--json", "large.json", "--save", "m.safetensors"
    )
    assert large.exit_code == 0, large.output
    expected, found = (coefficients(tmp_path / name) for name in ("plain.json", "large.json"))
    assert found == pytest.approx(expected, rel=1e-6)
    model = estimators.load(tmp_path / "m.safetensors")
    assert model.coef_ == pytest.approx(list(expected.values()), rel=1e-6)
    assert np.isfinite(model.standard_errors_).all()


def test_a_checkpoint_is_taken_up(travel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "softmax", travel / "travel.parquet", *ROLES, "--checkpoint", "fit.ckpt"]
    assert run(*command).exit_code == 0
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert "resumed from" in again.output.replace("\n", " ")
    other = run(*command[:-2], "--loss", "kl", "--checkpoint", "fit.ckpt")
    assert "another" in one_error(other)
    assert "--afresh" in one_error(other)
    assert run(*command[:-2], "--loss", "kl", "--checkpoint", "fit.ckpt", "--afresh").exit_code == 0


def test_a_cluster(travel, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    from distributed import LocalCluster

    monkeypatch.chdir(tmp_path)
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0", protocol="tcp") as cluster:
        address = cluster.scheduler_address
        for file in ("travel.parquet", "travel.csv"):
            done = run("fit", "softmax", travel / file, *ROLES, "--dask", address, "--json", "out.json")
            assert done.exit_code == 0, done.output
            assert "certified within" in done.output
    plain = run("fit", "softmax", travel / "travel.csv", *ROLES, "--json", "plain.json")
    assert plain.exit_code == 0
    expected, found = (coefficients(tmp_path / name) for name in ("plain.json", "out.json"))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory-limit", "much"], "--memory-limit must be a size"),
        (["--memory-limit", "1MB"], "--memory-limit is 1 MB"),
        (["--memory-limit", "1GB", "--outside-good"], "--outside-good needs the whole table"),
        (["--memory-limit", "1GB", "--missing", "skip"], "--missing must be drop or error, not 'skip'"),
        (["--dask", "tcp://127.0.0.1:1"], "There is no Dask scheduler at tcp://127.0.0.1:1"),
        (["--memory-limit", "1GB", "--features", "nonsense"], "has no column 'nonsense'"),
    ],
)
def test_what_cannot_be_is_said(options, message, travel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in one_error(run("fit", "softmax", travel / "travel.parquet", *ROLES, *options))


def test_weights_without_groups_repeat_rows(travel):
    done = run(
        "fit", "softmax", travel / "travel.parquet", "--target", "choice", "--weight", "traveller",
        "--memory-limit", "1GB",
    )  # fmt: skip
    assert (
        "--weight repeats rows where there are no groups, which needs the whole table in memory; name --group"
        in one_error(done)
    )
