"""The table of mutants, and the survivors that no test should see."""

from __future__ import annotations

import re
from pathlib import Path

from scipy.stats import binomtest

from benchmarks.mutation import Mutant

RESULTS = Path(__file__).resolve().parent / "results" / "mutants.md"

# Mutants that mean the same, by the end of the module's name and a pattern of what is said of them; why, by
# kind: docs/design.md.
EQUIVALENT = [
    # Bounds of cost, one larger.
    ("", r"`(WHITENED_ROWS|LOOKED_AT|DENSE_ENTRIES|FIRST_ROWS|MAX_ROUNDS|PROBE_ROWS|KEPT_NUMBERS) = "),
    (
        "",
        r"`(N_WEAK|N_ROWS|ROWS_PER_UNKNOWN|MAX_PRODUCTS|MAX_PROJECTIONS|MAX_SECONDS|LISTED|N_PROGRAMMES) = ",
    ),
    ("losses/activations", "`PROBES = "),
    # Arguments that nobody reads, lines that are not reached, what broadcasts.
    ("", r"became .*link\(z, \(1\.0\)\)"),
    ("losses/elementwise", r"became .*0\.0, \(1\.0\)\)\[0\]\[0\]"),
    ("losses/loss", "`return False` became `return True`"),
    ("objectives/units", "`return False` became `return True`"),
    ("", r"became .* - 0\.0 \* [a-z]"),
    ("", r"reshape\(-\(2\)"),
    # A short cut less; any row of a group; a symmetric matrix; a column of zeros.
    ("segments", r"became .*sizes != self\.sizes\[0\]"),
    ("objectives/units", r"became .*chunk\.index\[\(1\)\]"),
    ("solvers/subproblem", r"became .*sum\(axis=\(1\)\)"),
    ("solvers/separation", r"became `scale = np\.sqrt\(np\.where\(sizes > 0\.0, sizes, \(10\.0\)\)\)`"),
    # The other end decides, the iteration arrives at the same root, the programme agrees.
    ("certificates/layers", r"became .*np\.asarray\(problem\.penalty \* logits\)"),
    ("certificates/lipschitz", r"became .*np\.asarray\(self\.high - centre\)"),
    ("losses/elementwise", r"became .*np\.asarray\(v_high\)"),
    ("solvers/subproblem", r"`if lowest > 0 and size\(lowest \+ gap\) < radius:`"),
    ("solvers/subproblem", r"`if reciprocal > 100 \* tolerance:`"),
    ("solvers/separation", "`return False, None` became `return True, None`"),
    # Margins taken several times.
    ("certificates/rigorous", r"\* OUTWARD.* became .* / OUTWARD"),
    ("certificates/rigorous", r"\* OUTWARD.* became .* / OUTWARD"),
    ("certificates/rigorous", "`UNDERFLOW = "),
    ("objectives/surrogate", r"became .*np\.isfinite\(x\)\.any"),
    ("objectives/surrogate", r"became .*known\.mass\[chunk\.groups\], \(10\.0\)"),
]

HEAD = """\
| module | mutants | tried | killed | out of time | survived | equivalent | killed of all | of the others \
| interval |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def is_equivalent(name: str, mutant: Mutant | str) -> bool:
    """Return whether no test should see a mutant."""
    return any(name.endswith(module) and re.search(text, str(mutant)) for module, text in EQUIVALENT)


def write(names: list[str], about: str, name: str, counts: list[int], survivors: list[Mutant]) -> None:
    """Put a module's figures and survivors in the table, in place of those that are there.

    ``counts``: mutants, those tried and those of them that ran out of time.
    """
    old = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = {key: line for line in old if line.startswith("| ") for key in names if f"| {key} |" in line}
    lived = {key: [x for x in old if x.startswith(f"* {key} ")] for key in names}
    n_all, n, n_late = counts
    alive, same = len(survivors), sum(is_equivalent(name, m) for m in survivors)
    killed = n - alive
    low, high = interval(killed, n - same, n_all)
    shares = [f"{killed / n:.0%}", f"{killed / max(n - same, 1):.0%}", f"{low:.0%} to {high:.0%}"]
    rows[name] = "| " + " | ".join([name, *map(str, [n_all, n, killed, n_late, alive, same]), *shares]) + " |"
    lived[name] = [f"* {name} {m}{' (equivalent)' * is_equivalent(name, m)}" for m in survivors]
    figures = [[int(c) for c in rows[key].split("|")[2:8]] for key in names if key in rows]
    total = [sum(column) for column in zip(*figures, strict=True)]
    _, tried, dead, _, _, equal = total
    # Modules count by their mutants, whatever number of these was tried.
    weighted = sum(c[0] * c[2] / max(c[1] - c[5], 1) for c in figures) / total[0]
    last = [
        *map(str, total),
        f"{dead / tried:.1%}",
        f"{dead / (tried - equal):.1%}",
        f"by size {weighted:.1%}",
    ]
    missing = [key for key in names if key not in rows]
    parts = [
        "# Mutants",
        about.strip(),
        "Killed includes those that ran out of time. The interval (95 %) is of the share among all mutants\n"
        "that are not equivalent, where only some were tried. Why some are equivalent: `docs/design.md`.",
        "\n".join([HEAD, *(rows[key] for key in names if key in rows), f"| all | {' | '.join(last)} |"]),
        *([f"Not tried: {', '.join(missing)}."] if missing else []),
        "## Survivors",
        "\n".join(line for key in names for line in lived[key]),
    ]
    RESULTS.write_text("\n\n".join(parts) + "\n")


def interval(killed: int, n: int, n_all: int) -> tuple[float, float]:
    """Return the ends of a 95 % interval of the share killed among all, from those tried: exact (Clopper and
    Pearson) for what was not tried.
    """
    if n >= n_all or n == 0:
        return killed / max(n, 1), killed / max(n, 1)
    ends = binomtest(killed, n).proportion_ci(0.95)
    rest = n_all - n
    return (killed + rest * ends.low) / n_all, (killed + rest * ends.high) / n_all
