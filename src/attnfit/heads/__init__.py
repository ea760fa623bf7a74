"""Attention heads of transformers: what enters them and what they attend to (extra ``lm``)."""

try:
    from attnfit.heads.observe import observe
    from attnfit.heads.seen import Observation
    from attnfit.heads.survey import Survey, survey
except ModuleNotFoundError as missing:
    if missing.name not in ("torch", "transformers"):
        raise
    raise ModuleNotFoundError(
        'heads of models need torch and transformers; type: python -m pip install "attnfit[lm]"',
        name=missing.name,
    ) from None

__all__ = ["Observation", "Survey", "observe", "survey"]
