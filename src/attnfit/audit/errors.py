"""What can go wrong between a model, what it leaked and the text behind it."""

from __future__ import annotations

from typing import Any


class AuditError(ValueError):
    """Something about the model, the observation or the request rules the audit out."""


class PickleRefused(AuditError):
    """The weights are a pickle, which runs code when it is read."""


class MalformedModel(AuditError):
    """The files of a model are damaged, incomplete or of an unknown kind."""


class ModelTooLarge(AuditError):
    """The weights would not fit into memory."""


class NoRoundTrip(AuditError):
    """The tokenizer cannot give this text back."""


class ObservationMismatch(AuditError):
    """The observation does not come from this model, layer or access mode."""


class Unsupported(AuditError):
    """No way to evaluate candidates gives what the model itself gives: nothing can be said of this access."""


MISSING = "auditing language models needs torch and transformers: pip install 'attnfit[lm]'"


def require(module: str) -> Any:
    """Import a module of the ``lm`` extra, or say how to install it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ModuleNotFoundError(f"{error.msg}; {MISSING}", name=error.name) from error
