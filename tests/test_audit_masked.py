"""Hidden beginnings: exact scoring, likelihoods, and the published relaxation with its gradient."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit.likelihood import Likelihood  # noqa: E402
from attnfit.audit.masked import recover_masked  # noqa: E402
from attnfit.audit.models.model import Model  # noqa: E402
from attnfit.audit.relaxation import masked_relaxation, soft_loss  # noqa: E402

KNOWN = [3, 0, 7, 11]
N_TARGETS = 16


@pytest.fixture(scope="module")
def small():
    """A random model in double precision: 12 tokens, width 6, two layers."""
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=8, n_embd=6, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = transformers.GPT2LMHeadModel(config).double()
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    return Model("small", module, None, "causal")


def logits(n_masked=2):
    return torch.from_numpy(np.random.default_rng(1).standard_normal((1, n_masked, 12)))


def gradient(model, U):
    U = U.clone().requires_grad_()
    soft_loss(model, U, KNOWN).sum().backward()
    return U.grad[0].numpy()


@pytest.mark.parametrize("n_masked", [1, 2, 3])
def test_gradient_against_central_differences(small, n_masked):
    U = logits(n_masked)
    measured = np.empty((n_masked, 12))
    for place in np.ndindex(n_masked, 12):
        moved = [U.clone(), U.clone()]
        for one, step in zip(moved, (1e-5, -1e-5), strict=True):
            one[(0, *place)] += step
        up, down = (float(soft_loss(small, one, KNOWN)) for one in moved)
        measured[place] = (up - down) / 2e-5
    np.testing.assert_allclose(gradient(small, U), measured, rtol=1e-6, atol=1e-8)


def test_gradient_is_the_published_formula_with_both_paths(small):
    """The input path T E^T and the target path - log F add up; neither alone is the gradient."""
    U = logits()
    S1 = torch.softmax(U[0], -1)
    S = torch.cat([S1, torch.eye(12, dtype=torch.double)[KNOWN]])
    T = (S @ small.embeddings).requires_grad_()
    Lambda = small.head(small.base(inputs_embeds=T[None], use_cache=False)[0])[0]
    logF = torch.log_softmax(Lambda, -1)
    G = logF.exp() - torch.cat([S[1:], torch.zeros(1, 12)])
    G[-1] = 0.0
    Lambda.backward(G.detach())
    paths = {"input": T.grad @ small.embeddings.T, "target": torch.zeros_like(S)}
    paths["target"][1:] = -logF[:-1].detach()

    def through_softmax(bar):
        part = S1 * bar[:2]
        return (part - S1 * part.sum(-1, keepdim=True)).numpy()

    actual = gradient(small, U)
    np.testing.assert_allclose(actual, through_softmax(sum(paths.values())), rtol=1e-9, atol=1e-12)
    for path in paths.values():
        assert np.linalg.norm(actual - through_softmax(path)) > 0.03 * np.linalg.norm(actual)


def test_row_constants_do_not_matter(small):
    U = logits()
    plain = soft_loss(small, U, KNOWN)
    for shift in (5.0, 900.0, -900.0):
        moved = U + shift * torch.tensor([1.0, -1.0])[None, :, None]
        torch.testing.assert_close(soft_loss(small, moved, KNOWN), plain, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gradient(small, U).sum(-1), 0, atol=1e-12)


def test_one_hot_tokens_give_the_ordinary_cross_entropy(small):
    hot = torch.full((1, 2, 12), -1e4, dtype=torch.double)
    hot[0, 0, 5] = hot[0, 1, 9] = 1e4
    tokens = torch.tensor([[5, 9, *KNOWN]])
    chances = torch.log_softmax(small.module(input_ids=tokens).logits[0, :-1], -1)
    usual = -chances.gather(-1, tokens[0, 1:, None]).sum()
    torch.testing.assert_close(soft_loss(small, hot, KNOWN)[0], usual)


def test_likelihoods_are_the_models(small):
    sequences = torch.tensor([[5, 9, 3, 0], [1, 2, 3, 4]])
    chances = torch.log_softmax(small.module(input_ids=sequences).logits, -1)
    likelihood = Likelihood(small)
    torch.testing.assert_close(likelihood.after(sequences), chances[:, -1], check_dtype=False)
    picked = chances[:, :-1].gather(-1, sequences[:, 1:, None])[..., 0]
    for first in (1, 3):
        own = likelihood.of(sequences, first)
        torch.testing.assert_close(
            own, picked[:, first - 1 :].sum(-1), check_dtype=False, atol=1e-5, rtol=1e-5
        )
    assert likelihood.n_tokens == 8 + 6 + 6


# ---- exact scoring -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truths(tiny):  # noqa: F811
    return [tiny.tokenise(text) for text in tiny.private_texts[:N_TARGETS]]


@pytest.fixture(scope="module")
def found(tiny, truths):  # noqa: F811
    return recover_masked(tiny, [tokens[2:] for tokens in truths])


def test_memorised_beginnings_come_back(found, truths):
    right = [one.tokens == tokens[:2] for one, tokens in zip(found, truths, strict=True)]
    assert np.mean(right) >= 0.97


def test_it_costs_few_passes_where_targets_share_tables(found):
    """The tables are shared: 16 targets carry sixteen times their part of the cost for 256."""
    assert np.mean([one.forwards for one in found]) <= 1200


def test_exposures_rank_tokens(found, truths, tiny):  # noqa: F811
    one, tokens = found[0], truths[0]
    assert one.exposures.shape == (2, tiny.n_vocabulary)
    assert one.exposures[0, tokens[0]] == one.exposures[1, tokens[1]] == 0.0
    assert (one.exposures >= 0).all()
    assert one.gap > 0
    assert one.text == tiny.private_texts[0]


def test_known_candidates_restrict_the_search(tiny, truths):  # noqa: F811
    firsts, lasts = ([tokens[place] for tokens in truths] for place in (0, 1))
    one = recover_masked(tiny, [truths[3][2:]], admissible=[firsts, lasts])[0]
    assert one.tokens == truths[3][:2]
    assert np.isfinite(one.exposures[0]).sum() == len(set(firsts))


def test_one_hidden_token(tiny, truths):  # noqa: F811
    one = recover_masked(tiny, [truths[0][1:]], 1)[0]
    assert one.tokens == truths[0][:1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: recover_masked(m, [""]), r"suffixes\[0\] is empty"),
        (lambda m: recover_masked(m, [[5], [2000]]), r"suffixes\[1\] has token 2000"),
        (lambda m: recover_masked(m, [[5]], 0), "n_masked must be at least 1"),
        (lambda m: recover_masked(m, [[5]], 2, admissible=[[1]]), "admissible has 1 lists"),
        (lambda m: recover_masked(m, [[5]], 1, admissible=[[-1]]), r"admissible\[0\]"),
        (lambda m: masked_relaxation(m, [5], steps=0), "steps must be positive"),
        (lambda m: masked_relaxation(m, [5], step_size=float("nan")), "step_size must be positive"),
        (lambda m: masked_relaxation(m, [], steps=1), "empty"),
    ],
)
def test_bad_requests(tiny, call, message):  # noqa: F811
    with pytest.raises(audit.AuditError, match=message):
        call(tiny)


# ---- the published relaxation ------------------------------------------------------------------------------


def test_relaxation_descends_and_is_repeatable(tiny, truths):  # noqa: F811
    settings = {"steps": 60, "step_size": 0.1, "n_repeats": 8, "random_state": 4}
    one, again = (masked_relaxation(tiny, truths[0][2:], **settings) for _ in range(2))
    np.testing.assert_array_equal(one.history, again.history)
    assert one.history[-1].mean() < 0.5 * one.history[0].mean()
    assert one.steps[0] == 0 and one.steps[-1] == 60
    assert one.success(truths[0][:2]).shape == one.steps.shape
    assert one.success(one.best)[-1] > 0
    assert one.forwards == 180
    assert ((one.sharpness > 0) & (one.sharpness <= 1)).all()


def test_a_logit_moves_no_faster_than_the_step_size(tiny, truths):  # noqa: F811
    """Why the published attack waits: with steps of 1e-3 nothing is decided after 100 of them."""
    slow = masked_relaxation(tiny, truths[0][2:], steps=100, step_size=1e-3, n_repeats=4)
    assert slow.sharpness.max() < 0.1
