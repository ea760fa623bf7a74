"""One language model with everything that an audit asks of it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.errors import AuditError, MalformedModel
from attnfit.audit.models.blocks import INSIDE, capture, final_norm, find_blocks
from attnfit.audit.models.cached import arguments
from attnfit.audit.models.texts import Text, tokenised
from attnfit.audit.models.texts import Tokens as Tokens

Array = NDArray[np.float32]
# A number as in `Model.states`, or a part of a block as "attention:BLOCK" and "kv:BLOCK".
Layer = int | str
# What configurations call the longest sequence, first come first served.
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
# Embeddings that differ by less than this share of their size may give states that no observation tells
# apart: so many of them are compared before a token counts as known.
NEAR, N_NEAR = 0.3, 16
# Relative error of squared distances from products in single precision, with room.
ROUNDING = 1e-4
# Tokens that are moved to find out whether positions count, and how much states may differ by rounding: by
# 1e-5 with rotary embeddings, by more than 0.1 with learned ones.
SHIFTED, SAME_STATES = 5, 1e-3


@dataclass(eq=False)
class Model:
    """A language model of the transformers library, its tokenizer, and one vocabulary for all architectures.

    Attributes
    ----------
    name : str
    module : transformers.PreTrainedModel
        In float32, in evaluation mode, without gradients.
    tokenizer : transformers.PreTrainedTokenizerBase
    kind : {"causal", "encoder"}
        Whether a token sees only those before it, or all.
    private_texts : tuple of str
        Texts that the model is known to have memorised; empty for models from elsewhere.
    calibrations : dict
        What was learned about its layers so far.
    ways : dict
        How candidates are evaluated at each layer, by name; or why they cannot be.
    first_position : int
        Position of the first token of every text; see `at`.
    before_work : callable, optional
        Called before long work on it that is no forward pass; what it raises ends the work.
    """

    name: str
    module: Any
    tokenizer: Any
    kind: Literal["causal", "encoder"]
    private_texts: tuple[str, ...] = ()
    calibrations: dict[Layer, Any] = field(default_factory=dict, repr=False)
    ways: dict[Layer, str] = field(default_factory=dict, repr=False)
    before_work: Callable[[], None] | None = field(default=None, repr=False)
    first_position: int = 0

    def __post_init__(self) -> None:
        self._near: dict[int, Tokens] = {}
        self._runs: dict[str, Model] = {}
        # What of a layer depends on the token alone: see `attnfit.audit.context_free`.
        self.context_free: dict[Layer, Any] = {}
        self.module.eval().requires_grad_(False)
        self.blocks = find_blocks(self.module)

    @property
    def base(self) -> Any:
        """The model without its language-modelling head."""
        return self.module.base_model

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    @property
    def family(self) -> str:
        """What the transformers library calls its architecture."""
        return str(self.module.config.model_type)

    @property
    def width(self) -> int:
        """Length of a hidden state; embeddings are shorter where a projection follows them."""
        return int(self.module.config.get_text_config().hidden_size)

    @property
    def n_vocabulary(self) -> int:
        """Number of rows of the embedding table."""
        return int(self.embeddings.shape[0])

    @property
    def max_length(self) -> int:
        """The longest sequence that its positions allow; the largest integer where there is no limit."""
        config = self.module.config.get_text_config()
        sizes = (getattr(config, name, None) for name in LENGTHS)
        size = next((size for size in sizes if isinstance(size, int) and size > 0), None)
        return sys.maxsize if size is None else int(size) - self.n_reserved - self.first_position

    @property
    def n_reserved(self) -> int:
        """Rows of the table of positions before that of the first token: RoBERTa and its kin count from after
        the number of their padding token.
        """
        table = getattr(getattr(self.base, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        return 0 if padding is None else int(padding) + 1

    def on(self, device: str) -> Model:
        """Return the model on a device of torch, a copy unless it is there.

        Raises
        ------
        AuditError
            If there is no such device.
        """
        try:
            if self.module.device == torch.device(device):
                return self
            module = deepcopy(self.module).to(device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise AuditError(f"device {device!r} cannot be used here ({reason}); pass 'cpu'") from None
        return replace(self, module=module, calibrations={}, ways={})

    @cached_property
    def embeddings(self) -> Any:
        """What each token is to the model, before positions; shape (n_vocabulary, width), or narrower."""
        table = self.module.get_input_embeddings()
        if type(table) is torch.nn.Embedding:
            return table.weight
        return table(torch.arange(table.weight.shape[0]))

    def near(self, token: int) -> Tokens:
        """Return other tokens with nearly the same embedding: all that are equal, the nearest of the rest."""
        if token not in self._near:
            table, squares = self.embeddings, self._squares
            reach = NEAR**2 * squares[token]
            # One product is a tenth of the work of all differences; what it leaves is compared exactly.
            rough = squares + squares[token] - 2.0 * (table @ table[token])
            likely = (rough <= reach + ROUNDING * (squares + squares[token])).nonzero()[:, 0]
            far = (table[likely] - table[token]).square().sum(1)
            close, far = likely[far <= reach], far[far <= reach]
            order = close[far.argsort(stable=True)]
            count = max(N_NEAR + 1, int((far == 0.0).sum()))
            self._near[token] = [int(other) for other in order[:count] if other != token]
        return self._near[token]

    @cached_property
    def _squares(self) -> Any:
        """Squared lengths of the embeddings."""
        return self.embeddings.square().sum(1)

    @property
    def head(self) -> Any:
        """The linear map from normed last states to logits."""
        head = self.module.get_output_embeddings()
        if head is None or self.kind != "causal":
            raise AuditError(f"model {self.name!r} has no language-modelling head, so it has no logits")
        return head

    @cached_property
    def head_weight(self) -> Any:
        """What the head multiplies normed last states by, scale included, in double precision."""
        return self.head.weight.double() * self.head_scale

    @cached_property
    def head_directions(self) -> tuple[Any, Any]:
        """Squared sizes of the head along its principal directions, ascending, and these as columns.

        Of the head centred over the vocabulary: what is common to all logits does not show in probabilities.
        """
        U = self.head_weight - self.head_weight.mean(0)
        values, vectors = torch.linalg.eigh(U.T @ U)
        return values, vectors

    @property
    def head_scale(self) -> float:
        """The number that some architectures multiply their logits by."""
        config = self.module.config.get_text_config()
        divided, times = (getattr(config, name, None) or 1.0 for name in ("logits_scaling", "logit_scale"))
        return float(times) / float(divided)

    @property
    def softcap(self) -> float | None:
        """The size that ``cap tanh(x / cap)`` keeps logits below; None where they are plain."""
        cap = getattr(self.module.config.get_text_config(), "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    def scores(self, states: Any, tokens: Any = None) -> Any:
        """Return the logits of normed last states with their gradient, shape (..., n_vocabulary); or those of
        some tokens, shape (..., len(tokens)).
        """
        if not self.predicts:
            raise AuditError(
                f"the logits of {self.name!r} ({self.family}) are not its head's output, at most scaled and "
                "capped by a tanh: this architecture cannot be audited by logits, topk or masked"
            )
        weight, bias = self.head.weight, self.head.bias
        if tokens is not None:
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        logits = torch.nn.functional.linear(states.to(weight.dtype), weight, bias) * self.head_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def unembed(self, states: Any, tokens: Any = None) -> Any:
        """Return the logits of normed last states, shape (..., n_vocabulary), or of some tokens only."""
        with torch.no_grad():
            return self.scores(states, tokens).float()

    @cached_property
    def predicts(self) -> bool:
        """Whether head, scale and cap give the logits that the model itself returns."""
        two = torch.tensor([[0, 1]])
        with torch.no_grad():
            try:
                last = capture(self.base, [self.final_norm], "output", input_ids=two, use_cache=False)[0][0]
            except MalformedModel:
                return False
            given = self.module(input_ids=two, use_cache=False).logits[0].float()
            self.__dict__["predicts"] = True
            ours = self.unembed(last)
        return bool(torch.allclose(ours, given, rtol=1e-3, atol=1e-3 * float(given.abs().max())))

    @cached_property
    def final_norm(self) -> Any:
        """The normalisation between the last block and the logits."""
        return final_norm(self.base, self.family)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the configuration and of all bytes of all tensors."""
        config = self.module.config.to_dict()
        volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
        settled = {key: value for key, value in config.items() if key not in volatile}
        digest = hashlib.sha256(json.dumps(settled, sort_keys=True, default=str).encode())
        met: dict[Any, str] = {}
        for name, tensor in sorted(self.module.state_dict().items()):
            # Tied weights are read once; which they are tied to belongs to the model.
            same = met.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), name)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}={same}".encode())
            if same == name:
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def tokenise(self, text: Text) -> Tokens:
        """Return the tokens of a text, special tokens of the tokenizer included.

        Parameters
        ----------
        text : str, list of int or list of dict
            Text; token ids, which are only checked; or the messages of a chat, each with "role" and
            "content", which the chat template of the model puts together.

        Raises
        ------
        NoRoundTrip
            If the tokens do not stand for the text: an unknown token, or a character no token encodes.
        AuditError
            If the text is empty, an id is no token, or the model has no chat template.
        """
        return tokenised(self, text).tokens

    def detokenise(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens, without the special ones that the tokenizer puts around a text."""
        before, after = self.around
        inner = list(tokens)
        if before and inner[: len(before)] == before:
            inner = inner[len(before) :]
        if after and inner[-len(after) :] == after:
            inner = inner[: -len(after)]
        return str(self.tokenizer.decode(inner, clean_up_tokenization_spaces=False))

    @cached_property
    def around(self) -> tuple[Tokens, Tokens]:
        """The special tokens before and after a text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        n_before = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
        return list(whole[:n_before]), list(whole[n_before + len(bare) :])

    def states(self, tokens: Sequence[int], layer: Layer) -> Array:
        """Return the states after block `layer`.

        Layer 0 is what enters the first block, ``n_layers + 1`` the last state after the final norm,
        ``"attention:BLOCK"`` what the self-attention of a block (counted from 0) adds, its output projection
        included, and ``"kv:BLOCK"``, ``"k:BLOCK"`` and ``"v:BLOCK"`` its keys and values as they enter the
        cache, all heads in one row a token.

        Returns
        -------
        ndarray, shape (n, width)
        """
        if layer == 0:
            return self._run(tokens, self.blocks[0], "input")
        return self._run(tokens, self.part(layer), "output")

    def part(self, layer: Layer) -> Any:
        """Return the module that ends a layer: a block, for ``n_layers + 1`` the final norm, or what stands
        for a part of a block.

        Raises
        ------
        AuditError
            If the model has no such layer.
        """
        if isinstance(layer, str):
            block = self.depth(layer) - 1
            if not 0 <= block < self.n_layers:
                raise AuditError(f"block must be 0 to {self.n_layers - 1} for {self.name!r}, not {block}")
            return INSIDE[layer.partition(":")[0]](self.blocks[block], self.family)
        top = self.n_layers + (self.kind == "causal")
        if not 1 <= layer <= top:
            raise AuditError(f"layer must be 1 to {top} for {self.name!r}, not {layer}")
        return self.final_norm if layer > self.n_layers else self.blocks[layer - 1]

    def depth(self, layer: Layer) -> int:
        """Return how many blocks are run up to a layer."""
        return 1 + int(layer.partition(":")[2]) if isinstance(layer, str) else layer

    def width_of(self, layer: Layer) -> int:
        """Return how many numbers a token has at a layer."""
        return self.width if isinstance(layer, int) else int(self.states([0], layer).shape[1])

    def logits(self, tokens: Sequence[int]) -> Array:
        """Return the logits of the next token at every position.

        Returns
        -------
        ndarray, shape (n, n_vocabulary)
        """
        # What has no head says so first, whatever its layers.
        _ = self.head
        return np.asarray(self.unembed(torch.from_numpy(self.states(tokens, self.n_layers + 1))).numpy())

    def _run(self, tokens: Sequence[int], module: Any, side: Literal["input", "output"]) -> Array:
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([list(tokens)])}
            if self.kind == "causal":
                inputs["use_cache"] = False
            return np.asarray(self.capture([module], side, **inputs)[0][0].float().numpy())

    def capture(self, parts: Sequence[Any], side: Literal["input", "output"], **inputs: Any) -> list[Any]:
        """Run texts until all parts are passed, and return what enters or leaves each; see `capture`."""
        if self.first_position and "position_ids" not in inputs:
            given = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
            first = self.first_position + self.n_reserved
            inputs["position_ids"] = torch.arange(first, first + given.shape[1])[None]
        return capture(self.base, parts, side, **inputs)

    def at(self, first_position: int, *, keys: bool = False) -> Model:
        """Return the model on texts whose first token has another position than 0, as where padding or a part
        that is masked goes before it; itself where its states do not depend on that.

        Parameters
        ----------
        first_position : int
        keys : bool
            Whether keys count too, which positions may turn where no state depends on them.

        Raises
        ------
        AuditError
            If it has no such position.
        """
        if isinstance(first_position, bool) or not isinstance(first_position, int) or first_position < 0:
            raise AuditError(f"first_position must be an integer >= 0, not {first_position!r}")
        counted = self.counts_positions or (keys and self.takes_positions)
        if first_position == self.first_position or not counted:
            return self
        longest = self.max_length + self.first_position
        if first_position >= longest:
            raise AuditError(
                f"first_position is {first_position}; {self.name!r} has positions 0 to {longest - 1}"
            )
        other = copy(self)
        other.first_position, other.ways, other.calibrations = first_position, {}, {}
        other.context_free = {}
        return other

    def in_dtype(self, name: str) -> Model:
        """Return the same model with all weights rounded to another type, in which it then computes.

        What is no weight keeps its type, as where the transformers library loads a model so.
        """
        if name not in self._runs:
            # Hooks belong to this model, and would drag what they know along.
            hooks = self.base._forward_pre_hooks.copy()
            self.base._forward_pre_hooks.clear()
            try:
                module = deepcopy(self.module)
            finally:
                self.base._forward_pre_hooks.update(hooks)
            for weight in module.parameters():
                weight.data = weight.data.to(getattr(torch, name))
            self._runs[name] = Model(self.name, module, self.tokenizer, self.kind)
        found = self._runs[name]
        found.first_position = self.first_position
        return found

    @property
    def takes_positions(self) -> bool:
        """Whether it can be told the positions of tokens."""
        return "position_ids" in arguments(self.base)

    @cached_property
    def counts_positions(self) -> bool:
        """Whether states depend on the position of the first token: not where positions only turn queries
        and keys, or only their distances count.
        """
        if not self.takes_positions:
            return False
        count = min(SHIFTED, self.max_length // 2)
        tokens = torch.arange(1, 1 + count)[None] % self.n_vocabulary
        first = self.first_position + self.n_reserved
        with torch.no_grad():
            here, there = (
                capture(self.base, [self.blocks[-1]], "output", input_ids=tokens,
                        position_ids=torch.arange(start, start + count)[None])[0]
                for start in (first, first + count)
            )  # fmt: skip
        return bool((here - there).abs().max() > SAME_STATES * here.std())
