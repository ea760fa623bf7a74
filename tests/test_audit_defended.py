"""Inversions of noised, rounded and withheld outputs: what comes back, and what may be called certain."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit.breakpoints import forecast  # noqa: E402
from attnfit.audit.defences import apply_defence  # noqa: E402
from attnfit.audit.target import Target  # noqa: E402

# Tokens that tiny was hardly trained on have all but the same embedding: the hardest text to be sure of.
STRANGE = "Zebras yawn; my PIN is 4921!"
NOISES = ("noise:0.01", "noise:0.1", "noise:0.3", "noise:1.0")


def share_right(model, texts, access, defence):
    right = total = 0
    for seed, text in enumerate(texts):
        truth = model.tokenise(text)
        found = audit.invert(model, audit.observe(model, text, access, defence, random_state=seed))
        right += sum(a == b for a, b in zip(found.tokens, truth, strict=False))
        total += len(truth)
    return right / total


# ---- noise on logits ---------------------------------------------------------------------------------------


def test_noised_logits_are_inverted(tiny):  # noqa: F811
    texts = tiny.private_texts[:2]
    shares = [share_right(tiny, texts, "logits", f"noise:{size}") for size in (0.3, 1.0, 20.0)]
    assert shares[0] == 1.0
    assert shares[1] >= 0.9
    assert shares[2] < 0.5


def test_the_error_of_the_last_states_is_as_large_as_said(tiny):  # noqa: F811
    from attnfit.audit.logits import last_states

    tokens = tiny.tokenise(tiny.private_texts[0])
    for defence in ("noise:0.5", "noise:0.5std"):
        defended = apply_defence(tiny.logits(tokens), defence)
        states, uncertainty = last_states(tiny, defended.array, defended.error)
        missed = (states - torch.from_numpy(tiny.states(tokens, 5))) @ uncertainty.basis
        assert 0.85 < float((missed / uncertainty.error).square().mean().sqrt()) < 1.15, defence


def test_unstated_noise_is_still_refused(tiny):  # noqa: F811
    seen = audit.observe(tiny, tiny.private_texts[0], "logits", "noise:1.0")
    with pytest.raises(audit.ObservationMismatch, match="beyond the error that was stated"):
        audit.invert_logits(tiny, seen.array)
    assert audit.invert_logits(tiny, seen.array, error=seen.error).failed_at is None


@pytest.mark.parametrize("access", ["hidden:1", "logits"])
def test_predicted_half_is_where_half_is_lost(tiny, access):  # noqa: F811
    """On words in no order, of which the model does not know what to expect, the tokens before known."""
    rng = np.random.default_rng(5)
    names = [tiny.detokenise([token]) for token in range(tiny.n_vocabulary)]
    words = [token for token, name in enumerate(names) if name[:1] == " " and len(name) > 4]
    texts = rng.choice(words, (4, 8)).tolist()
    half = forecast(tiny, texts, access, [], 60).noise["noise, row RMS"]
    shares = []
    # A share of 32 tokens has a standard error of 0.09; four draws of the noise halve it.
    for ratio, draws in ((half / 3, 1), (half, 4), (3 * half, 1)):
        right = []
        for seed, tokens in enumerate(texts * draws):
            array = tiny.logits(tokens) if access == "logits" else tiny.states(tokens, 1)
            seen = apply_defence(array, f"noise:{ratio}", seed)
            for place, token in enumerate(tokens):
                rows = slice(place + 1)
                known = {"error": seen.error[rows], "known_prefix": tokens[:place]}
                if access == "logits":
                    found = audit.invert_logits(tiny, seen.array[rows], **known)
                else:
                    found = audit.invert_hidden(tiny, seen.array[rows], 1, **known)
                right.append(found.tokens[place] == token)
        shares.append(np.mean(right))
    assert shares[0] >= 0.8
    assert 0.25 <= shares[1] <= 0.75
    assert shares[2] <= 0.25


@pytest.mark.parametrize("defence", ["int8", "int4", "int3:channel", "round:0"])
def test_rounded_logits_are_compared_as_rounded(tiny, defence):  # noqa: F811
    for text in (tiny.private_texts[3], STRANGE):
        found = audit.invert(tiny, audit.observe(tiny, text, "logits", defence))
        assert found.text == text
        assert found.verified


# ---- what is certain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["hidden:1", "hidden:4", "attention:0", "logits", "topk:5"])
def test_no_wrong_text_is_verified(tiny, access):  # noqa: F811
    claims = wrong = 0
    for seed, text in enumerate([tiny.private_texts[0], STRANGE]):
        for defence in NOISES:
            found = audit.invert(tiny, audit.observe(tiny, text, access, defence, random_state=seed))
            claims += found.verified
            wrong += found.verified and found.text != text
    assert wrong == 0
    # Where the noise is weak enough there is no doubt.
    assert claims >= (1 if access in ("attention:0", "topk:5") else 2)


def test_consistent_texts_of_several_are_not_verified(tiny):  # noqa: F811
    found = audit.invert(tiny, audit.observe(tiny, tiny.private_texts[0], "hidden:1", "noise:2.0"))
    assert not found.verified
    assert "they give the observation, but so would others" in found.message
    assert min(found.log_odds) < 5.0


def test_leads_are_log_odds(tiny):  # noqa: F811
    """Against the likelihoods of the whole vocabulary."""
    tokens = tiny.tokenise(tiny.private_texts[0])
    seen = audit.observe(tiny, tiny.private_texts[0], "hidden:1", "noise:0.7")
    found = audit.invert(tiny, seen)
    place = int(np.argmin(found.log_odds))
    states = np.stack([tiny.states([*tokens[:place], token], 1)[-1] for token in range(tiny.n_vocabulary)])
    chances = -0.5 * np.square((states - seen.array[place]) / seen.error[place]).sum(1)
    others = np.delete(chances, found.tokens[place])
    expected = chances[found.tokens[place]] - np.logaddexp.reduce(others)
    assert found.tokens[:place] == tokens[:place]
    assert found.log_odds[place] == pytest.approx(expected, rel=0.02)


def test_noise_is_not_claimed_to_be_text(tiny):  # noqa: F811
    report = audit.run(
        tiny, tiny.private_texts[:1], ["hidden:2", "logits", "topk:5"], [None, "noise:3.0"], budget=60
    )
    assert sum(control.false_claims for control in report.controls) == 0
    assert sum(pair.false_claims for pair in report.pairs) == 0
    assert not any("certain that were not" in sentence for sentence in report.advice)


# ---- through the defence itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "defence", ["float16", "bfloat16", "int8", "int4", "int2", "int8:channel", "round:1", "int8+float16"]
)
def test_rounding_never_errs_by_more_than_said(defence):
    rng = np.random.default_rng(0)
    array = (rng.standard_normal((20, 30)) * np.exp(2 * rng.standard_normal(30))).astype(np.float32)
    defended = apply_defence(array, defence)
    assert (np.abs(defended.array - array) <= 1.0001 * defended.error_bound + 1e-7).all()
    assert np.isinf(apply_defence(array, f"{defence}+noise:0.1").error_bound).all()


def test_states_within_the_bounds_fit_exactly():
    """A nearer state that would have been rounded to something else fits worse than the true one."""
    step = 0.5
    truth = torch.tensor([0.24, -0.24, 0.74, 1.24])
    seen = torch.round(truth / step) * step
    error = torch.full((4,), step / 12**0.5)
    target = Target(seen, error, torch.ones(4), error_bound=torch.full((4,), step / 2))
    nearer = seen + torch.tensor([0.0, 0.0, 0.0, 0.3])
    assert float((nearer - seen).norm()) < float((truth - seen).norm())
    fits = target.misfits(torch.stack([truth, nearer]))
    assert float(fits[0]) == 0.0 and float(fits[1]) > target.bound


@pytest.mark.parametrize("defence", ["int4", "int3:channel"])
def test_coarse_integers_do_not_help(tiny, defence):  # noqa: F811
    for access in ("hidden:1", "attention:0"):
        text = tiny.private_texts[5]
        found = audit.invert(tiny, audit.observe(tiny, text, access, defence))
        assert (found.text, found.verified) == (text, True)


# ---- the first position withheld ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "defence"),
    [("hidden:1", "int8+drop0"), ("hidden:4", "drop0"), ("attention:0", "drop0"), ("logits", "drop0")],
)
def test_withholding_the_first_position_does_not_help(tiny, access, defence):  # noqa: F811
    text = tiny.private_texts[1]
    found = audit.invert(tiny, audit.observe(tiny, text, access, defence))
    assert found.text == text
    assert found.verified
    assert found.methods[0] == "joint"


def test_a_withheld_token_that_noise_hides_is_not_verified(tiny):  # noqa: F811
    found = audit.invert(tiny, audit.observe(tiny, tiny.private_texts[1], "hidden:4", "noise:1.0+drop0"))
    assert not found.verified


def test_what_cannot_be_done_without_the_first_position_says_so(tiny, monkeypatch):  # noqa: F811
    seen = audit.observe(tiny, tiny.private_texts[0], "topk:3", "drop0")
    with pytest.raises(audit.AuditError, match="the first position was withheld: access 'topk:3' cannot"):
        audit.invert(tiny, seen)
    seen = audit.observe(tiny, tiny.private_texts[0], "hidden:1", "drop0")
    with pytest.raises(audit.AuditError, match="known_prefix cannot be used"):
        audit.invert(tiny, seen, known_prefix=[1])
    monkeypatch.setattr(tiny, "kind", "encoder")
    with pytest.raises(audit.AuditError, match="outputs of an encoder cannot be inverted without it"):
        audit.invert(tiny, seen)


def test_one_position_cannot_be_withheld_alone(tiny):  # noqa: F811
    with pytest.raises(audit.AuditError, match="drop0 leaves nothing"):
        audit.observe(tiny, "a", "hidden:1", "drop0")
