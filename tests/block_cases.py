"""Random blocks, in NumPy and the same in PyTorch, for tests of their derivatives and of their inversion."""

import numpy as np
import torch

from attnfit.inversion import Block, Heads, Mlp, Norm
from attnfit.problems import Rotary

TORCH_ACTS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
    "tanh": torch.tanh,
}


def random_block(
    seed, d=16, n_heads=4, gain=1.0, order="pre", mask="causal", centred=False, mlp=True, n_keys=None, v=None,
    activation="gelu", gated=False, rotary=None, softcap=None, qk=None, biases=False, eps=1e-6,
):  # fmt: skip
    """A block whose branches are as large as `gain` beside a stream of normal tokens."""
    rng = np.random.default_rng([seed, 1])
    N, h, G = rng.standard_normal, d // n_heads, n_keys or n_heads
    v = v or h

    def norm(width=d):
        return Norm(1 + 0.1 * N(width), 0.1 * N(width), eps, centred)

    heads = Heads(
        N((n_heads, d, h)) / d**0.5, N((G, d, h)) / d**0.5, N((G, d, v)) / d**0.5,
        gain * N((n_heads, v, d)) / d**0.5,
        *((N((n_heads, h)), N((G, h)), N((G, v)), N(d)) if biases else ()),
        softcap=softcap,
        q_norm=None if qk is None else norm(h if qk == "head" else n_heads * h),
        k_norm=None if qk is None else norm(h if qk == "head" else G * h),
    )  # fmt: skip
    perceptron = None
    if mlp:
        perceptron = Mlp(
            N((d, 4 * d)) / d**0.5, gain * N((4 * d, d)) / (4 * d) ** 0.5,
            *((N(4 * d), N(d)) if biases else (None, None)), activation,
            N((d, 4 * d)) / d**0.5 if gated else None,
        )  # fmt: skip
    norms = [norm() for _ in range(4 if order == "sandwich" else 2)]
    return Block(heads, perceptron, norms, order, mask, rotary)


def outputs(blocks, T, keys=None):
    for block in blocks:
        T = block.output(T, keys)
    return T


def torch_block(block, keys=None):
    """The same block of PyTorch's own functions, as a function of tokens."""
    F, t = torch.nn.functional, lambda a: torch.tensor(np.array(a))
    d = block.d

    def normed(norm, x):
        if norm is None:
            return x
        width = (norm.width,)
        if norm.centred:
            return F.layer_norm(x, width, t(norm.gains), t(norm.bias), norm.eps)
        return F.rms_norm(x, width, t(norm.gains), norm.eps) + t(norm.bias)

    def turned(x):
        if block.rotary is None:
            return x
        w = t(block.rotary.of_width(x.shape[-1], 1)[0])
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * w
        n = len(w)
        if block.rotary.layout == "half":
            a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
        else:
            a, b, rest = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2], x[..., 2 * n :]
        one, other = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        if block.rotary.layout == "half":
            return torch.cat([one, other, rest], -1)
        return torch.cat([torch.stack([one, other], -1).flatten(-2), rest], -1)

    def attended(u):
        heads, read = block.heads, u if keys is None else t(keys)
        H, G = len(heads.W_Q), len(heads.W_K)
        q = torch.einsum("nd,Hdh->Hnh", u, t(heads.W_Q)) + t(heads.b_Q)[:, None]
        k = torch.einsum("nd,Hdh->Hnh", read, t(heads.W_K)) + t(heads.b_K)[:, None]
        v = torch.einsum("nd,Hdh->Hnh", read, t(heads.W_V)) + t(heads.b_V)[:, None]
        for norm, which in ((heads.q_norm, 0), (heads.k_norm, 1)):
            if norm is not None:
                x = (q, k)[which]
                flat = x.transpose(0, 1).reshape(len(u), -1, norm.width)
                x = normed(norm, flat).reshape(len(u), x.shape[0], -1).transpose(0, 1)
                q, k = (x, k) if which == 0 else (q, x)
        if keys is None:
            q, k = turned(q), turned(k)
        k, v = (x.repeat_interleave(H // G, 0) for x in (k, v))
        z = heads.scale * q @ k.transpose(-1, -2)
        if heads.softcap is not None:
            z = heads.softcap * torch.tanh(z / heads.softcap)
        if keys is None:
            z = z.masked_fill(~torch.tensor(block.reach(len(u))), -torch.inf)
        return torch.einsum("Hnv,Hvd->nd", z.softmax(-1) @ v, t(heads.W_O)) + t(heads.b_O)

    def mixed(x):
        mlp, act = block.mlp, TORCH_ACTS[block.mlp.activation]
        up = x @ t(mlp.W_1) + t(mlp.b_1)
        inner = act(up) if mlp.gate is None else act(x @ t(mlp.gate) + t(mlp.gate_bias)) * up
        return inner @ t(mlp.W_2) + t(mlp.b_2)

    def run(x):
        n = block.norms
        if block.order == "pre":
            w = x + attended(normed(n[0], x))
            return w + mixed(normed(n[1], w))
        if block.order == "parallel":
            return x + attended(normed(n[0], x)) + mixed(normed(n[1], x))
        if block.order == "post":
            w = normed(n[0], x + attended(x))
            return normed(n[1], w + mixed(w))
        w = x + normed(n[1], attended(normed(n[0], x)))
        return w + normed(n[3], mixed(normed(n[2], w)))

    assert d
    return run


HALF, INTERLEAVED = Rotary(theta=100.0, n=2), Rotary(frequencies=[0.9, 0.1], layout="interleaved")
CASES = {
    "pre": {"biases": True},
    "pre, gated, rotary, grouped": {
        "gated": True, "activation": "silu", "rotary": HALF, "n_keys": 2, "v": 3, "biases": True,
    },
    "pre, normed queries": {"qk": "head", "rotary": INTERLEAVED, "n_keys": 1, "activation": "gelu_tanh"},
    "pre, capped, window": {"softcap": 1.5, "mask": "causal:2", "activation": "tanh"},
    "parallel": {"order": "parallel", "centred": True, "rotary": HALF, "mask": None},
    "post": {"order": "post", "centred": True, "mask": None, "biases": True},
    "sandwich": {
        "order": "sandwich", "gated": True, "activation": "gelu_tanh", "softcap": 2.0, "n_keys": 2,
    },
    "sandwich, all queries normed": {"order": "sandwich", "qk": "all", "rotary": HALF, "activation": "relu"},
}  # fmt: skip
