"""Three real data sets with the answers that other software gives for them.

They ship with the package, so every example runs offline and can be compared with numbers from elsewhere.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.softmax import LossName

__all__ = ["Dataset", "Reference", "load_austrian_flows", "load_car_shares", "load_travel_mode"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Reference:
    """The answer of other software for one loss.

    Attributes
    ----------
    coefficients : ndarray of shape (n_features,)
        The fitted coefficients; NaN where the source has none or the data do not determine one.
    source : str
        Which software or publication the numbers come from.
    squared_error : float or None
        ``sum((f - b)**2)`` over all rows, unweighted. It has no factor 0.5, so it is twice the value of
        ``problems.Softmax(loss="squared")``.
    log_likelihood : float or None
        ``sum(weights * b * log(f))`` over all rows.
    standard_errors : ndarray of shape (n_features,) or None
        Standard errors of the coefficients, NaN where `coefficients` is.
    """

    coefficients: FloatArray
    source: str
    squared_error: float | None = None
    log_likelihood: float | None = None
    standard_errors: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A grouped softmax problem: ``b`` is modelled as ``softmax(A x)`` within each group.

    Attributes
    ----------
    name : str
        Short title.
    A : ndarray of shape (n, d)
        One row per alternative.
    b : ndarray of shape (n,)
        Observed shares or choices; they sum to one in each group.
    groups : ndarray of shape (n,)
        Label of the group each row belongs to, from 0; rows of one group are contiguous.
    weights : ndarray of shape (n,) or None
        Row weights to give to the cross entropy. The squared references are unweighted.
    feature_names : tuple of str
        Names of the columns of `A`.
    description, source, licence : str
        What the data are, where they come from and on what terms.
    references : mapping of str to Reference
        Published answers, by the name of the loss.
    """

    name: str
    A: FloatArray
    b: FloatArray
    groups: IntArray
    weights: FloatArray | None
    feature_names: tuple[str, ...]
    description: str
    source: str
    licence: str
    references: Mapping[LossName, Reference]


def load_car_shares() -> Dataset:
    """Load the market shares of cars of Berry, Levinsohn and Pakes (1995).

    2,217 car-years in 20 yearly markets (group 0 is 1971, group 19 is 1990). The last row of each market is
    the outside good: all features zero, share one minus the sum of the others.

    Returns
    -------
    Dataset
        2,237 rows, 6 features, 20 groups.

    Notes
    -----
    The usual baseline, ordinary least squares on ``log(share) - log(outside share)``, gives -10.0716,
    -0.1243, -0.0343, 0.2650, 2.3421, -0.0886 with a squared share error of 0.033444. Nearly all of the
    difference lies in the outside good, and none of these fits treats prices as endogenous.
    """
    table = _read("car_shares.csv")
    names = ("const", "hpwt", "air", "mpd", "space", "prices")
    share, year = _floats(table["share"]), np.array(table["year"], dtype=np.int64)
    market = year - year.min()
    n_markets = int(market.max()) + 1
    cars = np.column_stack([np.ones(len(share)), *(_floats(table[name]) for name in names[1:])])

    groups = np.concatenate([market, np.arange(n_markets)])
    order = np.argsort(groups, kind="stable")
    return Dataset(
        name="US car market shares, 1971-1990",
        A=np.vstack([cars, np.zeros((n_markets, len(names)))])[order],
        b=np.concatenate([share, 1.0 - np.bincount(market, weights=share)])[order],
        groups=groups[order],
        weights=None,
        feature_names=names,
        description="Share of a year's households that bought each car, and of those that bought none.",
        source="Berry, Levinsohn and Pakes (1995), Econometrica 63, 841-890; from pyblp 1.3.0",
        licence="MIT",
        references={
            "cross_entropy": Reference(
                np.array([-8.148206, -0.190869, 0.181392, 0.140203, 1.790482, -0.137495]),
                source="statsmodels 0.15.0, Poisson GLM with market dummies",
                squared_error=0.0037557,
            ),
            "squared": Reference(
                np.array([-7.747011, -0.222377, -0.093097, 0.213931, 1.760056, -0.196653]),
                source="scipy 1.17.1, the same answer from several starts",
                squared_error=0.003538921,
            ),
        },
    )


def load_austrian_flows(dummies: bool = False) -> Dataset:
    """Load the migration flows between the nine regions of Austria.

    Each origin is a group of eight destinations: no flow stays at home. `weights` is the outflow of the
    origin, which makes the cross entropy on shares equal to a Poisson model of the counts.

    Parameters
    ----------
    dummies : bool, default=False
        Add a column for every destination but the first. ``log_mass`` is then a combination of these up to
        a constant, so only the coefficient of the distance is determined.

    Returns
    -------
    Dataset
        72 rows, 2 features (10 with `dummies`), 9 groups.
    """
    table = _read("austrian_flows.csv")
    regions, origin = np.unique(table["origin"], return_inverse=True)
    flow = _floats(table["flow"])
    outflow = np.bincount(origin, weights=flow).astype(np.float64)[origin]
    A = np.column_stack([np.log(_floats(table["destination_mass"])), _floats(table["distance"])])
    names: tuple[str, ...] = ("log_mass", "distance")
    references: dict[LossName, Reference] = {
        "cross_entropy": Reference(
            np.array([0.89278717, -0.00727113]),
            source="spint 1.0.7, production-constrained gravity model",
            standard_errors=np.array([0.004669, 5.266e-05]),
        ),
        "squared": Reference(
            np.array([0.878853, -0.007652]),
            source="scipy 1.17.1, every origin with the same weight",
            squared_error=0.327418,
        ),
    }
    if dummies:
        destination = np.array(table["destination"])
        A = np.column_stack([A, destination[:, None] == regions[None, 1:]])
        names += tuple(f"to_{region}" for region in regions[1:])
        references = {
            "cross_entropy": Reference(
                _known(len(names), {1: -0.00791533}),
                source="spint 1.0.7, doubly constrained gravity model",
                standard_errors=_known(len(names), {1: 5.062e-05}),
            ),
            "squared": Reference(
                _known(len(names), {1: -0.0077034}),
                source="scipy 1.17.1, every origin with the same weight",
                squared_error=0.186648,
            ),
        }
    return Dataset(
        name="Migration between Austrian regions",
        A=A,
        b=flow / outflow,
        groups=origin.astype(np.int64),
        weights=outflow,
        feature_names=names,
        description="Share of the people leaving a region who went to each other region.",
        source="Dennett (2012), CASA Working Paper 181, University College London; from spint 1.0.7",
        licence="BSD-3-Clause",
        references=references,
    )


def load_travel_mode() -> Dataset:
    """Load the travel mode choices of Greene and Hensher (1997).

    210 travellers chose one of air, train, bus and car, in this order; car is the base of the mode constants.

    Returns
    -------
    Dataset
        840 rows, 6 features, 210 groups.

    Notes
    -----
    Use the cross entropy. On one-hot choices the squared loss is the Brier score, whose best fit here is
    nearly a step function: it drives the constants and ``ttme`` off along a flat valley, and only the value
    and the other two coefficients are determined. Squared loss is for shares.
    """
    table = _read("travel_mode.csv")
    mode, air = _floats(table["mode"]), np.array(table["mode"]) == "1"
    names = ("air", "train", "bus", "gc", "ttme", "air_hinc")
    constants = [mode == code for code in (1, 2, 3)]
    gc, ttme, hinc = (_floats(table[name]) for name in ("gc", "ttme", "hinc"))
    return Dataset(
        name="Travel mode choice",
        A=np.column_stack([*constants, gc, ttme, air * hinc]).astype(np.float64),
        b=_floats(table["choice"]),
        groups=np.array(table["traveller"], dtype=np.int64) - 1,
        weights=None,
        feature_names=names,
        description="Which of four modes each traveller chose between Sydney, Canberra and Melbourne.",
        source="Greene and Hensher (1997), Greene (2011) table F18-2; from statsmodels 0.15.0",
        licence="public domain",
        references={
            "cross_entropy": Reference(
                np.array([5.207443, 3.869043, 3.163194, -0.0155015, -0.0961248, 0.013287]),
                source="Stata, conditional logit (published output)",
                squared_error=94.431,
                log_likelihood=-199.12837,
                standard_errors=np.array([0.7790551, 0.4431269, 0.4502659, 0.004408, 0.0104398, 0.0102624]),
            ),
            "squared": Reference(
                _known(len(names), {3: -0.012981, 5: -0.179268}),
                source="scipy 1.17.1, two starts agree where a number is given",
                squared_error=70.547,
            ),
        },
    )


def _read(filename: str) -> dict[str, list[str]]:
    header, *rows = csv.reader((files(__name__) / filename).read_text(encoding="utf-8").splitlines())
    return {name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}


def _floats(column: list[str]) -> FloatArray:
    return np.array(column, dtype=np.float64)


def _known(size: int, values: Mapping[int, float]) -> FloatArray:
    full = np.full(size, np.nan)
    full[list(values)] = list(values.values())
    return full
