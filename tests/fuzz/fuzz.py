"""Damage files at random until a reader fails in a way of which it knows nothing: ``make fuzz``.

Inputs that did are kept under ``kept/NAME``, where the suite reads them for ever.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from targets import complaint, damaged, targets  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader (default 60)")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("names", nargs="*", help="readers (default: all)")
    options = parser.parse_args()
    known = targets()
    failed = 0
    for name in options.names or known:
        with tempfile.TemporaryDirectory() as folder:
            file, path = known[name].write(Path(folder))
            whole, rng, n = file.read_bytes(), np.random.default_rng(options.seed), 0
            end = time.monotonic() + options.seconds
            while time.monotonic() < end:
                contents = damaged(whole, rng)
                file.write_bytes(contents)
                found, n = complaint(known[name], path), n + 1
                if found is not None:
                    failed += 1
                    kept = HERE / "kept" / name / hashlib.sha256(contents).hexdigest()[:12]
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_bytes(contents)
                    print(f"{name}: {found} ({kept})")
                    break
            print(f"{name}: {n} files", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
