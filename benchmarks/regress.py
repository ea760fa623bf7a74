"""Ten small benchmarks against an earlier version: ``make bench-check``, or
``python -m benchmarks.regress v0.1.0``.

Both versions take turns, each run in a process of its own that first does the work once; processor time is
compared, with whatever else goes on at the same time in both. Reads of the data are compared too: they are
the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np

from benchmarks.report import table

ROOT = Path(__file__).resolve().parents[1]
# More than this share of time or reads above the earlier version fails.
ALLOWED = 0.2
# Runs that differ by less than this, in seconds, are the same.
NOISE = 0.005
ROUNDS, REPEATS = 3, 3
# Seconds of a repeat of short work, and runs in it.
LONG_ENOUGH, MOST_RUNS = 0.5, 50


def softmax(n: int = 200_000, d: int = 16) -> Any:
    """One group, squared loss."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((n, d))
    f = np.exp(A @ rng.standard_normal(d) * 0.3)
    b = f / f.sum() * np.exp(0.1 * rng.standard_normal(n))
    return _minimised("Softmax", A, b)


def choices(n_groups: int = 40_000, size: int = 5, d: int = 8) -> Any:
    """Cross entropy in many groups."""
    rng = np.random.default_rng(1)
    A, groups = rng.standard_normal((n_groups * size, d)), np.repeat(np.arange(n_groups), size)
    z = (A @ rng.standard_normal(d) + rng.gumbel(size=len(A))).reshape(n_groups, size)
    b = (z == z.max(axis=1, keepdims=True)).astype(float).ravel()
    return _minimised("Softmax", A, b, groups, loss="cross_entropy")


def exponential(n: int = 100_000, d: int = 64) -> Any:
    """Positive outcomes."""
    rng = np.random.default_rng(2)
    A = rng.standard_normal((n, d)) / np.sqrt(d)
    A[:, 0] = 1.0
    return _minimised("Exponential", A, np.exp(A @ rng.standard_normal(d)) * rng.gamma(5.0, 0.2, n))


def rescaled(n: int = 50_000, d: int = 8) -> Any:
    """Rescaled hyperbolic regression."""
    rng = np.random.default_rng(3)
    A = rng.standard_normal((n, d)) * 0.3
    u = np.cosh(A @ rng.standard_normal(d) + 0.5)
    return _minimised("Rescaled", A, u / u.sum() * np.exp(0.05 * rng.standard_normal(n)), "cosh")


def flows(n_places: int = 150) -> Any:
    """Sparse dummies of two sides, one group an origin."""
    from scipy import sparse

    rng = np.random.default_rng(4)
    i, j = np.divmod(np.arange(n_places**2), n_places)
    columns = np.stack([np.full(n_places**2, n_places), j], axis=1)
    distance = np.abs(i - j) / n_places
    values = np.stack([distance, np.ones(len(i))], axis=1)
    A = sparse.csr_array((values.ravel(), columns.ravel(), np.arange(0, 2 * len(i) + 1, 2)))
    b = rng.poisson(20.0 * np.exp(-2.0 * distance) * rng.gamma(2.0, 0.5, n_places)[j]).astype(float)
    return _minimised("Softmax", A, b, i, loss="cross_entropy", ridge=1e-3)


def estimator() -> Any:
    """An estimator with standard errors, on real shares."""
    from attnfit import SoftmaxRegressor, datasets

    cars = datasets.load_car_shares()

    def work() -> float:
        model = SoftmaxRegressor(loss="cross_entropy").fit(cars.A, cars.b, groups=cars.groups)
        model.summary()
        return float(model.result_.n_passes)

    return work


def certificate() -> Any:
    """An error radius."""
    from attnfit import datasets, minimize, problems

    cars = datasets.load_car_shares()
    result = minimize(problems.Softmax(cars.A, cars.b, cars.groups))

    def work() -> float:
        for _ in range(5):
            result.certificate()
        return 0.0

    return work


def attention(n: int = 400, d: int = 12) -> Any:
    """A matrix of queries and keys."""
    rng = np.random.default_rng(5)
    Q, K = rng.standard_normal((n, d)), rng.standard_normal((n, d))
    maps = np.exp(Q @ (rng.standard_normal((d, d)) / d) @ K.T)
    return _minimised("Attention", Q, K, maps / maps.sum(axis=1, keepdims=True))


def mixture(n: int = 500, d: int = 100, k: int = 20) -> Any:
    """Proportions of known signatures."""
    rng = np.random.default_rng(6)
    S = rng.random((n, d))
    return _minimised("TwoLayer", None, S, S @ rng.dirichlet(np.ones(d), k).T, "identity")


def layer() -> Any:
    """The input of an attention layer, a vocabulary given."""
    from attnfit.inversion import recover
    from attnfit.problems import LayerInversion

    g = np.random.default_rng(1)
    n, d = 8, 5
    words = g.standard_normal((60, d))
    W, V = g.standard_normal((d, d)) / d, g.standard_normal((d, d)) / np.sqrt(d)
    out = LayerInversion(W, V, np.zeros((n, d))).output(words[g.permutation(60)[:n]].T)

    def work() -> float:
        recover(LayerInversion(W, V, out), vocabulary=words, random_state=0)
        return 0.0

    return work


CASES: dict[str, Callable[[], Callable[[], float]]] = {
    f.__name__: f
    for f in (
        *(softmax, choices, exponential, rescaled, flows),
        *(estimator, certificate, attention, mixture, layer),
    )
}


def _minimised(name: str, *data: Any, **options: Any) -> Callable[[], float]:
    from attnfit import minimize, problems

    def work() -> float:
        return float(minimize(getattr(problems, name)(*data, **options), random_state=0).n_passes)

    return work


def measure(name: str) -> dict[str, float]:
    """Return processor seconds and reads of one benchmark, after it was run once."""
    warnings.simplefilter("ignore")
    work = CASES[name]()
    began = process_time()
    work()
    # The first run compiles too: no more runs than take this long.
    count = max(1, min(MOST_RUNS, int(LONG_ENOUGH / max(process_time() - began, 1e-3))))
    seconds = []
    for _ in range(REPEATS):
        began = process_time()
        for _ in range(count):
            reads = work()
        seconds.append((process_time() - began) / count)
    return {"seconds": min(seconds), "reads": reads}


def _measured(source: Path, name: str) -> dict[str, float] | None:
    """Return the same of the version in a folder; None where that cannot do it."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.regress", "--one", name],
        cwd=ROOT,
        env=os.environ | one | {"PYTHONPATH": os.pathsep.join([str(source), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Give a folder with the sources of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["git", "archive", commit, "src"], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
        yield Path(folder) / "src"


def last_tag() -> str:
    """Return the last tag before this commit."""
    found = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        raise SystemExit("there is no tag to compare with; name a commit: make bench-check BASE=COMMIT")
    return found.stdout.strip()


def main() -> int:
    """Compare; return 1 if anything is slower than allowed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regress", description=__doc__)
    parser.add_argument("base", nargs="?", help="a tag or commit; the last tag unless given")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    base = options.base or last_tag()
    lines, slower = [], []
    with checked_out(base) as before:
        for name in options.only:
            runs: dict[Path, list[Any]] = {before: [], ROOT / "src": []}
            for turn in range(ROUNDS):
                for source in list(runs)[:: 1 if turn % 2 else -1]:
                    runs[source].append(_measured(source, name))
            old, new = runs.values()
            if None in new:
                raise SystemExit(f"{name} cannot be run")
            if None in old:
                lines.append([name, "-", f"{median(r['seconds'] for r in new):.3f}", "-", "not there before"])
                continue
            a, b = (median(run["seconds"] for run in some) for some in (old, new))
            reads = [some[0]["reads"] for some in (old, new)]
            bad = b > (1.0 + ALLOWED) * a + NOISE or reads[1] > (1.0 + ALLOWED) * reads[0] + 1e-9
            slower += [name] if bad else []
            counted = f"{reads[0]:.1f} to {reads[1]:.1f}"
            lines.append([name, f"{a:.3f}", f"{b:.3f}", f"{b / a:.2f}", counted + " SLOWER" * bad])
            print(*lines[-1], flush=True)
    print(table(["benchmark", f"seconds at {base}", "seconds now", "ratio", "reads"], lines))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
