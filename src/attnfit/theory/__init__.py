"""The papers' bounds as objects: evaluated on data, searched for their worst case, with the papers'
errata.
"""

from attnfit.theory import instances
from attnfit.theory.audit import Audit, audit
from attnfit.theory.bound import PAPERS, Bound, Check
from attnfit.theory.errata import Erratum, errata
from attnfit.theory.search import Found, search
from attnfit.theory.table import Table, check, table

__all__ = [
    "PAPERS", "Audit", "Bound", "Check", "Erratum", "Found", "Table", "audit", "check", "errata", "instances",
    "search", "table",
]  # fmt: skip
