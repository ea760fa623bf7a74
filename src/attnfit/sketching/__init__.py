"""Leverage scores and row sampling."""

from attnfit.sketching.sampling import RowSampler, leverage_sketch

__all__ = ["RowSampler", "leverage_sketch"]
