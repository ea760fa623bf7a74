"""A clock for inversions, which hand back what they have when they are interrupted."""

from __future__ import annotations

from time import perf_counter

from attnfit.audit.models.model import Model


class Deadline:
    """Context in which no work on a model begins after some time: it raises KeyboardInterrupt instead.

    Forward passes are work, and whatever calls `Model.before_work`.

    Attributes
    ----------
    passed : bool

    Parameters
    ----------
    model : Model
    seconds : float
    """

    def __init__(self, model: Model, seconds: float) -> None:
        self.passed = False
        self._model, self._end = model, perf_counter() + seconds

    def __enter__(self) -> Deadline:
        """Start the clock."""
        # Not a signal: that could ring anywhere, also where the model is between two states.
        self._handle = self._model.base.register_forward_pre_hook(self._check)
        self._model.before_work = self._check
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the clock."""
        self._handle.remove()
        self._model.before_work = None

    def _check(self, *_: object) -> None:
        if perf_counter() > self._end:
            self.passed = True
            raise KeyboardInterrupt
