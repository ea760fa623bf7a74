"""What a form of access is: what leaves the machine, where in the model it comes from, how it is inverted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.result import InversionResult

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

Array = NDArray[np.float32]
# Forms by what stands before the colon.
FORMS: dict[str, type[Access]] = {}


class Leak(NamedTuple):
    """What leaves: numbers, shape (n, width), and the tokens that they belong to where only some leave."""

    array: Array
    shown: NDArray[np.int64] | None = None


class Search(Protocol):
    """The inversion of one observation."""

    def run(self, known: Tokens) -> InversionResult:
        """Return everything that could be recovered, given the first tokens."""

    def contradiction(self, truth: Tokens) -> str:
        """Return why the search would not accept these tokens, which are the true ones; empty if it would."""


@dataclass(frozen=True)
class Access(ABC):
    """A form of access, known to every audit by its ``kind`` from the definition of its class on.

    `attnfit.audit.check_access` tests one.

    Attributes
    ----------
    place : int
        What stands after the colon, as the layer in "hidden:15"; 0 for forms without.
    kind : str
        What stands before it.
    number : str
        What ``place`` is, in messages; empty where there is none.
    first : int
        The smallest place.
    reads_encoders : bool
        Whether encoders are inverted too.
    observed : bool
        Whether outputs leave, which a defence can change.
    probed : bool
        Whether probes of the layer are learned before it is inverted.
    forecasts : bool
        Whether `rivals` tells what defences should do.
    ordered : bool
        Whether row t of what leaves is that of token t.
    counts_positions : bool
        Whether what leaves depends on the position of the first token also where states do not.
    conclusive : bool
        Whether a text that the attack does not find says anything: where not, it counts as not tested to
        the end.
    """

    place: int = 0

    kind: ClassVar[str] = ""
    number: ClassVar[str] = ""
    first: ClassVar[int] = 0
    reads_encoders: ClassVar[bool] = False
    observed: ClassVar[bool] = True
    probed: ClassVar[bool] = False
    forecasts: ClassVar[bool] = True
    ordered: ClassVar[bool] = True
    counts_positions: ClassVar[bool] = False
    conclusive: ClassVar[bool] = True

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "kind" in vars(cls):
            known = FORMS.get(cls.kind)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise TypeError(f"access {cls.kind!r} is {known.__qualname__} already")
            FORMS[cls.kind] = cls

    def __str__(self) -> str:
        return f"{self.kind}:{self.place}" if self.number else self.kind

    @property
    @abstractmethod
    def description(self) -> str:
        """What leaves, as a sentence calls it."""

    @abstractmethod
    def layer(self, model: Model) -> Layer:
        """Return the layer whose states are searched for."""

    @abstractmethod
    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return what leaves, undefended.

        Raises
        ------
        AuditError
            If this model has no such thing.
        """

    @abstractmethod
    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the inversion of an observation, with at most so many candidates a position.

        Raises
        ------
        ObservationMismatch
            If it cannot come from this model.
        AuditError
            If there is no attack on it.
        """

    def prepare(self, model: Model) -> None:
        """Learn what every inversion needs, beside probes, before the time of an audit counts."""
        return

    def run_layer(self, model: Model) -> Layer | None:
        """Return the layer whose states leave as they are, where a run in fewer digits can be compared with
        the one in float32; None if none do.
        """
        return None

    def rivals(self, model: Model, tokens: Tokens, place: int, every: Any) -> tuple[Any, slice]:
        """Return what would leave, shape (len(every), k), with each of some tokens at a place after the
        same ones, and the rows of the array where that is.
        """
        prefix = Prefix(model, self.layer(model))
        if place:
            prefix.extend(tokens[:place])
        return prefix.candidates(every), slice(place, place + 1)

    def metric(self, model: Model) -> NDArray[np.float64] | None:
        """Return L where what leaves differs by ``|d L|`` for a difference d of rivals; None where by d."""
        return None

    def continued(self, model: Model, tokens: Tokens, observation: Observation) -> Any:
        """Return the logits that the model arrives at from what was observed, from the first position
        observed on; None where nothing goes on from it.
        """
        return None


def no_attack_on_encoder(access: Access) -> AuditError:
    """Return the error that says so."""
    return AuditError(
        f"{access} of an encoder cannot be inverted: what enters a block after the first is no row of a "
        "table, and its states depend on all tokens at once; observe attention:0"
    )


def no_attack_without_first(what: str) -> AuditError:
    """Return the error that says so."""
    return AuditError(
        f"the first position was withheld: {what} cannot be inverted without it, because every later "
        "position depends on the token there"
    )
