"""The table of mutants, and the survivors that no test should see."""

from __future__ import annotations

import re
from pathlib import Path

from scipy.stats import binomtest

from benchmarks.mutation import Mutant

RESULTS = Path(__file__).resolve().parent / "results" / "mutants.md"

# Mutants that mean the same, by the end of the module's name and a pattern of what is said of them; why, by
# kind: docs/design.md. A pattern counts only where no test noticed.
EQUIVALENT = [
    # Bounds of cost, one larger, doubled or ten times as large.
    ("", r"became `(WHITENED_ROWS|LOOKED_AT|DENSE_ENTRIES|MAX_ROUNDS|PROBE_ROWS|KEPT_NUMBERS|MOST_TERMS) = "),
    ("", r"became `(N_WEAK|N_PROGRAMMES|PROGRAMME_ENTRIES) = "),
    ("solvers/separation", r"became `FIRST_ROWS, MORE_ROWS = (\(5001\), 2_000|5_000, \(2001\))`"),
    ("solvers/separation", r"became `MAX_PROJECTIONS, CLEARLY, RANK = \(101\), 1e-3, 1e-10`"),
    ("solvers/separation", r"became `MAX_SECONDS = \(200\.0\)`"),
    ("solvers/evidence", r"became `N_ROWS, ROWS_PER_UNKNOWN = (\(8001\), 4|8_000, \(5\))`"),
    ("objectives/beginning", r"became `FORCING, MAX_PRODUCTS = 1e-2, \(31\)`"),
    ("losses/activations", r"became `PROBES = "),
    ("losses/activations", r"became `STEP = \((0\.0001|-1e-05)\)`"),
    ("losses/activations", r"became .*np\.clip\(y, (-\(400\.0\), 40\.0|-40\.0, \(400\.0\))\)"),
    # Protection from ourselves.
    ("", r"became `@dataclass\(frozen=False\)`"),
    ("", r"became .*check_finite=True"),
    # Arguments that nobody reads, lines that are not reached, what broadcasts.
    ("losses/loss", r"became .*self\.transform\(z, \(1\.0\)\)"),
    ("losses/elementwise", r"became .*self\.transform\(z, \(1\.0\)\)"),
    ("losses/rescaled", r"became .*self\.transform\(z, \(1\.0\)\)"),
    ("losses/elementwise", r"became .*b, w, (\(1\.0\), 0\.0|0\.0, \(1\.0\))\)\[0\]\[0\]"),
    ("losses/elementwise", r"became `return np\.(ones\(1\)|zeros\(\(2\)\)), \*self\.transform"),
    ("certificates/mixture", r"became .*default_factory=lambda: np\.ones\(0\)"),
    ("certificates/good_start", r"became `return \(-1\.0\)`"),
    ("certificates/good_start", r"became .*sums_on_ball\(.*, _data, \(1\.0\)\)"),
    ("certificates/certification", r"became .*sums_on_ball\(.*, _rounding, \(1\.0\)\)"),
    ("certificates/certification", r"became .*_rounding\(rows, \(1\.0\)\)"),
    ("solvers/evidence", r"became `SHRUNK = \(-0\.5\)`"),
    ("solvers/evidence", r"became `if not \(diagonal > 0\.0\)\.any\(\):`"),
    ("solvers/subproblem", r"became `size: float = \(1\.0\)`"),
    ("solvers/subproblem", "`break` became `continue`"),
    ("", r"became .* - 0\.0 \* [a-z]"),
    ("", r"became .* - np\.zeros\("),
    ("", r"reshape\(-\(2\)"),
    ("solvers/separation", r"became `means = np\.zeros\(\(\(1\), problem\.n_unknowns\)\)`"),
    # A short cut less; any row of a group; a symmetric matrix; what is multiplied by zero.
    ("segments", r"became .*sizes != self\.sizes\[0\]"),
    ("objectives/beginning", r"became .*chunk\.index\[\(1\)\]"),
    ("solvers/subproblem", r"became .*sum\(axis=\(1\)\)"),
    ("solvers/separation", r"became `scale = np\.sqrt\(np\.where\(sizes > 0\.0, sizes, \(10\.0\)\)\)`"),
    ("objectives/beginning", r"became .*np\.where\(sizes > 0\.0, sizes, \(10\.0\)\)\)\), 0\.0\)`"),
    ("losses/softmax", r"became `weight = np\.where\(columns\[1\] > 0, columns\[1\], \(10\.0\)\)`"),
    ("objectives/recession", r"np\.where\(total > (\(1\.0\), total, 1\.0|0\.0, total, \((-1|10)\.0\))\)"),
    ("objectives/recession", r"became `n_all: int = \(1\)`"),
    ("objectives/recession", r"became `found = Free\(.*, np\.ones\(0\), limit\)`"),
    ("objectives/beginning", r"became `scale = np\.sqrt\(np\.where\(seen, diagonal, \(10\.0\)\)\)`"),
    ("objectives/beginning", r"became `scale = np\.sqrt\(np\.where\(sizes > 0\.0, sizes, \(10\.0\)\)\)`"),
    ("objectives/convexity", r"became .* / np\.where\(mass > 0, mass, \((-1|10)\.0\)\)`"),
    ("objectives/convexity", r"became .*multiplicity: Array \| float = \(10\.0\)"),
    ("objectives/beginning", r"became .*known\.mass\[chunk\.groups\], \(10\.0\)"),
    ("solvers/separation", r"became `return True, others \+ \(\(10\.0\) \+ max\("),
    # The iteration arrives at the same root; the answer is the same one way or the other.
    ("solvers/subproblem", r"became `if lowest > 0 and .*\(lowest - gap\)\)\) < radius:`"),
    ("solvers/subproblem", r"became `if reciprocal > \(101\) \* tolerance:`"),
    ("objectives/beginning", r"became .*np\.isfinite\(x\)\.any"),
    # Margins taken several times, outside of the operations that enclose a single rounding.
    (
        "certificates/rigorous",
        r"^(?!.*(cls\(mid|norm\(self\.size|return \(np\.abs\(self\.mid\))).*\* OUTWARD.* became .* / OUTWARD",
    ),
    ("certificates/rigorous", r"became `UNDERFLOW = \(1e-152\)`"),
    ("certificates/rigorous", r"became `slack = WIDEN \* w \* \(\(80\.0\)"),
]

HEAD = """\
| module | mutants | tried | killed | out of time | survived | equivalent | killed of all | of the others \
| interval | seed | without those of |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def is_equivalent(name: str, mutant: Mutant | str) -> bool:
    """Return whether no test should see a mutant."""
    return any(name.endswith(module) and re.search(text, str(mutant)) for module, text in EQUIVALENT)


def write(
    names: list[str],
    about: str,
    name: str,
    counts: list[int],
    survivors: list[Mutant],
    seeds: tuple[str, str],
) -> None:
    """Put a module's figures and survivors in the table, in place of those that are there.

    ``counts``: mutants, those tried and those of them that ran out of time; ``seeds``: that of the sample,
    and those of earlier ones that it has no mutant of.
    """
    old = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = {key: line for line in old if line.startswith("| ") for key in names if f"| {key} |" in line}
    lived = {key: [x for x in old if x.startswith(f"* {key} ")] for key in names}
    n_all, n, n_late = counts
    alive, same = len(survivors), sum(is_equivalent(name, m) for m in survivors)
    killed = n - alive
    low, high = interval(killed, n - same, n_all)
    shares = [f"{killed / n:.0%}", f"{killed / max(n - same, 1):.0%}", f"{low:.0%} to {high:.0%}", *seeds]
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
        "",
        "",
    ]
    missing = [key for key in names if key not in rows]
    parts = [
        "# Mutants",
        about.strip(),
        "Killed includes those that ran out of time. The interval (95 %) is of the share among all mutants\n"
        "that are not equivalent, where only some were tried. Why some are equivalent: `docs/design.md`.\n"
        "\n"
        "Tests were written for the kinds of mutants that survived under the seeds of the last column.\n"
        "A row with such seeds is a sample of mutants that none of them had drawn, that nobody had seen;\n"
        "a row without is the first look at a module.",
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
