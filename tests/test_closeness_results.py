"""docs/incontext.md quotes the results file, and the file is of the experiment as it stands."""

import json
from pathlib import Path

import numpy as np

from attnfit.incontext.closeness import DATA, compare_on
from attnfit.incontext.experiment import SHAPES
from attnfit.incontext.families import draw
from attnfit.reproduction.similarity import on_car_markets
from experiments.closeness import PROBLEMS, RESULTS, markdown, rounded

PAGE = Path(__file__).parent.parent / "docs" / "incontext.md"


def results():
    return json.loads(RESULTS.read_text())


def test_the_page_has_the_numbers_of_the_file():
    assert markdown(results()) in PAGE.read_text()


def test_the_file_is_complete():
    found = results()
    assert [(one["link"], tuple(one["shape"])) for one in found["steps"]] == list(PROBLEMS)
    assert [(one["n"], one["d"], one["planted"]) for one in found["sizes"]] == [
        (n, d, planted) for n, d in SHAPES for planted in (False, True)
    ]


def test_its_numbers_are_those_of_the_experiment():
    """The steps that need no training, of one problem: instances do not depend on what was trained."""
    one = results()["steps"][0]
    rng = np.random.default_rng(0)
    draw("softmax", 4000, (12, 4), rng)
    again = compare_on(draw("softmax", 200, (12, 4), rng), 4).as_json()
    np.testing.assert_allclose(
        again["steps"][DATA]["cosine"], one["steps"][DATA]["cosine"], rtol=0, atol=2e-3
    )
    np.testing.assert_allclose(again["floor"], one["floor"], rtol=0, atol=2e-3)


def test_other_numbers_make_another_page():
    found = results()
    found["steps"][0]["close"][DATA] = True
    found["sizes"][0]["cosine"]["data step"][0] = 0.01
    text = markdown(found)
    assert "data step 0.01 to" in text
    assert text != markdown(results())
    assert rounded({"a": [0.123456, True, "x"]}) == {"a": [0.1235, True, "x"]}


def test_numbers_on_data_are_those_of_the_packaged_data():
    found = on_car_markets("softmax").as_json()["steps"][DATA]["cosine"]
    np.testing.assert_allclose(found, results()["data"]["cars"]["steps"][DATA]["cosine"], rtol=0, atol=2e-3)
