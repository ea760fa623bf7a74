"""The papers' claims, measured again: one page each."""

from attnfit.reproduction.page import Claim, Curve, Page, Table
from attnfit.reproduction.papers import NAMES, reproduce

__all__ = ["NAMES", "Claim", "Curve", "Page", "Table", "reproduce"]
