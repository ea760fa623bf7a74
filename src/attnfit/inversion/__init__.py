"""Recover the input of an attention layer, and say whether that is the only one."""

from attnfit.inversion.identifiable import Identifiability, identifiable
from attnfit.inversion.layer_files import LayerFileError, load_layer, save_layer
from attnfit.inversion.recovery import Recovery, recover

__all__ = [
    "Identifiability",
    "LayerFileError",
    "Recovery",
    "identifiable",
    "load_layer",
    "recover",
    "save_layer",
]
