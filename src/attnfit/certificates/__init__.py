"""Proofs about a computed answer: error balls, local Lipschitz constants, conditions on a start."""

from attnfit.certificates.certification import certify
from attnfit.certificates.good_start import GoodStart, good_start
from attnfit.certificates.kantorovich import Certificate
from attnfit.certificates.mixture import MixtureCertificate

__all__ = ["Certificate", "GoodStart", "MixtureCertificate", "certify", "good_start"]
