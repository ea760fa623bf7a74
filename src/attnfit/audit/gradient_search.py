"""From the gradient of a training step to its texts: spans of the rows that weights multiply.

The attack is that of "DAGER: Exact Gradient Inversion for Large Language Models" (arXiv 2405.15586): a row
of ``dL/dW = sum_t delta_t x_t'`` is a combination of what enters the weight, so that, as long as fewer tokens
than channels were in the batch, a token is one of them only if its row lies in the span. Here with the last
tokens, which have no loss of their own and show in the head's gradient only, and with a proof: the gradient
of the texts found is compared with what was observed.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.errors import AuditError
from attnfit.audit.gradients import Weight, gradients_of, observed_weights
from attnfit.audit.models.model import Model, Tokens

# Singular values below this share of the first are rounding of single precision; how far from a span true
# rows may be then, in the first block and the second, and at most where a defence's errors are larger. On
# SmolLM2 true rows are at 8e-8 to 5e-5, false ones at 6e-2 (first block) and 5e-3 (second) and more.
CUT, NEAR, FARTHEST = 1e-6, (1e-3, 1e-4), 5e-2
# Errors may be so much larger than they are estimated.
SLACK = 1.2
# Prefixes of one length that are kept.
MOST = 256
# Relative difference up to which gradients are the same, and beyond which nothing is certain: one label among
# a thousand changes them by more.
SAME, CERTAIN = 3e-5, 1e-2
# Texts whose gradients are one to this (least eigenvalue of their correlations) cannot be told apart.
ALIKE = 1e-8
# A last token's own loss makes its number in the head's gradient negative by the weight of the text, up to
# this share.
LABEL = 0.3
TOKENS = 1 << 12


@dataclass(frozen=True)
class GradientResult:
    """What was found in a gradient.

    Attributes
    ----------
    texts : list of str
    tokens : list of list of int
        Of each text, the one with the largest weight in the loss first; without its last token where that is
        not known.
    verified : bool
        Whether the gradient of exactly these texts is the one observed.
    ranks : tuple of int
        Of the gradients of the first two blocks: about the number of different tokens and of all tokens.
    residual : float
        Relative difference of the two gradients of these blocks.
    message : str
    n_candidates : int
    seconds : float
    """

    texts: list[str]
    tokens: list[Tokens]
    verified: bool
    ranks: tuple[int, int]
    residual: float
    message: str
    n_candidates: int
    seconds: float


class Span:
    """The span of the rows of some gradients.

    Parameters
    ----------
    gradients, errors : list of Tensor, shapes (outputs, width)
    place : {0, 1}
        Of the block.
    """

    def __init__(self, gradients: list[Any], errors: list[Any], place: int) -> None:
        sizes = [float(one.norm()) for one in gradients]
        kept = [(g / s, e / s) for g, e, s in zip(gradients, errors, sizes, strict=True) if s > 0]
        stack, error = (torch.cat([pair[i] for pair in kept]).double() for i in (0, 1))
        _, values, V = torch.linalg.svd(stack, full_matrices=False)
        # The norm of independent errors of unlike sizes is at most about this.
        rows = error.square().mean(1)
        noise = float(rows.sum().sqrt() + (stack.shape[1] * rows.max()).sqrt()) / float(values[0])
        self.rank = int((values > max(CUT, SLACK * noise) * values[0]).sum())
        self.width = stack.shape[1]
        self._V = V[: self.rank].float()
        self._tilts = (SLACK * noise * values[0] / values[: self.rank]).float()
        self._near = NEAR[place]

    def holds(self, rows: Any) -> tuple[Any, Any]:
        """Return how far rows are from the span, relative to their size, and whether as near as true ones.

        To first order, errors tilt a direction out of the span by their norm over its singular value.
        """
        size = rows.norm(dim=-1)
        along = rows @ self._V.T
        far = (rows - along @ self._V).norm(dim=-1) / size
        tilted = (along * self._tilts).norm(dim=-1) / size
        return far, far <= torch.hypot(torch.tensor(self._near), tilted).clamp_max(FARTHEST)


class GradientSearch:
    """The inversion of one gradient.

    Parameters
    ----------
    model : Model
        A causal one.
    array, error : ndarray, shape (rows, width)
        Rows of the gradients of `observed_weights` in turn, and their errors.

    Raises
    ------
    AuditError
        If the first block has no gradient, or the batch is too large for the width.
    """

    def __init__(self, model: Model, array: Any, error: Any) -> None:
        self._began, self._model = perf_counter(), model
        self._weights: list[Weight] = observed_weights(model)
        sizes = [weight.n_rows for weight in self._weights]
        given, likely = (torch.from_numpy(np.array(one, dtype=np.float32)) for one in (array, error))
        self._given, errors = list(given.split(sizes)), list(likely.split(sizes))
        half = (len(sizes) - 1) // 2
        self._inner = slice(0, len(sizes) - 1)
        size = float(torch.cat(self._given[self._inner]).norm())
        noise = float(torch.cat(errors[self._inner]).norm())
        for block, rows in enumerate((slice(0, half), slice(half, 2 * half))):
            if not any(float(one.norm()) > 0 for one in self._given[rows]):
                raise AuditError(
                    f"block {block} has no gradient, so that it was frozen or not sent: what enters a later "
                    "block is no row of a table, and there is no attack here on its gradient alone"
                )
        self._allowed = max(SAME, SLACK * noise / size)
        self._first = Span(self._given[:half], errors[:half], 0)
        self._second = Span(self._given[half : 2 * half], errors[half : 2 * half], 1)
        for span in (self._first, self._second):
            if span.rank >= span.width:
                raise AuditError(
                    f"batch too large for this width: its gradient has rank {span.rank} of {span.width}, so "
                    "that every token lies in its span"
                )
        self._prefix = Prefix(model, "entering:1")
        self._known: dict[int, Tokens] = {}
        self._columns: dict[tuple[int, ...], Any] = {}

    def search(self) -> GradientResult:
        """Return all texts that could be found."""
        texts = self._tree()
        texts, ended = self._completed(texts)
        unended = [text for text, whole in zip(texts, ended, strict=True) if not whole]
        # One token alone has no loss.
        texts = [text for text in texts if len(text) > 1]
        ranks = (self._first.rank, self._second.rank)
        shares, residual, apart = self._explained(texts) if texts else ([], 1.0, True)
        # Branches that no text goes on from leave nothing: what has no part in the gradient is none of it.
        kept = [text for text, share in zip(texts, shares, strict=True) if self._counts(text, share)]
        if kept and len(kept) < len(texts) and residual <= self._allowed:
            texts = kept
            shares, residual, apart = self._explained(texts)
        order = sorted(range(len(texts)), key=lambda one: -shares[one])
        texts = [texts[one] for one in order]
        same = residual <= self._allowed and bool(texts) and min(shares) > 0
        complete = not any(text in unended for text in texts)
        sure = complete and same and apart and self._allowed <= CERTAIN
        verified = sure and not self._others_explain(texts)
        n = len(texts)
        named = f"{n} text{'s' if n != 1 else ''}"
        if not texts:
            told = "no token's row lies in the span of the gradient: it may come from another model or loss"
        elif verified:
            told = f"{named} recovered: their gradient is the one observed"
        elif not complete:
            told = f"{named} guessed without every last token, which shows in the gradient of the head only"
        elif not same:
            told = (
                f"{named} guessed: their gradient differs from the one observed by {residual:.2g} of its size"
            )
        elif not apart:
            told = f"{named} guessed: some have the same gradient, and cannot be told apart"
        else:
            told = f"{named} guessed: they give the observation, but with its errors so would others"
        return GradientResult(
            [self._model.detokenise(tokens) for tokens in texts], texts, verified, ranks, residual, told,
            self._prefix.n_candidates, perf_counter() - self._began,
        )  # fmt: skip

    def differs(self, texts: list[Tokens]) -> str:
        """Return why these texts would not be accepted; empty if they would."""
        _, residual, _ = self._explained(texts)
        if residual <= self._allowed:
            return ""
        return f"the gradient of the true text is {residual:.2g} of it away (allowed {self._allowed:.2g})"

    def _in_span(self, place: int) -> Tokens:
        """Return the tokens that the first block may have seen at a position."""
        at = place if self._model.counts_positions else 0
        if at not in self._known:
            part = [self._model.part("entering:0")]
            first = self._model.first_position + at
            inputs = {"position_ids": torch.tensor([[first]])} if self._model.takes_positions else {}
            held = []
            for some in torch.arange(self._model.n_vocabulary)[:, None].split(TOKENS):
                with torch.no_grad():
                    rows = self._model.capture(part, "output", input_ids=some, use_cache=False, **inputs)[0]
                held.append(self._first.holds(rows[:, 0])[1])
            self._known[at] = torch.cat(held).nonzero()[:, 0].tolist()
        return self._known[at]

    def _tree(self) -> list[Tokens]:
        """Return all texts whose every prefix lies in the spans, without their last tokens."""
        leaves: list[Tokens] = []
        living: list[Tokens] = [[]]
        while living and len(living[0]) < self._model.max_length - 1:
            grown: list[tuple[float, Tokens]] = []
            for tokens in living:
                some = self._in_span(len(tokens))
                self._prefix.crop(0)
                if tokens:
                    self._prefix.extend(tokens)
                kept = []
                if some:
                    rows = self._prefix.candidates(some)
                    far, held = self._second.holds(rows)
                    if tokens:
                        # A first token repeated is the same row for ever where positions only turn keys.
                        before = torch.cdist(rows, self._prefix.states[0]).amin(1)
                        held &= before > NEAR[1] * rows.norm(dim=-1)
                    kept = held.nonzero()[:, 0].tolist()
                grown += [(float(far[place]), [*tokens, some[place]]) for place in kept]
                if tokens and not kept:
                    leaves.append(tokens)
            living = [tokens for _, tokens in sorted(grown)[:MOST]]
        return leaves + [tokens for tokens in living if tokens]

    def _completed(self, texts: list[Tokens]) -> tuple[list[Tokens], list[bool]]:
        """Return texts with their last tokens, and of which these are known."""
        head = self._given[-1]
        unknown = [False] * len(texts)
        if not texts or not float(head.norm()) > 0:
            return texts, unknown
        nodes = list(dict.fromkeys(tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)))
        if len(nodes) >= self._model.width:
            return texts, unknown
        top = self._model.n_layers + 1
        last = {}
        for text in texts:
            for n, state in enumerate(torch.from_numpy(self._model.states(text, top)), 1):
                last[tuple(text[:n])] = state
        H = torch.stack([last[node] for node in nodes])
        # A column for each prefix: how the loss there changes with each logit.
        slopes = head @ torch.linalg.pinv(H.double()).float()
        tied = self._model.embeddings.data_ptr() == self._model.head.weight.data_ptr()
        inputs = sorted({token for text in texts for token in text}) if tied else []
        ends = [self._label(slopes[:, nodes.index(tuple(t))], last[tuple(t)], inputs) for t in texts]
        missing = [place for place, end in enumerate(ends) if end is None]
        found = [text if end is None else [*text, end] for text, end in zip(texts, ends, strict=True)]
        if len(missing) != 1 or not inputs:
            return found, [end is not None for end in ends]
        # The gradient of the table of embeddings lies over the head's for tokens of the text: try them.
        place = missing[0]
        missed = []
        for token in inputs:
            found[place] = [*texts[place], token]
            missed.append(self._explained(found)[1])
        found[place] = [*texts[place], inputs[int(np.argmin(missed))]]
        return found, [True] * len(texts)

    def _label(self, slopes: Any, state: Any, inputs: Tokens) -> int | None:
        """Return the token whose logit the loss wants larger; None where only tokens of the text are left."""
        chances = torch.softmax(self._model.unembed(state[None])[0], -1)
        clean = torch.ones(len(slopes), dtype=torch.bool)
        clean[inputs] = False
        least = int(torch.where(clean, slopes, torch.inf).argmin())
        clean[least] = False
        weight = float(slopes[clean].sum() / chances[clean].sum())
        own = weight * float(chances[least]) - float(slopes[least])
        return least if weight > 0 and abs(own - weight) <= LABEL * weight else None

    def _others_explain(self, texts: list[Tokens]) -> bool:
        """Return whether a text could as well end one token earlier, or later: tokens that the model expects
        have next to no loss, and leave no trace in a gradient.
        """
        for place, text in enumerate(texts):
            state = torch.from_numpy(self._model.states(text, self._model.n_layers + 1)[-1:])
            longer = [*text, int(self._model.unembed(state)[0].argmax())]
            others = ([longer] if len(longer) <= self._model.max_length else []) + [text[:-1]]
            for other in others:
                if len(other) > 1:
                    changed = [*texts[:place], other, *texts[place + 1 :]]
                    if self._explained(changed)[1] <= self._allowed:
                        return True
        return False

    def _counts(self, text: Tokens, share: float) -> bool:
        """Return whether a text has a part in the gradient beyond what may be an error."""
        size = torch.cat(self._given[self._inner]).norm()
        return share * float(self._column(text).norm() / size) > self._allowed

    def _column(self, text: Tokens) -> Any:
        """Return the gradient of one text in a row; kept, as many sets of texts are compared."""
        if tuple(text) not in self._columns:
            rows = gradients_of(self._model, [text], self._weights[self._inner])
            self._columns[tuple(text)] = torch.cat([one.reshape(-1) for one in rows])
        return self._columns[tuple(text)]

    def _explained(self, texts: list[Tokens]) -> tuple[list[float], float, bool]:
        """Return the weight of each text, the relative residual, and whether the texts are told apart."""
        columns = [self._column(text) for text in texts]
        target = torch.cat([one.reshape(-1) for one in self._given[self._inner]]).double()
        A = torch.stack(columns).double()
        gram, size = A @ A.T, A.norm(dim=1)
        apart = float(torch.linalg.eigvalsh(gram / torch.outer(size, size))[0]) > ALIKE
        shares = torch.linalg.lstsq(gram, (A @ target)[:, None], driver="gelsd").solution[:, 0]
        residual = float((target - shares @ A).norm() / target.norm())
        return [float(share) for share in shares], residual, apart
