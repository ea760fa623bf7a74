"""Every form of access, every defence, every text, within a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any

from attnfit.audit.access import Access
from attnfit.audit.breakpoints import Forecast, forecast
from attnfit.audit.calibration import calibrate
from attnfit.audit.cells import NONE, Attack, Cell, Key
from attnfit.audit.checkpoint import Checkpoint
from attnfit.audit.engine.prefix import way_for
from attnfit.audit.errors import Unsupported
from attnfit.audit.forms import parse_access
from attnfit.audit.lower_precision import run_error, split_run
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.models.texts import Text
from attnfit.audit.report import Report
from attnfit.audit.settings import Settings, check_request, identity, tokenise_all

# Texts for which there are controls too, per form of access.
N_CONTROLS = 2
# The largest part of the time left that one cell may take.
LARGEST_PART = 1 / 4


@dataclass(frozen=True)
class Step:
    """How far an audit is.

    Attributes
    ----------
    done, total : int
        Cells.
    seconds_left : float
        Until the last cell at the pace so far, and at most what the budget leaves.
    now : str
        What is being done.
    """

    done: int
    total: int
    seconds_left: float
    now: str


def run(
    model: Model,
    texts: Sequence[Text],
    access: Sequence[str | Access] | None = None,
    defences: Sequence[str | None] = (None,),
    budget: float = 120.0,
    *,
    checkpoint: str | PathLike[str] | None = None,
    progress: Callable[[Step], None] | None = None,
    random_state: int = 0,
    first_position: int = 0,
    client: Any = None,
) -> Report:
    """Audit a model: invert what it gives away about some texts, under every form of access and defence.

    Every text is taken in turn under all combinations, so that a short budget shortens the list of texts
    first. The undefended output is always measured, to compare with. For the first texts each form of access
    also inverts another text and noise: claims to have recovered something then count as false.

    Parameters
    ----------
    model : Model
    texts : sequence of str, of lists of token ids or of lists of messages
        What the model is run on: texts like those to be protected. Messages have "role" and "content"; of a
        chat, shares are those of the contents, as the template is no secret.
    access : sequence of str, optional
        As in `attnfit.audit.observe`, and ``"masked"``: the first two tokens of each text are hidden, and
        guessed from how likely the model finds the rest after them. No defence of outputs changes that, so
        it is run once, and not of chats, which begin with their template. Unless given: states of the first,
        middle and last layer, the first attention, logits, five log-probabilities and masked; for encoders
        the first attention.
    defences : sequence of str or None
        As in `attnfit.audit.observe`.
    budget : float
        Wall time in seconds for everything but the calibration of layers, which is kept on disk. An inversion
        that takes longer than its part is cut short, and what was not reached is said.
    checkpoint : path, optional
        Cells are kept here as they are done; the same audit resumes from it.
    progress : callable, optional
        Called with a Step before each cell.
    random_state : int
    first_position : int
        Position of the first token of every text, for models that count them (see `observe`).
    client : distributed.Client, optional
        The cells of a text run on its workers, each of which gets the model once.

    Returns
    -------
    Report
        Also after KeyboardInterrupt, with what was done until then.

    Raises
    ------
    NoRoundTrip
        If the tokenizer can represent none of the texts; some of them count as errors.
    AuditError
        If the budget is not positive, an access or a defence is not known or not available from this model,
        or the checkpoint belongs to another audit.
    """
    began = perf_counter()
    keys = any(parse_access(form).counts_positions for form in access or ())
    model = model.at(first_position, keys=keys)
    settings = check_request(model, texts, access, defences, budget, random_state, first_position)
    truths, faults = tokenise_all(model, settings.texts)
    kept = Checkpoint(None if checkpoint is None else Path(checkpoint), identity(model, settings))
    audit = _Run(model, settings, truths, kept, progress, began, client)
    audit.refuse(faults)
    interrupted = audit.all_cells()
    return Report.of(model, settings, truths, audit.cells, audit.forecasts, audit.n_planned, interrupted,
                     perf_counter() - began)  # fmt: skip


class _Run:
    """The state of one audit while it runs."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        truths: list[Tokens],
        kept: Checkpoint,
        progress: Callable[[Step], None] | None,
        began: float,
        client: Any,
    ) -> None:
        self._model, self._settings, self._kept = model, settings, kept
        self._truths, self._progress = truths, progress
        self._end = began + settings.budget
        self._client, self._there = client, None
        self._attack = Attack(model, settings.texts, truths, settings.random_state)
        self._rounds = _plan(settings)
        self._started = perf_counter()
        self._n_run = 0
        self.n_planned = sum(map(len, self._rounds))
        self.cells = dict(kept.cells)
        # Seconds in which an inversion of a form of access did not come to its end: others would not either.
        self._too_short: dict[str, float] = {}
        self.forecasts: dict[str, Forecast] = {}

    def refuse(self, faults: Mapping[int, str]) -> None:
        """Settle the cells of texts that cannot be run, by what is wrong with these."""
        for text, fault in faults.items():
            for key in self._rounds[text]:
                self.cells.setdefault(key, Cell(key, "error", fault, 0, [], []))

    def all_cells(self) -> bool:
        """Run what fits into the budget; return whether it was interrupted."""
        try:
            self._tell("calibrating")
            self._calibrate()
            # Once per model and layer, and kept: a short budget should not be spent on it each time.
            self._started = perf_counter()
            self._end = self._started + self._settings.budget
            self._tell("predicting break-points")
            self._forecast()
            run = self._round if self._client is None else self._round_on_workers
            for keys in self._rounds:
                run([key for key in keys if key not in self.cells])
        except KeyboardInterrupt:
            return True
        self._tell("done")
        return False

    def _round(self, keys: list[Key]) -> None:
        for place, key in enumerate(keys):
            left = self._end - perf_counter()
            if left <= 0:
                return
            self._tell(f"{key.access}, {key.defence}")
            # Each has its part; a slow one may take more, as long as the others still have theirs.
            seconds = left * max(1 / (len(keys) - place), LARGEST_PART)
            if seconds < self._too_short.get(key.access, 0.0):
                continue
            self._keep(self._attack.run(key, seconds), seconds)

    def _round_on_workers(self, keys: list[Key]) -> None:
        """Run the cells of a text at the same time, as many as there are workers."""
        from distributed import as_completed

        if self._there is None:
            self._there = self._client.scatter(self._attack, broadcast=True)
        left = self._end - perf_counter()
        share = max(sum(self._client.nthreads().values()) / max(1, len(keys)), LARGEST_PART)
        seconds = left * min(1.0, share)
        running = [
            self._client.submit(_run_cell, self._there, key, seconds, pure=False)
            for key in keys
            if seconds > 0 and seconds >= self._too_short.get(key.access, 0.0)
        ]
        try:
            for future in as_completed(running):
                cell = future.result()
                self._keep(cell, seconds)
                self._tell(f"{cell.key.access}, {cell.key.defence}")
                if perf_counter() > self._end:
                    return
        finally:
            self._client.cancel(running)

    def _keep(self, cell: Cell, seconds: float) -> None:
        """Keep a cell that was given so many seconds."""
        self.cells[cell.key] = cell
        if cell.status == "cut":
            self._too_short[cell.key.access] = seconds
        self._kept.add(cell)
        self._n_run += 1

    def _calibrate(self) -> None:
        model = self._model
        if model.kind != "causal":
            return
        seen = [form for form in map(parse_access, self._settings.access) if self._supported(form)]
        calibrate(model, list(dict.fromkeys(form.layer(model) for form in seen if form.probed)))
        for form in seen:
            form.prepare(model)
        for dtype in {dtype for defence in self._settings.defences if (dtype := split_run(defence)[0])}:
            for layer in dict.fromkeys(form.run_layer(model) for form in seen):
                # Where nothing is measured the cells say so.
                if layer is not None:
                    run_error(model, layer, dtype)

    def _supported(self, form: Access) -> bool:
        """Return whether candidates can be evaluated; where not, every cell says so itself."""
        try:
            way_for(self._model, form.layer(self._model))
        except Unsupported:
            return False
        return True

    def _forecast(self) -> None:
        """Predict what defences should do; a twentieth of the budget is enough for that."""
        for form in self._settings.access:
            seconds = self._settings.budget / 20 / len(self._settings.access)
            known = parse_access(form)
            if known.forecasts and (self._model.kind == "encoder" or self._supported(known)):
                self.forecasts[form] = forecast(
                    self._model, [tokens for tokens in self._truths if tokens], form,
                    self._settings.defences, seconds, self._settings.random_state,
                )  # fmt: skip

    def _tell(self, now: str) -> None:
        if self._progress is not None:
            passed, budget = perf_counter() - self._started, max(0.0, self._end - perf_counter())
            missing = self.n_planned - len(self.cells)
            pace = passed / self._n_run * missing if self._n_run else budget
            self._progress(Step(len(self.cells), self.n_planned, min(pace, budget), now))


def _run_cell(attack: Attack, key: Key, seconds: float) -> Cell:
    return attack.run(key, seconds)


def _plan(settings: Settings) -> list[list[Key]]:
    """Return the cells of each text; controls follow the first texts."""
    rounds = []
    for text in range(len(settings.texts)):
        keys = [
            Key(form, defence, text)
            for defence in settings.defences
            for form in settings.access
            if parse_access(form).observed or defence == NONE
        ]
        if text < N_CONTROLS:
            keys += [
                Key(form, NONE, text, control)
                for form in settings.access
                for control in ("other text", "noise")
                if parse_access(form).observed
            ]
        rounds.append(keys)
    return rounds
