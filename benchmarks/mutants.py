"""Faults put in on purpose: ``make mutants``, or ``python -m benchmarks.mutants --module moves --share 0.1``.

Cosmic Ray's operators, and a few for numerical code, change one place of a module at a time. A change that no
test notices is a survivor. Every mutant runs in a process of its own and exists in memory only: forked where
the tests are collected if the code of a function can be exchanged, where the libraries are loaded otherwise.
Of the tests that guard a module, a mutant runs those that call the function it changes, the fastest first, up
to the first failure, and no more than take a quarter of a minute.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import hashlib
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
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from time import perf_counter, process_time
from types import CodeType, FunctionType
from typing import Any

import pytest

from benchmarks.mutant_table import is_equivalent, write
from benchmarks.mutation import Changes, Mutant

ROOT = Path(__file__).resolve().parents[1]
TRIED = ROOT / ".mutants" / "tried.tsv"

# The tests that guard each module, without those that take long.
LOSSES = ["losses", "segments", "certificate_constants"]
BALLS = [
    "certificates",
    "certificate_constants",
    "kantorovich",
    "certificate_intervals",
    "certificate_statements",
    "certificates_centred",
]
PROVEN = ["certificate_intervals", "certificates_rigorous"]
SEPARATION = ["recession", "moves", "separation", "separation_programme"]
GUARDS = {
    "losses/loss": [*LOSSES, "certificate_statements", "open_losses"],
    "segments": [*LOSSES, "inputs", "estimators_groups"],
    "losses/softmax": [*LOSSES, "open_losses", "loss_sums"],
    "losses/elementwise": LOSSES,
    "losses/rescaled": LOSSES,
    "losses/separable": ["losses", "open_losses"],
    "losses/activations": ["activations", "activation_kinks"],
    "losses/vector_activations": ["activation_kinks"],
    "losses/sums": ["loss_sums", "loss_sums_verdicts"],
    "losses/named": ["loss_sums", "open_losses"],
    "objectives/beginning": ["log_start", "certificates_centred"],
    "objectives/convexity": ["log_start", "loss_sums"],
    "certificates/certification": [*BALLS, "certificates_rigorous"],
    "certificates/kantorovich": BALLS,
    "certificates/lipschitz": BALLS,
    "certificates/rigorous": PROVEN,
    "certificates/good_start": ["good_start"],
    "certificates/layers": [
        "layer_bounds",
        "layer_constants",
        "inversion_certificates",
        "certificate_statements",
        "certificates_centred",
    ],
    "certificates/mixture": ["mixture_uniqueness", "mixtures", "certificate_constants"],
    "solvers/evidence": ["evidence", "evidence_sums"],
    "solvers/separation": SEPARATION,
    "solvers/subproblem": ["trust_region"],
    "solvers/verdicts": ["verdict_rules", "verdict_rounding", "verdict_messages", "separation"],
    "objectives/moves": SEPARATION,
    "objectives/recession": SEPARATION,
}

# Seconds of processor time beyond three times what the tests take on the module as it is; bytes.
GRACE, MEMORY = 10, 6 << 30
# Seconds of tests for a mutant, of the fastest that can notice it, where there are more.
ENOUGH = 15.0
# Seconds for all tests of a module, and for all its mutants.
LEARNING, TRYING = 3600, 36_000


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
        self.paths = {str(path_of(name)): name for name in GUARDS}
        self.calls: dict[str, set[tuple[str, int]]] = {}
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        called: set[tuple[str, int]] = set()

        def note(frame: Any, event: str, argument: object) -> None:
            if event == "call" and frame.f_code.co_filename in self.paths:
                called.add((self.paths[frame.f_code.co_filename], frame.f_code.co_firstlineno))

        # Compiled, and of this thread alone: arithmetic in Python would take ten times as long.
        profile = cProfile.Profile(builtins=False)
        threading.setprofile(note)
        start = process_time()
        profile.enable()
        try:
            return (yield)
        finally:
            profile.disable()
            threading.setprofile(None)  # type: ignore[arg-type]
            self.seconds[item.nodeid] = process_time() - start
            codes = [entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType)]
            called |= {
                (self.paths[c.co_filename], c.co_firstlineno) for c in codes if c.co_filename in self.paths
            }
            self.calls[item.nodeid] = called


class Only:
    """Runs some tests, in a given order."""

    def __init__(self, names: list[str]) -> None:
        self.order = {name: number for number, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        kept = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(kept, key=lambda item: self.order[item.nodeid])


class Forked:
    """Collects tests, and runs some of them for every mutant in a process forked after that."""

    def __init__(self, name: str, mutants: list[Mutant]) -> None:
        self.name, self.mutants = name, mutants
        self.found: list[tuple[bool, bool] | None] = []

    def pytest_runtestloop(self, session: Any) -> bool:
        items = {item.nodeid: item for item in session.items}
        self.found = [self._try(session, items, mutant) for mutant in self.mutants]
        return True

    def _try(self, session: Any, items: dict[str, Any], mutant: Mutant) -> tuple[bool, bool] | None:
        names, seconds = tests_of(self.name, mutant)
        if not names:
            return True, False
        code = compile(mutant.source, str(path_of(self.name)), "exec")
        functions = changed_functions(code, path_of(self.name), mutant.function)
        if not functions:
            return None

        def work() -> bool:
            for function, new in functions:
                function.__code__ = new
            chosen = [items[name] for name in names]
            for item, following in zip(chosen, [*chosen[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    return False
            return True

        survived, late = apart(work, seconds)
        return bool(survived), late


def changed_functions(module: CodeType, path: Path, line: int) -> list[tuple[FunctionType, CodeType]]:
    """Return the loaded functions that begin at a line and their code in a changed module, where that differs
    and is all that does: defaults and decorators are not in it.
    """
    codes, new = [module], None
    while codes and new is None:
        inner = [const for code in codes for const in code.co_consts if isinstance(const, CodeType)]
        new = next((code for code in inner if code.co_firstlineno == line), None)
        codes = inner
    if new is None:
        return []
    loaded = [
        thing
        for thing in gc.get_objects()
        if type(thing) is FunctionType
        and (thing.__code__.co_filename, thing.__code__.co_firstlineno) == (str(path), line)
        and thing.__code__.co_name == new.co_name
    ]
    same = any(f.__code__ == new or f.__code__.co_freevars != new.co_freevars for f in loaded)
    return [] if same else [(function, new) for function in loaded]


def apart(work: Callable[[], Any], seconds: float) -> tuple[Any, bool]:
    """Return what a function returns in a process of its own, None if the process dies; and whether it took
    too long.
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
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, *files], plugins=[plugin])
    if code is pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"no tests in {files}")
    return code is pytest.ExitCode.OK


@cache
def learn(files: tuple[str, ...]) -> Watch:
    """Return what tests do on the modules as they are, and load what they load."""
    watch = Watch()
    for file in files:
        found = learn_file(file)
        watch.calls |= found.calls
        watch.seconds |= found.seconds
    return watch


@cache
def learn_file(file: str) -> Watch:
    """Return the same of one file; known from the last time where neither it nor a module has changed."""
    known = ROOT / ".mutants" / f"{fingerprint(file)}.pickle"

    def work() -> Any:
        watch = Watch()
        passed = run_tests([file], watch)
        return passed, watch, [n for n in sys.modules if n.split(".")[0] not in ours()]

    found = pickle.loads(known.read_bytes()) if known.exists() else apart(work, LEARNING)[0]
    if found is None or not found[0]:
        raise SystemExit(f"tests fail on the modules as they are: {file}")
    known.parent.mkdir(exist_ok=True)
    known.write_bytes(pickle.dumps(found))
    for name in found[2]:
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
    watch: Watch = found[1]
    return watch


def fingerprint(file: str) -> str:
    """Return a digest of some tests, of what they share and of the modules."""
    shared = [p for p in ROOT.glob("tests/*.py") if not p.name.startswith("test_")]
    paths = [ROOT / file, *sorted(shared), *sorted(ROOT.glob("src/**/*.py"))]
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()[:16]


def path_of(name: str) -> Path:
    return ROOT / "src" / "attnfit" / f"{name}.py"


def guards(name: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{f}.py" for f in GUARDS[name])


def tests_of(name: str, mutant: Mutant) -> tuple[list[str], float]:
    """Return the tests that can notice a mutant, the fastest first, and the time they may take."""
    watch = learn(guards(name))
    names = [
        n for n, called in watch.calls.items() if not mutant.function or (name, mutant.function) in called
    ]
    names.sort(key=lambda n: watch.seconds[n])
    spent = list(accumulate(watch.seconds[n] for n in names))
    names = [n for n, s in zip(names, spent, strict=True) if s <= max(ENOUGH, spent[0])]
    return names, 3 * sum(watch.seconds[n] for n in names) + GRACE


def survive(name: str, mutants: list[Mutant]) -> list[tuple[bool, bool]]:
    """Return of every mutant of a module whether no test notices it, and whether time was up."""
    forked = Forked(name, mutants)
    learn(guards(name))

    def work() -> list[tuple[bool, bool] | None]:
        run_tests(list(guards(name)), forked)
        return forked.found

    found, _ = apart(work, TRYING)
    return [known or survives(name, m) for known, m in zip(found, mutants, strict=True)]


def survives(name: str, mutant: Mutant) -> tuple[bool, bool]:
    """Return the same of one mutant, by tests of a module imported from its changed source."""
    names, seconds = tests_of(name, mutant)

    def work() -> bool:
        dotted = ".".join(["attnfit", *name.split("/")])
        sys.meta_path.insert(0, InMemory(dotted, str(path_of(name)), mutant.source))
        return run_tests(sorted({n.split("::")[0] for n in names}), Only(names))

    survived, late = apart(work, seconds)
    return bool(survived), late


def ours() -> set[str]:
    return {"attnfit", "benchmarks", "conftest", *(p.stem for p in (ROOT / "tests").glob("*.py"))}


def main() -> None:
    """Try mutants, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--module", nargs="*", default=[""], help="modules whose name holds one of these")
    parser.add_argument("--share", type=float, default=1.0, help="share of the mutants to try, by chance")
    parser.add_argument("--number", type=int, help="so many mutants of each module, instead of a share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unseen", action="store_true", help="leave out what earlier seeds have drawn")
    parser.add_argument("--lines", help="only these lines, as in 10-20; the table stays as it is")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "src"))
    with tempfile.TemporaryDirectory() as folder:
        # Every mutant imports the modules beside its own: these are compiled once.
        sys.dont_write_bytecode, sys.pycache_prefix = False, folder
        for name in GUARDS:
            if any(part in name for part in options.module):
                try_module(name, options)


def sample(name: str, options: argparse.Namespace) -> tuple[int, list[Mutant], list[int]]:
    """Return about how many mutants a module has, those to try, and the other seeds that have drawn some."""
    changes = Changes(path_of(name).read_text())
    places = changes.places
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        places = [place for place in places if first <= place[0] <= last]
    before = [(seed, text) for seed, module, text in tried() if module == name and seed != options.seed]
    seen = {text for _, text in before} if options.unseen else set()
    random.Random(f"{name} {options.seed}").shuffle(places)
    n = options.number or max(1, round(options.share * len(places)))
    found: list[Mutant] = []
    looked = real = 0
    while looked < len(places) and len(found) < n:
        mutant = changes.mutant(places[looked])
        real += mutant is not None
        found += [] if mutant is None or mutant.text in seen else [mutant]
        looked += 1
    n_all = round(len(places) * real / looked)
    return n_all, sorted(found, key=lambda m: m.line), sorted({seed for seed, _ in before})


def tried() -> list[tuple[int, str, str]]:
    """Return the seed, the module and the text of every mutant that was ever tried here."""
    lines = TRIED.read_text().splitlines() if TRIED.exists() else []
    return [(int(seed), module, text) for seed, module, text in (line.split("\t") for line in lines)]


def try_module(name: str, options: argparse.Namespace) -> None:
    n_all, chosen, before = sample(name, options)
    if not chosen:
        print(f"{name}: all mutants were tried before")
        return
    print(f"{name}: {n_all} mutants, {len(chosen)} to try", flush=True)
    start = perf_counter()
    found = survive(name, chosen)
    survivors = [m for m, (survived, _) in zip(chosen, found, strict=True) if survived]
    for mutant in survivors:
        print(f"  survived: {mutant}{' (equivalent)' * is_equivalent(name, mutant)}", flush=True)
    n_late, n_killed = sum(late for _, late in found), len(chosen) - len(survivors)
    seconds = perf_counter() - start
    print(f"  {n_killed} of {len(chosen)} killed, {n_late} timed out, {seconds:.0f} s", flush=True)
    if options.lines:
        return
    TRIED.parent.mkdir(exist_ok=True)
    with TRIED.open("a") as file:
        file.writelines(f"{options.seed}\t{name}\t{mutant.text}\n" for mutant in chosen)
    seeds = f"{options.seed}", ", ".join(map(str, before)) if options.unseen else ""
    write(list(GUARDS), __doc__ or "", name, [n_all, len(chosen), n_late], survivors, seeds)


if __name__ == "__main__":
    main()
