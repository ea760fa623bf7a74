"""Every example in the documentation and in docstrings runs and prints what it says."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import attnfit

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
# Pages on data of other packages, which need not be importable.
DATA = {"mode-choice.md": "biogeme"}
MODULES = [
    m.name for m in pkgutil.walk_packages(attnfit.__path__, "attnfit.") if not m.name.endswith("__main__")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page):
    """In a process of its own, as a reader would: a limit on memory counts what the process holds already."""
    package = DATA.get(page.name)
    if package is not None and PathFinder.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    flags = ["-o", "NORMALIZE_WHITESPACE", "-o", "ELLIPSIS"]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "doctest", *flags, str(page)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert failed == 0


def test_the_readme_examples_are_not_empty():
    examples = doctest.DocTestParser().get_examples((ROOT / "README.md").read_text())
    assert len(examples) >= 4


def test_changelog_knows_the_version():
    assert f"## {attnfit.__version__}" in (ROOT / "CHANGELOG.md").read_text()
