"""What the states of one layer look like in general, learned once per model and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Layer, Model
from attnfit.audit.models.sampling import sample
from attnfit.audit.probes import Probe, Ranker, fit_probe
from attnfit.audit.storage import cache_directory, kept
from attnfit.audit.uncertainty import Uncertainty

# Changes when calibrations on disk would no longer mean the same.
VERSION = 1
N_SEQUENCES, LENGTH = 200, 48
N_FIRST = 4096
# Contexts of these lengths, each followed by that many random tokens.
CONTEXTS = (1, 1, 2, 3, 4, 6, 8, 12, 16, 20)
N_CONTEXTS, N_CANDIDATES = 100, 96
# Differences between candidates explain little of their embeddings each: a strong ridge generalises best.
WITHIN_RIDGE = 1e-2
BATCH = 20
# Root mean square distance, in spreads of running text, from which on a state is not one of those.
UNLIKE = 2.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """Probes of one layer.

    Attributes
    ----------
    running : Probe
        For states at positions with tokens before them.
    first : Probe
        For position 0, whose states differ from all others in size where it serves as attention sink.
    within : Probe
        From differences of states to differences of embeddings, of candidates for one position after the
        same tokens: the context, which blurs the others, cancels.
    """

    table: Any
    running: Probe
    first: Probe
    within: Probe

    def kinds(self, states: Any) -> list[str]:
        """Return for each of the states, shape (n, width), which probe serves it, "first" or "running".

        The first position is not the only one with states of its kind: where the first token does not serve
        as attention sink, the second does.
        """
        first, running = (
            ((states - probe.centre) / probe.scale).square().mean(-1) for probe in (self.first, self.running)
        )
        alike = (first < running) & (running > UNLIKE**2)
        return ["first" if one else "running" for one in alike.tolist()]

    @cached_property
    def rankers(self) -> dict[str, Ranker]:
        """One ranker for each probe."""
        return {name: Ranker(getattr(self, name), self.table) for name in PROBES}

    def rankers_under(self, uncertainty: Uncertainty) -> dict[str, Ranker]:
        """Return rankers for states with such errors.

        The ranking counts on the typical error of each channel, at position 0 apart from the others.
        """
        first = uncertainty.typical(slice(1))
        later = uncertainty.typical(slice(1, None)) if len(uncertainty.error) > 1 else first
        typical = dict.fromkeys(PROBES, later) | {"first": first}
        return {
            name: Ranker(getattr(self, name).under_noise(size), self.table) for name, size in typical.items()
        }


PROBES = ("running", "first", "within")


def calibrate(model: Model, layers: Sequence[Layer], random_state: int = 0) -> dict[Layer, Calibration]:
    """Return the calibration of each layer: from memory, from disk, or learned in one pass for all missing.

    200 sequences of 48 tokens, half sampled from the model itself, half uniform random tokens; 4,096 tokens
    on their own for position 0; 100 contexts with 96 candidates each.

    Parameters
    ----------
    model : Model
        A causal one.
    layers : sequence of int or str
    random_state : int
        Seed of everything drawn.
    """
    known = model.calibrations
    for layer in set(layers) - known.keys():
        path = calibration_path(model, layer, random_state)
        if path.is_dir():
            known[layer] = _load(path, model)
    missing = sorted(set(layers) - known.keys(), key=str)
    if missing:
        for layer, learned in _learn(model, missing, random_state).items():
            kept(calibration_path(model, layer, random_state), partial(_save, learned))
            known[layer] = learned
    return {layer: known[layer] for layer in layers}


def _learn(model: Model, layers: Sequence[Layer], seed: int) -> dict[Layer, Calibration]:
    generator = torch.Generator().manual_seed(seed)
    sequences = calibration_texts(model, generator)
    alone = torch.randperm(model.n_vocabulary, generator=generator)[:N_FIRST, None]
    running, first = _states(model, sequences, layers), _states(model, alone, layers)
    contexts = _contexts(model, sequences, layers, generator)
    table = model.embeddings
    learned = {}
    for place, layer in enumerate(layers):
        later = running[place][:, 1:].flatten(0, 1)
        if not float(later.std(0).max()) > 0.0:
            raise AuditError(f"{layer} of {model.name!r} is the same for every token: it tells none of them")
        scale, first_scale = _scale(later), _scale(first[place][:, 0])
        candidates, states = contexts[0], contexts[1][place]
        learned[layer] = Calibration(
            table,
            fit_probe(later, table[sequences[:, 1:].reshape(-1)], scale),
            fit_probe(first[place][:, 0], table[alone[:, 0]], first_scale),
            fit_probe(_centred(states), _centred(table[candidates]), scale, WITHIN_RIDGE),
        )
    return learned


def calibration_texts(model: Model, generator: Any) -> Any:
    """Return the token sequences that a calibration runs, shape (200, 48) where the model takes so many."""
    length = min(LENGTH, model.max_length)
    text = sample(model, N_SEQUENCES // 2, length, generator)
    noise = torch.randint(model.n_vocabulary, (N_SEQUENCES - len(text), length), generator=generator)
    # Interleaved, so that the held-out samples are of both kinds.
    return torch.stack([text, noise], 1).reshape(-1, length)


def _scale(states: Any) -> Any:
    """Return the standard deviation of each channel, none of them zero."""
    spread = states.std(0)
    return spread.clamp_min(1e-6 * float(spread.max()))


def _centred(groups: Any) -> Any:
    return (groups - groups.mean(1, keepdim=True)).reshape(-1, groups.shape[-1])


def _states(model: Model, sequences: Any, layers: Sequence[Layer]) -> list[Any]:
    """Return the states of all sequences, one tensor (n, length, width) a layer."""
    parts = [model.part(layer) for layer in layers]
    size = max(1, BATCH * LENGTH // sequences.shape[1])
    with torch.no_grad():
        batches = [
            model.capture(parts, "output", input_ids=batch, use_cache=False)
            for batch in sequences.split(size)
        ]
    return [torch.cat(states) for states in zip(*batches, strict=True)]


def _contexts(model: Model, sequences: Any, layers: Sequence[Layer], generator: Any) -> tuple[Any, list[Any]]:
    """Return random candidates after many prefixes and their states, one tensor a layer."""
    drawn = torch.randint(model.n_vocabulary, (N_CONTEXTS, N_CANDIDATES), generator=generator)
    seen = []
    for place, candidates in enumerate(drawn):
        prefix = Prefix(model, *layers)
        length = min(CONTEXTS[place // 2 % len(CONTEXTS)], sequences.shape[1] - 1)
        prefix.extend(sequences[place % len(sequences)][:length].tolist())
        seen.append(prefix.embedded_at_all(model.embeddings[candidates]))
    return drawn, [torch.stack(states) for states in zip(*seen, strict=True)]


def calibration_path(model: Model, layer: Layer, seed: int, what: str = "") -> Path:
    """Return where what was learned about a layer is kept."""
    from_where = f"-from{model.first_position}" if model.first_position else ""
    name = f"{model.fingerprint}-{layer}-{seed}{from_where}{what}-v{VERSION}"
    return cache_directory() / "calibration" / name.replace(":", "")


def _save(calibration: Calibration, directory: Path) -> None:
    tensors = {
        f"{name}.{field.name}": getattr(getattr(calibration, name), field.name).contiguous().clone()
        for name in PROBES
        for field in fields(Probe)
    }
    save_file(tensors, directory / "probes.safetensors")


def _load(directory: Path, model: Model) -> Calibration:
    tensors = load_file(directory / "probes.safetensors")
    probes = [Probe(**{f.name: tensors[f"{name}.{f.name}"] for f in fields(Probe)}) for name in PROBES]
    return Calibration(model.embeddings, *probes)
