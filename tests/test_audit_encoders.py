"""Encoders of several families: positions counted from elsewhere, biases of distances, narrow embeddings."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
import transformers
from audit_families import text_of, trained_tokenizer
from audit_models import audit_cache  # noqa: F401

from attnfit import audit
from attnfit.audit import cells
from attnfit.audit.encoder_attention import EncoderSearch, first_attention, relative_biases, token_rows

SIZES = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
# The configuration, its settings, and the longest text.
FAMILIES = {
    "bert": ("Bert", {"pad_token_id": 0}, 64),
    "roberta": ("Roberta", {"pad_token_id": 1}, 62),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 3}, 60),
    "camembert": ("Camembert", {"pad_token_id": 1}, 62),
    "mpnet": ("MPNet", {"pad_token_id": 1}, 62),
    "electra": ("Electra", {"pad_token_id": 0, "embedding_size": 48}, 64),
}


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


@pytest.fixture
def build(tokenizer, audit_cache, tmp_path):  # noqa: F811
    torch.set_num_threads(1)

    def saved(name):
        kind, settings, _ = FAMILIES[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
        module = transformers.AutoModel.from_config(config)
        module.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return audit.load(tmp_path / "model")

    return saved


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_inverted(build, name):
    model = build(name)
    text = text_of(model.tokenizer, 9)
    attack = cells.Attack(model, [text], [model.tokenise(text)], 0)
    cell = attack.run(cells.Key("attention:0", "none", 0), 300.0)
    assert (cell.status, cell.verified, cell.exact) == ("done", True, True), cell.message


@pytest.mark.parametrize("name", FAMILIES)
def test_the_longest_text_that_positions_allow(build, name):
    """The table of RoBERTa and its kin has rows for the padding token and those before it."""
    model, longest = build(name), FAMILIES[name][2]
    assert model.max_length == longest
    tokens = [10 + place for place in range(longest + 1)]
    states = model.states(tokens[:longest], 0)
    rows = np.stack([token_rows(model, place, [token])[0] for place, token in enumerate(tokens[:longest])])
    np.testing.assert_allclose(rows, states, atol=1e-5)
    with pytest.raises((IndexError, RuntimeError)):
        model.states(tokens, 0)
    with pytest.raises(audit.AuditError, match=rf"takes {longest}"):
        audit.run(model, [" ".join(["one"] * 100)], budget=10)


def test_biases_of_distances_are_part_of_the_problem(build):
    """Against the module's own output; without the biases it is missed by much."""
    model = build("mpnet")
    with torch.no_grad():
        model.base.encoder.relative_attention_bias.weight.mul_(5.0)
    tokens = model.tokenise(text_of(model.tokenizer, 12))
    output = model.states(tokens, "attention:0").astype(float)
    search = EncoderSearch(model, output, 0.0)
    assert search.contradiction(tokens) == ""
    assert relative_biases(model, 12).shape == (4, 12, 12)
    rows = np.stack([search._rows(place, [token])[0] for place, token in enumerate(tokens)])
    problem = first_attention(model, output)
    assert np.sqrt(2 * problem.value(rows.T)) < 1e-5 * np.linalg.norm(output)
    model.base.encoder.compute_position_bias = lambda x: torch.zeros(1, 4, x.shape[1], x.shape[1])
    assert "misses the output by" in search.contradiction(tokens)


def test_what_is_observed_is_what_the_attention_adds(build):
    """Of MPNet too, whose attention ends with a residual and a normalisation of its own."""
    for name in ("bert", "mpnet"):
        model = build(name)
        tokens = model.tokenise(text_of(model.tokenizer, 5))
        before, added = (torch.from_numpy(model.states(tokens, layer)) for layer in (0, "attention:0"))
        attention = model.blocks[0].attention
        norm = attention.LayerNorm if name == "mpnet" else attention.output.LayerNorm
        seen = []
        hook = attention.register_forward_hook(lambda *call, to=seen: to.append(call[2][0]))
        with torch.no_grad():
            model.base(torch.tensor([tokens]))
            hook.remove()
            np.testing.assert_allclose(norm(before + added), seen[0].reshape(len(tokens), -1), atol=1e-5)


def test_attention_of_another_make_is_refused_by_name(build):
    model = build("bert")
    del model.blocks[0].attention.self.query
    with pytest.raises(audit.AuditError, match=r"\(bert\) is not of the BERT family"):
        first_attention(model, np.ones((3, 64)))
