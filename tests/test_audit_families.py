"""Every family of models: the true text is found and verified, or the family is said not to be supported."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from audit_families import FAMILIES, random_module, text_of, trained_tokenizer
from audit_models import audit_cache  # noqa: F401

from attnfit import audit
from attnfit.audit import calibration, cells
from attnfit.audit.engine import guard, ways
from attnfit.audit.engine.prefix import Prefix, check_text, way_for

# The guard runs random texts of 27 tokens by itself. Texts longer than a window are inverted where there is
# one, of one length for most; elsewhere few tokens show what many would, as the search is the same for all.
SHORT, LENGTHS = 9, (27, 40)
BOTH = ("gemma3, window", "mistral, window", "gpt_neo, window", "recurrent_gemma, window")


def lengths_of(name):
    return LENGTHS if name in BOTH else LENGTHS[:1] if "window" in name else (SHORT,)


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


@pytest.fixture
def quick(monkeypatch):
    """Probes that know less: the searches after them find the rest."""
    monkeypatch.setattr(calibration, "N_SEQUENCES", 60)
    monkeypatch.setattr(calibration, "N_CONTEXTS", 4)
    monkeypatch.setattr(calibration, "LENGTH", 24)


@pytest.fixture
def build(tokenizer, audit_cache, tmp_path, quick):  # noqa: F811
    torch.set_num_threads(1)

    def saved(name, change=lambda module: None, **settings):
        module = random_module(name, **settings)
        change(module)
        module.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return audit.load(tmp_path / "model")

    return saved


def run_cells(model, *access, lengths=(SHORT,)):
    """One cell for each form of access and text."""
    texts = [text_of(model.tokenizer, length) for length in lengths]
    truths = [model.tokenise(text) for text in texts]
    assert [len(tokens) for tokens in truths] == list(lengths)
    attack = cells.Attack(model, texts, truths, 0)
    return [attack.run(cells.Key(form, "none", text), 300.0) for form in access for text in range(len(texts))]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_inverted_or_refused_by_name(build, name):
    model = build(name)
    for cell in run_cells(model, "hidden:2", lengths=lengths_of(name)):
        assert (cell.status, cell.verified, cell.exact) == ("done", True, True), cell.message
        assert cell.way == FAMILIES[name][2]


@pytest.mark.parametrize(
    "name", ["opt", "granite", "cohere", "gemma3, window", "gptj", "recurrent_gemma, window"]
)
def test_logits_of_every_kind_are_inverted(build, name):
    """Both forms of access on one model: what is learned about its last layer serves both."""
    for cell in run_cells(build(name), "logits", "topk:5", lengths=lengths_of(name)[:1]):
        assert (cell.status, cell.verified, cell.exact) == ("done", True, True), cell.message


def test_states_without_a_norm_after_them_rule_out_logits_only(build):
    model = build("opt, projected")
    assert (model.width, model.embeddings.shape[1]) == (64, 32)
    for form in ("logits", "topk:5", "masked"):
        told = run_cells(model, form)
        assert {cell.status for cell in told} == {"error"}
        assert all("opt" in cell.message and "logits, topk" in cell.message for cell in told)


def test_a_head_that_is_not_reproduced_rules_out_logits_only(build):
    model = build("llama")
    model.module.lm_head.register_forward_hook(lambda module, args, out: out + 0.1 * out.square())
    assert not model.predicts
    for cell in run_cells(model, "hidden:2"):
        assert (cell.status, cell.verified, cell.exact) == ("done", True, True), cell.message
    for cell in run_cells(model, "logits", "topk:5", "masked"):
        assert cell.status == "error"
        assert "(llama) are not its head's output" in cell.message


def same_rows(pairs):
    def change(module):
        table = module.get_input_embeddings().weight.data
        for token, twin in pairs:
            table[twin] = table[token]

    return change


@pytest.mark.parametrize(
    ("name", "access", "nudge"),
    [
        ("llama", "hidden:2", 0.0),
        ("llama", "topk:5", 1e-5),
        ("qwen3", "hidden:2", 1e-5),
        ("qwen3", "topk:5", 0.0),
    ],
)
def test_tokens_that_are_one_to_the_model_are_not_verified(build, tokenizer, name, access, nudge):
    """Twins of tokens of a text: which one was run, nothing tells."""
    text = text_of(tokenizer, 27)
    tokens = tokenizer(text)["input_ids"]
    pairs = [(tokens[place], 960 + place) for place in range(0, 24, 2)]
    model = build(name, same_rows(pairs))
    twins = dict(pairs)
    for token, twin in pairs:
        model.embeddings[twin] = model.embeddings[token] * (1 + nudge)
    found = audit.invert(model, audit.observe(model, text, access))
    back = {twin: token for token, twin in pairs}
    assert [back.get(token, token) for token in found.tokens] == tokens
    assert not found.verified
    assert "ambiguous: token 0 is" in found.message
    assert set(found.alternatives) == {place for place, token in enumerate(tokens) if token in twins}
    cell = cells.Attack(model, [text], [tokens], 0).run(cells.Key(access, "none", 0), 300.0)
    assert (cell.status, cell.false_claim) == ("done", False)
    assert sum(cell.right) + cell.n_ambiguous == len(tokens)


# ---- the guard ---------------------------------------------------------------------------------------------


class Forgetful(ways.Fast):
    """Keys of a window only, as the library itself keeps them, cropped all the same."""

    name = "forgetful"

    def crop(self, length):
        for held in self._keys.layers:
            held.keys, held.values = held.keys[..., -7:, :], held.values[..., -7:, :]
        super().crop(length)


class Unmasked(ways.Fast):
    """Candidates that also see each other."""

    name = "unmasked"

    def evaluate(self, vectors):
        return [states + 1e-2 * states.flip(0) for states in super().evaluate(vectors)]


class Stale(ways.Fast):
    """The first candidate is always the one adopted."""

    name = "stale"

    def adopt(self, place, token):
        super().adopt(0, token)


@pytest.mark.parametrize("way", [Forgetful, Unmasked, Stale])
def test_a_way_that_is_wrong_is_not_used(build, monkeypatch, way):
    model = build("llama")
    monkeypatch.setattr(ways, "WAYS", (way,))
    fault = guard.check_way(model, 2, guard.random_tokens(model, None), lambda: Prefix(model, 2, way=way))
    assert "differs by" in fault and "(allowed 1e-04)" in fault


@pytest.mark.parametrize(
    ("name", "access", "layer"), [("gpt_neo, window", "hidden:2", 2), ("llama", "attention:0", "attention:0")]
)
def test_where_no_way_is_right_nothing_is_tested(build, monkeypatch, name, access, layer):
    model = build(name)
    monkeypatch.setattr("attnfit.audit.engine.prefix.WAYS", (Stale,))
    texts = [text_of(model.tokenizer, 27)]
    report = audit.run(model, texts, [access], [None, "int8"], budget=60)
    assert {cell.status for cell in report.cells} == {"unsupported"}
    for pair in report.pairs:
        assert (pair.tested, pair.n_unsupported, pair.n_texts) == (False, 1, 0)
        assert f"{model.family}, {access}: no way of evaluating candidates is right: stale:" in pair.message
        assert pair.as_json()["token_share"] is None
    assert report.verdict.startswith(f"Not tested: {access} with none, {access} with int8; ")
    assert report.untested() == list(report.pairs) and report.leaks(0.0) == []


class Late(ways.Fast):
    """Right on short texts only, as where a window is longer than those."""

    name = "late"

    def evaluate(self, vectors):
        return [states + 1e-2 * (self._length > 30) for states in super().evaluate(vectors)]


def test_texts_are_checked_too(build, monkeypatch):
    monkeypatch.setattr("attnfit.audit.engine.prefix.WAYS", (Late, ways.Expanded))
    model = build("llama")
    assert way_for(model, 2) is Late
    short, long = (model.tokenise(text_of(model.tokenizer, length)) for length in LENGTHS)
    assert check_text(model, 2, short) == "late"
    assert check_text(model, 2, long) == "expanded"
    assert way_for(model, 2) is ways.Expanded


def test_the_truth_must_pass_the_attacks_own_check(build, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(cells, "observe", lambda *args: other(*args))
    plain = audit.observe

    def other(*args):
        seen = plain(*args)
        seen.array[3] += 0.2 * seen.array.std(0)
        return seen

    cell = run_cells(model, "hidden:2")[0]
    assert cell.status == "unsupported"
    assert cell.message.startswith("llama, hidden:2 with none: at position 3 the true token misses")


def test_errors_that_are_not_the_models_go_through(build, monkeypatch):
    model = build("llama")

    class Full(ways.Fast):
        def evaluate(self, vectors):
            raise MemoryError

    with pytest.raises(MemoryError):
        guard.check_way(model, 2, [1, 2], lambda: Prefix(model, 2, way=Full))

    class Stopped(ways.Fast):
        def evaluate(self, vectors):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.check_way(model, 2, [1, 2], lambda: Prefix(model, 2, way=Stopped))
