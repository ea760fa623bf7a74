"""Models for the audit tests, prepared once for all workers."""

import os

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def audit_cache(tmp_path_factory):
    """A cache of their own for all tests of one run, whichever worker they run in."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    cache = shared / "attnfit-cache"
    previous = os.environ.get("ATTNFIT_CACHE")
    os.environ["ATTNFIT_CACHE"] = str(cache)
    yield cache
    if previous is None:
        del os.environ["ATTNFIT_CACHE"]
    else:
        os.environ["ATTNFIT_CACHE"] = previous


@pytest.fixture(scope="session")
def tiny(audit_cache):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    from attnfit import audit

    with FileLock(f"{audit_cache}.lock"):
        return audit.load("tiny")
