"""What a form of access or a defence of one's own must do, and what the checks notice."""

import numpy as np
import pytest

pytest.importorskip("transformers")

from attnfit import audit
from attnfit.audit.access import Leak
from attnfit.audit.forms import names_of_forms, parse_access


@pytest.fixture(scope="module")
def tiny():
    return audit.load("tiny")


@pytest.mark.parametrize("form", ["hidden:1", "attention:0", "logits", "topk:5"])
def test_our_forms_of_access_keep_their_word(form):
    audit.check_access(form)


class Mirrored(audit.StatesAccess):
    """States with the sign changed, and where tests break it."""

    kind, number, described = "mirrored", "LAYER", "the mirrored states"
    factor = wrong_factor = -1.0
    n_leaks = 0

    @property
    def description(self):
        return self.described

    def layer(self, model):
        return self.place

    def leak(self, model, tokens):
        return Leak(self.changed(self.factor * model.states(tokens, self.place), tokens))

    def changed(self, array, tokens):
        return array

    def states(self, model, observation):
        return audit.check_states(model, observation.array * self.wrong_factor, observation.error)


def test_a_form_of_ones_own(tiny):
    audit.check_access("mirrored:1")
    report = audit.run(tiny, tiny.private_texts[:1], access=[Mirrored(1)], budget=60)
    assert report.pair("mirrored:1").token_share == 1.0
    assert "the mirrored states" in report.advice[0]


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({"described": ""}, "description"),
        ({"changed": lambda self, array, tokens: array.astype(np.float64)}, "float32"),
        ({"changed": lambda self, array, tokens: array[1:]}, "a row a token"),
        ({"changed": lambda self, array, tokens: array * np.nan}, "not finite"),
        (
            {"changed": lambda self, array, tokens: array * np.float32(np.random.default_rng().random())},
            "each time",
        ),
        ({"changed": lambda self, array, tokens: array * np.float32(len(tokens))}, "later ones"),
        ({"wrong_factor": 1.0}, "not accept the true text"),
    ],
)
def test_a_form_that_breaks_its_word_is_named(broken, what):
    kind = type("Mirrored", (Mirrored,), {"kind": "mirrored", "__qualname__": "Mirrored", **broken})
    try:
        with pytest.raises(AssertionError, match=what):
            audit.check_access(kind(1))
    finally:
        # The one that keeps its word is known again.
        type("Mirrored", (Mirrored,), {"kind": "mirrored", "__qualname__": "Mirrored"})


class Believer:
    """A search that claims whatever it is told."""

    def __init__(self, search, claims, accepts):
        self.search, self.claims, self.accepts = search, claims, accepts

    def contradiction(self, truth):
        return "" if self.accepts else self.search.contradiction(truth)

    def run(self, known):
        from dataclasses import replace

        found = self.search.run(known)
        return replace(found, verified=True) if self.claims else found


@pytest.mark.parametrize(
    ("claims", "accepts", "rivals", "what"),
    [
        (False, True, 1.0, "accept another text"),
        (True, False, 1.0, "called verified"),
        (False, False, 2.0, "rivals"),
    ],
)
def test_a_search_that_claims_too_much_is_named(claims, accepts, rivals, what):
    def search(self, model, observation, budget):
        return Believer(Mirrored.search(self, model, observation, budget), claims, accepts)

    def scaled(self, model, tokens, place, every):
        outputs, rows = Mirrored.rivals(self, model, tokens, place, every)
        return rivals * outputs, rows

    kind = type("Claiming", (Mirrored,), {"kind": "claiming", "search": search, "rivals": scaled})
    with pytest.raises(AssertionError, match=what):
        audit.check_access(kind(1))


def test_names_of_forms(tiny):
    assert names_of_forms()[:5] == ["hidden:LAYER", "attention:BLOCK", "logits", "topk:COUNT", "masked"]
    for name in ("hidden:3", "attention:0", "logits", "topk:5", "masked"):
        assert str(parse_access(name)) == name
        assert parse_access(name) == parse_access(name)
    for name in (
        "hidden",
        "hidden:",
        "hidden:-1",
        "logits:1",
        "topk:0",
        "masked:1",
        "none:1",
        "",
        "Hidden:1",
    ):
        with pytest.raises(audit.AuditError, match="hidden:LAYER"):
            parse_access(name)
    with pytest.raises(audit.AuditError, match="no outputs leave"):
        audit.observe(tiny, tiny.private_texts[0], "masked")
    with pytest.raises(TypeError, match="already"):
        type("Other", (Mirrored,), {"kind": "hidden"})
    with pytest.raises(TypeError, match="abstract"):
        audit.StatesAccess(1)


@pytest.mark.parametrize(
    "defence",
    [
        *("none", "float16", "bfloat16", "int8", "int4:channel", "noise:0.3", "noise:0.1std", "round:1"),
        *("drop0", "int8+noise:0.1", "drop0+int8", "drop0+drop0"),
    ],
)
def test_our_defences_keep_their_word(defence):
    audit.check_defence(defence)


class Coarse(audit.Defence):
    """Multiples of a tenth, and where tests break it."""

    pattern, written = "coarse", "coarse"
    stated, reached, seeded, first = 1.0, 1.0, True, 0

    def apply(self, array, rng):
        error = np.full_like(array, self.stated * 0.1 / np.sqrt(12))
        rounded = np.float32(0.1) * np.rint(array / np.float32(0.1))
        if not self.seeded:
            rounded += np.float32(0.01 * np.random.default_rng().random())
        left = self.first
        error_bound = np.full_like(array, self.reached * 0.05)
        return audit.Defended(rounded[left:], error[left:], error_bound[left:], (1,) * left)


def test_a_defence_of_ones_own():
    audit.check_defence("coarse")
    audit.check_defence("coarse+noise:0.1")


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({"stated": 2.0}, "is stated"),
        ({"stated": 0.5}, "is stated"),
        ({"reached": -1.0}, "negative"),
        ({"stated": np.inf}, "not finite"),
        ({"reached": 0.9}, "beyond error_bound"),
        ({"seeded": False}, "each time"),
        ({"first": 1}, "only the first"),
    ],
)
def test_a_defence_that_breaks_its_word_is_named(broken, what):
    before = {name: getattr(Coarse, name) for name in broken}
    try:
        for name, value in broken.items():
            setattr(Coarse, name, value)
        with pytest.raises(AssertionError, match=what):
            audit.check_defence("coarse")
    finally:
        for name, value in before.items():
            setattr(Coarse, name, value)


def test_names_of_defences():
    with pytest.raises(audit.AuditError, match=r"float17.*int8.*round:DECIMALS.*drop0"):
        audit.check_defence("float17")
    with pytest.raises(TypeError, match="already"):
        type("Other", (Coarse,), {"pattern": "float16"})
    with pytest.raises(TypeError, match="abstract"):
        audit.Defence()
