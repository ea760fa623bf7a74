"""Faults put in on purpose: ``make mutants``, or ``python -m benchmarks.mutants --module moves --share 0.1``.

Cosmic Ray's operators, and a few for numerical code, change one place of a module at a time. A change that no
test notices is a survivor. Every mutant runs in a process of its own, forked after the libraries are loaded;
it exists in memory only. Of the tests that guard a module, a mutant runs those that call the function it
changes, the fastest first, up to the first failure.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numba
import parso.python.tree as tree
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider
from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.md"

# The tests that guard each module, without those that take long.
LOSSES = ["losses", "certificate_constants"]
CERTIFICATES = ["certificate_constants", "certificate_statements", "certificates_centred"]
GUARDS = {
    "losses/base": LOSSES,
    "losses/segments": LOSSES,
    "losses/softmax": LOSSES,
    "losses/exponential": LOSSES,
    "losses/rescaled": LOSSES,
    "losses/log_ratio": LOSSES,
    "losses/activations": LOSSES,
    "certificates/ball": CERTIFICATES,
    "problems/rows/centred": CERTIFICATES,
    "certificates/certification": CERTIFICATES,
    "certificates/kantorovich": CERTIFICATES,
    "certificates/lipschitz": CERTIFICATES,
    "certificates/enclosure": ["certificates_rigorous"],
    "certificates/rigorous": ["certificates_rigorous"],
    "certificates/good_start": ["good_start"],
    "certificates/layer": ["layer_constants"],
    "certificates/two_layer": ["layer_constants"],
    "certificates/mixture": ["mixture_uniqueness", "certificate_constants"],
    "solvers/evidence": ["evidence"],
    "solvers/separation": ["recession", "separation"],
    "solvers/trust_region": ["trust_region"],
    "solvers/verdicts": ["verdict_rules", "separation", "solver_outcomes"],
    "problems/rows/log_start": ["log_start"],
    "problems/rows/moves": ["recession"],
    "problems/rows/recession": ["recession", "separation"],
    "problems/rows/row_kinds": ["recession", "separation"],
}

# One replacement of each operator: more kinds of wrong arithmetic are found by the same tests. None of
# < by <=: where numbers are rounded, equality says nothing; integers that count change anyway.
REPLACED = {
    "BinaryOperator": [
        *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Mul", "Mod_Mul"),
        *("BitOr_BitAnd", "BitAnd_BitOr"),
    ],
    "ComparisonOperator": [
        "Lt_GtE",
        "LtE_Gt",
        "Gt_LtE",
        "GtE_Lt",
        "Eq_NotEq",
        "NotEq_Eq",
        "Is_IsNot",
        "IsNot_Is",
    ],
    "UnaryOperator": ["USub_UAdd", "Delete_Not", "Delete_Invert"],
}
NAMED = ["AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"]
NAMED += ["ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"]

# Seconds of processor time beyond three times what the tests take on the module as it is; bytes.
GRACE, MEMORY = 10, 6 << 30


PAIRS = [("min", "max"), ("minimum", "maximum"), ("any", "all"), ("zeros", "ones"), ("floor", "ceil")]
PAIRS += [("zeros_like", "ones_like"), ("+=", "-="), ("*=", "/="), ("|=", "&=")]
COUNTERPARTS = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])} | {"abs": "float"}


class Constants(Operator):
    """A number times ten and with its sign changed, an integer one larger."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if isinstance(node, tree.Number):
            yield from [(node.start_pos, node.end_pos)] * len(self._others(node.value))

    def mutate(self, node: Any, index: int) -> Any:
        return tree.Number(f"({self._others(node.value)[index]!r})", node.start_pos, node.prefix)

    @staticmethod
    def _others(value: str) -> list[float]:
        number = ast.literal_eval(value)
        return [number + 1] if isinstance(number, int) or not number else [10 * number, -number]

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class Words(Operator):
    """A function's counterpart in place of it."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if isinstance(node, tree.Name | tree.Operator) and node.value in COUNTERPARTS:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        after_dot = node.value == "abs" and node.get_previous_leaf() == "."
        node.value = "asarray" if after_dot else COUNTERPARTS[node.value]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Mutant:
    """A change of one place, in the function that begins at ``function`` (0: in none)."""

    line: int
    function: int
    was: str
    source: str

    def __str__(self) -> str:
        now = self.source.splitlines()[self.line - 1].strip()
        return f"line {self.line}: `{self.was.strip()}` became `{now}`"


def operators() -> Iterator[Operator]:
    """Yield what changes a place."""
    known = OperatorProvider()
    for kind, names in REPLACED.items():
        yield from (
            known[f"Replace{kind}_{name}" if "Delete" not in name else f"ReplaceUnaryOperator_{name}"]()
            for name in names
        )
    yield from (known[name]() for name in NAMED)
    yield Constants()
    yield Words()


def bare(source: str) -> str | None:
    """Return what a source means, without annotations; None if it means nothing."""
    try:
        module = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(module):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
        if isinstance(node, ast.arguments):
            # How arguments may be passed is for those who call.
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.posonlyargs, node.kwonlyargs = [], []
    return ast.dump(module)


def mutants(source: str) -> list[Mutant]:
    """Return every change of a source that is a program and another one."""
    functions = sorted(
        (node.lineno, node.end_lineno or 0, min([node.lineno, *(d.lineno for d in node.decorator_list)]))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    )
    lines, same, found = source.splitlines(), bare(source), []
    for operator in operators():
        positions = [p for node in ast_nodes(get_ast(source)) for p in operator.mutation_positions(node)]
        for number, ((line, _), _) in enumerate(positions):
            changed = mutate_code(source, operator, number)
            # Type checkers alone read what is imported for them.
            if changed is None or bare(changed) in (None, same) or "TYPE_CHECKING" in lines[line - 1]:
                continue
            around = [first for start, end, first in functions if start <= line <= end]
            found.append(Mutant(line, around[-1] if around else 0, lines[line - 1], changed))
    return sorted(found, key=lambda m: m.line)


class InMemory(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports a module from a changed source."""

    def __init__(self, name: str, path: str, source: str) -> None:
        importlib.machinery.SourceFileLoader.__init__(self, name, path)
        self.source = source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=self.path)

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec")


class Watch:
    """Notes which functions of our modules each test calls, and how long the test takes."""

    def __init__(self) -> None:
        self.paths = {str(path_of(name)) for name in GUARDS}
        self.calls: dict[str, set[tuple[str, int]]] = {}
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        called: set[tuple[str, int]] = set()

        def note(frame: Any, event: str, argument: object) -> None:
            if event == "call" and frame.f_code.co_filename in self.paths:
                called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

        threading.setprofile(note)
        sys.setprofile(note)
        start = perf_counter()
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            self.seconds[item.nodeid], self.calls[item.nodeid] = perf_counter() - start, called


class Only:
    """Runs some tests, in a given order."""

    def __init__(self, names: list[str]) -> None:
        self.order = {name: number for number, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        kept = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(kept, key=lambda item: self.order[item.nodeid])


def thread_copy(work: Callable[[], Any], seconds: float, *, fresh: bool = False) -> tuple[Any, bool]:
    """Return what a function returns in a process of its own, None if the process dies; and whether it took
    too long. Compiled code is kept by the names of files, and mutants have their original's: ``fresh`` where
    the changed module is compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
            signal.alarm(int(5 * seconds))
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            if fresh:
                numba.config.CACHE_DIR = folder
            try:
                found = work()
            except BaseException:
                found = RuntimeError(traceback.format_exc())
            answer.write_bytes(pickle.dumps(found))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = pickle.loads(answer.read_bytes()) if answer.exists() else None
    if isinstance(found, RuntimeError):
        raise found
    return found, os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU)


def run_tests(files: list[str], plugin: object) -> bool:
    """Return whether all tests pass."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, *files], plugins=[plugin])
    if code is pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"no tests in {files}")
    return code is pytest.ExitCode.OK


@cache
def learn(files: tuple[str, ...]) -> Watch:
    """Run tests on the modules as they are, and load what they load."""

    def work() -> Any:
        watch = Watch()
        passed = run_tests(list(files), watch)
        return passed, watch, [n for n in sys.modules if n.split(".")[0] not in ours()]

    found, _ = thread_copy(work, 1800)
    if found is None or not found[0]:
        raise SystemExit(f"tests fail on the modules as they are: {' '.join(files)}")
    for name in found[2]:
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
    return found[1]


def path_of(name: str) -> Path:
    return ROOT / "src" / "attnfit" / f"{name}.py"


def survives(name: str, mutant: Mutant) -> tuple[bool, bool]:
    """Return whether no test notices a mutant of a module, and whether time was up."""
    path, watch = str(path_of(name)), learn(tuple(f"tests/test_{f}.py" for f in GUARDS[name]))
    names = [
        n for n, called in watch.calls.items() if not mutant.function or (path, mutant.function) in called
    ]
    names.sort(key=lambda n: watch.seconds[n])
    if not names:
        return True, False

    def work() -> bool:
        sys.meta_path.insert(0, InMemory(".".join(["attnfit", *name.split("/")]), path, mutant.source))
        return run_tests(sorted({n.split("::")[0] for n in names}), Only(names))

    seconds = 3 * sum(watch.seconds[n] for n in names) + GRACE
    survived, late = thread_copy(work, seconds, fresh=name.startswith("losses"))
    return bool(survived), late


def ours() -> set[str]:
    return {"attnfit", "benchmarks", "conftest", *(p.stem for p in (ROOT / "tests").glob("*.py"))}


def main() -> None:
    """Try mutants, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--module", nargs="*", default=[""], help="modules whose name holds one of these")
    parser.add_argument("--share", type=float, default=1.0, help="share of the mutants to try, by chance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", help="only these lines, as in 10-20")
    parser.add_argument("--dry", action="store_true", help="only count the mutants")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "src"))
    for name in GUARDS:
        if any(part in name for part in options.module):
            try_module(name, options)


def try_module(name: str, options: argparse.Namespace) -> None:
    every = mutants(path_of(name).read_text())
    n = max(1, round(options.share * len(every)))
    chosen = every if n == len(every) else random.Random(f"{name} {options.seed}").sample(every, n)
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        chosen = [m for m in every if first <= m.line <= last]
    print(f"{name}: {len(every)} mutants, {len(chosen)} to try", flush=True)
    if options.dry:
        return
    start = perf_counter()
    survivors, n_late = [], 0
    for mutant in chosen:
        survived, late = survives(name, mutant)
        n_late += late
        if survived:
            survivors.append(mutant)
            print(f"  survived: {mutant}", flush=True)
    n_killed, seconds = len(chosen) - len(survivors), perf_counter() - start
    print(f"  {n_killed} of {len(chosen)} killed, {n_late} timed out, {seconds:.0f} s", flush=True)
    if not options.lines:
        write(name, len(every), len(chosen), n_late, survivors)


def write(name: str, n_all: int, n: int, n_late: int, survivors: list[Mutant]) -> None:
    """Put a module's figures and survivors in the table, in place of those that are there."""
    old = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = {key: line for line in old if line.startswith("| ") for key in GUARDS if f"| {key} |" in line}
    lived = {key: [x for x in old if x.startswith(f"* {key} ")] for key in GUARDS}
    killed = n - len(survivors)
    low, high = interval(killed, n, n_all)
    figures = [n_all, n, killed, n_late, len(survivors), f"{killed / n:.0%}", f"{low:.0%} to {high:.0%}"]
    rows[name] = "| " + " | ".join([name, *map(str, figures)]) + " |"
    lived[name] = [f"* {name} {m}" for m in survivors]
    counts = [[int(c) for c in rows[key].split("|")[2:7]] for key in GUARDS if key in rows]
    total, tried, dead, late, alive = map(sum, zip(*counts, strict=True))
    # Modules count by their mutants, whatever share of these was tried.
    rate = sum(c[0] * c[2] / c[1] for c in counts) / total
    parts = [
        "# Mutants",
        (__doc__ or "").strip(),
        "Killed includes those that ran out of time. The interval (95 %) is of the rate among all mutants,\n"
        "where only some were tried. Survivors that no test can see: `docs/design.md`.",
        "\n".join(
            [
                "| module | mutants | tried | killed | of these out of time | survived | rate | interval |",
                "| --- | --- | --- | --- | --- | --- | --- | --- |",
                *(rows[key] for key in GUARDS if key in rows),
                f"| all | {total} | {tried} | {dead} | {late} | {alive} | {rate:.1%} | |",
            ]
        ),
        "## Survivors",
        "\n".join(line for key in GUARDS for line in lived[key]),
    ]
    missing = [key for key in GUARDS if key not in rows]
    if missing:
        parts.insert(4, f"Not tried: {', '.join(missing)}.")
    RESULTS.write_text("\n\n".join(parts) + "\n")


def interval(killed: int, n: int, n_all: int) -> tuple[float, float]:
    """Return the ends of a 95 % interval of the share killed among all, from those tried: exact (Clopper and
    Pearson) for what was not tried.
    """
    if n == n_all:
        return killed / n, killed / n
    ends = binomtest(killed, n).proportion_ci(0.95)
    rest = n_all - n
    return (killed + rest * ends.low) / n_all, (killed + rest * ends.high) / n_all


if __name__ == "__main__":
    main()
