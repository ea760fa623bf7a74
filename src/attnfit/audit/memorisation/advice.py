"""What the figures of memorisation mean, and what to do, for readers who know no statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnfit.audit.advice import percent
from attnfit.audit.intervals import wilson
from attnfit.audit.memorisation.extraction import Extraction, counted
from attnfit.audit.memorisation.membership import AtRate, Membership
from attnfit.audit.memorisation.report import Memorised


@dataclass(frozen=True)
class Remedy:
    """Something to do about it.

    Attributes
    ----------
    what, why, cost : str
        The reason names its source: a paper, or a table of ours.
    """

    what: str
    why: str
    cost: str


# The cheapest first. Our figures: benchmarks/results/audit-memorised.md.
REMEDIES = (
    Remedy(
        "Take duplicates out of the training texts, and train again.",
        "A text that stands ten times in the data is produced about 1,000 times as often as one that stands "
        "once (arXiv:2202.06539). One that stands once can still be memorised: in a small GPT-2, all "
        "canaries planted once were exposed, with 7.6 to 15.0 of 16.6 bits "
        "(benchmarks/results/audit-memorised.md).",
        "a pass over the data.",
    ),
    Remedy(
        "Train for fewer epochs.",
        "Memorisation begins early, and goes on long before the loss of other texts rises (arXiv:1802.08232, "
        "arXiv:2205.10770): an early stop by that loss comes too late.",
        "a worse fit.",
    ),
    Remedy(
        "Train with differential privacy.",
        "It bounds what any one text can change (arXiv:1607.00133), and kept planted secrets from coming "
        "back where regularisation did not (arXiv:1802.08232).",
        "accuracy, and a gradient for each text.",
    ),
    Remedy(
        "Withhold the model, and not its weights alone.",
        "Whoever cannot query it can extract nothing from it; training texts have been extracted through the "
        "interfaces of production models (arXiv:2311.17035).",
        "its use by others.",
    ),
)


def conclusion(found: Memorised) -> tuple[str, bool]:
    """Return what the figures say together, and whether they give no reason to do anything.

    Texts that come back were memorised, and not guessed, where more of them do than of texts like them that
    the model was not trained on: where intervals at 95 % do not meet, and words alone do not tell them apart.

    Parameters
    ----------
    found : Memorised
    """
    told, exposed = found.membership, found.exposure
    confounded = told is not None and told.conclusion == "confounded"
    others = None if confounded else found.extraction_of_others
    back = found.extraction is not None and _comes_back(found.extraction, others)
    if (back and others is not None) or (exposed is not None and exposed.exposed.any()):
        return "has memorised texts that it was trained on", False
    if back:
        return "completes texts that it was trained on, be they memorised or guessed", False
    if told is not None and told.conclusion == "told apart":
        return "gives away which texts it was trained on", False
    if confounded or (exposed is not None and not exposed.decidable):
        return "shows no sign of memorised texts, but not all figures can be read", False
    return "shows no sign of memorised texts, which is no proof that there are none", True


def _comes_back(members: Extraction, others: Extraction | None) -> bool:
    """Whether any members come back, or more than others where there are some, by any way of decoding."""
    own = members.columns()
    if others is None:
        return any(own["extracted"])
    return any(low > high for low, high in zip(own["low"], others.columns()["high"], strict=True))


def findings(found: Memorised) -> list[str]:
    """Return a clause for each measure, with its count and interval.

    Parameters
    ----------
    found : Memorised
    """
    told = []
    if found.extraction is not None:
        told.append(_told_of_extraction(found.extraction, found.extraction_of_others))
    if found.membership is not None:
        told.append(_told_of_membership(found.membership))
    if found.exposure is not None:
        n, count = len(found.exposure.texts), int(found.exposure.exposed.sum())
        told.append(
            f"{_share(count, n, 'canaries')} are exposed beyond chance"
            if found.exposure.decidable
            else f"whether any of {n} canaries is exposed cannot be told, as too few texts were compared"
        )
    return told


def _told_of_extraction(own: Extraction, others: Extraction | None) -> str:
    prefix, most = max(own.prefixes), max(own.samples)
    count, drawn = own.count(prefix), own.count(prefix, most)
    told = f"given {prefix} tokens, it produces the next {own.suffix} for {counted(count, own.n_texts)}"
    if drawn > count:
        told += f", or for {drawn} with probability {own.chance:g} or more in {most:,} draws"
    if others is not None:
        told += f", and for {counted(others.count(prefix), others.n_texts)} that it was not trained on"
    return told


def _told_of_membership(told: Membership) -> str:
    first = told.scores[0]
    if told.conclusion == "confounded":
        return (
            "whether its training texts can be told from others cannot be read off, as words alone tell them "
            f"apart (AUC {told.blind})"
        )
    if told.conclusion == "not told apart":
        return f"its training texts are not told from others (AUC {first.auc})"
    at = _first_rate(first.at_rates)
    if at is None:
        return f"its training texts are told from others with AUC {first.auc}"
    return (
        f"{_share(at.n_told or 0, at.n_members, 'training texts')} are told from others at a false-positive "
        f"rate of at most {percent(at.rate)}"
    )


def _first_rate(at_rates: Sequence[AtRate]) -> AtRate | None:
    return next((at for at in at_rates if at.n_told is not None), None)


def _share(count: int, n: int, what: str) -> str:
    low, high = map(percent, wilson(count, n))
    return f"{count} of {n} {what} ({percent(count / n)}, interval {low} to {high})"


def scope(found: Memorised) -> dict[str, str]:
    """Return who is assumed to attack, what was measured, and what was not, in words.

    Parameters
    ----------
    found : Memorised
    """
    attackers, measured = [], []
    if found.extraction is not None:
        one = found.extraction
        attackers.append(
            "Extraction: somebody who knows how a training text begins and reads what the model goes on with."
        )
        given = ", ".join(map(str, one.prefixes))
        others = (
            ""
            if found.extraction_of_others is None
            else f", and {found.extraction_of_others.n_texts:,} others"
        )
        measured.append(f"{one.n_texts:,} training texts, {given} tokens given{others}.")
    if found.membership is not None:
        attackers.append(
            "Membership: somebody who has a text, sees what probability the model gives to its tokens, and "
            "has texts like it that were not trained on."
        )
        score = found.membership.scores[0]
        measured.append(f"{len(score.members):,} training texts against {len(score.others):,} others.")
    if found.exposure is not None:
        attackers.append(
            "Exposure: somebody who knows the form of a secret, and sees what probability the model gives to "
            "every candidate."
        )
        measured.append(
            f"{len(found.exposure.texts):,} canaries against {found.exposure.n_compared:,} of "
            f"{found.exposure.n_possible - 1:,} other texts of their template."
        )
    return {
        "Who attacks": " ".join(attackers),
        "What was measured": " ".join(measured),
        "What was not": "Other texts and prefixes, texts that come back with small changes, attacks that "
        "train models of their own, and other runs of the training: intervals are about texts, for this one "
        "model.",
    }


def definitions(found: Memorised) -> list[tuple[str, str]]:
    """Return what the words on the page mean, of what was measured.

    Parameters
    ----------
    found : Memorised
    """
    told = {"interval": "At 95 %; Wilson's for shares of texts, which count as independent."}
    if found.extraction is not None:
        told |= {
            "greedy": "The model's likeliest token each time gives exactly the tokens that follow.",
            "draws": "So many draws contain these tokens with probability "
            f"{found.extraction.chance:g} or more ((n, p)-discoverable extraction, arXiv:2410.19482).",
            "others": "Texts that the model was not trained on: what comes back of these can be guessed.",
        }
    if found.membership is not None:
        told |= {
            "false-positive rate": "A text is told if 1 + the number of others that score as high is at most "
            "this share of all others and itself: then another text is told no more often, on average over "
            "draws of the others. Realised: what the rate of the threshold at hand stays below with "
            "probability 97.5 %.",
            "AUC": "The chance that a training text scores higher than another; 0.5 is a coin. The interval "
            "is DeLong's.",
            "loss, zlib, min-k, reference": "The mean log-probability of a token; the same over the bytes "
            "that zlib needs; that of the least likely fifth; the difference from a model that was not "
            "trained on the texts. The first row is the one that counts.",
            "words alone": "A classifier that sees the words and not the model. If it tells the texts apart, "
            "the other figures say nothing of membership.",
        }
        if found.membership.epsilon is not None:
            told["epsilon"] = (
                f"(epsilon, {found.membership.delta:g})-differential privacy with epsilon below "
                f"{found.membership.epsilon:.2f} is ruled out at 95 %, if texts are independent trials."
            )
    if found.exposure is not None:
        told |= {
            "bits": "log2 of the number of texts of the template, less log2 of the rank of the canary among "
            "them. A canary never seen has e bits or more with probability at most 2^-e.",
            "counted": "exact: all texts of the template were compared. sampled: a sample, in which ten or "
            "more are as likely. bounded: fewer are, and the bits are the least that the sample shows; the "
            "fitted tail is an extrapolation.",
            "exposed": "Likelier than chance allows at 5 % over all canaries (Holm).",
        }
    return list(told.items())
