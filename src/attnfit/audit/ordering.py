"""In which order candidates are tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnfit.audit.models.model import Tokens


def interleaved(scores: Sequence[Any], seen: set[int], count: int) -> Tokens:
    """Return the best `count` tokens not seen yet, taken in turn from rankings by each of the scores."""
    depth = min(len(scores[0]), count + len(seen))
    rankings = [score.topk(depth).indices for score in scores]
    order = dict.fromkeys(torch.stack(rankings, 1).reshape(-1).tolist())
    return [token for token in order if token not in seen][:count]
