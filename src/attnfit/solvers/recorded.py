"""A problem whose answers are recorded, and taken from the recording of an earlier run."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.beginning import LogStart
from attnfit.objectives.layer_curvature import LayeredEvaluation
from attnfit.objectives.objective import Drawn, Evaluation, Moved
from attnfit.segments import Array
from attnfit.solvers.record import CheckpointError, Draw, Entry, Recording, digest

# Evaluations made of arrays, or of what can be computed again from x, and their parts beside value and
# gradient.
KINDS = (Evaluation, LayeredEvaluation)
PARTS = ("state", "centre", "gradient_at_zero", "hessian", "column_values")


@dataclass(frozen=True)
class Unread(Drawn):
    """Rows drawn in an earlier run: their number is known, and ``read`` draws them again."""

    read: Callable[[], Evaluation] = field(kw_only=True, repr=False)


class Recorded:
    """A problem whose answers are entered in a recording, and taken from it.

    Calls that read the data go through the recording; everything else is asked of the problem itself, so
    nothing depends on which calls these are but the time a resumed fit takes.

    Parameters
    ----------
    problem : Problem
    recording : Recording
    """

    def __init__(self, problem: Any, recording: Recording) -> None:
        self.inner, self.recording = problem, recording
        self._recorded_columns: NDArray[np.bool_] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            # Not there yet while a pickle is being read.
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def n_passes(self) -> float:
        """Data passes, those of the earlier run included."""
        return float(self.inner.n_passes) + self.recording.reads_saved

    def convex_surrogate(self) -> Recorded | None:
        """Return the convex surrogate, recorded."""
        convex = self.inner.convex_surrogate()
        return None if convex is None else Recorded(convex, self.recording)

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient at x, and what else is asked for."""
        recording = self.recording
        own = self.inner.evaluate

        def ask() -> Evaluation:
            if sampler is not None:
                recording.renew(sampler)
            at: Evaluation = own(x, near, sampler, at_zero=at_zero, hessian=hessian)
            return at

        def enter(at: Evaluation | None) -> dict[str, Any]:
            draw = None
            if sampler is not None:
                state = deepcopy(sampler.rng.bit_generator.state)
                n_rows = None if at is None or at.sample is None else at.sample.n_rows
                draw = Draw(state, float(sampler.mass), sampler.has_leverage, n_rows)
            if at is None:
                return {"draw": draw}
            recording.at = at
            return {"arrays": _parts(at), "draw": draw}

        def answer(entry: Entry) -> Evaluation:
            # What an evaluation is near to may hold much that is not needed to repeat it.
            bare = None if near is None else near.bare()
            again = self._again(lambda s: own(x, bare, s, at_zero=at_zero, hessian=hessian), sampler)
            sample = None
            if sampler is not None and entry.draw is not None:
                sampler.rng.bit_generator.state = entry.draw.random
                sampler.mass, sampler.has_leverage = entry.draw.mass, entry.draw.has_leverage
                if entry.draw.n_rows is not None:
                    sample = Unread(None, entry.draw.n_rows, read=again)
            if entry.overflow is not None:
                raise OverflowError(entry.overflow)
            known = recording.at = _evaluation(entry, x, sample)
            recording.expect(known, again)
            return again() if _is_bare(entry) else known

        key = digest(type(self.inner).__name__, x, at_zero, hessian, near is None, sampler is None)
        found: Evaluation = self._through("evaluate", key, ask, enter, answer)
        return found

    def _again(self, read: Callable[..., Evaluation], sampler: Any) -> Callable[[], Evaluation]:
        """Return how to repeat a read later on, rows drawn included; it is repeated once."""
        recording, before = self.recording, None if sampler is None else _twin(sampler)

        @cache
        def again() -> Evaluation:
            with recording.aside():
                if before is None:
                    return read(None)
                if before.has_leverage:
                    recording.renew(before)
                return read(_twin(before))

        if before is not None and not before.has_leverage:
            recording.leverage_from(before, again)
        return again

    def hessian_at(self, at: Evaluation, sample: Any = None, **options: Any) -> Array:
        """Return the Hessian at an evaluated point."""
        call = self.inner.hessian_at
        key = digest(at.x, sample is None, sorted(options.items()))
        return self._array("hessian_at", key, lambda: call(at, _drawn(sample), **options), 2 * at.x.shape)

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of a positive majorant of the Hessian."""
        call = self.inner.diagonal_at
        return self._array("diagonal_at", digest(at.x), lambda: call(at), at.x.shape)

    def log_start(self, normaliser: float = 1.0) -> LogStart | None:
        """Return least squares on the logarithm of the target."""
        call = self.inner.log_start

        def ask() -> Array:
            found = call(normaliser)
            return np.zeros(0) if found is None else np.append(found.x, found.share)

        found = self._array("log_start", digest(normaliser), ask, None)
        return LogStart(found[:-1], float(found[-1])) if len(found) else None

    def unseen_columns(self, at: Evaluation) -> NDArray[np.bool_]:
        """Return which unknowns no datum and no penalty sees."""
        if self._recorded_columns is None:
            call = self.inner.unseen_columns
            shape = (self.inner.n_unknowns,)
            found = self._array("unseen_columns", "", lambda: call(at).astype(np.float64), shape)
            self._recorded_columns = found > 0.0
        return self._recorded_columns

    def unseen_directions(self, at: Evaluation) -> Array:
        """Return an orthonormal basis of the directions along which no datum and no penalty changes."""
        call = self.inner.unseen_directions
        return self._array("unseen_directions", digest(at.x), lambda: call(at), None)

    def is_trivial(self, at: Evaluation) -> bool:
        """Return whether a point is a minimum that says nothing about the data."""
        call = self.inner.is_trivial
        found = self._array("is_trivial", digest(at.x), lambda: np.array([float(call(at))]), (1,))
        return bool(found[0])

    def moves(self, at: Evaluation, steps: Array) -> Moved | None:
        """Return by how much each step changes a fitted logit at most."""
        call = self.inner.moves

        def ask() -> Array:
            found = call(at, steps)
            return np.zeros(0) if found is None else np.append(found.largest, found.least)

        found = self._array("moves", digest(at.x, steps), ask, None)
        return Moved(found[:-1], float(found[-1])) if len(found) else None

    def look_along(self, at: Evaluation, step: Array, directions: Array) -> tuple[Moved, Array, Array]:
        """Return the move of a step, the Hessian's diagonal and its curvature along directions."""
        call, d = self.inner.look_along, len(step)

        def ask() -> Array:
            moved, diagonal, along = call(at, step, directions)
            return np.concatenate([moved.largest, [moved.least], diagonal, along])

        found = self._array("look_along", digest(at.x, step, directions), ask, None)
        return Moved(found[:1], float(found[1])), found[2 : 2 + d], found[2 + d :]

    def hvp_at(self, at: Evaluation, v: Array, **options: Any) -> Array:
        """Return the Hessian at an evaluated point times v."""
        call = self.inner.hvp_at
        key = digest(at.x, v, sorted(options.items()))
        return self._array("hvp_at", key, lambda: call(at, v, **options), at.x.shape)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v; the read that prepares it is made when the first product is."""
        call = self.inner.hessian_operator
        prepared = cache(lambda: call(at, _drawn(sample)))

        def product(v: Array) -> Array:
            key = digest(at.x, v, sample is None)
            return self._array("product", key, lambda: prepared()(v), at.x.shape)

        return product

    # ---- through the recording

    def _array(self, call: str, key: str, ask: Callable[[], Array], shape: tuple[int, ...] | None) -> Array:
        def enter(found: Array | None) -> dict[str, Any]:
            return {} if found is None else {"arrays": {"answer": np.array(found)}}

        def answer(entry: Entry) -> Array:
            if entry.overflow is not None:
                raise OverflowError(entry.overflow)
            return _part(entry, "answer", shape)

        found: Array = self._through(call, key, ask, enter, answer)
        return found

    def _through(
        self,
        call: str,
        key: str,
        ask: Callable[[], Any],
        enter: Callable[[Any], dict[str, Any]],
        answer: Callable[[Entry], Any],
    ) -> Any:
        """Return the answer that the recording has, or ask for it and enter it: None where it overflows."""
        recording = self.recording
        if recording.silent:
            return ask()
        try:
            entry = recording.take(call, key)
            if entry is None:
                return self._entered(call, key, ask, enter)
        except KeyboardInterrupt:
            recording.seal()
            raise
        return answer(entry)

    def _entered(
        self, call: str, key: str, ask: Callable[[], Any], enter: Callable[[Any], dict[str, Any]]
    ) -> Any:
        """Return the answer of the problem itself, and enter it."""
        recording, reads, began = self.recording, self.n_passes, time.perf_counter()

        def add(**parts: Any) -> None:
            recording.add(Entry(call, key, self.n_passes - reads, time.perf_counter() - began, **parts))

        try:
            with recording.aside():
                found = ask()
        except OverflowError as error:
            # A solver rejects such a step and goes on.
            add(**enter(None), overflow=str(error))
            raise
        add(**enter(found))
        return found


def _twin(sampler: Any) -> Any:
    """Return a sampler that draws the same rows; the leverages are shared."""
    twin = copy(sampler)
    twin.rng = deepcopy(sampler.rng)
    return twin


def _drawn(sample: Any) -> Any:
    """Return drawn rows, drawn again where they are of an earlier run."""
    return sample.read().sample if isinstance(sample, Unread) else sample


def _parts(at: Evaluation) -> dict[str, NDArray[Any]]:
    """Return an evaluation as arrays that nobody else changes.

    Of one that holds more than arrays, such as all that passed through a layer, value and gradient must do:
    it is repeated.
    """
    arrays = {"value": np.array(at.value), "gradient": np.array(at.gradient)}
    if type(at) not in KINDS:
        return arrays
    for name in PARTS:
        if getattr(at, name, None) is not None:
            arrays[name] = np.array(getattr(at, name))
    if at.inner is not None:
        arrays["inner.x"] = np.array(at.inner.x)
        arrays |= {f"inner.{name}": array for name, array in _parts(at.inner).items()}
    return arrays


def _is_bare(entry: Entry) -> bool:
    return "state" not in entry.arrays


def _evaluation(entry: Entry, x: Array, sample: Drawn | None, prefix: str = "") -> Evaluation:
    """Return the evaluation that an entry holds."""

    def part(name: str, *shape: int) -> Array:
        return _part(entry, prefix + name, shape)

    d = len(x)
    shapes = {"gradient_at_zero": (d,), "hessian": (d, d)}
    given: dict[str, Any] = {
        name: _part(entry, prefix + name, shapes.get(name)) for name in PARTS if prefix + name in entry.arrays
    }
    if f"{prefix}inner.x" in entry.arrays:
        inner = _part(entry, f"{prefix}inner.x", None)
        given["inner"] = _evaluation(entry, inner, None, f"{prefix}inner.")
    kind = LayeredEvaluation if "column_values" in given else Evaluation
    return kind(x, float(part("value")), part("gradient", d), sample=sample, **given)


def _part(entry: Entry, name: str, shape: tuple[int, ...] | None) -> Array:
    """Return an array of an entry."""
    array = entry.arrays.get(name)
    if array is None or (shape is not None and array.shape != shape):
        raise CheckpointError(
            f"the checkpoint is malformed: {name} of {entry.call} is missing or has another shape than the "
            "fit's; pass resume=False to start afresh"
        )
    return array.copy()
