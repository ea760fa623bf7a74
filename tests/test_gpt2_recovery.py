"""The experiment on a GPT-2 of one's own, on a tiny random one saved to a directory."""

import json
from types import SimpleNamespace

import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

from attnfit.audit import AuditError, load, masked, masked_relaxation, reproduction  # noqa: E402
from attnfit.audit.relaxation import soft_loss  # noqa: E402
from attnfit.cli.app import app  # noqa: E402
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
    # As a device of its own, the processor gets a copy of the model, as a graphics processor would.
    arguments = [
        home,
        "--texts",
        texts,
        "--out",
        out,
        "--steps",
        150,
        "--until",
        0.2,
        "--quick",
        "--device",
        "cpu:0",
    ]
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


class Elsewhere(torch.nn.Module):
    """A model on a device without memory, which refuses any tensor from elsewhere."""

    device = torch.device("meta")
    n_vocabulary = 16

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(self.n_vocabulary, 4, device="meta")
        self.embeddings = self.table.weight

    def on(self, device):
        assert device == "meta"
        return self

    def scores(self, states):
        return states @ self.embeddings.T

    def base(self, inputs_embeds, use_cache):
        return (inputs_embeds,)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.scores(self.table(input_ids)))


def test_nothing_stays_on_the_processor_where_another_device_is_named():
    model, logits = Elsewhere(), torch.zeros((2, 2, 16), device="meta", requires_grad=True)
    loss = soft_loss(model, logits, torch.zeros((2, 5), dtype=torch.int64, device="meta"))
    loss.sum().backward()
    assert loss.device.type == logits.grad.device.type == "meta"
    # What cannot be had there are the numbers of the history, and the loss of the fine-tuning.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        masked_relaxation(model, [3, 4, 5], 2, steps=1, device="meta")
    with pytest.raises(RuntimeError, match="item"):
        gpt2_recovery.memorise(model, lambda _: {"input_ids": [1, 2, 3]}, ["text"], 1, 0.0)


def test_where_soft_tokens_descend(home):
    model = load(home)
    assert model.on("cpu") is model
    one, other = (
        masked_relaxation(model, [3, 4, 5], 2, steps=20, step_size=0.1, n_repeats=3, device=device)
        for device in ("cpu", "cpu:0")
    )
    assert (one.tokens == other.tokens).all()
    assert one.losses == pytest.approx(other.losses, rel=1e-6)
    missing = ["nowhere", *([] if torch.cuda.is_available() else ["cuda"])]
    for device in missing:
        with pytest.raises(AuditError, match=f"device '{device}' cannot be used here"):
            masked_relaxation(model, [3, 4, 5], 2, steps=1, device=device)


def test_the_device_from_the_shell():
    refused = CliRunner().invoke(app, ["reproduce", "two-layer", "--device", "cuda"])
    assert refused.exit_code == 2
    assert "--device goes with data-recovery" in " ".join(refused.output.split())
    if not torch.cuda.is_available():
        refused = CliRunner().invoke(app, ["reproduce", "data-recovery", "--quick", "--device", "cuda"])
        assert refused.exit_code == 2
        assert "device 'cuda' cannot be used here" in " ".join(refused.output.split())
