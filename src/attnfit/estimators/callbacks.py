"""scikit-learn's callback protocol, where the installed version has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnfit.solvers import Record

__all__ = ["CallbackSupportMixin", "Listeners", "with_callbacks"]

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's mixin."""

    def with_callbacks(method: Any) -> Any:
        """Return the method unchanged."""
        return method


class Listeners:
    """Tell an estimator's callbacks about the fit, every evaluation of the loss being one task.

    Parameters
    ----------
    estimator : estimator
    X, y : array_like
        The training data as the user passed them.
    metadata : dict
        Further arguments of ``fit``; those that are None are left out.
    """

    def __init__(self, estimator: Any, X: Any, y: Any, metadata: dict[str, Any]) -> None:
        self._estimator = estimator
        self._data = {
            "X": X,
            "y": y,
            "metadata": {name: value for name, value in metadata.items() if value is not None},
        }
        self._context: Any = None
        if getattr(estimator, "_skl_callbacks", None) or hasattr(estimator, "_parent_callback_ctx"):
            self._context = estimator._init_callback_context(max_subtasks=None)
            self._context.call_on_fit_task_begin(estimator=estimator, **self._data)

    def on_record(self) -> Callable[[Record], bool] | None:
        """Return what `attnfit.minimize` should call: true when a callback asks to stop."""
        context, estimator = self._context, self._estimator
        if context is None:
            return None

        def tell(record: Record) -> bool:
            task = context.subcontext(task_name="evaluation")
            task.call_on_fit_task_begin(estimator=estimator)
            return bool(task.call_on_fit_task_end(estimator=estimator, metadata={"record": record}))

        return tell

    def finish(self) -> None:
        """Tell that the estimator is fitted."""
        if self._context is not None:
            # Nothing is missing: the estimator itself can predict by now.
            self._context.call_on_fit_task_end(
                estimator=self._estimator, reconstruction_attributes={}, **self._data
            )
