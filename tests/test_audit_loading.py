"""A directory is a gate: nothing in it makes code run, weights go missing or two models look like one."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.utils import import_utils  # noqa: E402

from attnfit import audit  # noqa: E402
from attnfit.audit.models import gguf as gguf_module  # noqa: E402
from attnfit.audit.models.model import Model  # noqa: E402
from attnfit.audit.models.tiny import SHIPPED  # noqa: E402


@pytest.fixture
def home(tmp_path):
    """A directory of its own with the tiny model's files."""
    return shutil.copytree(SHIPPED, tmp_path / "model")


def change_weights(home, change):
    tensors = load_file(home / "model.safetensors")
    change(tensors)
    save_file(tensors, home / "model.safetensors", metadata={"format": "pt"})


def change_config(home, **settings):
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(config | settings))


def test_missing_weights_are_refused(home):
    change_weights(home, lambda t: [t.pop(name) for name in list(t) if ".mlp." in name])
    with pytest.raises(audit.MalformedModel, match=r"lacks weights.*transformer\.h\.0\.mlp.* and 11 more"):
        audit.load(home)


def test_weights_of_another_shape_are_refused(home):
    change_weights(home, lambda t: t.update({"transformer.ln_f.weight": torch.ones(63)}))
    with pytest.raises(audit.MalformedModel, match=r"transformer\.ln_f\.weight \(63,\) instead of \(64,\)"):
        audit.load(home)


def test_weights_that_are_not_used_are_told(home):
    change_weights(home, lambda t: t.update({"transformer.h.9.ln_1.weight": torch.ones(64)}))
    with pytest.warns(UserWarning, match=r"does not use: transformer\.h\.9\.ln_1\.weight"):
        audit.load(home)


def test_every_number_is_in_the_fingerprint(home):
    before = audit.load(home).fingerprint
    names = list(load_file(home / "model.safetensors"))
    seen = {before}
    for name in names[::7]:

        def nudge(tensors, name=name):
            tensors[name].view(-1)[-2] += 1e-3

        change_weights(home, nudge)
        seen.add(audit.load(home).fingerprint)
    assert len(seen) == 1 + len(names[::7])


STUB = """
def get_kernel(*_, **__):
    open({mark!r}, "w").close()
    raise RuntimeError("asked for code")
get_local_kernel = get_loaded_kernels = get_kernel
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {{"__init__": lambda self, *_, **__: None, "__call__": lambda self, part: part}})
"""


@pytest.mark.parametrize("depth", ["top", "nested"])
@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("form", ["{}", "_{}", "_{}_internal"])
def test_settings_that_name_code_are_not_followed(home, name, form, depth):
    evil = {
        form.format(name): "evil/kernel",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    change_config(home, **(evil if depth == "top" else {"parts": [{"inner": evil}]}))
    config = audit.load(home).module.config
    assert config._attn_implementation == "sdpa"
    assert config._experts_implementation != "evil/kernel"
    assert "evil" not in json.dumps(config.to_dict())


def test_no_package_of_kernels_is_asked(home, tmp_path):
    mark, packages = tmp_path / "asked", tmp_path / "packages"
    version = import_utils.KERNELS_MIN_VERSION
    (packages / f"kernels-{version}.dist-info").mkdir(parents=True)
    (packages / f"kernels-{version}.dist-info" / "METADATA").write_text(
        f"Name: kernels\nVersion: {version}\n"
    )
    (packages / "kernels").mkdir()
    (packages / "kernels" / "__init__.py").write_text(STUB.format(mark=str(mark)))
    (packages / "kernels" / "layer").mkdir()
    (packages / "kernels" / "layer" / "__init__.py").write_text("class Mode: pass\n")
    (packages / "kernels" / "layer" / "mode.py").write_text("class Mode: pass\n")
    change_config(home, _attn_implementation="evil/kernel", _experts_implementation="evil/kernel")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), *sys.path])}
    loads = "from attnfit import audit; import sys; audit.load(sys.argv[1])"
    plain = (
        "import transformers, sys; "
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], allow_all_kernels=True)"
    )
    told = subprocess.run(
        [sys.executable, "-c", loads, home], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert not mark.exists()
    # The stub is one that the library itself would have asked.
    subprocess.run([sys.executable, "-c", plain, home], env=environment, capture_output=True, check=False)
    assert mark.exists()


def test_quantised_weights_are_refused_in_words(home):
    change_config(home, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(audit.MalformedModel, match=r"quantised \(bitsandbytes.*save the model dequantised"):
        audit.load(home)


def index(home, names):
    """Move the weights into a shard, and let an index name files."""
    (home / "model.safetensors").rename(home / "model-1.safetensors")
    weights = {f"w{place}": name for place, name in enumerate(names)}
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def test_shards_are_read(home):
    whole = audit.load(home).fingerprint
    tensors = load_file(home / "model.safetensors")
    (home / "model.safetensors").unlink()
    half = len(tensors) // 2
    for shard, part in ((1, list(tensors)[:half]), (2, list(tensors)[half:])):
        save_file({name: tensors[name] for name in part}, home / f"m-{shard}.safetensors")
    (home / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {n: f"m-{1 + (i >= half)}.safetensors" for i, n in enumerate(tensors)}})
    )
    assert audit.load(home).fingerprint == whole


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("pytorch_model.bin", audit.PickleRefused, "only files ending in .safetensors"),
        ("../../x.safetensors", audit.MalformedModel, "not the name of a file beside it"),
        ("/etc/passwd", audit.MalformedModel, "not the name of a file beside it"),
        ("..\\x.safetensors", audit.MalformedModel, "not the name of a file beside it"),
        ("..", audit.MalformedModel, "only files ending in"),
        (7, audit.MalformedModel, "not the name of a file beside it"),
        ("link.safetensors", audit.MalformedModel, "a link to elsewhere"),
        ("gone.safetensors", audit.MalformedModel, "which is not there"),
        ("notes.json", audit.MalformedModel, "only files ending in"),
    ],
)
def test_an_index_names_files_beside_it(home, tmp_path, bomb, monkeypatch, name, kind, message):
    torch.save(bomb, home / "pytorch_model.bin")
    (tmp_path / "elsewhere.safetensors").write_bytes(b"x")
    (home / "link.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    index(home, ["model-1.safetensors", name])
    monkeypatch.setattr("attnfit.audit.models.directory.load_file", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(kind, match=message):
        audit.load(home)


def test_adapters_are_refused(home):
    (home / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(audit.MalformedModel, match="merge it"):
        audit.load(home)


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"n_ctx": 7, "n_positions": 9}, 9),
        ({"max_position_embeddings": 5, "n_positions": 9}, 5),
        ({"max_seq_len": 3, "seq_length": 4}, 3),
        ({"seq_length": 4}, 4),
        ({}, sys.maxsize),
    ],
)
def test_the_longest_text(settings, length):
    class Module:
        class config:
            get_text_config = staticmethod(lambda: type("Config", (), settings))

    made = type("Any", (), {"module": Module, "n_reserved": 0, "first_position": 0})
    assert Model.max_length.fget(made) == length


# ---- the metadata of a GGUF file ---------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value)) + value


def gguf_file(path, value=b"llama", tail=b"\0" * 64):
    settings = [
        text(b"general.architecture") + struct.pack("<I", 8) + text(value),
        text(b"numbers") + struct.pack("<IIQ", 9, 4, 3) + struct.pack("<3I", 1, 2, 3),
        text(b"words") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"bc"),
        text(b"nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 7, 2) + b"\1\0",
        text(b"real") + struct.pack("<Id", 12, 0.5),
    ]
    tensors = [text(b"w") + struct.pack("<IQQIQ", 2, 8, 2, 0, 0)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings)) + b"".join(settings + tensors)
    path.write_bytes(head + tail)
    return len(head)


def test_the_key_of_the_cache_is_all_metadata(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    size = gguf_file(file)
    key = gguf_module._identity(file)
    gguf_file(file, tail=b"\1" * 64)
    assert gguf_module._identity(file) == key
    content = bytearray(file.read_bytes())
    for place in (size - 1, size - 20):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert gguf_module._identity(file) != key
    gguf_file(file, value=b"gpt2_")
    assert gguf_module._identity(file) != key
    # A vocabulary longer than any fixed part of the file.
    gguf_file(file, value=b"a" * 2**21)
    long = gguf_module._identity(file)
    gguf_file(file, value=b"a" * (2**21 - 1) + b"b")
    assert gguf_module._identity(file) != long


@pytest.mark.parametrize("cut", [10, 30, 60, 120])
def test_metadata_cut_short_are_refused(tmp_path, cut):
    file = tmp_path / "m.gguf"
    gguf_file(file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="ends within"):
        gguf_module._identity(file)
