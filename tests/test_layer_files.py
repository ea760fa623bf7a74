"""Layers in files: what was written comes back, and what is wrong with a file is named."""

import json
import struct

import numpy as np
import pytest
from instances import relative
from safetensors.numpy import save_file

from attnfit.inversion.layer_files import LayerFileError, load_layer, save_layer
from attnfit.problems import LayerInversion

rng = np.random.default_rng(0)
N, D, M, HEADS = 5, 4, 3, 2
X = rng.standard_normal((D, N))
B = rng.standard_normal((N, M))
W, V = rng.standard_normal((HEADS, D, D)), rng.standard_normal((HEADS, D, M))
SEEN = np.tri(N, dtype=bool) | np.eye(N, k=1, dtype=bool)
PROJECTIONS = {
    "W_Q": rng.standard_normal((D, 4)),
    "W_K": rng.standard_normal((D, 4)),
    "W_V": rng.standard_normal((D, 6)),
    "W_O": rng.standard_normal((6, M)),
}
BIASES = {"b_Q": rng.standard_normal(4), "b_V": rng.standard_normal(6), "b_O": rng.standard_normal(M)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.safetensors"


@pytest.mark.parametrize("mask", [None, "causal", SEEN])
@pytest.mark.parametrize("convention", ["rows", "columns"])
def test_bilinear_layers_come_back(path, mask, convention):
    bias = rng.standard_normal((HEADS, D))
    save_layer(path, W=W, V=V, key_bias=bias, mask=mask, convention=convention)
    expected = LayerInversion(W, V, B, mask=mask, convention=convention, key_bias=bias)
    assert relative(load_layer(path, B).output(X), expected.output(X)) < 1e-15


@pytest.mark.parametrize("mask", [None, "causal", SEEN])
@pytest.mark.parametrize("biases", [{}, BIASES])
def test_projections_come_back(path, mask, biases):
    save_layer(path, n_heads=HEADS, mask=mask, **PROJECTIONS, **biases)
    expected = LayerInversion.from_projections(*PROJECTIONS.values(), B, n_heads=HEADS, mask=mask, **biases)
    loaded = load_layer(path, B)
    assert relative(loaded.residuals(X), expected.residuals(X)) < 1e-15


def test_stacked_heads_need_no_count_and_outputs_may_be_concatenated(path):
    stacked = {name: np.stack(np.split(PROJECTIONS[name], HEADS, axis=1)) for name in ("W_Q", "W_K", "W_V")}
    save_file(stacked, path)
    wide = rng.standard_normal((N, 6))
    expected = LayerInversion.from_projections(
        *(PROJECTIONS[name] for name in stacked), None, wide, n_heads=HEADS
    )
    assert relative(load_layer(path, wide).output(X), expected.output(X)) < 1e-15


def test_half_precision_weights_and_known_tokens(path):
    save_layer(path, W=W.astype(np.float16), V=V.astype(np.float32))
    layer = load_layer(path, B, known={1: X[:, 1]}, mask="causal")
    assert layer.shape == (D, N - 1)
    assert not layer.layer.mask[0, 1]


@pytest.mark.parametrize(
    ("tensors", "words", "expected"),
    [
        ({"W": W}, {}, "tensor 'V' is missing: a layer has W and V, or W_Q, W_K, W_V and W_O; it has W"),
        ({"W_Q": W[0], "W_V": W[0]}, {}, "tensor 'W_K' is missing"),
        ({"query.weight": W[0]}, {}, "tensor 'query.weight' (of 1) is none of a layer"),
        ({"W": W, "V": V, "b_Q": B[0]}, {}, "tensor 'b_Q' (of 3) is none of a layer"),
        ({"W": W[:1], "V": V}, {}, "W has 1 heads but V has 2"),
        ({"W": W[0, :, :2], "V": V[0]}, {}, "W has shape (4, 2) in head 0; expected (4, 4)"),
        ({"W": np.full((D, D), np.nan), "V": V[0]}, {}, "W contains NaN at row 0, column 0"),
        ({"W": W, "V": V}, {"convention": "cols"}, "convention='cols' in the metadata must be one of rows"),
        ({"W": W, "V": V}, {"mask": "full"}, "mask='full' in the metadata must be 'causal'"),
        ({"W": W, "V": V, "mask": SEEN}, {"mask": "causal"}, "and the only mask"),
        (PROJECTIONS, {"n_heads": "two"}, "n_heads='two' in the metadata must be a positive integer"),
        (PROJECTIONS, {"n_heads": "3"}, "does not make n_heads=3 heads"),
        (PROJECTIONS | {"W_O": W[0]}, {"n_heads": "2"}, "W_O has shape"),
    ],
)
def test_what_is_no_layer(path, tensors, words, expected):
    save_file({name: np.ascontiguousarray(part) for name, part in tensors.items()}, path, metadata=words)
    with pytest.raises(LayerFileError) as caught:
        load_layer(path, B)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_nothing_wrong_is_written(path):
    with pytest.raises(ValueError, match="tensor 'V' is missing"):
        save_layer(path, W=W)
    with pytest.raises(ValueError, match="W has shape"):
        save_layer(path, W=W[0, :2], V=V[0])
    assert not path.exists()


def test_two_masks(path):
    save_layer(path, W=W, V=V, mask="causal")
    with pytest.raises(LayerFileError, match="it has a mask of its own; give no other"):
        load_layer(path, B, mask="causal")


def test_damaged_files(path):
    with pytest.raises(FileNotFoundError, match="no layer file at"):
        load_layer(path, B)
    save_layer(path, W=W, V=V)
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:40], whole[:-8], b"\x80\x04K\x01." + whole, b"x" * 200):
        path.write_bytes(content)
        with pytest.raises(LayerFileError, match="is not a whole safetensors file"):
            load_layer(path, B)


def test_number_types_that_numpy_lacks(path):
    header = json.dumps({"W": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(LayerFileError, match="tensor 'W' has type BF16, which NumPy cannot read"):
        load_layer(path, B)


def test_an_output_of_another_layer_is_not_blamed_on_the_file(path):
    save_layer(path, W=W, V=V)
    with pytest.raises(ValueError, match="B has 4 columns but V has 3") as caught:
        load_layer(path, np.zeros((N, 4)))
    assert not isinstance(caught.value, LayerFileError)
