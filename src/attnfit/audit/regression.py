"""Estimate an embedding from the candidates already tried: every failure tells where to look next."""

from __future__ import annotations

from typing import Any

import torch

from attnfit.audit.probes import Probe

# Noise of the regression relative to the kernel at distance zero.
NUGGET = 0.1
# Candidates count by the exponential of their squared distance from the state, relative to so many times the
# median one: one width does not suit all states. The slopes of the probe stand in for this share of a sample.
WIDTHS, SHARE = (0.03, 0.1, 0.3), 1e-2


def regressed_embedding(probe: Probe, state: Any, states: Any, embeddings: Any) -> Any:
    """Return the embedding that a Gaussian process on the candidates' estimates puts at a state.

    Each candidate c estimates the embedding sought as ``E_c + probe.displacement(state - h_c)``; these
    estimates err by the curvature of the map, which is smooth in h. Their mean plus a Gaussian process, with
    a squared exponential kernel in the metric of the probe's residuals, carries them to the observed state.

    Parameters
    ----------
    probe : Probe
        From differences of states to differences of embeddings.
    state : Tensor, shape (width,)
        Observed.
    states, embeddings : Tensor, shape (n, width)
        Of the candidates tried after the same tokens.

    Returns
    -------
    Tensor, shape (width,)
    """
    moves = probe.displacement(state - states)
    estimates = embeddings + moves
    mean = estimates.mean(0)
    whitened = moves @ torch.linalg.cholesky(probe.precision)
    squares = torch.cdist(whitened, whitened).square()
    length = squares.median().clamp_min(torch.finfo(squares.dtype).tiny)
    kernel = torch.exp(-0.5 * squares / length)
    kernel.diagonal().add_(NUGGET)
    at_state = torch.exp(-0.5 * whitened.square().sum(-1) / length)
    return mean + torch.linalg.solve(kernel, at_state) @ (estimates - mean)


def local_embeddings(probe: Probe, state: Any, states: Any, embeddings: Any) -> Any:
    """Return the embeddings that weighted regressions on the candidates tried put at a state, one a width.

    Ridge regressions of embeddings on states, shrunk towards the slopes of the probe, in which candidates
    count the more the nearer their states are: a probe learned from other texts may know nothing of what
    this one has made of the states, a thousand candidates after the same tokens do.

    Parameters
    ----------
    probe : Probe
        From differences of states to differences of embeddings.
    state : Tensor, shape (width,)
        Observed.
    states, embeddings : Tensor, shape (n, width)
        Of the candidates tried after the same tokens.

    Returns
    -------
    Tensor, shape (len(WIDTHS), width)
    """
    apart = (states - state) / probe.scale
    squares = apart.square().mean(-1)
    found = []
    for width in WIDTHS:
        length = (width * squares.median()).clamp_min(torch.finfo(squares.dtype).tiny)
        weights = torch.softmax(-squares / length, 0)[:, None]
        centre, offset = (weights * apart).sum(0), (weights * embeddings).sum(0)
        X, weighted = apart - centre, weights * (apart - centre)
        gram = weighted.T @ X
        ridge = SHARE * gram.diagonal().mean()
        gram.diagonal().add_(ridge)
        slopes = torch.linalg.solve(gram, weighted.T @ (embeddings - offset) + ridge * probe.matrix)
        found.append(offset - centre @ slopes)
    return torch.stack(found)
