"""Inversion of transformer blocks: what is found, what is proven, and what is never claimed."""

import mpmath
import numpy as np
import pytest
import torch
from block_cases import outputs, random_block, torch_block
from scipy import optimize

from attnfit import minimize
from attnfit.inversion import Block, BlockInversion, Heads, Mlp, Norm, homotopy, identifiable, recover
from attnfit.inversion.homotopy import Equation, follow, newton, sign
from attnfit.objectives.block_stack import Stack, TokenMap

D = 16


def planted(seed, n, gain, n_blocks=1, d=D, **kwargs):
    blocks = [random_block([seed, k], d, gain=gain, **kwargs) for k in range(n_blocks)]
    T = np.random.default_rng([seed, 2]).standard_normal((n, d))
    return blocks, T, outputs(blocks, T)


def equation(block, B):
    """The map of a single token."""
    token = TokenMap(Stack([block], 1), 0, [None])
    return Equation(lambda x: token.output(x[None])[0], token.jacobian, B[0])


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_small_branches_are_inverted_token_by_token(seed, n_blocks):
    blocks, T, B = planted(seed, 12, 0.3, n_blocks)
    found = recover(BlockInversion(blocks, B), random_state=0, n_starts=2)
    np.testing.assert_allclose(found.x, T.T, atol=1e-9)
    # As many equations as unknowns: that is no recovery.
    assert found.verdict == "ambiguous" and len(found.inputs) == 1
    assert found.signs.tolist() == [1] and found.sign_sum == 1
    assert found.identifiability.counting == "isolated, often not unique"
    assert np.all(np.linalg.norm(found.x - T.T, axis=0) <= found.radius) and found.radius.max() < 1e-6
    assert not found.certificate.valid and "radius" in found.certificate.reason


@pytest.mark.parametrize("mask", ["causal", None])
def test_signs_of_all_inputs_of_one_token_add_to_one(mask):
    """All inputs from SciPy's root finder and many starts; determinants by automatic differentiation."""
    several = 0
    for seed in range(8):
        # With a larger eps the map is smooth at the origin, and no input hides there.
        blocks, _, B = planted(seed, 1, 1.0, d=2, n_heads=1, mask=mask, eps=0.1)
        run = torch_block(blocks[0])
        rng, roots = np.random.default_rng(seed), []
        for start in B[0] + 2.0 * rng.standard_normal((60, 2)):
            end = optimize.root(lambda x, one=blocks[0], b=B[0]: one.output(x[None])[0] - b, start)
            if end.success and not any(np.allclose(end.x, root, atol=1e-5) for root in roots):
                roots.append(end.x)
        J = [torch.func.jacrev(lambda x, run=run: run(x[None])[0])(torch.tensor(root)) for root in roots]
        assert sum(int(torch.sign(torch.linalg.det(one))) for one in J) == 1
        several += len(roots) > 1
        found = recover(BlockInversion(blocks, B), random_state=0)
        for x in found.inputs:
            assert any(np.allclose(x[:, 0], root, atol=1e-5) for root in roots)
        if len(roots) > 1:
            assert found.verdict == "ambiguous"
        assert found.verdict != "recovered"
    assert several >= 2


def test_a_negative_determinant_proves_another_input():
    proven = 0
    for seed in (*range(35), 100, 107):
        blocks, _, B = planted(seed, 1, 2.0, d=4, n_heads=1)
        one, run = equation(blocks[0], B), torch_block(blocks[0])
        x, left = newton(one, B[0])
        if left > 1e-9 or sign(one.jacobian(x)) > 0:
            continue
        J = torch.func.jacrev(lambda y, run=run: run(y[None])[0])(torch.tensor(x))
        assert torch.linalg.det(J) < 0
        proven += 1
        problem = BlockInversion(blocks, B)
        # With one start nothing else is looked for: the determinant alone says it.
        alone = recover(problem, random_state=0, n_starts=1)
        assert alone.verdict == "ambiguous" and "proven: the determinant" in alone.message
        assert alone.signs.tolist() == [-1] and len(alone.inputs) == 1
        assert len(recover(problem, random_state=0).inputs) > 1
    assert proven >= 3


def test_branches_without_norms_prove_nothing():
    negative = 0
    for seed in range(40):
        block = random_block(seed, 2, n_heads=1, gain=2.0)
        block = Block(block.heads, block.mlp, [None, None], mask="causal")
        B = block.output(np.random.default_rng(seed).standard_normal((1, 2)))
        found = recover(BlockInversion(block, B), random_state=0, n_starts=1)
        if found.verdict == "ambiguous" and found.signs.tolist() == [-1]:
            negative += 1
            assert "proven: the determinant" not in found.message
        if found.verdict == "not recovered":
            assert "an input exists" not in found.message
    assert negative >= 3


def test_paths_arrive_where_newtons_method_stalls():
    stalled = 0
    for seed in range(60):
        blocks, _, B = planted(seed, 1, 2.0, d=8, n_heads=2)
        one = equation(blocks[0], B)
        if newton(one, B[0])[1] < 1e-9:
            continue
        stalled += 1
        found, steps = follow(one, 1)
        assert len(found) == 1 and 0 < steps < 300
        assert np.linalg.norm(one.residual(found[0])) <= 1e-10 * np.linalg.norm(B)
        assert sign(one.jacobian(found[0])) == 1
    assert stalled >= 3


def test_signs_alternate_along_a_path():
    several = 0
    for seed in range(30):
        blocks, _, B = planted(seed, 1, 2.0, d=4, n_heads=1)
        one = equation(blocks[0], B)
        signs = [sign(one.jacobian(x)) for x in follow(one, 3)[0]]
        assert signs == [1, -1, 1][: len(signs)]
        several += len(signs) > 1
    assert several >= 3


def test_the_sign_is_that_of_the_determinant():
    rng = np.random.default_rng(0)
    for _ in range(50):
        J = rng.standard_normal((5, 5))
        assert sign(J) == np.sign(np.linalg.det(J))
    assert sign(np.ones((3, 3))) == 0


@pytest.mark.parametrize(("mask", "known"), [(None, [3]), ("causal", [7]), ("causal", [2, 7])])
def test_a_known_token_settles_it(mask, known):
    for seed in range(4):
        blocks, T, B = planted(seed, 8, 1.0, mask=mask)
        problem = BlockInversion(blocks, B, known={k: T[k] for k in known})
        assert identifiable(problem).counting == "isolated and mostly unique"
        found = recover(problem, random_state=0)
        unknown = np.setdiff1d(np.arange(8), known)
        assert found.verdict == "recovered"
        np.testing.assert_allclose(found.x, T[unknown].T, atol=1e-8)


def test_known_tokens_before_the_others_add_nothing():
    blocks, T, B = planted(0, 6, 0.3)
    problem = BlockInversion(blocks, B, known={0: T[0], 1: T[1]})
    assert identifiable(problem).counting == "isolated, often not unique"
    found = recover(problem, random_state=0, n_starts=2)
    assert found.verdict == "ambiguous" and found.radius.shape == (4,)
    np.testing.assert_allclose(found.x, T[2:].T, atol=1e-9)


def test_tokens_that_see_one_another():
    """No verdict of recovery; what is found has the output, and determinants say whether more is to come."""
    for seed in range(3):
        blocks, _, B = planted(seed, 4, 1.0, d=8, n_heads=2, mask=None)
        problem = BlockInversion(blocks, B)
        found = recover(problem, random_state=0)
        assert found.verdict == "ambiguous" and len(found.inputs) == len(found.signs)
        for x, its in zip(found.inputs, found.signs, strict=True):
            assert np.linalg.norm(problem.residuals(x)) <= 1e-9 * np.linalg.norm(B)
            J = problem.jacobian(x).reshape(4, 8, 8, 4).transpose(0, 1, 3, 2).reshape(32, 32)
            assert its == np.sign(np.linalg.det(J))
        if found.sign_sum != 1:
            assert "there are more" in found.message or "proven" in found.message


@pytest.mark.parametrize("mask", ["causal", None])
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_vocabulary_settles_it(mask, gain):
    rng = np.random.default_rng(3)
    table, rows = rng.standard_normal((400, D)), rng.integers(0, 400, 10)
    blocks = [random_block(k, D, gain=gain, mask=mask) for k in range(2)]
    found = recover(BlockInversion(blocks, outputs(blocks, table[rows])), vocabulary=table, random_state=0)
    assert found.verdict == "recovered" and found.tokens.tolist() == rows.tolist()
    assert found.margins.min() > 1e-3
    # Rows that are not in the table are not found in it.
    other = recover(
        BlockInversion(blocks, outputs(blocks, rng.standard_normal((3, D)))),
        vocabulary=table[:60],
        n_starts=2,
    )
    assert other.verdict == "not recovered"


def test_post_norm_blocks_lack_two_numbers_a_token():
    norm = Norm(np.ones(8), np.zeros(8), 1e-12, centred=True)
    block = random_block(0, 8, 2, gain=0.3, order="post", centred=True, mask=None, eps=1e-12)
    T = norm.forward(np.random.default_rng(0).standard_normal((4, 8)))[0]
    bare = recover(BlockInversion(block, block.output(T)), random_state=0)
    assert bare.identifiability.counting == "not isolated" and bare.verdict == "ambiguous"
    full = recover(BlockInversion(block, block.output(T), input_norm=norm), random_state=0)
    assert full.identifiability.counting == "isolated, often not unique" and full.verdict == "ambiguous"
    np.testing.assert_allclose(full.x, T.T, atol=1e-7)


def test_cross_attention_is_a_problem_a_token():
    rng = np.random.default_rng(0)
    block, keys, T = random_block(0, D, gain=0.3), rng.standard_normal((10, D)), rng.standard_normal((5, D))
    found = recover(BlockInversion(block, block.output(T, keys), keys=keys), random_state=0, n_starts=2)
    np.testing.assert_allclose(found.x, T.T, atol=1e-9)
    assert found.verdict == "ambiguous" and found.radius_proven


def exact_input(block, b, start):
    """The input of one token by Newton's method in 60 digits: alone, it attends to itself only."""
    mp, W = mpmath.mp, block.heads
    V = np.einsum("Hdv,Hve->de", W.W_V, W.W_O)
    with mp.workdps(60):

        def matrix(a):
            return mp.matrix(np.atleast_2d(a).tolist())

        def normed(norm, x):
            s = mp.sqrt(sum(t * t for t in x) / len(x) + mp.mpf(norm.eps))
            return matrix([0.0] * len(x)) + mp.matrix(
                [
                    [
                        mp.mpf(float(g)) * t / s + mp.mpf(float(c))
                        for g, c, t in zip(norm.gains, norm.bias, x, strict=True)
                    ]
                ]
            )

        def run(*x):
            row = mp.matrix([list(x)])
            w = row + normed(block.norms[0], list(row)) * matrix(V)
            up = normed(block.norms[1], list(w)) * matrix(block.mlp.W_1)
            act = mp.matrix([[t * mp.ncdf(t) for t in up]])
            y = w + act * matrix(block.mlp.W_2)
            return [y[k] - mp.mpf(float(b[k])) for k in range(len(x))]

        return np.array([float(t) for t in mp.findroot(run, start.tolist(), tol=1e-80, maxsteps=40)])


def test_radii_hold_against_sixty_digits():
    proven = 0
    for seed in range(8):
        blocks, _, B = planted(seed, 1, 0.6, d=3, n_heads=1)
        for precision in (1e-9, 1e-6, 1e-3):
            rng = np.random.default_rng(seed)
            rounded = B * (1.0 + precision * rng.uniform(-0.99, 0.99, B.shape))
            found = recover(BlockInversion(blocks, rounded), precision=precision, random_state=0)
            exact = exact_input(blocks[0], B[0], found.x[:, 0])
            distance = np.linalg.norm(exact - found.x[:, 0])
            if found.radius_proven:
                proven += 1
                assert distance <= found.radius[0]
            # What is proven is no empty claim.
            assert found.radius[0] < 1e4 * precision
    assert proven >= 8


def test_rounded_outputs_have_no_proof():
    blocks, T, B = planted(0, 6, 1.0, d=D)
    found = recover(
        BlockInversion(blocks, B.astype(np.float16)), precision=2.0**-11, random_state=0, n_starts=2
    )
    assert not found.radius_proven and found.verdict == "ambiguous"
    assert np.linalg.norm(found.x[:, 0] - T[0]) <= found.radius[0]


def test_one_input_where_branches_contract():
    blocks, T, B = planted(0, 3, 1e-3)
    found = recover(BlockInversion(blocks, B))
    assert found.verdict == "recovered" and "contracts" in found.message
    np.testing.assert_allclose(found.x, T.T, atol=1e-12)


def test_what_is_not_found_is_said_to_exist(monkeypatch):
    monkeypatch.setattr(homotopy, "MAX_NEWTON", 0)
    monkeypatch.setattr(homotopy, "MAX_POINTS", 0)
    blocks, _, B = planted(0, 3, 1.0)
    found = recover(BlockInversion(blocks, B), n_starts=2)
    assert found.verdict == "not recovered" and "an input exists" in found.message
    assert found.inputs == [] and np.isinf(found.radius).all()


def test_it_is_a_problem_like_others():
    blocks, T, B = planted(0, 3, 0.3, d=6, n_heads=2)
    problem = BlockInversion(blocks, B)
    result = minimize(problem, random_state=0)
    assert result.status == "converged"
    np.testing.assert_allclose(result.x, T.T, atol=1e-4)
    assert problem.with_output(2.0 * B).value(T.T) == pytest.approx(0.5 * np.sum(B**2))


ONE = np.ones((1, 4, 4)) / 8


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda b: BlockInversion([], np.ones((2, 4))), "blocks is empty"),
        (lambda b: BlockInversion(b, np.ones((2, 3))), "B has 3 columns"),
        (lambda b: BlockInversion(b, np.full((2, 4), np.nan)), "B"),
        (lambda b: BlockInversion(b, np.ones((2, 4)), known={5: np.ones(4)}), "known has token 5"),
        (lambda b: BlockInversion(b, np.ones((2, 4)), keys=np.ones((3, 5))), "keys has 5 columns"),
        (lambda b: BlockInversion(b, np.ones((2, 4)), input_norm=Norm(np.ones(3))), "input_norm has width 3"),
        (lambda b: BlockInversion(b, np.ones((2, 4)), input_norm=Norm([1, 0, 1, 1])), "gain 0 at index 1"),
        (
            lambda b: BlockInversion([b, random_block(0, 8)], np.ones((2, 4))),
            "blocks\\[1\\] takes 8 numbers a token, the first 4",
        ),
        (
            lambda b: BlockInversion(
                Block(Heads(ONE, np.ones((1, 6, 4)), np.ones((1, 6, 4)), ONE)), np.ones((2, 4))
            ),
            "cross attention needs keys",
        ),
        (lambda b: BlockInversion(b, np.ones((2, 4))).with_output(np.ones((3, 4))), "B has 3 rows"),
    ],
)
def test_bad_input_is_named(make, said):
    block = Block(Heads(ONE, ONE, ONE, ONE), Mlp(ONE[0], ONE[0]), [Norm(np.ones(4))] * 2, mask="causal")
    with pytest.raises(ValueError, match=said):
        make(block)
