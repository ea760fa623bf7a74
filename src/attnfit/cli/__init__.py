"""The command line: ``attnfit fit | predict | score | elasticities | example``, ``invert``, ``audit`` ...

Nothing here computes: commands read a file, call the library and print what it returns.
"""

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what to install if its extra is missing."""
    try:
        from attnfit.cli.app import app
    except ModuleNotFoundError as missing:
        # Only a missing extra deserves the sentence: anything else is a bug and should be seen.
        if (missing.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        told = 'the command line needs typer and rich; type: python -m pip install "attnfit[cli]"'
        print(f"attnfit: {told}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    for name in ("stdout", "stderr"):
        # A stream that the shell has closed (2>&-) takes what is said with it, not the command.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a letter is no reason to stop.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="attnfit")
