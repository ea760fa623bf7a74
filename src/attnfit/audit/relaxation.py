"""The published attack on masked tokens: gradient descent on soft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.errors import AuditError
from attnfit.audit.masked import as_tokens
from attnfit.audit.models.model import Model, Tokens

Array = NDArray[np.float64]

# Points of the history.
POINTS = 40


@dataclass(frozen=True)
class Relaxation:
    """What repeats of the attack ended at, and how they went.

    Attributes
    ----------
    tokens : ndarray of int, shape (n_repeats, n_masked)
        The likeliest token of every masked position at the end.
    losses : ndarray, shape (n_repeats,)
        At the end, summed over positions, in nats.
    sharpness : ndarray, shape (n_repeats,)
        The least weight of a likeliest token.
    best : list of int
        Tokens of the repeat with the least loss.
    steps : ndarray of int, shape (k,)
        Steps at which the history was taken.
    history : ndarray, shape (k, n_repeats)
        Losses there.
    tokens_then : ndarray of int, shape (k, n_repeats, n_masked)
    forwards : float
        Passes of one whole sequence for each repeat; a backward pass counts two.
    seconds : float
    """

    tokens: NDArray[np.int64]
    losses: Array
    sharpness: Array
    best: Tokens
    steps: NDArray[np.int64]
    history: Array = field(repr=False)
    tokens_then: NDArray[np.int64] = field(repr=False)
    forwards: float = 0.0
    seconds: float = 0.0

    def success(self, tokens: Sequence[int]) -> Array:
        """Return the share of repeats whose tokens were these at each point of the history, shape (k,)."""
        return np.asarray((self.tokens_then == np.asarray(tokens)).all(-1).mean(-1))


def masked_relaxation(
    model: Model,
    suffix: Any,
    n_masked: int = 2,
    *,
    steps: int = 10_000,
    step_size: float = 1e-3,
    temperature: float = 1.0,
    n_repeats: int = 1,
    random_state: int = 0,
    device: str = "cpu",
) -> Relaxation:
    """Recover masked tokens by Adam on soft ones, as published.

    Masked tokens are mixtures ``softmax(U / temperature)`` of embeddings, U starts normal, and Adam lowers
    ``L(U) = - sum_i sum_j S_{i+1,j} log F(S)_ij``, the cross entropy of the sequence S under the model's own
    predictions F(S): S is input and target, and both paths carry gradient.

    Parameters
    ----------
    model : Model
        A causal one.
    suffix : str or sequence of int
        The known part.
    n_masked : int
    steps, step_size : int, float
        Of Adam: 10,000 and 1e-3 as published. A logit moves by at most the step size, so a mixture over N
        tokens needs about ``(ln N + 0.5) / (2 step_size)`` steps before one of them dominates.
    temperature : float
    n_repeats : int
        Starts, descended from together.
    random_state : int
        The starts it draws are the same on every device.
    device : str
        Of torch, as "cuda", on which a copy of the model descends.

    Returns
    -------
    Relaxation

    Raises
    ------
    AuditError
        If the known part is empty, a number is not positive, or there is no such device.

    Notes
    -----
    "Unmasking Transformers: A Theoretical Approach to Data Recovery via Attention Weights", its experiment.
    `attnfit.audit.recover_masked` needs about a hundredth of the work.
    """
    (found,) = masked_relaxations(
        model, [suffix], n_masked, steps=steps, step_size=step_size, temperature=temperature,
        n_repeats=n_repeats, random_state=random_state, device=device,
    )  # fmt: skip
    return found


def masked_relaxations(
    model: Model,
    suffixes: Sequence[Any],
    n_masked: int = 2,
    *,
    steps: int = 10_000,
    step_size: float = 1e-3,
    temperature: float = 1.0,
    n_repeats: int = 1,
    random_state: int = 0,
    device: str = "cpu",
) -> list[Relaxation]:
    """Attack several texts with known parts of one length in one batch, each as `masked_relaxation` would
    with the random state after that of the text before.

    Raises
    ------
    AuditError
        As `masked_relaxation`; and if the known parts differ in length.
    """
    known = [as_tokens(model, suffix, place) for place, suffix in enumerate(suffixes)]
    sizes = {"n_masked": n_masked, "steps": steps, "step_size": step_size, "temperature": temperature,
             "n_repeats": n_repeats}  # fmt: skip
    for name, value in sizes.items():
        if not value > 0:
            raise AuditError(f"{name} must be positive, not {value!r}")
    if len({len(part) for part in known}) != 1:
        raise AuditError("suffixes must have one length to be attacked in one batch; pass them one by one")
    began, model = perf_counter(), model.on(device)
    starts = []
    for place in range(len(known)):
        random = torch.Generator().manual_seed(random_state + place)
        starts.append(torch.randn((n_repeats, n_masked, model.n_vocabulary), generator=random))
    U = torch.cat(starts).to(device).requires_grad_()
    rows = torch.tensor(known, device=device).repeat_interleave(n_repeats, 0)
    adam = torch.optim.Adam([U], lr=step_size)
    taken, history, then = [], [], []
    marks = set(np.linspace(0, steps, min(POINTS, steps) + 1).astype(int).tolist())
    for step in range(steps + 1):
        losses = soft_loss(model, U / temperature, rows)
        if step in marks:
            taken.append(step)
            history.append(losses.detach().cpu().double().numpy())
            then.append(U.detach().argmax(-1).cpu().numpy())
        if step < steps:
            adam.zero_grad()
            losses.sum().backward()
            adam.step()
    weights = torch.softmax(U.detach() / temperature, -1)
    sharpness = weights.max(-1).values.min(-1).values.cpu().double().numpy()
    seconds = (perf_counter() - began) / len(known)
    found = []
    for place in range(len(known)):
        own = slice(place * n_repeats, (place + 1) * n_repeats)
        last = history[-1][own]
        found.append(
            Relaxation(
                tokens=then[-1][own],
                losses=last,
                sharpness=sharpness[own],
                best=[int(token) for token in then[-1][own][int(last.argmin())]],
                steps=np.array(taken),
                history=np.stack([values[own] for values in history]),
                tokens_then=np.stack([tokens[own] for tokens in then]),
                forwards=3.0 * steps,
                seconds=seconds,
            )
        )
    return found


def soft_loss(model: Model, logits: Any, known: Any) -> Any:
    """Return the loss of soft tokens before known ones, shape (k,); logits of shape (k, n_masked, N), known
    tokens the same for all or of shape (k, n).
    """
    soft = torch.softmax(logits, -1)
    table = model.embeddings
    tail = torch.as_tensor(known).expand(len(soft), -1)
    inputs = torch.cat([soft @ table, table[tail]], 1)
    predicted = torch.log_softmax(model.scores(model.base(inputs_embeds=inputs, use_cache=False)[0]), -1)
    n_masked = soft.shape[1]
    # Targets of positions 1 .. n-1: the other soft tokens, then the known ones.
    within = (soft[:, 1:] * predicted[:, : n_masked - 1]).sum((-1, -2))
    beyond = predicted[:, n_masked - 1 : -1].gather(-1, tail[..., None])
    return -(within + beyond.sum((-1, -2)))
