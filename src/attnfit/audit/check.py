"""A form of access, or a defence, of one's own against what the audit counts on."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnfit.audit.access import Access
from attnfit.audit.defences import Chain
from attnfit.audit.forms import parse_access
from attnfit.audit.inverting import search_for
from attnfit.audit.models import load
from attnfit.audit.models.model import Model
from attnfit.audit.observation import observe

# Numbers that two runs of one text differ by, relative to their spread.
ROUNDING = 1e-4
# Errors are as large as a defence says, on average, up to this factor.
HONEST = 1.5


def check_access(access: str | Access, model: Model | None = None) -> None:
    """Observe a text and invert it, and compare what a form of access says with what is so.

    What leaves must be the same each time and, of a causal model, independent of later tokens; the search
    must accept the true text and recover it, with and without rounding, reject another text, and never claim
    to have found what it has not; rivals must be what would have left with another token.

    Parameters
    ----------
    access : str or Access
    model : Model, optional
        A model with ``private_texts``; the packaged "tiny" unless given.

    Raises
    ------
    AssertionError
        Naming what is wrong.

    Examples
    --------
    >>> from attnfit import audit
    >>> audit.check_access("hidden:1")
    """
    form = parse_access(access)
    assert str(parse_access(str(form))) == str(form), f"{form!r} is not known by its name {str(form)!r}"
    assert form.description, "a form of access needs a description"
    model = load("tiny") if model is None else model
    text, other = model.private_texts[:2]
    tokens, others = model.tokenise(text), model.tokenise(other)
    array = form.leak(model, tokens).array
    assert array.dtype == np.float32 and array.ndim == 2 and len(array) == len(tokens), (
        f"leak returns float32 of shape (n, width), a row a token, not {array.dtype} of shape {array.shape}"
    )
    assert np.isfinite(array).all(), "what leaves is not finite"
    again = form.leak(model, tokens).array
    assert np.array_equal(array, again), "the same text leaves other numbers each time"
    if model.kind == "causal" and form.ordered:
        spread, half = array.std(), len(tokens) // 2
        first = form.leak(model, tokens[:half]).array
        assert np.abs(first - array[:half]).max() <= ROUNDING * spread, (
            "what leaves of the first tokens depends on later ones, although the model is causal"
        )
    for defence in (None, "int8"):
        seen = observe(model, text, form, defence)
        reason = search_for(model, seen).contradiction(tokens)
        assert not reason, f"the search would not accept the true text, with {defence}: {reason}"
        found = search_for(model, seen).run([])
        assert found.tokens == tokens, f"with {defence} {found.tokens} were found, not {tokens}"
    seen = observe(model, text, form)
    wrong = others[: len(tokens)] + tokens[len(others) :]
    assert search_for(model, seen).contradiction(wrong), "the search would accept another text"
    seen = observe(model, text, form, "noise:3")
    found = search_for(model, seen, 64).run([])
    assert found.tokens == tokens or not found.verified, "a wrong text is called verified"
    if form.forecasts:
        _check_rivals(form, model, tokens)


def _check_rivals(form: Access, model: Model, tokens: list[int]) -> None:
    import torch

    place = len(tokens) // 2
    token, other = tokens[place], (tokens[place] + 1) % model.n_vocabulary
    rivals, rows = form.rivals(model, tokens, place, torch.tensor([token, other]))
    changed = [*tokens[:place], other, *tokens[place + 1 :]]
    metric = form.metric(model)
    difference = (rivals[1] - rivals[0]).double().numpy()
    difference = difference if metric is None else difference @ metric
    true = form.leak(model, changed).array[rows] - form.leak(model, tokens).array[rows]
    # A form with a metric leaves what is known up to a constant.
    true = true if metric is None else true - true.mean()
    assert np.isclose(np.linalg.norm(difference), np.linalg.norm(true), rtol=1e-2), (
        "rivals are not what would have left with another token"
    )


def check_defence(defence: str, array: Any = None) -> None:
    """Apply a defence, and compare the errors that it states with those that it makes.

    The same seed must give the same numbers; what is given must be left alone; errors must be finite and as
    large as stated, on average, to a factor of 1.5, and never beyond
    ``error_bound``; only first positions may be withheld.

    Parameters
    ----------
    defence : str
        By its name.
    array : array_like, shape (n, width), optional
        Numbers to apply it to; Gaussian ones, some rows and channels larger, unless given.

    Raises
    ------
    AssertionError
        Naming what is wrong.

    Examples
    --------
    >>> from attnfit import audit
    >>> audit.check_defence("int8:channel")
    """
    rng = np.random.default_rng(0)
    if array is None:
        array = rng.standard_normal((64, 48)) * np.exp(rng.standard_normal((64, 1)))
        array[:, :4] *= 5.0
    given = np.asarray(array, dtype=np.float32)
    before, chain = given.copy(), Chain.parse(defence)
    found = chain.apply(given, np.random.default_rng(1))
    again = chain.apply(given, np.random.default_rng(1))
    assert np.array_equal(given, before), "the defence changes what it is given"
    assert np.array_equal(found.array, again.array), (
        "the same seed gives other numbers each time: draw from rng alone"
    )
    n = len(found.dropped)
    assert found.dropped == tuple(range(n)), f"positions {found.dropped} are withheld: only the first can be"
    left = given[n:]
    for name, values in vars(found).items():
        if name != "dropped":
            assert values.shape == left.shape and values.dtype == np.float32, (
                f"{name} must be float32 of shape {left.shape}, not {values.dtype} of shape {values.shape}"
            )
    assert np.isfinite(found.array).all() and np.isfinite(found.error).all(), "numbers are not finite"
    assert (found.error_bound >= 0.0).all(), "a largest error is negative"
    made = np.abs(found.array.astype(np.float64) - left)
    # A stated step is itself rounded to float32.
    room = found.error_bound * (1.0 + 1e-5) + 1e-6 * np.abs(left)
    assert (made <= room).all(), "an error is beyond error_bound: state the largest, or infinity"
    stated = float(np.sqrt(np.mean(np.square(found.error.astype(np.float64)))))
    actual = float(np.sqrt(np.mean(made**2)))
    assert stated / HONEST <= actual <= stated * HONEST or max(stated, actual) <= 1e-6 * np.abs(left).max(), (
        f"errors have root mean square {actual:.3g}, and {stated:.3g} is stated"
    )
