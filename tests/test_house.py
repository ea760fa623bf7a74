"""The house as docs/design.md draws it: imports point one way, in no circle, and a file holds an idea."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

import attnfit
from attnfit import SoftmaxRegressor, datasets, inversion, problems

ROOT = Path(attnfit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# From the ground up: a room imports from those before it, and from itself.
ROOMS = [
    {"version", "segments", "writing"},
    {"losses", "data"},
    {"objectives"},
    {"effects"},
    {"problems"},
    {"solvers"},
    {"certificates"},
    {"inference", "formulas"},
    {"metrics", "datasets", "reshape", "theory", "inversion", "incontext", "estimators"},
    {"scorers", "model_selection", "plots"},
    {"reproduction", "audit", "heads"},
    {"cli"},
]
FLOOR = {room: k for k, rooms in enumerate(ROOMS) for room in rooms}
APART = {("losses", "data"), ("data", "losses")}
# Doors, and names that a door hands on.
FREE = {"__init__", "__main__", "designs"}
# A name that is needed once, where a function is called.
LAZY = {
    # What a result offers: its certificate.
    ("solvers", "certificates"),
    # What a block offers: itself, out of a model.
    ("objectives", "heads"),
}


def module(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, *, eager):
    """Return the modules that a file imports, at its top only or anywhere, without those for types."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if eager else list(ast.walk(tree))
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in nodes:
        if id(node) in typed:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("attnfit"):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("attnfit")}
    return found


MODULES = {module(path): path for path in FILES}


def room(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    here = room(name)
    if here in FREE:
        return
    for target in imported(MODULES[name], eager=False) & set(MODULES):
        there = room(target)
        if there in FREE | {here} or (here, there) in LAZY:
            continue
        assert (here, there) not in APART, f"{name} imports {target}: these rooms never meet"
        assert FLOOR[there] <= FLOOR[here], f"{name} imports {target}, from a floor above"


def test_no_file_imports_itself_by_way_of_others():
    edges = {name: imported(path, eager=True) & set(MODULES) for name, path in MODULES.items()}
    edges = {
        name: {t for t in targets if MODULES[t].name != "__init__.py"} for name, targets in edges.items()
    }
    state: dict[str, int] = {}

    def visit(name, way):
        state[name] = 1
        for target in edges[name]:
            assert state.get(target) != 1, f"a circle: {' -> '.join([*way, name, target])}"
            if target not in state:
                visit(target, [*way, name])
        state[name] = 2

    for name in edges:
        if name not in state:
            visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_holds_an_idea(path):
    assert len(path.read_text().splitlines()) <= 450


def test_solvers_know_no_class_of_problem():
    classes = {
        node.name
        for path in (ROOT / "objectives").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and any("Problem" in ast.unparse(base) for base in node.bases)
    }
    assert {"RowProblem", "LayeredProblem", "LowRankAttention"} <= classes
    for path in (ROOT / "solvers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not names & classes, f"{path.name}, line {node.lineno}: ask what the problem offers"


def test_no_class_is_made_or_changed_at_run_time():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            made = (
                isinstance(node, ast.Call) and getattr(node.func, "id", "") == "type" and len(node.args) == 3
            )
            changed = isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Attribute) and t.attr == "__class__" for t in node.targets
            )
            assert not made and not changed, f"{path.name}, line {node.lineno}"


def travelled(call):
    """Return how many files and functions of the library a second call visits, and how deep it goes."""
    call()
    seen, depth, deepest = set(), 0, 0

    def watch(frame, event, _):
        nonlocal depth, deepest
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)):
            if event == "call":
                depth += 1
                seen.add((name, frame.f_code.co_qualname))
            elif event == "return":
                depth -= 1
            deepest = max(deepest, depth)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return len({name for name, _ in seen}), len(seen), deepest


def test_a_fit_travels_no_further():
    """What docs/design.md tells, and a few per cent: another processor may round a step to another branch."""
    cars = datasets.load_car_shares()
    files, functions, depth = travelled(lambda: SoftmaxRegressor().fit(cars.A, cars.b, groups=cars.groups))
    assert 15 < files <= 25 and functions <= 168 and depth <= 13


def test_a_recovery_travels_no_further():
    rng = np.random.default_rng(1)
    table = rng.standard_normal((60, 5))
    W, V = rng.standard_normal((5, 5)) / 5, rng.standard_normal((5, 5)) / np.sqrt(5)
    outputs = problems.LayerInversion(W, V, np.zeros((8, 5))).output(table[rng.permutation(60)[:8]].T)
    layer = problems.LayerInversion(W, V, outputs)
    files, functions, depth = travelled(lambda: inversion.recover(layer, vocabulary=table, random_state=0))
    assert 10 < files <= 14 and functions <= 108 and depth <= 11
