"""Recovery against memorisation: claims that follow their numbers, batches that equal single runs, stages."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit.audit import AuditError, load  # noqa: E402
from attnfit.audit.models import train_tiny  # noqa: E402
from attnfit.audit.relaxation import masked_relaxation, masked_relaxations  # noqa: E402
from attnfit.reproduction import memorisation  # noqa: E402
from attnfit.reproduction.memorisation import Measured, Stage, attacked, chosen_texts, claims, dispersion  # noqa: E402


def stage(loss, shares, scored, **changes):
    shares = np.array(shares, float)
    n = len(shares)
    made = Stage(
        loss, 12 * loss, shares, 0.9, np.ones(n, bool), np.arange(n) < scored * n, 3.0,
        np.array([0, 300]), np.array([0.0, shares.mean()]),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def measured(before=0.0, last=0.95, middle=0.5, scored=(0.0, 1.0), by_text=False):
    """Before, in the middle and at the end; shares as even as coins make them, or one for each text."""
    rng = np.random.default_rng(0)

    def shares(mean):
        return (rng.random(24) < mean) * 1.0 if by_text else rng.binomial(12, mean, 24) / 12

    stages = [stage(1.3, shares(before), scored[0]), stage(0.5, shares(middle), 0.5)]
    return Measured([*stages, stage(0.2, shares(last), scored[1])], 12, [])


def held(**changes):
    return [claim.held for claim in claims(measured(**changes))]


def test_claims_follow_their_numbers():
    assert held() == [True, True, True, True]
    assert held(last=0.2, middle=0.1)[0] is False
    assert held(scored=(0.5, 1.0))[1] is False
    assert held(scored=(0.0, 0.8))[1] is False
    # Less at the lowest loss than before: clearly, and by too little to tell.
    assert held(last=0.1, middle=0.6)[2] is False
    even = measured()
    middle = np.linspace(0.2, 0.8, 24)
    last = middle - 0.01 + 0.1 * np.resize([1, -1], 24)
    stages = [even.stages[0], stage(0.5, middle, 0.5), stage(0.2, last, 1.0)]
    assert claims(Measured(stages, 12, []))[2].held is None
    # Texts that always or never succeed.
    assert held(last=0.5, middle=0.1, by_text=True)[3] is False
    assert len(held()) == 4


def test_dispersion_is_one_for_coins():
    rng = np.random.default_rng(0)
    assert dispersion(rng.binomial(12, 0.3, 4000) / 12, 12) == pytest.approx(1.0, abs=0.1)
    assert dispersion(np.repeat([0.0, 1.0], 50), 12) == pytest.approx(12.0, rel=0.05)
    assert dispersion(np.zeros(5), 12) == 1.0


def test_texts_of_a_batch_are_attacked_as_they_are_one_by_one():
    model = load("tiny")
    texts = chosen_texts(model, 3)
    together = masked_relaxations(
        model, [t[2:] for t in texts], 2, steps=5, step_size=0.1, n_repeats=2, random_state=4
    )
    for place, (text, found) in enumerate(zip(texts, together, strict=True)):
        alone = masked_relaxation(
            model, text[2:], 2, steps=5, step_size=0.1, n_repeats=2, random_state=4 + place
        )
        assert np.array_equal(alone.tokens_then[0], found.tokens_then[0])
        np.testing.assert_allclose(alone.history, found.history, rtol=1e-4)
    with pytest.raises(AuditError, match="one length"):
        masked_relaxations(model, [texts[0][2:], texts[1][3:]], 2, steps=1)


def test_an_attack_is_scored_against_the_truth(monkeypatch):
    monkeypatch.setattr(memorisation, "STEPS", 40)
    model = load("tiny")
    found = attacked(model, 0.23, 2, 3, 0)
    text = torch.tensor(chosen_texts(model, 2))
    with torch.no_grad():
        logits = model.module(input_ids=text).logits[:, :-1]
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")
    assert found.text_loss == pytest.approx(float(truth.reshape(2, -1).sum(1).mean()), rel=1e-4)
    assert found.scored.all()
    assert found.shares.shape == (2,)
    assert found.success[-1] == pytest.approx(found.shares.mean())


def test_the_likeliest_of_the_rounded_starts_is_judged(monkeypatch):
    from attnfit.audit import relaxation

    model = load("tiny")
    texts = chosen_texts(model, 3)
    runs = masked_relaxations(model, [t[2:] for t in texts], 2, steps=1, n_repeats=4)
    for place, run in ((0, 2), (1, 0)):
        runs[place].tokens[run] = texts[place][:2]
    monkeypatch.setattr(relaxation, "masked_relaxations", lambda *_, **__: runs)
    found = attacked(model, 0.23, 3, 4, 0)
    # Noise is less likely than what was memorised; the third text has noise only.
    assert found.rounded.tolist() == [True, True, False]
    assert found.shares.tolist() == [0.25, 0.25, 0.0]
    assert found.last == pytest.approx(2 / 12)


def test_training_stops_at_losses_and_goes_on(monkeypatch):
    monkeypatch.setattr(train_tiny, "GENERIC_STEPS", 5)
    monkeypatch.setattr(train_tiny, "MAX_STEPS", 40)
    monkeypatch.setattr(train_tiny, "N_GENERIC", 500)
    stages = [(loss, model.fingerprint) for loss, model in train_tiny.at_losses((5.5, 5.0, 0.01))]
    losses = [loss for loss, _ in stages]
    assert losses[0] > 5.5 >= losses[1] > 5.0 >= losses[2] > losses[3]
    # Copies: what was yielded is not trained on.
    assert len({fingerprint for _, fingerprint in stages}) == 4


def test_the_page_and_the_flag(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from attnfit.cli.app import app

    page = memorisation.page(measured())
    page.to_html(tmp_path / "page.html", "command")
    assert "texts with half of the starts" in (tmp_path / "page.html").read_text()
    monkeypatch.setattr(memorisation, "run", lambda *_: page)
    done = CliRunner().invoke(
        app, ["reproduce", "data-recovery", "--memorisation", "--quick", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert "held: claimed: memorisation decides whether the secret is in the model" in " ".join(
        done.output.split()
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"memorisation.json", "memorisation.html"}
    refused = CliRunner().invoke(app, ["reproduce", "two-layer", "--memorisation"])
    assert refused.exit_code != 0
    assert "--memorisation goes with data-recovery" in " ".join(refused.output.split())


def test_the_page_on_auditing_quotes_the_results_file():
    root = Path(__file__).parent.parent
    found = json.loads((root / "experiments" / "results" / "memorisation.json").read_text())
    page = (root / "docs" / "audit.md").read_text()
    for row in found["tables"][0]["rows"]:
        loss, text, both, last, half, rounded, scored, soft = row.values()
        cells = f"{loss:.2f}; {text:.1f}", f"{both:.2f} ({last:.2f})", half, f"{rounded:.2f}", f"{scored:.2f}"
        assert f"| {' | '.join(cells)} | {soft:.1f} |" in page
    excess = re.findall(r"shares of texts vary (\S+) times", found["claims"][3]["measured"])[0]
    words = " ".join(page.split())
    assert f"vary {excess} times as much as by chance" in words
    histogram = {row["nats a token"]: row for row in found["tables"][1]["rows"]}[0.3369]
    assert (histogram["0.00 to 0.05"], histogram["0.75 to 1.00"]) == (16, 4)
    shares = [row["success"] for row in found["tables"][2]["rows"]]
    assert "0.1 find both tokens in {:.2f} of the runs, 1,500 of 0.01 in {:.2f}".format(*shares) in words
    assert f"10,000 of 1e-3 in {shares[2]:.2f}" in words
