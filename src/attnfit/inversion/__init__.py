"""Recover the input of an attention layer or of transformer blocks, and say whether that is the only one."""

from attnfit.inversion.layer_files import LayerFileError, load_layer, save_layer
from attnfit.inversion.recovered import Identifiability, Recovery, identifiable
from attnfit.inversion.recovery import recover
from attnfit.objectives.block_heads import Heads
from attnfit.objectives.block_parts import Mlp, Norm
from attnfit.objectives.block_problem import BlockInversion
from attnfit.objectives.blocks import Block

__all__ = [
    "Block",
    "BlockInversion",
    "Heads",
    "Identifiability",
    "LayerFileError",
    "Mlp",
    "Norm",
    "Recovery",
    "identifiable",
    "load_layer",
    "recover",
    "save_layer",
]
