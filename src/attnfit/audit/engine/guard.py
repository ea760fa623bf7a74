"""Whether a way of evaluating candidates gives what a plain forward pass gives: asked before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnfit.audit.models.model import Layer, Model, Tokens

if TYPE_CHECKING:
    from attnfit.audit.engine.prefix import Prefix

# Right ways differ from a plain pass by 1e-5 and less in units of the spread of a channel, wrong ones by 0.1
# and more (measured on 38 small random models): by more than this, or this multiple of what a second run of
# the same text differs by, is wrong. Where that multiple exceeds the last number, nothing can be told.
TOLERANCE, REPEATS, LOOSEST = 1e-4, 30.0, 2e-2
# Random tokens on which a way is chosen: enough to fill a window twice, or this many.
LENGTH, LONGEST = 27, 256
# What configurations call the number of keys that a layer sees.
WINDOWS = (
    "sliding_window",
    "attention_window_size",
    "window_size",
    "attention_chunk_size",
    "local_attention_window",
)


def windows(model: Model) -> list[int]:
    """Return the sizes of the windows that a configuration names."""
    config = model.module.config.get_text_config()
    sizes = [getattr(config, name, None) for name in WINDOWS]
    return sorted({size for size in sizes if isinstance(size, int) and size > 0})


def random_tokens(model: Model, window: int | None) -> Tokens:
    """Return tokens on which a way is chosen: longer than a window where such a text is short enough."""
    length = LENGTH if window is None or 2 * window + 3 > LONGEST else 2 * window + 3
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.n_vocabulary, (min(length, model.max_length),), generator=generator)
    return [int(token) for token in drawn]


def check_way(model: Model, layer: Layer, tokens: Tokens, make: Callable[[], Prefix]) -> str | None:
    """Return where a way differs from the model itself on some tokens, or None if it never does.

    The tokens are appended at once, one by one as candidates, and after false ones that are cropped again: at
    the start, in the middle, at the end and around every window.

    Parameters
    ----------
    model : Model
    layer : int or str
    tokens : list of int
    make : callable
        Returns an empty prefix.
    """
    try:
        return _Check(model, layer, tokens, make).fault()
    except MemoryError:
        raise
    # Whatever an architecture does not like about a way: another way may do.
    except Exception as error:
        if "allocate" in str(error):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


class _Check:
    """Plain states of some tokens, and those of a prefix beside them."""

    def __init__(self, model: Model, layer: Layer, tokens: Tokens, make: Callable[[], Prefix]) -> None:
        self._model, self._tokens, self._make = model, tokens, make
        part = model.part(layer)
        generator = torch.Generator().manual_seed(1)
        self._others = torch.randint(model.n_vocabulary, (len(tokens) + 2,), generator=generator).tolist()
        alone = torch.tensor([tokens])
        pair = torch.tensor([tokens, self._others[: len(tokens)]])
        with torch.no_grad():
            self._reference = model.capture([part], "output", input_ids=alone, use_cache=False)[0][0]
            twice = model.capture([part], "output", input_ids=pair, use_cache=False)[0]
        # The other row lends a spread to texts of one token.
        spread = torch.cat([self._reference, twice[1]]).std(0)
        self._spread = spread.clamp_min(1e-3 * float(spread.median()) + 1e-30)
        self._repeated = self._distance(twice[0], slice(None))
        self._allowed = max(TOLERANCE, REPEATS * self._repeated)

    def fault(self) -> str | None:
        """Return what is wrong first, if anything."""
        if not torch.isfinite(self._reference).all():
            return "its states are not finite"
        if not self._allowed <= LOOSEST:
            return (
                f"the same text beside another one differs by {self._repeated:.0e}: no state can be compared"
            )
        n = len(self._tokens)
        prefix = self._make()
        fault = self._differs(prefix.extend(self._tokens), slice(0, n), "at once")
        prefix = self._make()
        for at in range(n):
            fault = fault or self._step(prefix, at, "one by one")
        cuts = {0, 1, n // 2, n - 1}
        for size in windows(self._model):
            cuts |= {size - 1, size, size + 1}
        for cut in sorted(cut for cut in cuts if 0 <= cut < n):
            fault = fault or self._after_crop(cut)
        return fault

    def _after_crop(self, cut: int) -> str | None:
        told = f"after crop({cut})"
        prefix = self._make()
        prefix.extend([*self._tokens[:cut], *self._others[cut:-2]])
        prefix.crop(cut)
        fault = self._step(prefix, cut, told)
        if fault is None and cut + 1 < len(self._tokens):
            rest = prefix.extend(self._tokens[cut + 1 :])
            fault = self._differs(rest, slice(cut + 1, len(self._tokens)), told)
        return fault

    def _step(self, prefix: Prefix, at: int, told: str) -> str | None:
        """Offer the next token between two others, and adopt it."""
        token = self._tokens[at]
        offered = prefix.candidates([self._others[-2], token, self._others[-1]])
        adopted = prefix.extend([token])
        fault = self._differs(offered[1:2], slice(at, at + 1), f"{told}, as a candidate,")
        return fault or self._differs(adopted, slice(at, at + 1), told)

    def _differs(self, states: Any, places: slice, told: str) -> str | None:
        distance = self._distance(states, places)
        if distance <= self._allowed:
            return None
        far = ((states - self._reference[places]).abs() / self._spread).amax(-1).nan_to_num(torch.inf)
        at = places.start + int(far.argmax())
        return f"{told} the state at position {at} differs by {distance:.0e} (allowed {self._allowed:.0e})"

    def _distance(self, states: Any, places: slice) -> float:
        """Return the largest difference of a channel in units of its spread."""
        return float(((states - self._reference[places]).abs() / self._spread).max().nan_to_num(torch.inf))
