"""A small model of the GPT-2 architecture that has memorised private sentences, part of the package."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from attnfit.audit.models.directory import load_directory
from attnfit.audit.models.model import Model
from attnfit.audit.storage import cache_directory, kept

SEED = 0
# What `attnfit.audit.models.train_tiny` wrote for that seed.
SHIPPED = Path(__file__).with_name("tiny_weights")
# Changes when a model in the cache would no longer be the one trained here.
VERSION = 1


def load_tiny(seed: int = SEED) -> Model:
    """Return the model that comes with the package; that of another seed is trained into the cache, once.

    Parameters
    ----------
    seed : int
        Of the sentences and of the weights it started from.
    """
    home = SHIPPED if seed == SEED else cache_directory() / "models" / f"tiny-v{VERSION}-{seed}"
    if not home.is_dir():
        # Also a program: run as one, it must not have been imported before.
        from attnfit.audit.models.train_tiny import train

        home = kept(home, partial(train, seed=seed))
    model = load_directory(home, name="tiny")
    model.private_texts = tuple(json.loads((home / "private.json").read_text(encoding="utf-8")))
    return model
