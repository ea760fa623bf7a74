"""Keys and values of a cache: the text comes back, and nothing is claimed that they do not tell."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from audit_families import random_module, text_of, trained_tokenizer  # noqa: E402

from attnfit import audit  # noqa: E402
from attnfit.audit import calibration, cells  # noqa: E402
from attnfit.audit.models.cached import cache_argument  # noqa: E402


@pytest.fixture
def quick(monkeypatch):
    """Probes that know less: the searches after them find the rest."""
    monkeypatch.setattr(calibration, "N_SEQUENCES", 60)
    monkeypatch.setattr(calibration, "N_CONTEXTS", 4)
    monkeypatch.setattr(calibration, "LENGTH", 24)


@pytest.fixture
def build(audit_cache, tmp_path, quick):  # noqa: F811
    torch.set_num_threads(1)
    tokenizer = trained_tokenizer()

    def saved(name, change=lambda module: None):
        module = random_module(name)
        change(module)
        module.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return audit.load(tmp_path / "model")

    return saved


def cached(model, tokens, block, first=0):
    """Keys and values as the transformers library itself returns them, shape (key heads, n, width)."""
    places = torch.arange(first, first + len(tokens))[None]
    held = model.base(input_ids=torch.tensor([tokens]), position_ids=places, use_cache=True).past_key_values
    return held.layers[block].keys[0], held.layers[block].values[0]


@pytest.mark.parametrize("form", ["k:1", "v:0"])
def test_the_forms_keep_their_word(form):
    audit.check_access(form)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3, window", "gptj"])
def test_what_leaks_is_what_the_library_caches(build, name):
    """Biases, norms of keys, rotation of either layout, shared heads and windows: against its own cache."""
    model = build(name)
    tokens = model.tokenise(text_of(model.tokenizer, 7))
    keys, values = (part.transpose(0, 1).flatten(1).numpy() for part in cached(model, tokens, 1))
    seen = audit.observe(model, tokens, "kv:1").array
    np.testing.assert_allclose(seen, np.hstack([keys, values]), atol=2e-6)
    np.testing.assert_array_equal(audit.observe(model, tokens, "k:1").array, seen[:, : keys.shape[1]])
    np.testing.assert_array_equal(audit.observe(model, tokens, "v:1").array, seen[:, keys.shape[1] :])


@pytest.mark.parametrize(("name", "forms"), [("qwen3", ("kv:0", "k:1")), ("gptj", ("v:1",))])
def test_other_families_are_inverted(build, name, forms):
    model = build(name)
    text = text_of(model.tokenizer, 9)
    attack = cells.Attack(model, [text], [model.tokenise(text)], 0)
    for form in forms:
        for defence in ("none", "int8"):
            cell = attack.run(cells.Key(form, defence, 0), 300.0)
            assert (cell.status, cell.verified, cell.exact) == ("done", True, True), cell.message


@pytest.mark.parametrize(("name", "told"), [("mamba", "no attention"), ("rwkv", "keeps no keys and values")])
def test_models_without_a_cache_are_refused_by_name(build, name, told):
    model = build(name)
    with pytest.raises(audit.AuditError, match=f"{name}.*{told}|{told}"):
        audit.run(model, [text_of(model.tokenizer, 9)], ["kv:1"])


def test_a_cache_that_a_user_brings(build):
    """In the shapes, the precision and the container of the library; keys before their rotation too."""
    model = build("qwen3")
    tokens = model.tokenise(text_of(model.tokenizer, 9))
    keys, values = cached(model, tokens, 1)
    assert audit.invert_kv(model, keys[None], values[None], 1).tokens == tokens
    rows = keys.transpose(0, 1).flatten(1).numpy()
    found = audit.invert_kv(model, rows, block=1)
    assert found.tokens == tokens and found.verified
    assert audit.invert_kv(model, values=values.double(), block=1).verified
    half = keys.bfloat16()
    width = np.abs(half.float().numpy()).max() * 2.0**-8
    assert audit.invert_kv(model, half, block=1, error=width / np.sqrt(3), error_bound=width).tokens == tokens


def unrotated(model, tokens, block):
    """Keys of a Llama by its own weights, before they are turned."""
    entering = torch.from_numpy(model.states(tokens, block))
    inner = model.blocks[block]
    return inner.self_attn.k_proj(inner.input_layernorm(entering))


def test_keys_before_their_rotation(build):
    model = build("llama")
    tokens = model.tokenise(text_of(model.tokenizer, 9))
    plain = unrotated(model, tokens, 1)
    turned = audit.observe(model, tokens, "k:1").array
    assert audit.invert_kv(model, plain, block=1, rotated=False).tokens == tokens
    for given, rotated in ((plain, True), (turned, False)):
        found = audit.invert_kv(model, given, block=1, rotated=rotated)
        assert not found.verified and "turned by their positions from 0 on" in found.message
    with pytest.raises(audit.AuditError, match="how positions turn the keys of gpt2 is not known"):
        audit.invert_kv(build("gpt2"), plain, block=1, rotated=False)


def test_keys_count_positions_where_states_do_not(build):
    model = build("llama")
    assert not model.counts_positions
    text = text_of(model.tokenizer, 9)
    seen = audit.observe(model, text, "k:1", first_position=5)
    np.testing.assert_allclose(
        seen.array, cached(model, model.tokenise(text), 1, 5)[0].transpose(0, 1).flatten(1), atol=2e-6
    )
    assert audit.invert(model, seen).verified
    wrong = audit.invert(model, seen, first_position=0)
    assert not wrong.verified and "first_position" in wrong.message
    assert audit.observe(model, text, "v:1", first_position=5).first_position == 0


def mirrored(module):
    """Tokens whose embeddings differ where the keys of the first block do not look, and only there."""
    block = module.model.layers[0]
    W = block.self_attn.k_proj.weight * block.input_layernorm.weight
    _, _, V = torch.linalg.svd(W)
    unseen = V[len(W) :]
    table = module.get_input_embeddings().weight.data
    table[900:912] = table[400:412] - 2 * table[400:412] @ unseen.T @ unseen


def test_tokens_that_are_one_to_the_keys_are_not_verified(build):
    """Their embeddings are far apart: nothing but the keys themselves tells that they cannot be told."""
    model = build("llama", mirrored)
    tokens = [3, *range(400, 406), *range(906, 912), 5]
    seen = audit.observe(model, tokens, "k:0")
    np.testing.assert_allclose(
        seen.array, audit.observe(model, [3, *range(900, 906), *range(406, 412), 5], "k:0").array, atol=1e-5
    )
    assert not any(model.near(token) for token in tokens)
    found = audit.invert(model, seen)
    assert not found.verified
    assert set(found.alternatives) == set(range(1, 13))
    # What is the same to the keys is not so to the values.
    assert audit.invert(model, audit.observe(model, tokens, "kv:0")).tokens == tokens


def silent(module):
    module.model.layers[1].self_attn.k_proj.weight.data.zero_()


def test_keys_that_tell_nothing_are_not_tested(build):
    model = build("llama", silent)
    with pytest.raises(audit.AuditError, match=r"k:1 .* is the same for every token"):
        audit.invert(model, audit.observe(model, [1, 2, 3], "k:1"))


CONTROLS = ["other text", "one token", "permuted", "other block", "heads exchanged", "noise"]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("form", ["kv:1", "k:1"])
def test_nothing_false_is_claimed(tiny, form, control):  # noqa: F811
    text, other = tiny.private_texts[:2]
    tokens = tiny.tokenise(text)
    seen = audit.observe(tiny, text, form).array.copy()
    if control == "other text":
        seen[5:] = audit.observe(tiny, other, form).array[5 : len(seen)]
    elif control == "one token":
        seen[5] = audit.observe(tiny, [*tokens[:5], tokens[5] + 1], form).array[5]
    elif control == "permuted":
        seen[[4, 5]] = seen[[5, 4]]
    elif control == "other block":
        seen = audit.observe(tiny, text, form.replace("1", "2")).array
    elif control == "heads exchanged":
        seen[:, :32] = seen[:, :32][:, [*range(16, 32), *range(16)]]
    else:
        seen += 0.3 * seen.std(0) * np.random.default_rng(0).standard_normal(seen.shape).astype(np.float32)
    # The noise is not told of.
    keys, values = (seen[:, :64], seen[:, 64:]) if form == "kv:1" else (seen, None)
    found = audit.invert_kv(tiny, keys, values, block=1, budget=40)
    assert not found.verified


def test_bad_input_in_one_sentence(tiny):  # noqa: F811
    good = np.zeros((4, 5, 16))
    for keys, values, told in (
        (None, None, "both missing"),
        (good[:, :4], good, "keys have 4 positions and values 5"),
        (good[..., :15], None, r"must have shape \(n, 64\) for 'tiny' at k:0, not \(5, 60\)"),
        (np.zeros(5), None, "keys must have shape"),
        (good + 1j, None, "real numbers, not complex"),
        (good.astype(str), None, "real numbers, not <U"),
        (good * np.nan, None, "must be finite"),
    ):
        with pytest.raises(audit.ObservationMismatch, match=told):
            audit.invert_kv(tiny, keys, values)
    with pytest.raises(audit.AuditError, match="block must be 0 to 3 for 'tiny', not 4"):
        audit.invert_kv(tiny, good, block=4)
    other = audit.observe(tiny, tiny.private_texts[0], "kv:0")
    object.__setattr__(other, "fingerprint", "0" * 16)
    with pytest.raises(audit.ObservationMismatch, match="comes from another model"):
        audit.invert(tiny, other)


def test_the_report_has_what_defences_do(tiny):  # noqa: F811
    report = audit.run(tiny, tiny.private_texts[:1], ["kv:1"], [None, "int8", "noise:30"], budget=60)
    assert report.pair("kv:1").token_share == report.pair("kv:1", "int8").token_share == 1.0
    assert report.pair("kv:1", "noise:30").token_share < 0.5
    assert report.pair("kv:1", "noise:30").divergence > report.pair("kv:1", "int8").divergence > 0
    assert report.pair("kv:1", "int8").predicted == pytest.approx(1.0, abs=1e-3)
    assert sum(control.false_claims for control in report.controls) == 0
    assert "whoever sees the cached keys and values of block 1 reads 100 %" in report.advice[0]


def test_what_a_defence_costs_is_what_the_model_makes_of_the_cache(tiny):  # noqa: F811
    """Against the library going on from a cache in which all keys but the last were changed."""
    tokens = tiny.tokenise(tiny.private_texts[0])
    true, seen = (audit.observe(tiny, tokens, "k:3", defence) for defence in (None, "noise:1"))
    seen.array[-1] = true.array[-1]
    held = tiny.base(input_ids=torch.tensor([tokens[:-1]]), use_cache=True).past_key_values
    held.layers[3].keys = torch.from_numpy(seen.array[:-1]).reshape(-1, 4, 16).transpose(0, 1)[None]
    given = {cache_argument(tiny.base): held}
    last = tiny.base(input_ids=torch.tensor([tokens[-1:]]), **given).last_hidden_state[0]
    continued = seen.access.continued(tiny, tokens, seen)
    torch.testing.assert_close(continued[-1:], tiny.unembed(last), atol=1e-4, rtol=1e-4)
    assert float((continued - torch.from_numpy(tiny.logits(tokens))).abs().max()) > 0.1
