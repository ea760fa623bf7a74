"""Run a model on texts and see what enters its heads and what they attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from attnfit.heads import weights
from attnfit.heads.seen import Observation, Truth
from attnfit.heads.weights import Projections, UnknownHead
from attnfit.objectives.head_data import precision_of
from attnfit.segments import Array

# Maps recomputed from the weights may differ from those of a model in single precision by so much,
# relatively (seen: 1e-6), in other formats by so many roundings.
AGREES, ROUNDINGS = 1e-5, 8.0


def observe(
    model: Any,
    texts: Sequence[Any],
    layer: int,
    head: int,
    *,
    tokenizer: Any = None,
    inner: bool = False,
    max_length: int | None = None,
) -> Observation:
    """Return queries, keys and maps of one head of a transformer, checked against its weights.

    The maps are recomputed from what is returned, ``softmax(cap tanh(q . k / cap))`` with all settings of the
    head, and must be those of the model: a head that is not understood is refused.

    Parameters
    ----------
    model : transformers model, attnfit.audit model, or path
        A causal model or an encoder with the projections of GPT-2, BERT, Llama, Qwen, Mistral, Gemma, Phi,
        GPT-NeoX and their kin; a directory, a GGUF file, or a name that `attnfit.audit.load` knows.
    texts : sequence of str, or of sequences of int
        Texts, or their tokens.
    layer, head : int
        Counted from 0.
    tokenizer : optional
        For texts of a bare transformers model.
    inner : bool
        Return the queries and keys themselves, after biases and norms and before they are turned: for heads
        whose norms act on all heads together. The truth is then the identity.
    max_length : int, optional
        Keep the first so many tokens of each text.

    Returns
    -------
    Observation
        ``seen.regressor().fit(*seen.fit_args())`` fits the head.

    Raises
    ------
    UnknownHead
        A ValueError: the architecture is not understood, or its maps are not those recomputed; the message
        has the error and the settings tried.
    ValueError
        If there is no such layer or head, or no tokenizer for texts.

    Examples
    --------
    >>> from attnfit import audit, heads
    >>> tiny = audit.load("tiny")
    >>> seen = heads.observe(tiny, tiny.private_texts[:3], layer=0, head=1)
    >>> seen.error < 1e-5, seen.maps[0].shape == (len(seen.queries[0]),) * 2
    (True, True)
    """
    looked = look(model, texts, tokenizer=tokenizer, max_length=max_length, layers=[layer])
    return looked.head(layer, head, inner=inner)


@dataclass(frozen=True)
class Looked:
    """What entered the attentions of a model on texts, and the maps of all heads.

    Attributes
    ----------
    module : transformers.PreTrainedModel
    parts : list of torch.nn.Module
        The attention of each block.
    inputs, maps : list of dict
        By text: arrays by layer, shapes (n, d) and (heads, n, n).
    """

    module: Any
    parts: list[Any]
    inputs: list[dict[int, Any]]
    maps: list[dict[int, Any]]

    @property
    def config(self) -> Any:
        """The configuration of the text model."""
        return self.module.config.get_text_config()

    @property
    def n_heads(self) -> int:
        """Heads of a layer."""
        return int(self.config.num_attention_heads)

    def head(self, layer: int, head: int, *, inner: bool = False) -> Observation:
        """Return what was seen of one head; `observe` documents it."""
        if not 0 <= head < self.n_heads:
            raise ValueError(f"head must be 0 to {self.n_heads - 1}, not {head}")
        found = None
        for layout in weights.layouts(str(self.config.model_type)):
            seen = self._with(layer, head, layout, inner)
            try:
                maps = seen.recomputed()
            except ValueError as error:
                raise UnknownHead(f"{seen.family}, layer {layer}, head {head}: {error}") from error
            squares = sum(float(np.sum((F - B) ** 2)) for F, B in zip(maps, seen.maps, strict=True))
            total = sum(float(np.sum(B**2.0)) for B in seen.maps)
            seen = replace(seen, error=float(np.sqrt(squares / total)))
            found = seen if found is None or seen.error < found.error else found
            if seen.rotary is None or seen.error <= self._limit():
                break
        assert found is not None
        if not found.error <= self._limit():
            raise UnknownHead(
                f"{found.family}, layer {layer}, head {head}: maps recomputed from its weights are off by "
                f"{found.error:.1e} of theirs (limit {self._limit():.0e}); tried "
                f"{'no rotary embedding' if found.rotary is None else 'rotary, both layouts'}, scale "
                f"{found.scaling:.4g}, cap {found.softcap}, norm {found.qk_norm}, sink {found.sink}, mask "
                f"{found.mask}: this architecture is not understood"
            )
        return found

    def _limit(self) -> float:
        raw = next(iter(self.maps[0].values()))
        relative = precision_of(raw).relative if raw.dtype in (torch.bfloat16, torch.float16) else 0.0
        return max(AGREES, ROUNDINGS * relative)

    def _with(self, layer: int, head: int, layout: str, inner: bool) -> Observation:
        part, config = self.parts[layer], self.config
        projected = weights.projections(part, config)
        h = projected.width
        turn, factor = weights.rotary(self.module, part, config, layer, layout)
        scale = weights.scaling(part, h) * factor
        W_Q, W_K = projected.of_head(head)
        norms = None if inner else weights.norms(part, h)
        gains: tuple[Array | None, Array | None] = (None, None)
        if norms is not None:
            # The scale cannot stand before a norm.
            gains = norms[0].gains * scale, norms[1].gains
        else:
            W_Q = W_Q * scale
        inputs = [text[layer] for text in self.inputs]
        if inner:
            queries, keys = self._inner(part, projected, inputs, head)
            W_Q, W_K = np.eye(h) * scale, np.eye(h)
        else:
            queries = keys = [_with_ones(_numbers(x), projected.bias) for x in inputs]
        sinks = getattr(part, "sinks", None)
        causal = bool(getattr(part, "is_causal", getattr(config, "is_decoder", False)))
        return Observation(
            queries,
            keys,
            [_shares(text[layer][head]) for text in self.maps],
            [np.arange(len(q), dtype=np.float64) for q in queries],
            weights.mask(part, config, layer, causal),
            h,
            turn,
            weights.softcap(part, config),
            None if norms is None else norms[0].eps,
            sinks is not None,
            scale,
            Truth(W_Q, W_K, *gains, None if sinks is None else float(sinks[head].detach())),
            layer,
            head,
            str(config.model_type),
        )

    def _inner(
        self, part: Any, projected: Projections, inputs: list[Any], head: int
    ) -> tuple[list[Array], list[Array]]:
        """Return queries and keys of a head after biases and norms."""
        out: tuple[list[Array], list[Array]] = ([], [])
        sides = ((projected.W_Q, projected.n_heads), (projected.W_K, projected.n_keys))
        own = (head, head // (projected.n_heads // projected.n_keys))
        for side, (W, n) in enumerate(sides):
            for x in inputs:
                y = torch.from_numpy(_with_ones(_numbers(x), projected.bias) @ W).float()
                with torch.no_grad():
                    vectors = weights.normed(part, side, y, n)
                first = own[side] * projected.width
                out[side].append(_numbers(vectors[:, first : first + projected.width]))
        return out


def look(
    model: Any,
    texts: Sequence[Any],
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    layers: Sequence[int] | None = None,
) -> Looked:
    """Run a model on texts, one by one, and keep what enters its attentions and all maps."""
    module, tokenise = opened(model, tokenizer)
    family = str(module.config.get_text_config().model_type)
    blocks = _blocks(module)
    wanted = list(range(len(blocks))) if layers is None else list(layers)
    for layer in wanted:
        if isinstance(layer, bool) or not 0 <= layer < len(blocks):
            raise ValueError(f"layer must be 0 to {len(blocks) - 1}, not {layer!r}")
    if isinstance(texts, str) or not len(texts):
        raise ValueError("texts must be a list with at least one text, or one list of tokens")
    parts = [weights.attention_part(block, family) for block in blocks]
    looked = Looked(module, parts, [], [])
    device = next(module.parameters()).device
    with _eager(module), torch.no_grad():
        for text in texts:
            tokens = list(tokenise(text))[:max_length]
            seen: dict[int, Any] = {}
            handles = [
                parts[k].register_forward_pre_hook(partial(_note, seen, k), with_kwargs=True) for k in wanted
            ]
            try:
                out = module.base_model(
                    input_ids=torch.tensor([tokens], device=device), output_attentions=True
                )
            finally:
                for handle in handles:
                    handle.remove()
            if not out.attentions or any(out.attentions[k] is None for k in wanted):
                raise UnknownHead(f"{family} returns no attention maps; its heads cannot be observed")
            looked.inputs.append(seen)
            looked.maps.append({k: out.attentions[k][0].detach().cpu() for k in wanted})
    return looked


def _note(seen: dict[int, Any], layer: int, _: Any, args: Any, kwargs: Any) -> None:
    value = args[0] if args else kwargs["hidden_states"]
    seen[layer] = value[0].detach().cpu()


def opened(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return the transformers model, and what makes tokens of a text."""
    if not isinstance(model, torch.nn.Module) and not hasattr(model, "module"):
        from attnfit import audit

        model = audit.load(model)
    if hasattr(model, "tokenise"):
        return model.module, lambda text: model.tokenise(text)

    def tokenise(text: Any) -> Any:
        if not isinstance(text, str):
            return [int(token) for token in text]
        if tokenizer is None:
            raise ValueError(
                "texts are strings, but there is no tokenizer; pass tokenizer=, or lists of tokens"
            )
        return tokenizer(text)["input_ids"]

    return model.eval(), tokenise


def _blocks(module: Any) -> Any:
    from attnfit.audit.models.blocks import find_blocks

    return find_blocks(module)


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    """Have maps computed and returned: other implementations of attention have none."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def _with_ones(x: Array, bias: bool) -> Array:
    return np.column_stack([x, np.ones(len(x))]) if bias else x


def _shares(maps: Any) -> Any:
    """Return maps as an array in their own precision; bfloat16 in single, which holds it."""
    return (maps.float() if maps.dtype == torch.bfloat16 else maps).numpy()


def _numbers(tensor: Any) -> Array:
    return np.asarray(tensor.detach().double().cpu().numpy())
