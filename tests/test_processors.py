"""Verdicts and recovered texts are the same whatever instructions a processor has, and on any threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PROGRAM = Path(__file__).with_name("verdicts_everywhere.py")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# The libraries below choose their kernels when they are loaded: NumPy's BLAS, PyTorch's own, MKL and oneDNN.
OLDEST = {
    "OPENBLAS_CORETYPE": "Prescott",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
AVX2 = {"OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def start(cache, threads, kernels, *what):
    """Run the program on kernels of its own and with calibrations of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in OLDEST}
    settings = dict.fromkeys(THREADS, str(threads)) | kernels | {"ATTNFIT_CACHE": str(cache)}
    # Two threads that spin while they wait for each other take three times as long beside other tests.
    settings["OMP_WAIT_POLICY"] = "PASSIVE"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, PROGRAM, *what], env=kept | settings, **pipes)


def test_verdicts_do_not_depend_on_the_processor(tmp_path):
    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    children = {
        "own": start(tmp_path / "own", 1, {}),
        "oldest, two threads": start(tmp_path / "oldest", 2, OLDEST),
        "older, two threads": start(tmp_path / "older", 2, AVX2 if has_avx2 else {}, "fits"),
        "oldest": start(tmp_path / "one", 1, OLDEST, "fits"),
    }
    found = {}
    for name, child in children.items():
        out, errors = child.communicate(timeout=300)
        assert child.returncode == 0, f"{name}: {errors}"
        found[name] = json.loads(out)
    own = found["own"]
    assert {status for status, _ in own["verdicts"].values()} >= {"converged", "separable"}
    assert own["recovered"] == "recovered"
    assert all(true == text and verified for true, text, verified, _ in own["texts"].values())
    for name, shown in found.items():
        assert shown == {key: own[key] for key in shown}, name
    assert found["oldest, two threads"] == own
