"""The experiment on a GPT-2 of one's own, on a tiny random one saved to a directory."""

import json

import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from attnfit.audit import load, masked, reproduction  # noqa: E402
from experiments import gpt2_recovery  # noqa: E402


@pytest.fixture
def home(tiny, tmp_path):  # noqa: F811
    """A random model with the tokenizer of the packaged one."""
    config = transformers.GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_it_fine_tunes_and_attacks(tiny, home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(gpt2_recovery, "RATE", 1e-2)
    monkeypatch.setattr(reproduction, "QUICK_STEPS", 20)
    monkeypatch.setattr(reproduction, "N_REPEATS", 2)
    texts = tmp_path / "private.txt"
    texts.write_text("\n".join(tiny.private_texts[:6]) + "\n")
    out = tmp_path / "results"
    arguments = [home, "--texts", texts, "--out", out, "--steps", 150, "--until", 0.2, "--quick"]
    gpt2_recovery.main([str(argument) for argument in arguments])
    told = json.loads((out / "data-recovery.json").read_text())
    assert told["texts"] == list(tiny.private_texts[:4])
    assert told["recover_masked"]["of"] == 4
    assert load(out / "model").fingerprint != load(home).fingerprint


def test_fine_tuning_stops_when_the_texts_are_known(tiny, home, monkeypatch):  # noqa: F811
    monkeypatch.setattr(gpt2_recovery, "RATE", 1e-2)
    model = load(home)
    loss = gpt2_recovery.memorise(model.module, model.tokenizer, tiny.private_texts[:3], 300, 0.5)
    assert loss <= 0.5
    assert not model.module.training


def test_a_large_vocabulary_is_searched_among_common_words(tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(masked, "TABLE", 1 << 12)
    monkeypatch.setattr(reproduction, "QUICK_STEPS", 10)
    found = reproduction.reproduce_data_recovery(tiny, quick=True, n_repeats=1)
    assert len(found.found) == 4
