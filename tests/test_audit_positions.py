"""Texts that do not begin at position 0: of consequence where positions are learned, and nowhere else."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from audit_families import random_module, text_of, trained_tokenizer
from audit_models import audit_cache, tiny  # noqa: F401
from test_cli import run

from attnfit import audit
from attnfit.audit import calibration
from attnfit.audit.models.model import Model

TURNED = ["llama", "gpt_neox", "bloom", "mamba"]
LEARNED = ["gpt2", "opt"]


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


@pytest.fixture
def build(tokenizer, audit_cache, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    for name, size in {"N_SEQUENCES": 60, "N_CONTEXTS": 4, "LENGTH": 24}.items():
        monkeypatch.setattr(calibration, name, size)
    return lambda name: Model(name, random_module(name), tokenizer, "causal")


def from_position(model, tokens, first):
    """The last block's states from the library itself, its positions given."""
    with torch.no_grad():
        return model.base(
            input_ids=torch.tensor([tokens]), position_ids=torch.arange(first, first + len(tokens))[None],
            output_hidden_states=True,
        ).hidden_states[2][0].numpy()  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_where_positions_only_turn_they_are_of_no_consequence(build, name):
    model = build(name)
    assert not model.counts_positions
    assert model.at(5) is model
    if name in ("llama", "gpt_neox"):
        tokens = model.tokenise(text_of(model.tokenizer, 27))
        zero, five = (from_position(model, tokens, first) for first in (0, 5))
        assert np.abs(zero - five).max() < 1e-5 * zero.std() * 30


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("access", ["hidden:2", "attention:1", "logits", "topk:5"])
def test_learned_positions(build, name, access):
    model, text = build(name), text_of(build(name).tokenizer, 27)
    tokens = model.tokenise(text)
    seen = audit.observe(model, text, access, first_position=5)
    if access == "hidden:2":
        np.testing.assert_allclose(seen.array, from_position(model, tokens, 5), atol=1e-4)
        assert np.abs(seen.array - from_position(model, tokens, 0)).max() > 0.1
    found = audit.invert(model, seen)
    assert (found.text, found.verified) == (text, True)


def test_another_position_explains_nothing_and_is_asked_for(build):
    model = build("gpt2")
    text = text_of(model.tokenizer, 27)
    seen = audit.observe(model, text, "hidden:2", first_position=5)
    found = audit.invert(model, seen, first_position=4)
    assert not found.verified and found.failed_at == 0
    assert "no token explains position 0" in found.message
    assert "begin at another position than 4 (first_position)" in found.message
    # Of a model that counts none the question would mislead.
    other = build("llama")
    noise = np.random.default_rng(0).standard_normal((3, other.width))
    assert "first_position" not in audit.invert_hidden(other, 50 * noise, 2, budget=20).message


def test_encoders_count_from_there_too(tokenizer):
    import transformers

    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=1,
    )  # fmt: skip
    model = Model("roberta", transformers.AutoModel.from_config(config), tokenizer, "encoder")
    text = text_of(tokenizer, 9)
    seen = audit.observe(model, text, first_position=7, access="attention:0")
    found = audit.invert(model, seen)
    assert (found.text, found.verified) == (text, True)
    assert model.at(7).max_length == model.max_length - 7


@pytest.mark.parametrize(
    ("first", "message"),
    [(-1, "an integer >= 0"), (0.5, "an integer >= 0"), (True, "an integer"), (256, "positions 0 to 255")],
)
def test_positions_that_are_none(build, first, message):
    with pytest.raises(audit.AuditError, match=message):
        build("gpt2").at(first)


def test_texts_that_end_after_the_last_position(build):
    model = build("gpt2").at(250)
    with pytest.raises(audit.AuditError, match=r"takes 6"):
        audit.observe(model, text_of(model.tokenizer, 27))


def test_an_audit_from_another_position(tiny, tmp_path):  # noqa: F811
    (tmp_path / "texts.txt").write_text(tiny.private_texts[0])
    words = ["audit", "tiny", "--access", "hidden:1", "--defences", "none", "--budget", 1000]
    words += ["--first-position", 9, "--texts", tmp_path / "texts.txt", "--json", tmp_path / "out.json"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "100 %" in done.stdout
    told = (tmp_path / "out.json").read_text()
    assert '"first_position": 9' in told and "--first-position 9" in told
