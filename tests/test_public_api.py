"""What users may rely on, name by name: a change here is a change of the contract, and must be meant.

After a change that is meant: ``python tests/test_public_api.py`` writes the listing anew.
"""

import importlib
import inspect
from pathlib import Path

import attnfit

LISTING = Path(__file__).parent / "public_api.txt"


def described(owner, name, member):
    """Return the lines of a public name: its signature, and those of a class's public members."""
    if inspect.ismodule(member):
        return []
    where = f"{owner}.{name}"
    if not inspect.isclass(member):
        return [where + (signature(member) if callable(member) else "")]
    lines = [where + signature(member)]
    for key, value in inspect.getmembers(member):
        if key.startswith("_"):
            continue
        holder = next((c for c in member.__mro__ if key in vars(c)), None)
        if holder is None or not holder.__module__.startswith("attnfit."):
            continue
        lines.append(f"{where}.{key}{signature(value) if callable(value) else ''}")
    return lines


def signature(member):
    try:
        found = inspect.signature(member)
    except (TypeError, ValueError):
        return "(...)"
    # Defaults are part of the contract, annotations are not.
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def listing():
    lines = []
    for room in sorted(attnfit.__all__):
        member = getattr(attnfit, room)
        if not inspect.ismodule(member):
            lines += described("attnfit", room, member)
            continue
        module = importlib.import_module(f"attnfit.{room}")
        for name in sorted(getattr(module, "__all__", ())):
            lines += described(f"attnfit.{room}", name, getattr(module, name))
    return "\n".join(lines) + "\n"


def test_the_public_names_are_those_listed():
    assert listing() == LISTING.read_text(), "see the top of this file"


if __name__ == "__main__":
    LISTING.write_text(listing())
