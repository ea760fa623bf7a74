"""A progress bar for fits that take more than two seconds; nothing at all for shorter ones."""

from __future__ import annotations

import math
import threading
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attnfit.cli.console import stderr

DELAY = 2.0


class FitProgress:
    """Context manager and callback: plain for `attnfit.minimize` (`record`), scikit-learn's for an estimator.

    Newton's method squares the error at each step, so digits of the gradient gained, not iterations, measure
    how far a fit is.

    Parameters
    ----------
    tol : float
        Relative gradient at which the fit ends; of no meaning where work is counted.
    delay : float
        Seconds before anything shows.
    """

    def __init__(self, tol: float = 1.0, delay: float = DELAY) -> None:
        self._digits = -math.log10(min(max(tol, 1e-16), 0.1))
        self._console = stderr()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[reads]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("reading the file", total=None, reads="")
        self._phase = ""
        # A thread, because the first read of a large file or matrix alone may take longer than the delay.
        self._timer = threading.Timer(delay, self._progress.start)
        self._timer.daemon = True

    def __enter__(self) -> FitProgress:
        """Start the clock."""
        if self._console.is_terminal:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._timer.cancel()
        if self._timer.ident is not None:
            # The timer may be starting the display at this very moment: only then is it safe to stop it.
            self._timer.join()
        # Stopping what never started would print an empty line.
        if self._progress.live.is_started:
            self._progress.stop()

    def watch(self, estimator: Any) -> None:
        """Follow the fit of an estimator; before scikit-learn 1.9 none can be, and only the time is shown."""
        if hasattr(estimator, "set_callbacks"):
            estimator.set_callbacks(self)

    def setup(self, estimator: Any, context: Any) -> None:
        """Do nothing: part of scikit-learn's protocol."""

    def teardown(self, estimator: Any, context: Any) -> None:
        """Do nothing: part of scikit-learn's protocol."""

    def on_fit_task_begin(self, estimator: Any, context: Any, **_: Any) -> None:
        """Do nothing: part of scikit-learn's protocol."""

    def on_fit_task_end(self, estimator: Any, context: Any, *, metadata: Any = None, **_: Any) -> bool:
        """Show one evaluation of the objective; never ask the fit to stop."""
        if metadata and "record" in metadata:
            self.record(metadata["record"])
        return False

    def say(self, description: str) -> None:
        """Name what is going on."""
        self._progress.update(self._task, description=description)

    def count(self, done: float, total: int) -> None:
        """Show how many pieces of work are done, of the most there can be."""
        counted = f"{math.floor(done)} of up to {total}"
        self._progress.update(self._task, completed=done, total=total, reads=counted)

    def record(self, record: Any) -> None:
        """Show one evaluation of the objective."""
        if record.phase != self._phase:
            self._phase = record.phase
            # The samples that provide a start are solved to a few digits only: no share of the work is known.
            total = self._digits if record.phase.startswith("fit") else None
            self._progress.reset(self._task, total=total, description=record.phase)
        digits = -math.log10(max(record.gradient_norm, 1e-300))
        self._progress.update(
            self._task,
            completed=min(max(digits, 0.0), self._digits),
            reads=f"relative gradient {record.gradient_norm:.1e}, {record.n_passes:.1f} reads of the data",
        )
