"""Recover the input of an attention layer, and say whether that is the only one."""

from attnfit.inversion.identifiable import Identifiability, identifiable
from attnfit.inversion.recovery import Recovery, recover

__all__ = ["Identifiability", "Recovery", "identifiable", "recover"]
