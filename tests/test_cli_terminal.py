"""What the commands look like: wide and narrow terminals, pipes, progress, missing packages."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console
from test_cli import CARS, run, write_data

from attnfit import datasets
from attnfit.cli.progress import FitProgress


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("cars") / "cars.csv", datasets.load_car_shares())


@pytest.mark.parametrize("width", ["200", "100", "80", "50", "20"])
def test_no_number_is_cropped(cars, width):
    result = run("fit", "softmax", cars, *CARS, width=width)
    assert result.exit_code == 0
    assert "-8.14821" in result.stdout and "…" not in result.stdout


def test_narrow_terminals_lose_columns_not_digits(cars):
    printed = {
        width: run("fit", "softmax", cars, *CARS, width=width).stdout.splitlines() for width in ("80", "40")
    }
    heads = {width: next(line for line in lines if "std." in line) for width, lines in printed.items()}
    assert heads["80"].split() == ["coefficient", "std.", "error", "t", "p", "95", "%", "from", "to"]
    assert heads["40"].split() == ["coefficient", "std.", "error", "p"]


@pytest.mark.parametrize("width", ["200", "90", "80", "50", "30"])
def test_demo_is_never_cropped(width):
    result = run("demo", width=width)
    assert result.exit_code == 0 and "…" not in result.stdout
    assert "0.003538921" in result.stdout


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
@pytest.mark.parametrize("command", ["demo", "fit", "predict", "--help"])
def test_pipes_get_plain_text(cars, tmp_path, command, environment):
    model = tmp_path / "m.safetensors"
    run("fit", "softmax", cars, *CARS, "--save", model)
    arguments = {
        "demo": ["demo"],
        "fit": ["fit", "softmax", str(cars), *CARS],
        "predict": ["predict", str(model), str(cars), "--group", "market"],
        "--help": ["--help"],
    }[command]
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    done = subprocess.run(
        [sys.executable, "-m", "attnfit.cli", *arguments],
        capture_output=True,
        env={**inherited, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr and b"\r" not in done.stdout + done.stderr
    assert done.stderr == b""


def test_bench_as_a_real_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "attnfit.cli", "bench", "dense"],
        capture_output=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith(b"Error: There is no benchmarks/ folder here")


def test_progress_bar_shows_on_terminals_after_a_delay(monkeypatch):
    from attnfit import minimize, problems

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("attnfit.cli.progress.stderr", lambda: console)
    data = datasets.load_car_shares()
    problem = problems.Softmax(data.A, data.b, data.groups)
    with FitProgress(1e-8, delay=60.0) as progress:
        minimize(problem, callback=progress.record)
    assert screen.getvalue() == ""
    with FitProgress(1e-8, delay=0.0) as progress:
        progress._timer.join()
        minimize(problem, callback=progress.record)
    assert "relative gradient" in screen.getvalue() and "reads of the data" in screen.getvalue()


def test_progress_follows_an_estimator(cars, monkeypatch):
    pytest.importorskip("sklearn.callback")
    seen = []
    monkeypatch.setattr(FitProgress, "record", lambda self, record: seen.append(record.gradient_norm))
    assert run("fit", "softmax", cars, *CARS).exit_code == 0
    assert len(seen) > 3 and min(seen) < 1e-8


def test_import_attnfit_leaves_the_terminal_packages_alone():
    code = "import sys, attnfit; print([m for m in ('typer', 'rich', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_extra_is_one_sentence(tmp_path):
    code = "import sys; sys.modules['typer'] = None; from attnfit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        'attnfit: the command line needs typer and rich; type: python -m pip install "attnfit[cli]"\n'
    )
