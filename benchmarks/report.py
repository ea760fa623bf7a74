"""Tables in Markdown, with everything needed to make them again."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.solvers import OURS, SOLVERS

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "attnfit",
    "numpy",
    "scipy",
    "scikit-learn",
    "glum",
    "pyfixest",
    "tabmat",
    "statsmodels",
    "xlogit",
    "pyfixest",
    "numba",
    "torch",
    "transformers",
    "jax",
)
Row = dict[str, Any]

# Relative excess of the objective above which a point belongs to another valley, or to none.
ELSEWHERE = 1e-6


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned Markdown."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def stored(name: str, count: int) -> tuple[list[list[str]], list[str]]:
    """Return the first rows of a table as it was written last, and the items of the list below it."""
    if not count:
        return [], []
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    # The first two lines of the table are its header.
    places = [k for k, line in enumerate(lines) if line.startswith("| ")]
    cut = [lines[k].strip("| ").split(" | ") for k in places[2 : 2 + count]]
    items = [line for line in lines[places[-1] :] if line.startswith("- ")]
    return [[cell.strip() for cell in row] for row in cut], items


def race_table(seeds: list[list[Row]], tol: float) -> str:
    """One row a solver over all seeds: median times, worst accuracy, largest counts."""
    names = [row["name"] for row in seeds[0]]
    grouped = {name: [row for rows in seeds for row in rows if row["name"] == name] for name in names}
    ours = worst(grouped[OURS]) if OURS in grouped else {}
    header = ["solver", "seconds", "fastest", "cpu", "runs", "iter", "evals", "reads", "rel. gradient"]
    header += ["error in x", "excess value", "ours/this", "note"]
    lines = []
    for name in names:
        row = worst(grouped[name])
        label = SOLVERS[name].label
        if "seconds" not in row:
            lines.append([label, *["-"] * 11, row["status"]])
            continue
        error = "-" if math.isnan(row["error"]) else f"{row['error']:.1e}"
        ratio = ours["seconds"] / row["seconds"] if "seconds" in ours else math.nan
        lines.append(
            [
                label,
                *(f"{row[key]:.3g}" for key in ("seconds", "fastest", "cpu")),
                f"{row['runs']} x {len(grouped[name])}",
                count(row["iterations"]),
                count(row["evaluations"]),
                count(row["reads"]),
                f"{row['gradient']:.1e}",
                error,
                f"{row['excess']:.1e}",
                "" if math.isnan(ratio) or name == OURS else f"{ratio:.2f}",
                note(name, row, ours, tol),
            ]
        )
    return table(header, lines)


def worst(rows: list[Row]) -> Row:
    """Several seeds as one row: no seed can hide behind another."""
    failed = [row for row in rows if "seconds" not in row]
    if failed:
        return failed[0]
    out: Row = {key: median(row[key] for row in rows) for key in ("seconds", "cpu")}
    out["fastest"] = min(row["fastest"] for row in rows)
    out["runs"] = min(row["runs"] for row in rows)
    for key in ("iterations", "evaluations", "reads", "gradient", "error", "excess"):
        out[key] = max(row[key] for row in rows)
    out["status"] = "; ".join(dict.fromkeys(row["status"] for row in rows if row["status"]))
    return out


def note(name: str, row: Row, ours: Row, tol: float) -> str:
    """What a reader must know about a row, above all where a peer wins it."""
    peer = not name.startswith(OURS)
    parts = [row["status"]] if row["status"] else []
    if row["gradient"] > tol:
        parts.append("not at tol")
    if row["excess"] > ELSEWHERE:
        parts.append("far from the lowest value")
        return "; ".join(parts)
    if peer and "seconds" in ours and row["seconds"] < ours["seconds"]:
        if row["gradient"] <= tol:
            parts.append("PEER WINS")
        elif row["gradient"] <= 100 * tol:
            parts.append("PEER FASTER to a looser gradient")
    missed = ours.get("gradient", 0.0) > tol or ours.get("excess", 0.0) > ELSEWHERE
    if peer and row["gradient"] <= tol and missed:
        parts.append("PEER WINS: attnfit missed tol")
    return "; ".join(parts)


def count(x: float) -> str:
    """A count, or a dash where nobody counted."""
    return "-" if x is None or math.isnan(x) else f"{x:.4g}" if x < 1e4 else f"{x:,.0f}"


def write(name: str, command: str, sections: list[str]) -> Path:
    """Save a report under ``results/``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(f"# {name}\n\n" + "\n\n".join([surroundings(command), *sections]) + "\n")
    return path


def stored_sections(name: str) -> dict[str, str]:
    """Return the sections of a stored report by their titles: those measured anew replace their like."""
    path = RESULTS / f"{name}.md"
    text = path.read_text() if path.exists() else ""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {part.split("\n", 1)[0]: part.strip() for part in parts}


def surroundings(command: str) -> str:
    """Command, machine, versions and date."""
    return "\n".join(
        [
            f"- command: `{command}`",
            f"- date: {datetime.datetime.now(datetime.UTC).date().isoformat()}",
            f"- machine: {os.cpu_count()} cores, {total_memory()} of memory, {processor()}",
            f"- load over the last minute when written: {os.getloadavg()[0]:.1f}",
            f"- versions: Python {platform.python_version()}, " + ", ".join(versions()),
        ]
    )


def versions() -> list[str]:
    """Versions of what takes part, absent packages left out."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def total_memory() -> str:
    """Memory of the machine."""
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def processor() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
