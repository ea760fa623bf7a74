"""The core works where no package of an extra is installed, and says what to install where one is needed."""

import subprocess
import sys

CODE = """
import importlib.abc, sys

ABSENT = {
    "dask", "distributed", "zarr", "numcodecs", "pyarrow", "pandas", "polars", "matplotlib", "formulaic",
    "torch", "transformers", "tokenizers", "typer", "rich",
}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib, pkgutil
import numpy as np
import attnfit

EXTRA = {"audit", "cli", "heads", "plots", "reproduction", "dask", "zarr_chunks", "parquet"}
EXTRA.add("trained_attention")
for module in pkgutil.walk_packages(attnfit.__path__, "attnfit."):
    if not EXTRA & set(module.name.split(".")) and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
A = np.random.default_rng(0).standard_normal((40, 2))
shares = np.full(40, 0.25)
model = attnfit.SoftmaxRegressor().fit(A, shares, np.repeat(np.arange(10), 4))
assert model.result_.converged and str(model.summary())
assert attnfit.minimize(attnfit.problems.Exponential(A, np.ones(40))).certificate().valid
try:
    attnfit.data.open_source("nothing.zarr")
except (ImportError, OSError, ValueError) as error:
    assert not isinstance(error, ModuleNotFoundError), error
else:
    raise AssertionError
"""


def test_the_core_needs_no_extra():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
