"""The former name of `attnfit.data`."""

from attnfit.data import *  # noqa: F403
from attnfit.data import __all__ as __all__
