"""What the states after one text tell of those after another: against a dense formula, and exact maps."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from attnfit import audit  # noqa: E402
from attnfit.audit import reference as module  # noqa: E402
from attnfit.audit.calibration import calibrate  # noqa: E402
from attnfit.audit.engine.prefix import Prefix  # noqa: E402
from attnfit.audit.reference import Reference  # noqa: E402


def case(n, width=12, n_vocabulary=300, seed=0, noise=0.0):
    """Return a reference, what was tried, and the token sought, where states are a linear map of others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    table, scale = normal(n_vocabulary, width), 0.5 + torch.rand(width, generator=generator)
    turn = torch.eye(width) + 0.3 * normal(width, width) / width**0.5
    states = (table @ turn + 2.0 * normal(width) + noise * normal(n_vocabulary, width)) * scale
    truth, *tried = torch.randperm(n_vocabulary, generator=generator)[: n + 1].tolist()
    misfits = ((states[tried] - states[truth]) / scale).square().mean(1)
    target = SimpleNamespace(state=states[truth])
    evaluated = SimpleNamespace(tokens=tried, states=states[tried], target=target, misfits=misfits)
    return told(table, scale), evaluated, truth


def told(table, scale):
    """Return a reference that has learned this table."""
    found = Reference(audit.load("tiny"), 3, scale)
    vars(found)["table"] = table
    return found


def dense(table, scale, evaluated):
    """The formula, a row at a time in double precision."""
    E = table.double().numpy()
    apart = ((evaluated.states - evaluated.target.state) / scale).double().numpy()
    squares = (apart**2).mean(1)
    # Of an even number torch takes the lower one.
    w = np.exp(-squares / (module.WIDTH * np.quantile(squares, 0.5, method="lower")))
    w /= w.sum()
    there = E[evaluated.tokens]
    centre, offset = w @ apart, w @ there
    d = E.shape[1]
    gram, right = np.zeros((d, d)), np.zeros((d, d))
    for weight, x, y in zip(w, apart - centre, there - offset, strict=True):
        gram += weight * np.outer(x, x)
        right += weight * np.outer(x, y)
    ridge = module.RIDGE * np.trace(gram) / d
    slopes = np.linalg.solve(gram + ridge * np.eye(d), right + ridge * np.eye(d))
    residual = there - offset - (apart - centre) @ slopes
    variance = w @ residual**2
    variance = variance + module.FLOOR * variance.mean() + module.EXACT
    estimate = offset - centre @ slopes
    return -0.5 * ((E - estimate) ** 2 / variance).sum(1) + 0.5 * (estimate**2 / variance).sum()


@pytest.mark.parametrize("n", [2, 5, 12, 13, 40])
def test_scores_are_those_of_the_dense_formula(n):
    found, evaluated, _ = case(n, noise=0.2)
    wanted, scores = dense(found.table, found._scale, evaluated), found.scores(evaluated).numpy()
    # Single precision, of terms as large as the largest score.
    assert scores == pytest.approx(wanted, rel=0, abs=1e-3 * np.abs(wanted).max())
    assert np.corrcoef(scores, wanted)[0, 1] > 0.9999


@pytest.mark.parametrize("seed", range(5))
def test_the_token_sought_comes_first_where_the_map_is_linear(seed):
    found, evaluated, truth = case(60, seed=seed)
    assert int(found.scores(evaluated).argmax()) == truth


def test_one_candidate_is_no_division_by_zero():
    found, evaluated, _ = case(1)
    assert torch.isfinite(found.scores(evaluated)).all()


def test_the_table_of_a_model_is_learned_once_and_tells_tokens_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNFIT_CACHE", str(tmp_path))
    model = audit.load("tiny")
    model.calibrations.pop("reference-3", None)
    scale = calibrate(model, [3])[3].running.scale
    found = Reference.of(model, 3, scale)
    assert Reference.of(model, 3, scale) is found
    assert not found.learned
    text = model.tokenise("The committee has met")
    truth, before = text[-1], text[:-1]
    prefix = Prefix(model, 3)
    prefix.extend(before)
    states = prefix.candidates(list(range(model.n_vocabulary)))
    tried = [token for token in range(0, model.n_vocabulary, 7) if token != truth]
    target = SimpleNamespace(state=states[truth])
    misfits = ((states[tried] - states[truth]) / scale).square().mean(1)
    evaluated = SimpleNamespace(tokens=tried, states=states[tried], target=target, misfits=misfits)
    scores = found.scores(evaluated)
    scores[tried] = -torch.inf
    assert found.learned
    assert int((scores > scores[truth]).sum()) < model.n_vocabulary // 50
    # A new object reads it from the disk.
    model.calibrations.pop("reference-3")
    again = Reference.of(model, 3, scale)
    assert again.learned
    assert torch.equal(again.scores(evaluated)[tried], found.scores(evaluated)[tried])


def test_no_table_where_it_would_be_too_large(monkeypatch):
    monkeypatch.setattr(module, "MOST_NUMBERS", 10)
    assert Reference.of(audit.load("tiny"), 3, torch.ones(1)) is None
