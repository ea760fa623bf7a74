"""Observations of a model that was run in fewer digits: how far they are from the run in float32."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attnfit.audit.calibration import BATCH, calibrate, calibration_path, calibration_texts
from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Layer, Model
from attnfit.audit.storage import kept
from attnfit.audit.target import Target

RUN = re.compile(r"run:([a-z0-9]+)(?:\+(.+))?")
DTYPES = ("bfloat16",)
# Of the true states, as many are within the limit.
WITHIN = 0.999


@dataclass(frozen=True, eq=False)
class RunError:
    """What a run in fewer digits differs by from one in float32, over texts in general.

    Attributes
    ----------
    dtype : str
    first, running : Tensor, shape (width,)
        Root mean square of the differences of each channel, at position 0 and later.
    limit : float
        The misfit, in units of these, that 99.9 % of all states stay below.
    """

    dtype: str
    first: Any
    running: Any
    limit: float

    def errors(self, count: int, start: int = 0) -> Any:
        """Return the standard deviation of each number of `count` positions from `start` on."""
        rows = self.running.expand(count, -1).clone()
        if start == 0:
            rows[0] = self.first
        return rows.numpy()


def split_run(defence: str | None) -> tuple[str | None, str | None]:
    """Return the precision of a run that a defence begins with, and the rest of it.

    Raises
    ------
    AuditError
        If there is no run in such a precision.
    """
    found = RUN.fullmatch(defence or "")
    if found is None:
        return None, defence
    if found[1] not in DTYPES:
        raise AuditError(f"defence 'run:{found[1]}' is not known; there is run:{', run:'.join(DTYPES)}")
    return found[1], found[2]


def run_error(model: Model, layer: Layer, dtype: str, random_state: int = 0) -> RunError:
    """Return what a run in fewer digits errs by at a layer: from disk, or measured.

    Over the texts of the calibration, each alone and several in a batch, as the kernels of both may differ.

    Parameters
    ----------
    model : Model
        A causal one.
    layer : int or str
    dtype : {"bfloat16"}
    random_state : int

    Raises
    ------
    AuditError
        If the model is an encoder, or cannot be run so here.
    """
    if model.kind != "causal":
        raise AuditError(f"run:{dtype} is measured for causal models; {model.name!r} is an encoder")
    path = kept(
        calibration_path(model, layer, random_state, f"-run-{dtype}"),
        partial(_measure, model, layer, dtype, random_state),
    )
    tensors = load_file(path / "errors.safetensors")
    return RunError(dtype, tensors["first"], tensors["running"], float(tensors["limit"]))


def _measure(model: Model, layer: Layer, dtype: str, seed: int, directory: Path) -> None:
    texts = calibration_texts(model, torch.Generator().manual_seed(seed))
    calibration, lower = calibrate(model, [layer], seed)[layer], model.in_dtype(dtype)
    exact, alone, batched = (
        _states(model, layer, texts, BATCH), _states(lower, layer, texts, 1),
        _states(lower, layer, texts, BATCH),
    )  # fmt: skip
    errors = torch.stack([alone - exact, batched - exact])
    sizes = {"first": errors[:, :, :1], "running": errors[:, :, 1:]}
    scales = {"first": calibration.first.scale, "running": calibration.running.scale}
    spread = {name: some.square().mean((0, 1, 2)).sqrt() for name, some in sizes.items()}
    limits = []
    for name, some in sizes.items():
        target = Target(torch.zeros_like(spread[name]), spread[name], scales[name])
        limits.append(torch.quantile(target.misfits(some.flatten(0, 2)).double(), WITHIN))
    save_file(spread | {"limit": torch.stack(limits).max()}, directory / "errors.safetensors")


def _states(model: Model, layer: Layer, texts: Any, size: int) -> Any:
    part = model.part(layer)
    with torch.no_grad():
        try:
            batches = [
                model.capture([part], "output", input_ids=some, use_cache=False)[0].float()
                for some in texts.split(size)
            ]
        except RuntimeError as error:
            dtype = next(model.module.parameters()).dtype
            raise AuditError(f"{model.name!r} cannot be run in {dtype} on this machine: {error}") from error
    return torch.cat(batches)


def as_error(model: Model, layer: Layer, error: Any, count: int) -> tuple[Any, RunError | None]:
    """Return standard deviations for `count` positions, and of which run they are where ``error`` says so."""
    if not isinstance(error, str):
        return error, None
    dtype, rest = split_run(error)
    if dtype is None or rest is not None:
        raise AuditError(f"error must be numbers or 'run:bfloat16', not {error!r}")
    run = run_error(model, layer, dtype)
    return run.errors(count), run
