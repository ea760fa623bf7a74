"""All heads of a model side by side: how wide they are, how far they look, how well a fit predicts them."""

from __future__ import annotations

import html
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.heads.observe import look
from attnfit.heads.seen import Observation
from attnfit.heads.weights import UnknownHead
from attnfit.segments import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distances of the profile: from each of these to before the next.
DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64)
# The directions that make up this share of the squared logits count.
ENERGY = 0.99
NAN = float("nan")
COLUMNS = ("layer", "head", "width", "rank", "held_out_error", "mean_distance", "sink_share", "note")
PANELS = (("held_out_error", "held-out error"), ("rank", "rank"), ("mean_distance", "mean distance"),
          ("sink_share", "share of the first token"))  # fmt: skip


@dataclass(frozen=True)
class HeadRow:
    """One head of a survey; numbers are NaN where the head was not understood, ``note`` says why.

    Attributes
    ----------
    layer, head, width : int
    rank : float
        Directions of queries and keys that make up 99 % of the squared logits, positions aside.
    held_out_error : float
        ``||F - B||_F / ||B||_F`` on the last text of a fit to the others; NaN without one.
    mean_distance : float
        Mean distance of a query from the keys it attends to, by their shares; in bidirectional models
        without its sign.
    sink_share : float
        Mean share of the first token over the queries after it, and of a sink where the head has one.
    profile : tuple of float
        Share of the distances 0, 1, 2-3, 4-7, 8-15, 16-31, 32-63, and 64 and more.
    note : str
    """

    layer: int
    head: int
    width: int
    rank: float
    held_out_error: float
    mean_distance: float
    sink_share: float
    profile: tuple[float, ...]
    note: str = ""


@dataclass(frozen=True)
class Survey:
    """What `survey` returns: a row a head. Prints as a table, and shows as one in notebooks.

    Attributes
    ----------
    rows : tuple of HeadRow
    """

    rows: tuple[HeadRow, ...]

    def to_dict(self) -> dict[str, list[Any]]:
        """Return one list a column; those of the distance profile are ``distance_0``, ``distance_1``, ..."""
        out: dict[str, list[Any]] = {name: [getattr(row, name) for row in self.rows] for name in COLUMNS}
        note = out.pop("note")
        for k, first in enumerate(DISTANCES):
            out[f"distance_{first}"] = [row.profile[k] for row in self.rows]
        return out | {"note": note}

    def to_frame(self) -> Any:
        """Return a pandas data frame, a row a head.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        import pandas as pd

        return pd.DataFrame(self.to_dict())

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        head, *body = self._cells()
        lines = [head, ["---"] * len(head), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def picture(self) -> Figure:
        """Draw layers by heads: held-out error, rank, mean distance and share of the first token.

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib (extra ``plot``).
        """
        from attnfit.plots.heads import head_survey

        return head_survey(self.to_dict(), PANELS)

    def _cells(self) -> list[list[str]]:
        profile = [f"{first}" for first in DISTANCES]
        out = [["layer", "head", "rank", "held out", "distance", "first", *profile]]
        for row in self.rows:
            shares = [f"{share:.2f}" for share in row.profile]
            width = f"{row.rank:.0f} of {row.width}" if np.isfinite(row.rank) else "not understood"
            out.append(
                [str(row.layer), str(row.head), width, f"{row.held_out_error:.1e}",
                 f"{row.mean_distance:.1f}", f"{row.sink_share:.2f}", *shares]
            )  # fmt: skip
        return out

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
        )

    def _repr_html_(self) -> str:
        head, *body = self._cells()

        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        return "<table>" + line(head, "th") + "".join(line(cells, "td") for cells in body) + "</table>"


def survey(
    model: Any,
    texts: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokenizer: Any = None,
    max_length: int | None = 256,
    max_iter: int = 5,
    random_state: Any = 0,
) -> Survey:
    """Look at every head of a model on some texts.

    Parameters
    ----------
    model, texts, tokenizer, max_length
        As in `observe`. The last text is held out; of one text no error is known.
    layers, heads : sequence of int, optional
        Those to look at; all by default.
    max_iter : int
        Steps of the fit of each head, from one start: a few tell heads apart that a bilinear form with these
        positions predicts easily. None, and no error, with 0: a fit of a wide head takes minutes.
    random_state : int, optional

    Returns
    -------
    Survey
        ``.to_frame()``, ``.to_markdown()``, ``.picture()``. Heads that are not understood have a note.

    Raises
    ------
    ValueError
        As `observe`, if there is no such layer or head, or no tokenizer.

    Examples
    --------
    >>> from attnfit import audit, heads
    >>> tiny = audit.load("tiny")
    >>> table = heads.survey(tiny, tiny.private_texts[:3], max_iter=0)
    >>> len(table.rows) == tiny.n_layers * 4, round(sum(table.rows[0].profile), 6)
    (True, 1.0)
    """
    looked = look(model, texts, tokenizer=tokenizer, max_length=max_length, layers=layers)
    wanted = sorted(looked.inputs[0])
    numbers = range(looked.n_heads) if heads is None else heads
    rows = []
    for layer in wanted:
        for head in numbers:
            try:
                seen = looked.head(layer, head)
            except UnknownHead as unknown:
                try:
                    # Norms over all heads together are left out of the fit.
                    seen = looked.head(layer, head, inner=True)
                except UnknownHead:
                    nothing = (NAN,) * len(DISTANCES)
                    rows.append(HeadRow(layer, head, 0, NAN, NAN, NAN, NAN, nothing, str(unknown)))
                    continue
            rows.append(describe(seen, max_iter, random_state))
    return Survey(tuple(rows))


def describe(seen: Observation, max_iter: int, random_state: Any) -> HeadRow:
    """Return the row of one head."""
    error = float("nan")
    if max_iter > 0 and len(seen) > 1:
        with warnings.catch_warnings():
            # A few steps do not converge, and short texts have few pairs: the error says what came of it.
            warnings.simplefilter("ignore")
            model = seen[:-1].regressor(max_iter=max_iter, n_starts=1, random_state=random_state)
            model.fit(*seen[:-1].fit_args())
            error = model.relative_error(*seen[-1:].fit_args())
    profile, distance, first = looks(seen)
    return HeadRow(seen.layer, seen.head, seen.rank, effective_rank(seen), error, distance, first, profile)


def looks(seen: Observation) -> tuple[tuple[float, ...], float, float]:
    """Return the shares of distances, their mean, and the share of the first token and the sink."""
    shares, distance, first, n, n_later = np.zeros(len(DISTANCES)), 0.0, 0.0, 0.0, 0
    for B in seen.maps:
        b = np.asarray(B, dtype=np.float64)
        rows, columns = np.indices(b.shape)
        D = np.abs(rows - columns)
        where = np.searchsorted(DISTANCES, D, side="right") - 1
        shares += np.bincount(where.reshape(-1), weights=b.reshape(-1), minlength=len(DISTANCES))
        distance += float(np.sum(D * b))
        n += float(b.sum())
        first += float(np.sum(b[1:, 0] + (1.0 - b[1:].sum(axis=1) if seen.sink else 0.0)))
        n_later += len(b) - 1
    return tuple(float(s) for s in shares / n), distance / n, first / max(n_later, 1)


def effective_rank(seen: Observation) -> float:
    """Return the number of directions that make up 99 % of the squares of ``q_t . k_s``, keys centred, with
    queries and keys before they are turned.
    """
    problem = seen.problem()
    left, right = problem.vectors(problem.parts(seen.true_point(problem)))
    q = np.concatenate([v.unit * v.gains if v.normed else v.unit for v in left])
    k = np.concatenate([v.unit * v.gains if v.normed else v.unit for v in right])
    R_q, R_k = (np.asarray(np.linalg.qr(v, mode="r")) for v in (q, k - k.mean(axis=0)))
    sizes: Array = np.linalg.svd(R_q @ R_k.T)[1]
    energy = np.cumsum(sizes**2) / max(float(np.sum(sizes**2)), np.finfo(np.float64).tiny)
    return float(np.searchsorted(energy, ENERGY) + 1)
