"""Proofs about a computed answer: error balls, local Lipschitz constants, conditions on a start."""

from attnfit.certificates.good_start import GoodStart, good_start
from attnfit.certificates.kantorovich import Certificate, certify

__all__ = ["Certificate", "GoodStart", "certify", "good_start"]
