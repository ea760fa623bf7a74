"""Forms of access by name."""

from __future__ import annotations

import re
from importlib.metadata import entry_points

from attnfit.audit.access import FORMS, Access
from attnfit.audit.cache import Keys, KeysAndValues, Values
from attnfit.audit.errors import AuditError
from attnfit.audit.gradient import Gradient
from attnfit.audit.last import LastLogits, LastState
from attnfit.audit.logits import Logits
from attnfit.audit.masked import Masked
from attnfit.audit.permuted import PermutedStates
from attnfit.audit.pooled import Pooled
from attnfit.audit.states import AttentionOutput, HiddenStates
from attnfit.audit.topk import TopLogProbabilities

# Entry points of this group name subclasses of `Access`.
GROUP = "attnfit.access"
OURS: tuple[type[Access], ...] = (
    HiddenStates, AttentionOutput, Logits, TopLogProbabilities, Masked, KeysAndValues, Keys, Values,
    PermutedStates, Gradient, LastState, LastLogits, Pooled,
)  # fmt: skip


def parse_access(access: str | Access) -> Access:
    """Return a form of access by its name, for example "hidden:15".

    Raises
    ------
    AuditError
        If it is none.
    """
    if isinstance(access, Access):
        return access
    if access in FORMS and not FORMS[access].number:
        return FORMS[access]()
    found = re.fullmatch(r"([a-z_]+)(?::([0-9]+))?", access)
    form = None if found is None else _named(found[1])
    if found is None or form is None or (found[2] is None) != (not form.number):
        raise AuditError(f"access must be one of {', '.join(names_of_forms())}, not {access!r}")
    place = int(found[2] or 0)
    if form.number and place < form.first:
        raise AuditError(f"access must be one of {', '.join(names_of_forms())}, not {access!r}")
    return form(place)


def names_of_forms() -> list[str]:
    """Return how the forms of access are written."""
    known = dict.fromkeys([*OURS, *FORMS.values()])
    return [f"{form.kind}:{form.number}" if form.number else form.kind for form in known]


def _named(kind: str) -> type[Access] | None:
    if kind not in FORMS:
        for point in entry_points(group=GROUP, name=kind):
            # Loading defines the class, which makes it known.
            point.load()
    return FORMS.get(kind)
