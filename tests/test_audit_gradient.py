"""Gradients of a training step: the batch comes back, and nothing is claimed that they do not tell."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from audit_families import random_module, text_of, trained_tokenizer  # noqa: E402

from attnfit import audit  # noqa: E402
from attnfit.audit.defences import apply_defence  # noqa: E402
from attnfit.audit.gradient_search import GradientSearch  # noqa: E402
from attnfit.audit.gradients import observed_weights  # noqa: E402
from attnfit.audit.models.model import Model  # noqa: E402


def trained_on(model, texts, padded=False):
    """Gradients of one step as the library itself computes them: labels, its own loss, every parameter."""
    module = model.module.requires_grad_(True)
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    labels = torch.where(mask == 1, ids, -100)
    module(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    found = {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}
    module.zero_grad(set_to_none=True)
    module.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def models(tiny):  # noqa: F811
    tokenizer = trained_tokenizer()
    made = {name: Model(name, random_module(name), tokenizer, "causal") for name in ("llama", "qwen3")}
    return made | {"tiny": tiny}


@pytest.mark.parametrize(("name", "sizes"), [("llama", (9,)), ("llama", (9, 6, 12)), ("qwen3", (7, 8))])
def test_a_batch_comes_back_to_the_last_token(models, name, sizes):
    """Padded as a trainer would; the head's gradient is of a matrix of its own, or of the tied one."""
    model = models[name]
    texts = [model.tokenise(text_of(model.tokenizer, size)) for size in sizes]
    found = audit.invert_gradient(model, trained_on(model, texts))
    assert sorted(found.tokens) == sorted(texts)
    assert found.verified and found.residual < 1e-5, found.message
    assert found.ranks[1] == sum(sizes) - len(sizes)


def test_tied_heads_and_learned_positions(tiny):  # noqa: F811
    texts = [tiny.tokenise(text) for text in tiny.private_texts[:2]]
    found = audit.invert_gradient(tiny, trained_on(tiny, texts))
    assert sorted(found.tokens) == sorted(texts) and found.verified


def test_a_last_token_that_the_text_has_before(models):
    """Of a tied head its row holds the table's own gradient too."""
    model = models["tiny"]
    tokens = [200, 300, 400, 500, 300]
    found = audit.invert_gradient(model, trained_on(model, [tokens]))
    assert found.tokens == [tokens] and found.verified


def test_without_the_heads_gradient_last_tokens_are_not_known(models):
    model = models["llama"]
    tokens = model.tokenise(text_of(model.tokenizer, 9))
    given = trained_on(model, [tokens])
    del given["lm_head.weight"]
    found = audit.invert_gradient(model, given)
    assert found.tokens == [tokens[:-1]]
    assert not found.verified and "in the gradient of the head only" in found.message


def test_what_is_too_large_or_frozen_is_refused(models):
    model = models["llama"]
    many = [np.random.default_rng(seed).integers(1, 1000, 30).tolist() for seed in range(4)]
    with pytest.raises(audit.AuditError, match=r"batch too large .* has rank 64 of 64"):
        audit.invert_gradient(model, trained_on(model, many))
    given = trained_on(model, many[:1])
    frozen = {name: one for name, one in given.items() if ".layers.0." not in name}
    with pytest.raises(audit.AuditError, match="block 0 has no gradient"):
        audit.invert_gradient(model, frozen)


def test_nothing_false_is_claimed(models):
    """The gradient of another model, of other weights, and sums that are no text's."""
    model = models["llama"]
    tokens = model.tokenise(text_of(model.tokenizer, 9))
    other = [*tokens[:4], tokens[4] + 1, *tokens[5:]]
    one, two = (trained_on(model, [text]) for text in (tokens, other))
    generator = torch.Generator().manual_seed(0)
    for change in (
        {name: torch.cat([one[name][:32], two[name][32:]]) for name in one},
        {name: grad.flip(-1) for name, grad in one.items()},
        {name: grad if "layers.1" in name else two[name] for name, grad in one.items()},
    ):
        assert not audit.invert_gradient(model, change).verified
    noisy = {name: g + 0.1 * g.std() * torch.randn(g.shape, generator=generator) for name, g in one.items()}
    with pytest.raises(audit.AuditError, match="has rank 64 of 64"):
        audit.invert_gradient(model, noisy)
    assert not audit.invert_gradient(model, noisy, error=0.1).verified


def test_branches_that_are_no_text_are_dropped(models, monkeypatch):
    model = models["llama"]
    tokens = model.tokenise(text_of(model.tokenizer, 9))
    given, tree = trained_on(model, [tokens]), GradientSearch._tree
    monkeypatch.setattr(GradientSearch, "_tree", lambda self: [*tree(self), [*tokens[:3], tokens[5]]])
    found = audit.invert_gradient(model, given)
    assert found.tokens == [tokens] and found.verified


@pytest.mark.parametrize("number", [6, 7, 12])
def test_a_token_without_loss_leaves_no_trace(tiny, number):  # noqa: F811
    """The model has memorised how these texts end: within errors their gradients are those of shorter ones,
    or longer ones, of which the search finds one.
    """
    tokens = tiny.tokenise(tiny.private_texts[number])
    given = trained_on(tiny, [tokens])
    found = audit.invert_gradient(tiny, given, error=1e-5)
    assert found.residual < 1e-2 and not found.verified
    assert "with its errors so would others" in found.message
    without = audit.invert_gradient(tiny, given)
    assert without.tokens == [tokens] and without.verified


def test_texts_with_the_same_gradient_are_told_apart_by_nobody(models, monkeypatch):
    """Two columns at an angle whose square is 1e-8 at least, as the rounding of float32 needs, and below."""
    model = models["llama"]
    tokens = model.tokenise(text_of(model.tokenizer, 9))
    seen = audit.observe(model, model.detokenise(tokens), "gradient")
    search = GradientSearch(model, seen.array, np.zeros_like(seen.array))
    v = search._column(tokens).double()
    u = torch.roll(v, 1)
    u -= (u @ v) / (v @ v) * v
    u *= v.norm() / u.norm()
    for angle, apart in ((2e-4, True), (0.5e-4, False)):
        search._columns = {(1, 2): v, (1, 3): v + angle * u}
        assert search._explained([[1, 2], [1, 3]])[2] is apart
    monkeypatch.setattr(GradientSearch, "_tree", lambda self: [tokens[:-1], tokens[:-1]])
    found = audit.invert_gradient(model, trained_on(model, [tokens]))
    assert not found.verified and "cannot be told apart" in found.message


@pytest.mark.parametrize(("defence", "back"), [("float16", True), ("noise:1", False)])
def test_the_form_in_a_report(tiny, defence, back):  # noqa: F811
    report = audit.run(tiny, ["A quiet train waits."], ["gradient"], [None, defence], budget=60)
    assert report.pair("gradient").token_share == 1.0
    assert report.pair("gradient").verified == 1
    assert (report.pair("gradient", defence).token_share == 1.0) is back
    assert sum(control.false_claims for control in report.controls) == 0


def test_bad_input_in_one_sentence(tiny):  # noqa: F811
    name = observed_weights(tiny)[0].name
    good = np.zeros((64, 192), np.float32)
    for given, told in (
        ({}, "gradients has none of"),
        ({name: good.T}, r"must have shape \(64, 192\) for 'tiny', not \(192, 64\)"),
        ({name: good * np.nan}, "not finite"),
        ({name: good.astype(complex)}, "real numbers, not complex"),
        ({name: good}, "block 0 has no gradient"),
    ):
        with pytest.raises(audit.AuditError, match=told):
            audit.invert_gradient(tiny, given)
    with pytest.raises(audit.AuditError, match="rows of a gradient have none"):
        audit.invert(tiny, audit.observe(tiny, "A quiet train.", "gradient", "drop0"))
    with pytest.raises(audit.AuditError, match="no next token"):
        audit.observe(tiny, [5], "gradient")


def test_small_numbers_in_half_precision_have_the_error_stated():
    """Gradients are mostly below the least normal number, where the last place stays where it is."""
    array = (1e-6 * np.random.default_rng(0).standard_normal((64, 48))).astype(np.float32)
    audit.check_defence("float16", array)
    assert np.abs(apply_defence(array, "float16").array - array).max() > 1e-8
