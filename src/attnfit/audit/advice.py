"""What an audit means, for readers who know no mathematics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnfit.audit.cells import NONE
from attnfit.audit.defences import Chain
from attnfit.audit.forms import parse_access
from attnfit.audit.intervals import wilson
from attnfit.audit.lower_precision import split_run

if TYPE_CHECKING:
    from attnfit.audit.report import Report
    from attnfit.audit.summary import BreakPoint, Pair


# Combinations that the verdict names.
MAX_NAMED = 5


def percent(share: float) -> str:
    """Return a share in percent; only all is 100 %, and only nothing 0 %."""
    for digits in (0, 1, 2):
        told = f"{100 * share:.{digits}f}"
        if share in (0.0, 1.0) or float(told) not in (0.0, 100.0):
            return f"{told} %"
    return "< 0.01 %" if share < 0.5 else "> 99.99 %"


def verdict(report: Report) -> str:
    """Return the audit in one line: what was not tested, then the worst access without and with a defence."""
    name = report.model["name"]
    missing = report.untested()
    told = (
        [f"the report contradicts itself: {'; '.join(report.contradictions())}"]
        if report.contradictions()
        else []
    )
    nothing = [pair for pair in missing if not pair.tested]
    some = [pair for pair in missing if pair.tested]
    told += [f"not tested: {_listed(nothing)}"] if nothing else []
    told += [f"tested on a part of the texts: {_listed(some)}"] if some else []
    bare = _worst(report, NONE)
    if bare is None:
        line = f"{name}: nothing was tested to its end"
    else:
        line = f"{name}: up to {percent(bare.leak)} of tokens recovered without a defence ({bare.access})"
        line += f", {_counted(bare)} at least {percent(_interval(bare)[0])}"
    defended = {d: _worst(report, d) for d in report.settings.judged if d != NONE and _all_tested(report, d)}
    worst = {defence: pair for defence, pair in defended.items() if pair is not None}
    if bare is not None and worst:
        defence, pair = min(worst.items(), key=lambda one: one[1].leak)
        line += f"; with {defence}, the best tried, up to {percent(pair.leak)} ({pair.access})"
        line += f", {_counted(pair)} at most {percent(_interval(pair)[1])}"
    told.append(line + (f"; {report.coverage}" if report.coverage else ""))
    first = told[0]
    return "; ".join([first if first.startswith(name) else first[0].upper() + first[1:], *told[1:]])


def _counted(pair: Pair) -> str:
    """Return a share as counts, before one end of its interval."""
    right = pair.tokens_right + pair.tokens_ambiguous
    whole = f"{pair.sentences_exact} of {pair.n_texts} text{'s' if pair.n_texts != 1 else ''} whole"
    return f"{right:,} of {pair.tokens:,} tokens, {whole}, 95 %"


def _interval(pair: Pair) -> tuple[float, float]:
    return wilson(pair.tokens_right + pair.tokens_ambiguous, pair.tokens)


def scope(report: Report) -> dict[str, str]:
    """Return who is assumed to attack, what was tried, and what was not, in words."""
    forms = [parse_access(access) for access in report.settings.access]
    seen = [form.description for form in forms if form.observed]
    n, n_defences = len(report.settings.texts), len(report.settings.judged)
    attacker = "has the weights of the model"
    if seen:
        attacker += f", sees {', or '.join(seen)}, and knows what was done to it"
    told = {"Who attacks": f"Somebody who {attacker}. The texts themselves are not known."}
    if any(not form.observed for form in forms):
        told["Who attacks"] += " For masked, only the model and the rest of a text."
    told["What was tried"] = (
        f"{n} text{'s' if n != 1 else ''}, {len(forms)} form{'s' if len(forms) != 1 else ''} of access, "
        f"{n_defences} defence{'s' if n_defences != 1 else ''} ({', '.join(report.settings.judged)})."
    )
    told["What was not"] = (
        "Other texts, attacks without the weights, and better attacks than these: what does not come back "
        "here is not proven to be safe."
    )
    return told


@dataclass(frozen=True)
class Option:
    """Something to do instead, and what it costs.

    Attributes
    ----------
    what : str
    leak : float
        The largest share of tokens that still comes back from any form of access.
    divergence, agreement : float or None
        What it costs the model's predictions: nats a token, and the share of first choices that stay.
    enough : bool
        Whether no more than the limit comes back, and all of it was tested.
    """

    what: str
    leak: float
    divergence: float | None
    agreement: float | None
    enough: bool


def options(report: Report, limit: float) -> list[Option]:
    """Return what can be done, first what is enough, the cheapest first; empty where nothing leaks."""
    observed = [pair for pair in report.pairs if parse_access(pair.access).observed]
    bare = [pair for pair in observed if pair.defence == NONE]
    exposed = [pair.access for pair in bare if pair.leak > limit]
    if not exposed:
        return []
    # What was not tested on one form of access is enough for none.
    others = [pair for pair in bare if pair.access not in exposed]
    kept_safe = all(pair.complete and pair.tested for pair in others)
    left = max((pair.leak for pair in others), default=0.0)
    found = [Option(f"keep {', '.join(exposed)} on your own machines", left, 0.0, 1.0, kept_safe)]
    for defence in report.settings.defences:
        pairs = [pair for pair in observed if pair.defence == defence]
        if defence == NONE or not all(pair.tested for pair in pairs if pair.access in exposed):
            continue
        leak = max(pair.leak for pair in pairs)
        costs = [pair.divergence for pair in pairs if pair.divergence is not None]
        kept = [pair.agreement for pair in pairs if pair.agreement is not None]
        enough = leak <= limit and all(pair.complete and pair.tested for pair in pairs)
        found.append(Option(defence, leak, max(costs, default=None), min(kept, default=None), enough))
    return sorted(found, key=lambda o: (not o.enough, (o.divergence or 0.0) if o.enough else o.leak))


def _listed(pairs: list[Pair]) -> str:
    named = [f"{pair.access} with {pair.defence}" for pair in pairs[:MAX_NAMED]]
    more = len(pairs) - MAX_NAMED
    return ", ".join(named + ([f"{more} more"] if more > 0 else []))


def _all_tested(report: Report, defence: str) -> bool:
    """Return whether a defence was tried on every form of access: one that was not is no best one."""
    return all(pair.tested for pair in report.pairs if pair.defence == defence)


def _worst(report: Report, defence: str) -> Pair | None:
    """Return the access that lets most through, among those that the defence changes."""
    known = [pair for pair in report.pairs if pair.defence == defence and pair.n_texts]
    return max(known, key=lambda pair: pair.leak, default=None)


def advise(report: Report, limit: float) -> list[str]:
    """Return one paragraph for each form of access.

    Parameters
    ----------
    report : Report
    limit : float
        Share of tokens up to which a defence is called enough.
    """
    told = [_of_access(report, access, limit) for access in report.settings.access]
    told = [one for one in told if one] + _untested(report)
    claims = sum(control.false_claims for control in report.controls)
    claims += sum(pair.false_claims for pair in report.pairs)
    if claims:
        told.append(
            f"The attack called {claims} texts certain that were not quite right, as happens where some "
            "tokens are all but the same to the model: trust the counts above, not its word."
        )
    if report.model["kind"] == "encoder":
        told.append(
            f"{report.model['name']} is an encoder: logits, topk and masked do not apply to it, and there is "
            "no attack here on its hidden states or on attention after the first block."
        )
    return told


def _of_access(report: Report, access: str, limit: float) -> str:
    bare = report.pair(access)
    form = parse_access(access)
    if bare is None or not bare.tested:
        return ""
    if bare.token_share <= limit and not bare.complete:
        return f"{access}: too few texts were tested to their end to say that it gives nothing away."
    share = percent(bare.token_share)
    if not form.observed:
        return _of_masked(bare, limit)
    if bare.token_share <= limit:
        return f"{access}: {share} of the tokens come back from {form.description} even without a defence."
    told = [f"{access}: whoever sees {form.description} reads {share} of the tokens."]
    defended = [p for p in report.pairs if p.access == access and p.defence != NONE]
    weak = [pair for pair in defended if pair.tested and pair.token_share > limit]
    enough = [p for p in defended if p.tested and p.complete and p.token_share <= limit]
    if weak:
        listed = ", ".join(f"{pair.defence} {percent(pair.token_share)}" for pair in weak)
        told.append(f"These do not protect it, and so much still comes back: {listed}.")
    if enough:
        best = min(enough, key=lambda pair: pair.divergence if pair.divergence is not None else 0.0)
        told.append(
            f"{best.defence} does, on these texts: {percent(best.token_share)} come back{_cost(best)}."
        )
        if Chain.parse(split_run(best.defence)[1]).withholds:
            told.append(
                "The token withheld is searched for among likely pairs, not all: a better attack may find "
                "it, and the rest with it."
            )
    else:
        told += _nothing_helps(report, access, weak)
    return " ".join(told)


def _untested(report: Report) -> list[str]:
    """Return one sentence for each reason why something was not tested."""
    missing = [pair for pair in report.pairs if not pair.tested or (pair.message and not pair.complete)]
    told = []
    for message in dict.fromkeys(pair.message for pair in missing):
        same = [pair for pair in missing if pair.message == message]
        groups = {one.access: [pair.defence for pair in same if pair.access == one.access] for one in same}
        listed = "; ".join(f"{access} with {', '.join(defences)}" for access, defences in groups.items())
        every = "" if not any(pair.tested for pair in same) else " with every text"
        told.append(f"Not tested{every}, which is no proof of protection: {listed} ({message}).")
    return told


def _of_masked(bare: Pair, limit: float) -> str:
    share = percent(bare.token_share)
    if bare.token_share <= limit:
        return f"masked: the model completes {share} of hidden beginnings: no sign of memorised texts."
    return (
        f"masked: from the model itself and the rest of a text, {share} of hidden first tokens come back: it "
        "has memorised these texts. No change of outputs helps; remove the texts from the training data or "
        "train on them fewer times."
    )


def _cost(pair: Pair) -> str:
    if pair.divergence is None or pair.agreement is None:
        return ""
    return (
        f", at a cost of {pair.divergence:.2g} nats a token: {percent(pair.agreement)} of the model's first "
        "choices stay the same"
    )


def _nothing_helps(report: Report, access: str, weak: list[Pair]) -> list[str]:
    told = ["Nothing that was tried is enough: do not let it leave your machines."] if weak else []
    points = [p for p in report.breakpoints if p.access == access and p.unit == "noise, row RMS"]
    if points and points[0].predicted is not None:
        told.append(_needed(points[0]) + _price(report, points[0]))
    return told


def _needed(point: BreakPoint) -> str:
    size = f"noise of {point.predicted:.2g} times the size of each row"
    predicted = 0.0 if point.predicted is None else point.predicted
    if point.kept_at is not None and point.kept_at >= predicted:
        return (
            f"By distances alone, {size} should lose half of the tokens; even {point.kept_at:g} does not, "
            "because the attack also knows which words are likely"
        )
    if point.lost_at is not None and point.lost_at < predicted:
        return (
            f"This attack loses half of the tokens at {point.lost_at:g} times the size of each row, but the "
            f"numbers still tell them apart: a better one could read them up to {predicted:.2g}"
        )
    return f"By calculation, {size} loses half of the tokens"


def _price(report: Report, point: BreakPoint) -> str:
    """Return what the strongest noise that was tried costs."""
    pattern = re.compile(r"noise:([0-9.]+)")
    tried = [p for p in report.pairs if p.access == point.access and p.divergence is not None]
    sizes = [(float(match[1]), pair) for pair in tried if (match := pattern.fullmatch(pair.defence))]
    if not sizes:
        return "."
    _, strongest = max(sizes, key=lambda one: one[0])
    return f"; {strongest.defence} costs {strongest.divergence:.2g} nats a token."
