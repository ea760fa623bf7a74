"""The examples that need no extra run as they stand; `make docs` runs all of them."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_austrian_flows(capsys):
    runpy.run_path(str(EXAMPLES / "austrian_flows.py"))
    assert "distance coefficient -0.00791533, spint -0.00791533" in capsys.readouterr().out


def test_every_example_says_what_it_is():
    for path in EXAMPLES.glob("*.py"):
        assert path.read_text().startswith('"""'), path.name
