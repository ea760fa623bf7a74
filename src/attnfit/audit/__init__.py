"""What text does a language model give away? Observe what leaks, invert it, and see what defends."""

from typing import TYPE_CHECKING, Any

from attnfit.audit.errors import (
    AuditError,
    MalformedModel,
    ModelTooLarge,
    NoRoundTrip,
    ObservationMismatch,
    PickleRefused,
    Unsupported,
    require,
)

if TYPE_CHECKING:
    from attnfit.audit.access import Access
    from attnfit.audit.cache import invert_kv
    from attnfit.audit.check import check_access, check_defence
    from attnfit.audit.checks import check_states
    from attnfit.audit.defences import Defence, Defended
    from attnfit.audit.gradient import invert_gradient
    from attnfit.audit.gradient_search import GradientResult
    from attnfit.audit.intervals import conformal_p_values
    from attnfit.audit.inverting import invert
    from attnfit.audit.logits import invert_logits
    from attnfit.audit.masked import MaskedResult, recover_masked
    from attnfit.audit.memorisation.canaries import Canaries, Exposure, canaries, exposure
    from attnfit.audit.memorisation.extraction import Extraction, extraction, windows
    from attnfit.audit.memorisation.membership import Membership, MembershipScore, membership
    from attnfit.audit.memorisation.report import Memorised, memorised
    from attnfit.audit.memorisation.scores import ScoredTexts, score_texts
    from attnfit.audit.models import Model, load
    from attnfit.audit.observation import Observation, observe
    from attnfit.audit.relaxation import Relaxation, masked_relaxation
    from attnfit.audit.report import Report
    from attnfit.audit.result import InversionResult, Position
    from attnfit.audit.running import run
    from attnfit.audit.states import StatesAccess, invert_attention, invert_hidden
    from attnfit.audit.topk import invert_topk
    from attnfit.audit.utility import Utility, utility_lost

_HOMES = {
    "Access": "access",
    "Canaries": "memorisation.canaries",
    "Defence": "defences",
    "Defended": "defences",
    "Exposure": "memorisation.canaries",
    "Extraction": "memorisation.extraction",
    "GradientResult": "gradient_search",
    "InversionResult": "result",
    "MaskedResult": "masked",
    "Membership": "memorisation.membership",
    "MembershipScore": "memorisation.membership",
    "Memorised": "memorisation.report",
    "Model": "models",
    "Observation": "observation",
    "Position": "result",
    "Relaxation": "relaxation",
    "Report": "report",
    "ScoredTexts": "memorisation.scores",
    "StatesAccess": "states",
    "Utility": "utility",
    "canaries": "memorisation.canaries",
    "check_access": "check",
    "check_defence": "check",
    "check_states": "checks",
    "conformal_p_values": "intervals",
    "exposure": "memorisation.canaries",
    "extraction": "memorisation.extraction",
    "invert": "inverting",
    "invert_attention": "states",
    "invert_gradient": "gradient",
    "invert_hidden": "states",
    "invert_kv": "cache",
    "invert_logits": "logits",
    "invert_topk": "topk",
    "load": "models",
    "masked_relaxation": "relaxation",
    "membership": "memorisation.membership",
    "memorised": "memorisation.report",
    "observe": "observation",
    "recover_masked": "masked",
    "run": "running",
    "score_texts": "memorisation.scores",
    "utility_lost": "utility",
    "windows": "memorisation.extraction",
}

__all__ = [
    "Access",
    "AuditError",
    "Canaries",
    "Defence",
    "Defended",
    "Exposure",
    "Extraction",
    "GradientResult",
    "InversionResult",
    "MalformedModel",
    "MaskedResult",
    "Membership",
    "MembershipScore",
    "Memorised",
    "Model",
    "ModelTooLarge",
    "NoRoundTrip",
    "Observation",
    "ObservationMismatch",
    "PickleRefused",
    "Position",
    "Relaxation",
    "Report",
    "ScoredTexts",
    "StatesAccess",
    "Unsupported",
    "Utility",
    "canaries",
    "check_access",
    "check_defence",
    "check_states",
    "conformal_p_values",
    "exposure",
    "extraction",
    "invert",
    "invert_attention",
    "invert_gradient",
    "invert_hidden",
    "invert_kv",
    "invert_logits",
    "invert_topk",
    "load",
    "masked_relaxation",
    "membership",
    "memorised",
    "observe",
    "recover_masked",
    "run",
    "score_texts",
    "utility_lost",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attnfit.audit' has no attribute {name!r}")
    require("torch")
    require("transformers")
    return getattr(require(f"attnfit.audit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
