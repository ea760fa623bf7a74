"""Newton's method on the embedding of one position: tokens lie on a smooth map from embeddings to states."""

from __future__ import annotations

from typing import Any

import torch

from attnfit.audit.candidates import CandidateSet

# Embeddings move by this share of their standard deviation to form the Jacobian.
STEP = 0.01
# Levenberg-Marquardt dampings tried at once, relative to the largest curvature.
DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Weights on the distance between embeddings in the ranking of the vocabulary, relative to the mean curvature.
WEIGHTS = (1e-2, 1e-1, 1.0)
N_RANKED, N_NEAREST = 24, 4
# Starts by rank among the candidates tried, steps from each, and how many without progress end it.
STARTS = (0, 4)
MAX_STEPS, PATIENCE, PROGRESS = 10, 3, 0.9


class EmbeddingNewton:
    """Levenberg-Marquardt on ``h(e) = observed``, each step followed by a look at the vocabulary.

    The Jacobian takes `width` passes of one token; a step that made good progress is followed by a rank-one
    (Broyden) correction instead. The linear model then ranks the whole vocabulary by
    ``||o - h - J (E_v - e)||^2 + weight ||E_v - e||^2``, and the best tokens are tried.

    Parameters
    ----------
    evaluated : CandidateSet
        Candidates tried so far; those tried here are added.
    table : Tensor, shape (n_vocabulary, width)
    budget : int
        Largest number of candidates for the position.
    """

    def __init__(self, evaluated: CandidateSet, table: Any, budget: int) -> None:
        self._evaluated, self._table, self._budget = evaluated, table, budget
        self._scale = evaluated.target.scale
        self._step = STEP * float(table.std())

    def search(self) -> bool:
        """Return whether a token was found that explains the observation."""
        order = self._evaluated.misfits.argsort().tolist()
        starts = [order[place] for place in STARTS if place < len(order)]
        return any(self._descend(start) for start in starts)

    def _descend(self, start: int) -> bool:
        """Follow one start; return whether the position is solved."""
        found = self._evaluated
        e, h = self._table[found.tokens[start]], found.states[start]
        J, idle = None, 0
        for _ in range(MAX_STEPS):
            if J is None:
                if found.n_candidates + len(e) > self._budget:
                    return False
                J = self._jacobian(e, h)
            before = float(found.target.misfits(h))
            e_next, h_next = self._move(e, h, J)
            if found.solved:
                return True
            after = float(found.target.misfits(h_next))
            idle = idle + 1 if after > PROGRESS * before else 0
            if idle == PATIENCE or (after >= before and J.fresh):
                return False
            if after < before:
                J = J.corrected(e_next - e, (h_next - h) / self._scale) if after < 0.5 * before else None
                e, h = e_next, h_next
            else:
                J = None
        return False

    def _jacobian(self, e: Any, h: Any) -> _Jacobian:
        """Return dh/de in units of the scale, by one-sided differences in one pass."""
        moved = self._evaluated.prefix.embedded(e + self._step * torch.eye(len(e)))
        return _Jacobian((moved - h) / (self._step * self._scale), fresh=True)

    def _move(self, e: Any, h: Any, J: _Jacobian) -> tuple[Any, Any]:
        """Try damped steps and the tokens that the linear model likes; return the better of both kinds."""
        found = self._evaluated
        residual = (found.target.state - h) / self._scale
        points = e + J.steps(residual)
        states = found.prefix.embedded(points)
        known = len(found.tokens)
        found.add(self._ranked(e, residual, J) + self._nearest(points))
        misfits = torch.cat([found.target.misfits(states), found.misfits[known:]])
        best = int(misfits.argmin())
        if best < len(points):
            return points[best], states[best]
        token = known + best - len(points)
        return self._table[found.tokens[token]], found.states[token]

    def _ranked(self, e: Any, residual: Any, J: _Jacobian) -> list[int]:
        """Return the tokens whose linearised state is nearest, for each weight on the way to them."""
        moves = self._table - e
        missed = (residual - moves @ J.matrix).square().sum(-1)
        lengths = moves.square().sum(-1)
        curvature = float(J.matrix.square().sum() / len(e))
        ranked = [(missed + weight * curvature * lengths).argsort()[:N_RANKED] for weight in WEIGHTS]
        return [int(token) for token in torch.cat(ranked)]

    def _nearest(self, points: Any) -> list[int]:
        """Return the tokens nearest to the least damped points."""
        near = torch.cdist(points[-4:], self._table).topk(N_NEAREST, largest=False).indices
        return [int(token) for token in near.reshape(-1)]


class _Jacobian:
    """``matrix[i, j] = d h_j / d e_i``."""

    def __init__(self, matrix: Any, fresh: bool) -> None:
        self.matrix, self.fresh = matrix, fresh

    def steps(self, residual: Any) -> Any:
        """Return the damped least-squares steps, shape (len(DAMPINGS), width)."""
        U, s, Vh = torch.linalg.svd(self.matrix, full_matrices=False)
        along = Vh @ residual
        damped = torch.stack([s / (s.square() + damping * s[0].square()) for damping in DAMPINGS])
        return (damped * along) @ U.T

    def corrected(self, move: Any, change: Any) -> _Jacobian:
        """Return the Jacobian nearest to this one that explains the last move."""
        surprise = change - move @ self.matrix
        return _Jacobian(self.matrix + torch.outer(move, surprise) / move.square().sum(), fresh=False)
