"""What the states after one text tell of those after another: against a dense formula, and exact maps."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from attnfit import audit  # noqa: E402
from attnfit.audit import reference as module  # noqa: E402
from attnfit.audit.calibration import Calibration, calibrate  # noqa: E402
from attnfit.audit.engine.prefix import Prefix  # noqa: E402
from attnfit.audit.probes import Probe  # noqa: E402
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


def ranks(here, there):
    """Mean logarithm of the ranks, the regression solved in as many equations as channels."""
    X, Y = here.double().numpy(), there.double().numpy()
    n, width = len(X) * module.N_TRIED // (module.N_TRIED + module.N_SOUGHT), X.shape[1]
    centre, offset = X[:n].mean(0), Y[:n].mean(0)
    A, B = X[:n] - centre, Y[:n] - offset
    ridge = module.RIDGE * (A**2).sum() / width * np.eye(width)
    slopes = np.linalg.solve(A.T @ A + ridge, A.T @ B + ridge)
    variance = ((B - A @ slopes) ** 2).sum(0)
    variance = variance + module.FLOOR * variance.mean() + module.EXACT
    places = []
    for k in range(n, len(X)):
        far = ((Y - offset - (X[k] - centre) @ slopes) ** 2 / variance).sum(1)
        places.append(1 + (far < far[k]).sum())
    return np.log(places).mean()


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 5.0])
def test_the_log_rank_is_that_of_the_dense_formula(noise):
    generator = torch.Generator().manual_seed(1)
    here = torch.randn(256, 12, generator=generator)
    turned = here @ (torch.eye(12) + 0.3 * torch.randn(12, 12, generator=generator) / 12**0.5)
    there = turned + noise * torch.randn(256, 12, generator=generator)
    found = module.log_rank(here, there)
    # A rank of some sixty may move by one with rounding.
    assert found == pytest.approx(ranks(here, there), abs=np.log(2) / module.N_SOUGHT)
    assert found < 0.01 if noise == 0.0 else (found > 1.0) == (noise >= 1.0)


def test_the_text_whose_states_tell_most_of_others_is_chosen(monkeypatch):
    model = audit.load("tiny")
    generator = torch.Generator().manual_seed(2)
    states, seen = torch.randn(model.n_vocabulary, 12, generator=generator), []

    def after(self, text, tokens):
        # Those that are compared come before the texts among which one is chosen.
        seen.append(text)
        noise = 0.0 if len(seen) <= len(module.LENGTHS) or text[0] % 3 == 1 else 2.0
        return (states + noise * torch.randn(states.shape, generator=generator))[tokens]

    monkeypatch.setattr(Reference, "_after", after)
    chosen = Reference(model, 3, 1.0)._best_text(torch.Generator().manual_seed(0))
    texts = seen[len(module.LENGTHS) :]
    assert [len(text) for text in seen[: len(module.LENGTHS)]] == list(module.LENGTHS)
    assert len(texts) == module.N_TEXTS
    assert {len(text) for text in texts} == {1, 2, 3}
    assert chosen in texts
    assert chosen[0] % 3 == 1


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


@pytest.mark.parametrize(
    ("first", "scale", "state", "kind"),
    [
        (10.0, 1.0, 10.0, "first"),
        (10.0, 1.0, 0.0, "running"),
        # In spreads of its own kind, not in numbers.
        (10.0, 0.5, 6.0, "running"),
        (10.0, 0.5, 7.0, "first"),
        # Where first positions are like all others, nothing is to be told apart.
        (1.0, 1.0, 1.0, "running"),
        (1.0, 1.0, 1.9, "running"),
        (1.0, 1.0, 2.1, "first"),
    ],
)
def test_states_are_told_by_the_nearer_of_two_kinds(first, scale, state, kind):
    def probe(centre, spread):
        return Probe(torch.full((6,), centre), torch.full((6,), spread), *[None] * 3)

    calibration = Calibration(None, probe(0.0, 1.0), probe(first, scale), None)
    assert calibration.kinds(torch.full((2, 6), state)) == [kind] * 2


def test_running_text_of_a_model_is_no_first_position():
    model = audit.load("tiny")
    states = torch.from_numpy(model.states(model.tokenise("The committee has met in the town hall"), 3))
    assert set(calibrate(model, [3])[3].kinds(states[1:])) == {"running"}
