"""What is tried against the safety of files, terminals, machines and models, and how often it fails:
``python -m benchmarks.safety``.

A case is a test of the suite: a way to damage a file, to read one that looks like another, to run where
nothing can be written, or to get a false "nothing leaks" out of an audit.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from benchmarks.report import table, write

CLASSES = {
    "outputs and inputs, full disks, kills": ["test_cli_files", "test_checkpoint_files"],
    "damaged and hostile files": [
        "test_fuzz",
        "test_hostile_files",
        "test_hostile_zarr",
        "test_source_drift",
    ],
    "model files": ["test_model_files", "test_layer_files"],
    "terminal and exit codes": ["test_cli_literal", "test_cli_terminal"],
    "data that are not what they seem": ["test_cli_columns", "test_cli_formats", "test_cli_input"],
    "the same report on disk and on workers": ["test_cli_elsewhere", "test_cli_large"],
    "forgotten groups, rows that are not written out": ["test_estimators_groups", "test_estimators_outside"],
    "nothing can be written; other processors": ["test_unwritable", "test_processors"],
    "model directories as a gate": ["test_audit_loading", "test_audit_models"],
    "false all-clears of an audit": [
        "test_audit_families",
        "test_audit_encoders",
        "test_audit_positions",
        "test_audit_lower_precision",
        "test_audit_texts",
    ],
    "texts that leave an audit unasked": ["test_audit_report"],
}
TESTS = Path(__file__).parent.parent / "tests"


def main() -> None:
    """Write the table."""
    lines = []
    for name, files in CLASSES.items():
        paths = [str(TESTS / f"{file}.py") for file in files if (TESTS / f"{file}.py").exists()]
        began = perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths],
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
        )
        counts = {
            what: int(found[1]) if (found := re.search(rf"(\d+) {what}", done.stdout)) else 0
            for what in ("passed", "failed", "error", "skipped")
        }
        if not counts["passed"]:
            raise SystemExit(done.stdout + done.stderr)
        tried = counts["passed"] + counts["failed"] + counts["error"]
        failures = counts["failed"] + counts["error"]
        seconds = f"{perf_counter() - began:.0f} s"
        lines.append([name, str(tried), str(failures), str(counts["skipped"]), seconds])
        print(*lines[-1], flush=True)
    header = ["class", "cases", "failures", "not possible here", "time"]
    command = shlex.join(["python", "-m", "benchmarks.safety", *sys.argv[1:]])
    note = "Fuzzing for a minute each is `make fuzz`; here every reader gets some sixty damaged files."
    write("safety", command, [f"## Safety\n\n{note}\n\n{table(header, lines)}"])


if __name__ == "__main__":
    main()
