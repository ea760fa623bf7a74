"""What is certified of a computed answer: error balls, local Lipschitz constants, conditions on a start."""

from attnfit.certificates.certification import certify
from attnfit.certificates.good_start import GoodStart, good_start
from attnfit.certificates.kantorovich import Certificate, Identified
from attnfit.certificates.mixture import MixtureCertificate

__all__ = ["Certificate", "GoodStart", "Identified", "MixtureCertificate", "certify", "good_start"]
