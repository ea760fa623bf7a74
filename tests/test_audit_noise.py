"""Under noise a text is verified only where tokens that were not tried cannot be the true ones."""

from types import SimpleNamespace

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401
from scipy.stats import ncx2

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit.candidates import CandidateSet  # noqa: E402
from attnfit.audit.context_free import ContextFree, context_free  # noqa: E402
from attnfit.audit.engine.prefix import Prefix  # noqa: E402
from attnfit.audit.forms import parse_access  # noqa: E402
from attnfit.audit.models.model import Model  # noqa: E402
from attnfit.audit.position import SLACK, Clues, PositionSearch  # noqa: E402
from attnfit.audit.result import certain_log_odds  # noqa: E402
from attnfit.audit.target import CONFIDENCE, Target, reach  # noqa: E402

WIDTH, N_TOKENS, N_NEAR, TRUTH, DECOY = 384, 3_000, 100, 0, 1


@pytest.mark.parametrize("n", [1, 10, 384, 8_000])
@pytest.mark.parametrize("excess", [-3.0, 0.0, 2.0, 10.0])
def test_a_state_beyond_reach_would_have_missed_by_more(n, excess):
    """By the quantiles of the distribution itself."""
    squares = max(0.0, n + excess * np.sqrt(2.0 * n))
    far = reach(n, squares)
    assert ncx2.cdf(squares, n, far) < 1e-4
    # Not farther than need be: of half the excess there may well be one.
    near = max(0.25 * far - CONFIDENCE * np.sqrt(2.0 * n), 1e-9)
    assert ncx2.cdf(squares, n, near) >= ncx2.cdf(squares, n, far)
    if n >= 384 and excess >= 0.0:
        assert ncx2.cdf(1.3 * squares, n, far) > 1e-4


def searched(separation, seed, *, cheap, known=1.0):
    """Search for a token that all rankings put last, behind one whose state is near its own, and a hundred
    that are nearly as near to that as the truth; with "table", one tells ``known`` times how far all are
    apart.
    """
    generator = torch.Generator().manual_seed(seed)
    states = 40.0 * torch.randn(N_TOKENS, WIDTH, generator=generator)
    near = torch.randn(N_NEAR + 1, WIDTH, generator=generator)
    near *= separation**0.5 / near.norm(dim=1, keepdim=True)
    states[DECOY] = states[TRUTH] + near[0]
    states[DECOY + 1 : DECOY + 1 + N_NEAR] = states[DECOY] + 0.9 * near[1:]
    observed = states[TRUTH] + torch.randn(WIDTH, generator=generator)
    ranks = torch.linspace(1.0, 0.0, N_TOKENS)
    ranks[TRUTH] = -1.0
    probe = SimpleNamespace(
        estimate=lambda state: state, displacement=lambda differences: differences, precision=torch.eye(WIDTH)
    )
    ranker = SimpleNamespace(probe=probe, scores=lambda _: ranks)
    prefix = SimpleNamespace(candidates=lambda tokens: states[list(tokens)], n_candidates=0, chunk=1_024)
    target = Target(observed, torch.ones(WIDTH), torch.full((WIDTH,), 40.0))
    found = CandidateSet(prefix, target)
    clues = Clues(ranker, ranker, ranks)
    search = PositionSearch(
        found, clues, torch.zeros(N_TOKENS, WIDTH), 10**6, cheap=bool(cheap),
        context_free=ContextFree(known * states, 0) if cheap == "table" else None,
    )  # fmt: skip
    search.most_likely(certain_log_odds(14), thorough=False)
    return found.tokens[found.best], found.log_odds >= certain_log_odds(14), len(found.tokens)


@pytest.mark.parametrize("separation", [30.0, 80.0, 110.0, 150.0, 180.0, 250.0])
@pytest.mark.parametrize("cheap", [False, True, "table"])
def test_the_nearest_of_those_tried_is_not_taken_for_the_truth(separation, cheap):
    claims = [searched(separation, seed, cheap=cheap)[:2] for seed in range(40)]
    assert not any(certain and token != TRUTH for token, certain in claims)
    if cheap and separation >= 80.0:
        # All tokens are tried before one is claimed, so that the true one is found.
        assert sum(certain for _, certain in claims) >= 35


@pytest.mark.parametrize("separation", [110.0, 250.0])
def test_a_table_saves_what_cannot_be_the_truth_and_one_that_is_wrong_saves_nothing(separation):
    """It claims what trying everything claims; where states are nearer than it says, everything is tried."""
    for seed in range(10):
        every = searched(separation, seed, cheap=True)
        table = searched(separation, seed, cheap="table")
        assert table[:2] == every[:2] and table[2] < every[2]
        assert searched(separation, seed, cheap="table", known=1.1) == every


def random_model(family):
    from audit_families import random_module

    return Model(family, random_module(family), None, "causal")


@pytest.mark.parametrize("access", ["kv:0", "k:0", "v:0"])
def test_what_a_first_block_caches_is_apart_as_the_table_says_after_any_prefix(access):
    model, tokens = random_model("llama"), list(range(300))
    table = context_free(model, access)
    for prefix in ([], [5, 9, 4], list(range(11, 40))):
        before = Prefix(model, access)
        if prefix:
            before.extend(prefix)
        states = before.candidates(tokens)
        width = states.shape[1]
        target = Target(states[3], torch.linspace(0.5, 1.0, width), torch.ones(width))
        known, apart = table.apart(target, 3)[tokens], target.separations(states, states[3])
        assert (known <= apart * (1.0 + SLACK)).all()
        # Keys in units of their largest error, values exactly.
        assert (known >= 0.25 * apart).all() and table.holds(tokens, states, 3)
    assert context_free(model, "kv:1") is None and context_free(model, 1) is None


@pytest.mark.parametrize("access", ["kv:0", "v:0"])
def test_positions_that_are_added_to_embeddings_are_noticed(access):
    """Values then depend on the position: the table of another one must not be believed."""
    model, tokens = random_model("gpt2"), list(range(60))
    prefix = Prefix(model, access)
    prefix.extend([1, 2, 3, 4])
    assert not context_free(model, access).holds(tokens, prefix.candidates(tokens), 7)
    assert context_free(model, "k:0") is None


@pytest.mark.parametrize(
    ("nats", "kept", "claimed"), [(30.0, 4, False), (400.0, 4, True), (30.0, 10**6, True)]
)
def test_a_withheld_first_token_counts_those_that_were_not_tried(tiny, monkeypatch, nats, kept, claimed):  # noqa: F811
    """Thirty nats before those tried are enough if these are all tokens, or no other one could be as near."""
    monkeypatch.setattr("attnfit.audit.withheld.FIRSTS_KEPT", kept)
    seen = audit.observe(tiny, tiny.private_texts[0], "hidden:1", "noise:0.1+drop0")
    search = parse_access("hidden:1").search(tiny, seen, 10**6)
    found = search._after(tiny.tokenise(tiny.private_texts[0])[0])
    perfect = -0.5 * sum(target.n_numbers for target in search._targets)

    def likelihoods(sequences):
        first = sequences[:, 0] == found.tokens[0]
        return torch.where(first, perfect, perfect - nats).double()

    monkeypatch.setattr(search, "_likelihoods", likelihoods)
    position = search._settled(found).positions[0]
    assert position.token == found.tokens[0]
    assert (position.log_odds >= certain_log_odds(len(found.tokens))) == claimed
