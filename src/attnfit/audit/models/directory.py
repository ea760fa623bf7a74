"""Load a model from a local directory of the transformers library."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from attnfit.audit.errors import AuditError, MalformedModel, PickleRefused
from attnfit.audit.models.memory import check_memory, count_parameters
from attnfit.audit.models.model import Model
from attnfit.audit.models.quiet import quiet

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
# Parts of the names of settings that can make the transformers library fetch code or read other files than
# those checked here.
GATES = ("attn_implementation", "experts_implementation", "auto_map", "transformers_weights", "kernel_config",
         "fusion_config", "distributed_config")  # fmt: skip
# Names of a kind that a message lists.
NAMED = 5


def load_directory(directory: Path, name: str | None = None, allow_pickle: bool = False) -> Model:
    """Return the causal model or encoder in a directory with config.json, tokenizer and safetensors.

    Nothing is downloaded, and no code of the directory is run: the configuration is read without the settings
    that name code, and the transformers library is given tensors instead of files.

    Parameters
    ----------
    directory : Path
    name : str, optional
        The directory's own unless given.
    allow_pickle : bool
        Also read checkpoints that are pickles, which can run any code: only your own.

    Raises
    ------
    PickleRefused
        If there are only pickled weights, and allow_pickle is false.
    MalformedModel
        If a file is missing or damaged, or weights are missing from it.
    ModelTooLarge
        If the weights would not fit into memory.
    """
    files = _weight_files(directory, allow_pickle)
    safe = files[0].suffix == ".safetensors"
    # Of pickles no more is known than that each number takes two bytes or more.
    check_memory(
        count_parameters(files) if safe else sum(file.stat().st_size for file in files) // 2, directory
    )
    try:
        config = read_config(directory)
        causal = any("CausalLM" in kind or "LMHead" in kind for kind in config.architectures or [])
        with quiet():
            tensors: dict[str, Any] = {}
            for file in files:
                tensors |= (
                    load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
                )
            module, report = _build(config, causal, tensors)
            tokenizer = AutoTokenizer.from_pretrained(
                directory, config=config, local_files_only=True, trust_remote_code=False
            )
    except (AuditError, MemoryError):
        raise
    # What a damaged directory makes a library stumble over has no limits.
    except Exception as error:
        raise MalformedModel(f"{directory} does not hold a readable model: {error}") from error
    check_report(report, directory)
    return Model(name or directory.name, module, tokenizer, "causal" if causal else "encoder")


def read_config(directory: Path) -> Any:
    """Return the configuration in a directory, without the settings that name code.

    Raises
    ------
    MalformedModel
        If it is of an unknown kind, or quantised.
    """
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"), object_hook=_numbers)
    if "adapter_config.json" in {file.name for file in directory.iterdir()}:
        raise MalformedModel(f"{directory} holds an adapter: merge it into its model, and save that")
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise MalformedModel(
            f"config.json of {directory} has model_type {kind!r}, which is no model known here"
        )
    return CONFIG_MAPPING[kind].from_dict(_without_gates(settings, directory))


def _numbers(settings: dict[str, Any]) -> Any:
    """Return the number that the transformers library writes as an object, as JSON has no infinity."""
    return float(settings["__float__"]) if settings.keys() == {"__float__"} else settings


def _without_gates(settings: Any, directory: Path) -> Any:
    """Return settings without those that name code, at every depth."""
    if isinstance(settings, list):
        return [_without_gates(one, directory) for one in settings]
    if not isinstance(settings, dict):
        return settings
    if settings.get("quantization_config"):
        how = settings["quantization_config"]
        how = how.get("quant_method") if isinstance(how, dict) else how
        raise MalformedModel(
            f"the weights of {directory} are quantised ({how}; quantization_config in config.json), which "
            "cannot be read here: save the model dequantised, or audit a GGUF file of it"
        )
    return {
        key: _without_gates(value, directory)
        for key, value in settings.items()
        if not any(gate in key for gate in GATES)
    }


def _build(config: Any, causal: bool, tensors: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model of a configuration with these weights, and the report on loading them."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_MAPPING
    if type(config) not in known:
        raise MalformedModel(f"{config.model_type!r} is neither a causal model nor an encoder")
    family = known[type(config)]
    # What pools sentences is beside all that is observed, and checkpoints of other heads come without it.
    pools = "add_pooling_layer" in inspect.signature(family.__init__).parameters
    pooled = {"add_pooling_layer": any("pooler" in key for key in tensors)} if pools else {}
    module, report = family.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        attn_implementation=attention_for(config, family),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
        **pooled,
    )
    return module, report


def check_report(report: dict[str, Any], source: Path) -> None:
    """Raise MalformedModel where weights would be random numbers; warn of those that are not used."""
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise MalformedModel(
            f"{source} lacks weights, which would be random numbers: {_listed(lacking)}; save the whole model"
        )
    wrong = [
        f"{key} {tuple(got)} instead of {tuple(due)}" for key, got, due in sorted(report["mismatched_keys"])
    ]
    if wrong:
        raise MalformedModel(f"{source} has weights of another shape than config.json says: {_listed(wrong)}")
    if report["error_msgs"]:
        raise MalformedModel(f"{source} could not be read: {_listed(report['error_msgs'])}")
    unused = sorted(report["unexpected_keys"])
    if unused:
        warnings.warn(
            f"{source} has weights that this architecture does not use: {_listed(unused)}; is config.json "
            "that of another model?",
            UserWarning,
            stacklevel=2,
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def attention_for(config: Any, family: Any) -> str:
    """Return the implementation of attention that computes all that a configuration asks for."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if capped is None and getattr(family, "_supports_sdpa", False) else "eager"


def _weight_files(directory: Path, allow_pickle: bool) -> list[Path]:
    """Return the files with the weights, all of one format, every one of them inside the directory."""
    if (directory / SAFE).is_file():
        return [directory / SAFE]
    index = directory / f"{SAFE}.index.json"
    if index.is_file():
        return _shards(directory, index, ".safetensors")
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if not pickles:
        raise MalformedModel(f"{directory} holds no weights: {SAFE} or {index.name} is expected")
    if not allow_pickle:
        raise PickleRefused(
            f"{directory / pickles[0]} is a pickle, which runs code when it is read; convert it to "
            "safetensors, or pass allow_pickle=True if you made it yourself"
        )
    if (directory / PICKLED).is_file():
        return [directory / PICKLED]
    index = directory / f"{PICKLED}.index.json"
    if not index.is_file():
        raise MalformedModel(f"{directory} holds neither {PICKLED} nor {index.name}")
    return _shards(directory, index, ".bin")


def _shards(directory: Path, index: Path, suffix: str) -> list[Path]:
    """Return the files that an index names, all of which must be plain names of files beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedModel(f"{index} is not an index of weights: {error}") from error
    if not names:
        raise MalformedModel(f"{index} names no file of weights")
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or "/" in name:
            raise MalformedModel(f"{index} names {name!r}, which is not the name of a file beside it")
        if not name.endswith(suffix):
            kind = PickleRefused if any(Path(name).match(pattern) for pattern in PICKLES) else MalformedModel
            raise kind(f"{index} names {name!r}: only files ending in {suffix} are read by it")
        if (directory / name).is_symlink():
            raise MalformedModel(
                f"{index} names {name!r}, a link to elsewhere: copy the directory with links followed "
                "(cp -rL)"
            )
        if not (directory / name).is_file():
            raise MalformedModel(f"{index} names {name!r}, which is not there")
    return [directory / name for name in sorted(names)]
