"""One form of access, one defence, one text: observed and inverted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import Any, Literal

import numpy as np

from attnfit.audit.access import Access
from attnfit.audit.deadline import Deadline
from attnfit.audit.engine.prefix import check_text
from attnfit.audit.errors import AuditError, Unsupported
from attnfit.audit.forms import parse_access
from attnfit.audit.inverting import search_for
from attnfit.audit.masked import COMMON, MaskedResult, common_words, recover_masked
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.models.texts import Text, is_chat, tokenised
from attnfit.audit.observation import Observation, observe
from attnfit.audit.utility import cost_of

NONE = "none"
N_MASKED = 2
# Candidates a position for noise that no text explains: the vocabulary to its end would say no more.
NOISE_CANDIDATES = 512
CUT = "the time for this cell ran out"


@dataclass(frozen=True)
class Key:
    """What a cell is about.

    Attributes
    ----------
    access, defence : str
    text : int
        Index of the text.
    control : {"", "other text", "noise"}
        Controls invert what is not the text: any claim to have recovered it is false.
    """

    access: str
    defence: str
    text: int
    control: str = ""


@dataclass(frozen=True)
class Cell:
    """How one inversion went.

    Attributes
    ----------
    key : Key
    status : {"done", "cut", "error", "unsupported"}
        "cut": time ran out before the end; "error": it cannot be done, and the message says why;
        "unsupported": the attack would be wrong on this model, and the message says at which step.
    message : str
    n_tokens : int
        Tokens of the text; with masked access the hidden ones.
    tokens : list of int
        Recovered, from the first on.
    right : list of bool
        Whether each is the true one at its position.
    verified : bool
        Whether the attack claims to know that it is right.
    failed_at : int or None
    n_candidates : int
    seconds : float
    divergence, agreement : float or None
        What the defence costs, where predictions go on from what is left.
    way : str
        How candidates were evaluated; empty where none were.
    n_ambiguous : int
        Tokens that are wrong, but known up to others with all but the same embedding.
    n_content, n_content_right : int or None
        Of a chat: tokens of the contents, and those of them that are right. None where all are content.
    """

    key: Key
    status: Literal["done", "cut", "error", "unsupported"]
    message: str
    n_tokens: int
    tokens: Tokens
    right: list[bool]
    verified: bool = False
    failed_at: int | None = None
    n_candidates: int = 0
    seconds: float = 0.0
    divergence: float | None = None
    agreement: float | None = None
    way: str = ""
    n_ambiguous: int = 0
    n_content: int | None = None
    n_content_right: int | None = None

    @property
    def content(self) -> tuple[int, int]:
        """Tokens of the contents that are right, and all of them."""
        if self.n_content is None or self.n_content_right is None:
            return sum(self.right), self.n_tokens
        return self.n_content_right, self.n_content

    @property
    def exact(self) -> bool:
        """Whether every token was recovered."""
        return len(self.right) == self.n_tokens and all(self.right)

    @property
    def false_claim(self) -> bool:
        """Whether the attack claims to be right and is not."""
        return self.verified and not self.exact


class Attack:
    """Runs cells of one model and some texts.

    Parameters
    ----------
    model : Model
    texts : sequence of str, of lists of token ids or of lists of messages
    truths : sequence of list of int
        Their tokens.
    random_state : int
        Seed of defences and controls.
    """

    def __init__(
        self, model: Model, texts: Sequence[Text], truths: Sequence[Tokens], random_state: int
    ) -> None:
        self._model, self._texts, self._truths = model, texts, truths
        self._seed = random_state
        self._masked: dict[int, MaskedResult] = {}
        self._ways: dict[tuple[str, int, bool], str] = {}

    def run(self, key: Key, seconds: float) -> Cell:
        """Observe and invert; at most for so many seconds.

        Raises
        ------
        KeyboardInterrupt
            If it was not the clock.
        """
        observed = parse_access(key.access).observed
        truth = self._truths[key.text][: None if observed else N_MASKED]
        blank = Cell(key, "cut", CUT, len(truth), [], [])
        deadline, began = Deadline(self._model, seconds), perf_counter()
        cell = blank
        try:
            with deadline:
                cell = self._invert(blank, truth) if observed else self._hide(blank, truth)
        except Unsupported as error:
            cell = replace(blank, status="unsupported", message=str(error))
        except AuditError as error:
            cell = replace(blank, status="error", message=str(error))
        except KeyboardInterrupt:
            if not deadline.passed:
                raise
        if cell.status == "done" and cell.message.endswith("interrupted"):
            if not deadline.passed:
                raise KeyboardInterrupt
            told = f"{CUT}: {sum(cell.right)} of {cell.n_tokens} tokens were recovered until then"
            cell = replace(cell, status="cut", message=told)
        return cell if cell.seconds else replace(cell, seconds=perf_counter() - began)

    def _invert(self, blank: Cell, truth: Tokens) -> Cell:
        key, model = blank.key, self._model
        text: Text = self._texts[key.text]
        budget = None
        if key.control == "other text":
            text, truth = self._nonsense(key.text)
        form = parse_access(key.access)
        way = self._way(form, key.text, truth, key.control) if model.kind == "causal" else ""
        seen = observe(model, text, key.access, _or_none(key.defence), self._seed + key.text)
        if key.control == "noise":
            seen, truth, budget = self._noise(seen), [], NOISE_CANDIDATES
        search = search_for(model, seen, budget)
        fault = search.contradiction(truth) if key.control != "noise" else ""
        if fault:
            raise Unsupported(f"{model.family}, {key.access} with {key.defence}: {fault}")
        found = search.run([])
        right = [a == b for a, b in zip(found.tokens, truth, strict=False)]
        counted = [True] * len(truth)
        if is_chat(text):
            counted = tokenised(model, text).content
        cell = replace(
            blank,
            status="done",
            message=found.message,
            n_tokens=len(truth),
            tokens=found.tokens,
            right=right,
            # Noise has no text: with nothing to recover, any claim is false.
            verified=found.verified,
            failed_at=found.failed_at,
            n_candidates=found.n_candidates,
            seconds=found.seconds,
            way=way,
            n_ambiguous=sum(
                truth[at] in others and not right[at]
                for at, others in found.alternatives.items()
                if at < len(truth) and counted[at]
            ),
            n_content=None if all(counted) else sum(counted),
            n_content_right=None if all(counted) else sum(map(min, right, counted)),
        )
        if key.control == "noise":
            return replace(cell, n_tokens=max(1, len(found.tokens)), right=[False] * len(found.tokens))
        if key.control or model.kind != "causal" or not model.predicts:
            return cell
        lost = cost_of(model, text, seen)
        if lost is None:
            return cell
        return replace(cell, divergence=lost.divergence, agreement=lost.agreement)

    def _way(self, form: Access, text: int, tokens: Tokens, control: str) -> str:
        """Return how candidates are evaluated, after that was compared with the model itself on this text."""
        told = (str(form), text, control == "other text")
        if told not in self._ways:
            self._ways[told] = check_text(self._model, form.layer(self._model), tokens)
        return self._ways[told]

    def _hide(self, blank: Cell, truth: Tokens) -> Cell:
        at = blank.key.text
        if at not in self._masked:
            # Tables of a small vocabulary are shared by all texts; a large one costs by the text.
            small = self._words is None
            if is_chat(self._texts[at]):
                raise AuditError(
                    "masked hides the first tokens of a text: those of a chat are its template's"
                )
            which = [i for i, text in enumerate(self._texts) if (small or i == at) and not is_chat(text)]
            which = [i for i in which if len(self._truths[i]) > N_MASKED + 1]
            if at not in which:
                raise AuditError(f"text {at} has {len(self._truths[at])} tokens: too few to hide {N_MASKED}")
            known = [self._truths[i][N_MASKED:] for i in which]
            results = recover_masked(self._model, known, N_MASKED, admissible=self._words)
            self._masked.update(zip(which, results, strict=True))
        found = self._masked[at]
        message = f"likeliest beginning, {found.gap:.2f} nats ahead of the next"
        if self._words is not None:
            message += f"; {COMMON:,} common words tried at each place"
        right = [a == b for a, b in zip(found.tokens, truth, strict=True)]
        return replace(
            blank, status="done", message=message, tokens=found.tokens, right=right,
            n_candidates=found.n_candidates, seconds=found.seconds,
        )  # fmt: skip

    @cached_property
    def _words(self) -> list[list[int]] | None:
        return common_words(self._model)

    def _nonsense(self, index: int) -> tuple[str, Tokens]:
        """Return a random text as long as one of the texts."""
        rng = np.random.default_rng([self._seed, index])
        model = self._model
        while True:
            drawn = rng.integers(model.n_vocabulary, size=8 * len(self._truths[index]))
            names = [model.detokenise([int(token)]).strip() for token in drawn]
            words = [name for name in names if name.isascii() and name.isalpha()]
            text = " ".join(words[: max(2, len(self._truths[index]) // 2)])
            if text:
                return text, model.tokenise(text)

    def _noise(self, seen: Observation) -> Observation:
        """Return numbers with the mean and the spread of each channel, and nothing else of an observation."""
        rng = np.random.default_rng([self._seed, len(seen.array)])
        spread = seen.array.std(0) + np.abs(seen.array).mean() * 1e-3
        array = seen.array.mean(0) + spread * rng.standard_normal(seen.array.shape)
        shown = seen.shown
        if shown is not None:
            array = -np.sort(np.abs(array), axis=1)
            shown = rng.random((len(array), self._model.n_vocabulary)).argsort(axis=1)[:, : shown.shape[1]]
        return replace(seen, array=array.astype(np.float32), shown=shown)


def _or_none(defence: str) -> str | None:
    return None if defence == NONE else defence


def as_record(cell: Cell) -> dict[str, Any]:
    """Return a cell as plain data with stable names."""
    plain = {name: value for name, value in vars(cell).items() if name != "key"}
    return {**vars(cell.key), **plain}


def from_record(record: dict[str, Any]) -> Cell:
    """Return the cell that as_record wrote."""
    own = {name: record[name] for name in ("access", "defence", "text", "control")}
    return Cell(Key(**own), **{name: value for name, value in record.items() if name not in own})
