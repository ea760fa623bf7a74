"""Transformer blocks as functions: against PyTorch's own, and their bounds against what they bound."""

import mpmath
import numpy as np
import pytest
import torch
from block_cases import CASES, outputs, random_block, torch_block

from attnfit.inversion import Block, BlockInversion, Heads, Mlp, Norm, identifiable
from attnfit.inversion.block_bounds import contracts, token_bounds
from attnfit.objectives.block_parts import ACTIVATIONS
from attnfit.objectives.block_stack import Stack, TokenMap
from attnfit.problems import Rotary

N, D = 4, 16


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def blocks_of(case):
    return [random_block(seed, D, **CASES[case]) for seed in (0, 1)]


def torch_of(blocks):
    runs = [torch_block(block) for block in blocks]
    return lambda x: runs[1](runs[0](x))


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_derivatives_are_those_of_automatic_differentiation(case, rng):
    blocks = blocks_of(case)
    T, B = rng.standard_normal((N, D)), rng.standard_normal((N, D))
    problem, run, x = BlockInversion(blocks, B), torch_of(blocks), torch.tensor(T)
    np.testing.assert_allclose(problem.output(T.T), run(x), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(outputs(blocks, T), run(x), rtol=1e-11, atol=1e-12)

    J = torch.func.jacrev(run)(x).numpy().transpose(0, 1, 3, 2).reshape(N * D, D * N)
    size = np.abs(J).max()
    np.testing.assert_allclose(problem.jacobian(T.T), J, rtol=1e-9, atol=1e-12 * size)
    v, u = rng.standard_normal((D, N)), rng.standard_normal((N, D))
    np.testing.assert_allclose(
        problem.jacobian_product(T.T, v).reshape(-1), J @ v.reshape(-1), rtol=1e-9, atol=1e-11 * size
    )
    np.testing.assert_allclose(
        problem.jacobian_transpose_product(T.T, u).reshape(-1),
        J.T @ u.reshape(-1), rtol=1e-9, atol=1e-11 * size,
    )  # fmt: skip

    def loss(y):
        return 0.5 * torch.sum((run(y.T) - torch.tensor(B)) ** 2)

    value, gradient = problem.value_and_gradient(T.T)
    at = torch.tensor(T.T.copy(), requires_grad=True)
    loss(at).backward()
    assert value == pytest.approx(float(loss(x.T)), rel=1e-12)
    np.testing.assert_allclose(gradient, at.grad, rtol=1e-9, atol=1e-11 * float(at.grad.abs().max()))
    H = torch.func.hessian(loss)(x.T.contiguous()).numpy().reshape(N * D, N * D)
    np.testing.assert_allclose(problem.hessian(T.T), H, rtol=1e-8, atol=1e-10 * np.abs(H).max())
    np.testing.assert_allclose(
        problem.hvp(T.T, v).reshape(-1), H @ v.reshape(-1), rtol=1e-8, atol=1e-10 * np.abs(H).max()
    )


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("mask", "causal") is not None])
def test_one_token_after_others_is_a_row_of_the_whole(case, rng):
    blocks, T = blocks_of(case), rng.standard_normal((N, D))
    stack = Stack(blocks, N)
    at = stack.forward(T)
    J = stack.jacobian(at, np.arange(N)).reshape(N, D, D, N)
    token = TokenMap(stack, 0, stack.caches(T[:0]))
    for i in range(N):
        fresh = TokenMap(stack, i, stack.caches(T[:i]))
        for one in (token, fresh):
            np.testing.assert_allclose(one.output(T[i : i + 1])[0], at.output[i], rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(one.jacobian(T[i]), J[i, :, :, i], rtol=1e-9, atol=1e-11)
        rows = stack.row_outputs(T[:i], np.vstack([T[i], T[0], T[i]]), i)
        np.testing.assert_allclose(rows[[0, 2]], at.output[[i, i]], rtol=1e-11, atol=1e-12)
        token = token.after(T[i])


def test_cross_attention_reads_given_states(rng):
    block, keys, T = random_block(0, D), rng.standard_normal((7, D)), rng.standard_normal((N, D))
    problem = BlockInversion(block, rng.standard_normal((N, D)), keys=keys)
    run = torch_block(block, keys)
    np.testing.assert_allclose(problem.output(T.T), run(torch.tensor(T)), rtol=1e-11)
    J = torch.func.jacrev(run)(torch.tensor(T)).numpy().transpose(0, 1, 3, 2).reshape(N * D, D * N)
    np.testing.assert_allclose(problem.jacobian(T.T), J, rtol=1e-9, atol=1e-11)
    for i in range(N):
        token = TokenMap(problem.stack, i, problem.stack.caches(T[:i]))
        own = J.reshape(N, D, D, N)[i, :, :, i]
        np.testing.assert_allclose(token.jacobian(T[i]), own, rtol=1e-9, atol=1e-11)


def test_moments_of_the_tokens_are_further_columns(rng):
    norm = Norm(1.0 + rng.random(D), rng.standard_normal(D), 0.0, centred=True)
    T = norm.forward(rng.standard_normal((N, D)))[0]
    block = random_block(0, D, order="post", centred=True, mask=None)
    problem = BlockInversion(block, block.output(T), input_norm=norm)
    assert np.abs(problem.residuals(T.T)).max() < 1e-12

    def run(x):
        v = (x - torch.tensor(norm.bias)) / torch.tensor(norm.gains)
        return torch.cat([torch_block(block)(x), v.mean(-1)[:, None], (v * v).mean(-1)[:, None]], -1)

    J = torch.func.jacrev(run)(torch.tensor(T)).numpy().transpose(0, 1, 3, 2).reshape(-1, D * N)
    np.testing.assert_allclose(problem.jacobian(T.T), J, rtol=1e-9, atol=1e-11)
    u = rng.standard_normal(problem.B.shape)
    np.testing.assert_allclose(
        problem.jacobian_transpose_product(T.T, u).reshape(-1), J.T @ u.reshape(-1), rtol=1e-9, atol=1e-11
    )
    # A LayerNorm at the end hides two numbers a token, and these two equations bring them back.
    bare = BlockInversion(block, block.output(T))
    assert (bare.rank, problem.rank) == (D - 2, D)
    assert np.sum(np.linalg.svd(bare.jacobian(T.T), compute_uv=False) > 1e-4) == N * (D - 2)
    assert identifiable(problem, T.T).rank == N * D


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_constants_of_activations_are_the_largest_derivatives(name):
    act, grid = ACTIVATIONS[name], np.linspace(-8.0, 8.0, 8001)
    functions = {
        "gelu": lambda x: x * mpmath.ncdf(x),
        "gelu_tanh": lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + 0.044715 * x**3))),
        "silu": lambda x: x / (1 + mpmath.exp(-x)),
        "relu": lambda x: max(x, 0),
        "tanh": mpmath.tanh,
    }
    some = grid[::400] + 0.01
    for x in some:
        assert float(act.value(np.array(x))) == pytest.approx(float(functions[name](x)), rel=1e-12, abs=1e-14)
        slope = float(mpmath.diff(functions[name], x))
        assert float(act.slope(np.array(x))) == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert np.abs(act.slope(grid)).max() == pytest.approx(act.steepest, rel=2e-4)
    assert np.abs(act.slope(grid)).max() <= act.steepest
    if name == "relu":
        assert act.sharpest == np.inf
        return
    second = np.abs(act.slope(grid + 1e-30j).imag) / 1e-30
    assert second.max() == pytest.approx(act.sharpest, rel=2e-4) and second.max() <= act.sharpest


def derivatives(jacobian, x, directions):
    """The norm of a Jacobian, and the largest second derivative along unit directions, by imaginary steps."""
    bent = [jacobian(x + 1e-30j * v).imag @ v / 1e-30 for v in directions]
    return np.linalg.norm(jacobian(x), 2), max(np.linalg.norm(one) for one in bent)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("centred", [False, True])
def test_bounds_of_norms_are_reached(centred, rng):
    norm = Norm(np.ones(7), None, 0.0, centred)
    x = rng.standard_normal(7)
    x -= x.mean() * centred
    bounds, size = norm.bounds(x, 0.0), np.linalg.norm(x)

    def jacobian(y):
        state = norm.forward(y)[1]
        return norm.push(state, np.eye(7)).T

    # The second derivative is largest along x at an angle whose tangent is the root of two.
    across = np.linalg.svd(np.vstack([x, np.ones(7)]))[2][-1]
    angles = np.linspace(0.0, np.pi, 200)
    directions = np.outer(np.cos(angles), x / size) + np.outer(np.sin(angles), across)
    first, second = derivatives(jacobian, x, directions)
    assert first == pytest.approx(bounds.first, rel=1e-9)
    assert 0.999 * bounds.second < second <= bounds.second * (1 + 1e-12)
    assert np.linalg.norm(norm.forward(x)[0]) == pytest.approx(bounds.size, rel=1e-12)
    # Closer to the origin everything is steeper.
    nearer = norm.bounds(x, 0.5 * float(size))
    assert nearer.first == pytest.approx(2.0 * bounds.first)
    assert nearer.second == pytest.approx(4.0 * bounds.second)
    assert norm.bounds(x, 10.0).first == np.inf


BOUNDED = ["pre", "pre, gated, rotary, grouped", "parallel", "sandwich"]


@pytest.mark.parametrize("case", BOUNDED)
def test_bounds_hold_everywhere_in_the_ball(case, rng):
    kwargs = CASES[case] | {"softcap": None, "mask": "causal"}
    blocks = [random_block(seed, D, gain=0.5, **kwargs) for seed in (0, 1)]
    T, radius = rng.standard_normal((N, D)), 0.4
    stack, directions = Stack(blocks, N), unit(rng.standard_normal((20, D)))
    for i in (0, N - 1):
        token = TokenMap(stack, i, stack.caches(T[:i]))
        bounds = token_bounds(token, T[i], radius)
        for move in unit(rng.standard_normal((10, D))):
            near = T[i] + radius * move
            first, second = derivatives(token.jacobian, near, directions)
            assert first <= bounds.first and second <= bounds.second
            assert np.linalg.norm(token.jacobian(near) - np.eye(D), 2) <= bounds.branch


def test_bounds_of_heads_are_those_of_the_formula(rng):
    """Written out once more, head by head, with keys turned by their distance from the query."""
    block = random_block(0, D, n_heads=2, n_keys=1, biases=True, rotary=Rotary(theta=100.0))
    heads, stack, T = block.heads, Stack([block], N), rng.standard_normal((N, D))
    token, largest = TokenMap(stack, N - 1, stack.caches(T[:-1])), 1.7
    u = np.stack([block.norms[0].forward(t)[0] for t in T])
    found = heads.bounds(_first_state(token, T[-1]), largest)
    size = first = second = 0.0
    frequencies = 100.0 ** (-np.arange(0, D // 2, 2) / (D // 2))
    angle = (N - 1 - np.arange(N))[:, None] * frequencies
    for i in range(2):
        W_Q, W_K, W_V = heads.W_Q[i], heads.W_K[0], heads.W_V[0]
        keys, half = (u @ W_K + heads.b_K[0])[:-1], D // 4
        cos, sin = np.cos(-angle[:-1]), np.sin(-angle[:-1])
        a, b = keys[:, :half], keys[:, half:]
        turned = np.hstack([a * cos - b * sin, b * cos + a * sin])
        norm = lambda M: np.linalg.norm(M, 2)  # noqa: E731
        own = 2 * norm(W_Q @ W_K.T) * largest
        own += np.linalg.norm(W_Q @ heads.b_K[0]) + np.linalg.norm(W_K @ heads.b_Q[i])
        z1 = heads.scale * max(own, *(np.linalg.norm(W_Q @ key) for key in turned))
        z2 = 2 * heads.scale * norm(W_Q @ W_K.T)
        values = np.linalg.norm((u @ W_V + heads.b_V[0])[:-1], axis=1)
        v = max(norm(W_V) * largest + np.linalg.norm(heads.b_V[0]), *values)
        size += norm(heads.W_O[i]) * v
        first += norm(heads.W_O[i]) * (norm(W_V) + v * z1)
        second += norm(heads.W_O[i]) * (2 * norm(W_V) * z1 + v * z2 + 4 * v * z1**2)
    assert found.size == pytest.approx(size + np.linalg.norm(heads.b_O), rel=1e-9)
    assert found.first == pytest.approx(first, rel=1e-9) and found.second == pytest.approx(second, rel=1e-9)


def _first_state(token, x):
    kept = token.forward(x[None])[1][0].heads
    return kept._replace(K=kept.K[0], V=kept.V[0], k=kept.k[0], q=kept.q[0], P=kept.P[0])


@pytest.mark.parametrize("gated", [False, True])
def test_bounds_of_perceptrons_are_those_of_the_formula(gated, rng):
    mlp = random_block(0, D, gated=gated, biases=True, activation="tanh").mlp
    x, radius, norm = rng.standard_normal(D), 0.3, np.linalg.norm
    found = mlp.bounds(x, radius)
    down, W_1 = norm(mlp.W_2, 2), norm(mlp.W_1, 2)
    up = np.abs(x @ mlp.W_1 + mlp.b_1) + radius * norm(mlp.W_1, axis=0)
    bent = 4.0 / 3.0**1.5
    if gated:
        gate, W_g = np.abs(x @ mlp.gate) + radius * norm(mlp.gate, axis=0), norm(mlp.gate, 2)
        size = norm(gate * up)
        first, second = W_g * up.max() + W_1 * gate.max(), bent * W_g**2 * up.max() + 2 * W_g * W_1
    else:
        size, first, second = norm(up), W_1, bent * W_1**2
    assert found.size == pytest.approx(down * size + norm(mlp.b_2), rel=1e-9)
    assert found.first == pytest.approx(down * first, rel=1e-9)
    assert found.second == pytest.approx(down * second, rel=1e-4)


@pytest.mark.parametrize("order", ["pre", "parallel", "sandwich", "post"])
def test_bounds_are_composed_by_the_chain_rule(order, rng):
    """With heads that add nothing, two norms and a perceptron are left."""
    block = random_block(0, D, order=order, gain=0.7)
    heads = Heads(block.heads.W_Q, block.heads.W_K, block.heads.W_V, 0.0 * block.heads.W_O)
    norms = [None, None, *block.norms[2:]] if order == "sandwich" else [None, block.norms[1]]
    block = Block(heads, block.mlp, norms, order, "causal")
    x, radius = rng.standard_normal(D), 0.2
    stack = Stack([block], 1)
    found = token_bounds(TokenMap(stack, 0, stack.caches(x[None][:0])), x, radius)
    if order == "post":
        m = block.mlp.bounds(x, radius)
        last = block.norms[1].bounds(x + block.mlp.forward(x)[0], radius * (1 + m.first))
        first = last.first * (1 + m.first)
        second, branch = last.second * (1 + m.first) ** 2 + last.first * m.second, np.inf
    else:
        inner = block.norms[2] if order == "sandwich" else block.norms[1]
        n, u = inner.bounds(x, radius), inner.forward(x)[0]
        m = block.mlp.bounds(u, n.first * radius)
        first, second = m.first * n.first, m.second * n.first**2 + m.first * n.second
        if order == "sandwich":
            outer = block.norms[3].bounds(block.mlp.forward(u)[0], first * radius)
            first, second = outer.first * first, outer.second * first**2 + outer.first * second
        branch, first = first, 1 + first
    assert found.first == pytest.approx(first, rel=1e-9)
    assert found.second == pytest.approx(second, rel=1e-9)
    assert found.branch == pytest.approx(branch, rel=1e-9)


def test_logits_with_norms_or_a_cap_have_no_bound(rng):
    for case in ("pre, normed queries", "pre, capped, window", "sandwich, all queries normed"):
        stack = Stack([random_block(0, D, **CASES[case])], 2)
        token = TokenMap(stack, 0, stack.caches(np.zeros((0, D))))
        assert token_bounds(token, rng.standard_normal(D), 0.1) is None


def test_what_contracts_has_one_input(rng):
    T = rng.standard_normal((2, D))
    for gain, wanted in ((1e-3, True), (1.0, False)):
        block = random_block(0, D, gain=gain)
        stack = Stack([block], 2)
        token = TokenMap(stack, 1, stack.caches(T[:1]))
        assert contracts(token, block.output(T)[1]) is wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norms": [Norm(np.ones(4))] * 3}, "order 'pre' has 2"),
        ({"norms": [Norm(np.ones(3)), None]}, "norms\\[0\\] has width 3; tokens have 4"),
        ({"order": "middle"}, "order must be"),
        ({"mlp": Mlp(np.ones((5, 2)), np.ones((2, 5)))}, "W_1 of mlp has 5 rows; tokens have 4"),
        ({"mask": "causal:0"}, "mask must be"),
        ({"rotary": Rotary(n=2), "positions": [0.0]}, "positions has 1 entries"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, said):
    one = np.ones((1, 4, 4))
    given = {"heads": Heads(one, one, one, one), "norms": (None, None)} | change
    with pytest.raises(ValueError, match=said):
        Block(**given).output(np.ones((3, 4)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda one: Heads(one, one, one, one[:, :2]), "W_O has shape"),
        (lambda one: Heads(np.tile(one, (3, 1, 1)), np.tile(one, (2, 1, 1)), one, one), "divides"),
        (lambda one: Heads(one[0], one, one, one), "W_Q has shape"),
        (lambda one: Heads(one, one * np.nan, one, one), "W_K is not finite in head 0"),
        (lambda one: Heads(one, one, one, one, b_Q=np.ones(4)), "b_Q must hold finite numbers"),
        (lambda one: Heads(one, one, one, one, softcap=0.0), "softcap must be positive"),
        (lambda one: Heads(one, one, one, one, scale=-1.0), "scale must be positive"),
        (lambda one: Heads(one, one, one, one, q_norm=Norm(np.ones(3))), "q_norm has width 3"),
        (lambda one: Norm(np.ones(4), eps=-1.0), "eps must be"),
        (lambda one: Norm([1.0, np.inf]), "gains is not finite at index 1"),
        (lambda one: Norm(np.ones(4), np.ones(3)), "bias has shape"),
        (lambda one: Mlp(one[0], np.ones((4, 3))), "W_2 has shape"),
        (lambda one: Mlp(one[0], one[0], activation="swish"), "activation"),
        (lambda one: Mlp(one[0], one[0], gate=np.ones((4, 2))), "gate has shape"),
        (lambda one: Mlp(one[0], one[0], gate_bias=np.ones(4)), "without gate"),
    ],
)
def test_weights_are_read_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make(np.ones((1, 4, 4)))
