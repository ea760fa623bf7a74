"""How well a model fits: likelihoods, information criteria, hits, proper scores, deviances."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy import sparse

from attnfit.inference import tables
from attnfit.inference.fitted import Fitted
from attnfit.losses.elementwise import PoissonDeviance, SquaredExponential
from attnfit.losses.softmax import CrossEntropy
from attnfit.objectives.part import Part
from attnfit.segments import Array, Chunk, Index


@dataclass(frozen=True)
class FitStatistics:
    """What applies to a model; the rest is None, and `notes` says why.

    Attributes
    ----------
    log_likelihood : float
        ``sum w y log f`` without the multinomial coefficient; Poisson ``sum w (y z - u - log gamma(y + 1))``.
    log_likelihood_null, log_likelihood_constants : float
        At zero coefficients with the offset kept (Poisson: the constant alone), and with alternative
        constants alone.
    rho2, rho2_adjusted, rho2_constants : float
        ``1 - L/L0``, ``1 - (L - K)/L0`` and ``1 - L/Lc``.
    aic, bic : float
        ``-2 L + 2 K`` and ``-2 L + K log N``: K the rank, or ``tr(B H)`` with a penalty, and N the number of
        choices, of rows for Poisson.
    hit_rate : float
        Share of groups whose chosen row has the largest share; q-fold ties count 1/q.
    log_loss, brier : float
        ``-sum w y log f / sum w y`` and ``sum w (f - y)^2 / sum of group weights``.
    deviance, null_deviance, pseudo_r2 : float
        Poisson ``2 sum w (y log(y/u) - y + u)``, that of the constant, ``1 - L/L0``; least squares: residual
        and total sum of squares, and one less their ratio.
    residual_scale : float
        Least squares: ``sqrt(deviance / (n - rank))``.
    n_parameters, n_observations : float
        K and N.
    """

    log_likelihood: float | None = None
    log_likelihood_null: float | None = None
    log_likelihood_constants: float | None = None
    rho2: float | None = None
    rho2_adjusted: float | None = None
    rho2_constants: float | None = None
    aic: float | None = None
    bic: float | None = None
    hit_rate: float | None = None
    log_loss: float | None = None
    brier: float | None = None
    deviance: float | None = None
    null_deviance: float | None = None
    pseudo_r2: float | None = None
    residual_scale: float | None = None
    n_parameters: float | None = None
    n_observations: float | None = None
    notes: tuple[str, ...] = ()

    def values(self) -> dict[str, float | None]:
        """Return all fields but the notes by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "notes"}

    def to_frame(self) -> Any:
        """Return a data frame with one row a statistic."""
        known = {name: value for name, value in self.values().items() if value is not None}
        return tables.to_frame({"statistic": list(known), "value": list(known.values())})

    def describe(self) -> list[str]:
        """Return lines for a report."""
        shown = {
            "log likelihood at zero": self.log_likelihood_null,
            "rho2": self.rho2,
            "AIC": self.aic,
            "BIC": self.bic,
            "hit rate": self.hit_rate,
            "log loss": self.log_loss,
            "Brier score": self.brier,
            "deviance": self.deviance,
            "pseudo r2": self.pseudo_r2,
        }
        told = ", ".join(f"{name} {value:.6g}" for name, value in shown.items() if value is not None)
        return [told] if told else []


def statistics_of(fitted: Fitted, alternatives: Any = None) -> FitStatistics:
    """Return the statistics of a fit."""
    loss, facts = fitted.problem.loss, fitted.facts
    k = fitted.bread.effective_parameters if fitted.penalised else float(fitted.bread.rank)
    k += fitted.n_effects
    totals = fitted.usual().totals
    if not loss.coupled:
        return _of_outcomes(fitted, k, totals)
    notes = []
    found: dict[str, float | None] = {"n_parameters": k, "n_observations": facts["mass"]}
    if loss.logarithmic:
        found["log_loss"] = totals["log_loss"] / facts["mass"] if facts["mass"] else None
        # Repeated rows of one group are still one group.
        found["brier"] = totals["brier"] / facts["n_all_copies" if fitted.counts is None else "n_all_groups"]
    else:
        notes.append("log loss and Brier score are those of a softmax")
    if facts.choices and loss.logarithmic and fitted.counts is None:
        facts_long = fitted.usual().long_facts
        weights = fitted.usual().long_weights
        hits = totals.get("hits", 0.0)
        if len(weights):
            mean = weights[:, 0] / np.maximum(weights[:, 1], 1.0) if weights.any() else np.ones(len(weights))
            hits += float(np.sum(facts_long.hits() * mean))
        found["hit_rate"] = hits / facts["n_copies"]
    integers = facts["n_fractional" if fitted.weight_type == "frequency" else "n_fractional_y"] == 0
    if not isinstance(loss, CrossEntropy):
        notes.append("no likelihood: the loss is not cross entropy or kl")
    elif not integers:
        notes.append("no likelihood: y are shares, not choices or counts")
    else:
        found |= _likelihoods(fitted, -totals["log_loss"], k, alternatives, notes)
    return _statistics(found, notes)


def _statistics(found: dict[str, float | None], notes: list[str]) -> FitStatistics:
    known = {name: float(value) for name, value in found.items() if value is not None and value == value}
    return FitStatistics(**known, notes=tuple(notes))


def _likelihoods(
    fitted: Fitted, value: float, k: float, alternatives: Any, notes: list[str]
) -> dict[str, float | None]:
    facts = fitted.facts
    null, n = facts["null"], facts["mass"]
    found: dict[str, float | None] = {"log_likelihood": value, "log_likelihood_null": null}
    if null:
        found |= {"rho2": 1.0 - value / null, "rho2_adjusted": 1.0 - (value - k) / null}
    if facts.weighted and fitted.weight_type == "sampling":
        notes.append("no AIC, BIC: sampling weights")
    elif not n:
        notes.append("no AIC, BIC: all y are zero")
    else:
        found |= {"aic": -2.0 * value + 2.0 * k, "bic": -2.0 * value + k * np.log(n)}
    if alternatives is not None:
        if not fitted.given.rows.is_whole:
            notes.append("no likelihood of constants: the data are on a cluster")
        else:
            constants = _constants(fitted, alternatives)
            found |= {"log_likelihood_constants": constants, "rho2_constants": 1.0 - value / constants}
    return found


def _constants(fitted: Fitted, alternatives: Any) -> float:
    """Return the log likelihood of alternative constants alone."""
    from attnfit.problems import Softmax
    from attnfit.solvers import minimize

    problem = fitted.given
    n = problem.n_rows
    codes = design_labels(fitted, alternatives)
    b, w, groups = user_columns(problem)
    labels, numbers = np.unique(codes, return_inverse=True)
    sizes = np.bincount(groups)
    equal = problem.offset is None and (sizes == len(labels)).all()
    if equal and (np.bincount(groups * len(labels) + numbers) == 1).all():
        mass = np.bincount(numbers, weights=b if w is None else w * b)
        return float(np.sum(mass[mass > 0] * np.log(mass[mass > 0] / mass.sum())))
    dummies = sparse.csr_array((np.ones(n), (np.arange(n), numbers)), shape=(n, len(labels)))[:, 1:]
    offset = None if problem.offset is None else problem.groups.unsort(np.asarray(problem.offset[0:n]))
    small = Softmax(dummies, b, groups, loss="cross_entropy", weights=w, offset=offset)
    return -float(minimize(small, separation="drop").value)


def user_columns(problem: Any) -> tuple[Array, Array | None, Index]:
    """Return target, weights and numbers of groups of the rows of the design, in the user's order."""
    n, unsort = problem.n_rows, problem.groups.unsort
    b = unsort(np.asarray(problem.b[0:n]))
    w = None if problem.weights is None else unsort(np.asarray(problem.weights[0:n]))
    numbers = np.repeat(np.arange(len(problem.groups)), np.diff(problem.groups.starts, append=n))
    return b, w, unsort(numbers)


def design_labels(fitted: Fitted, labels: Any) -> Any:
    """Return one label a row of the design: those of the user's rows that count, and "outside" for outside
    goods.
    """
    array = np.asarray(labels)
    n = fitted.given.n_rows - fitted.n_outside if fitted.kept is None else len(fitted.kept)
    if array.shape != (n,):
        raise ValueError(f"alternatives has shape {array.shape} but X has {n} rows; pass one label a row")
    array = array if fitted.kept is None else array[fitted.kept]
    return (
        np.concatenate([array.astype(object), np.full(fitted.n_outside, "outside")])
        if fitted.n_outside
        else array
    )


def _of_outcomes(fitted: Fitted, k: float, totals: dict[str, float]) -> FitStatistics:
    loss, facts = fitted.problem.loss, fitted.facts
    n = facts["w"] if fitted.weight_type == "frequency" else facts["rows"]
    found: dict[str, float | None] = {"n_parameters": k, "n_observations": n}
    notes = []
    if isinstance(loss, SquaredExponential):
        total = facts["wyy"] - facts["wy"] ** 2 / facts["w"]
        rss = totals["brier"]
        found |= {"deviance": rss, "null_deviance": total, "pseudo_r2": 1.0 - rss / total if total else None}
        found["residual_scale"] = float(np.sqrt(rss / (n - k))) if n > k else None
        notes.append("no likelihood: least squares")
    elif isinstance(loss, PoissonDeviance):
        saturated = facts["ylogy"] - facts["wy"]
        level = np.log(facts["wy"] / facts["wo"]) if facts["wy"] > 0 else 0.0
        constant = level * facts["wy"] + facts["wyo"] - facts["wy"]
        deviance, null = totals["deviance"], 2.0 * (saturated - constant)
        found |= {"deviance": deviance, "null_deviance": null}
        if facts["n_fractional" if fitted.weight_type == "frequency" else "n_fractional_y"]:
            notes.append("no likelihood: y are not counts")
        else:
            value, at_null = saturated - 0.5 * deviance - facts["gamma"], constant - facts["gamma"]
            found |= {
                "log_likelihood": value,
                "log_likelihood_null": at_null,
                "pseudo_r2": 1.0 - value / at_null,
            }
            if facts.weighted and fitted.weight_type == "sampling":
                notes.append("no AIC, BIC: sampling weights")
            else:
                found |= {"aic": -2.0 * value + 2.0 * k, "bic": -2.0 * value + k * np.log(n)}
    return _statistics(found, notes)


def checksums(fitted: Fitted) -> dict[str, str]:
    """Return a checksum of targets, weights, offset and groups: equal where two fits saw the same."""
    found = fitted.given.rows.collect(_digests)
    return {name: "-".join(part[name] for part in found) for name in found[0]}


def _digests(part: Part, chunks: list[Chunk]) -> dict[str, str]:
    n = part.n_rows
    digests = {name: hashlib.sha256() for name in ("y", "weights", "offset", "groups")}
    step = 1 << 20
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        for name, column in (("y", part.b), ("weights", part.weights), ("offset", part.offset)):
            if column is not None:
                digests[name].update(np.ascontiguousarray(column[rows]).tobytes())
    digests["groups"].update(part.groups.starts.tobytes() if part.loss.coupled else b"")
    digests["groups"].update(str(n).encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}
