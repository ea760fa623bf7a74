"""The papers' bounds as objects: evaluated on data, searched for their worst case, with the papers'
errata.
"""

from attnfit.theory import instances
from attnfit.theory.audit import Audit, audit
from attnfit.theory.bound import PAPERS, Bound, Check
from attnfit.theory.errata import Erratum, errata
from attnfit.theory.finished import OnFit, on
from attnfit.theory.search import Found, search
from attnfit.theory.table import Table, check, table
from attnfit.theory.theorem import Assumption, Row, Theorem

__all__ = [
    "PAPERS", "Assumption", "Audit", "Bound", "Check", "Erratum", "Found", "OnFit", "Row", "Table", "Theorem",
    "audit", "check", "errata", "instances", "on", "search", "table",
]  # fmt: skip
