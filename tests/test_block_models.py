"""Blocks taken out of transformers models: against the models, at texts that the check has not seen."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from attnfit.heads.weights import UnknownHead  # noqa: E402
from attnfit.inversion import Block, BlockInversion, recover  # noqa: E402

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
UNDERSTOOD = {
    "llama": GROUPED, "qwen2": {"num_key_value_heads": 2}, "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 6}, "gemma": GROUPED,
    "gemma2": {**GROUPED, "sliding_window": 6}, "gemma3_text": {**GROUPED, "sliding_window": 6},
    "phi3": {"num_key_value_heads": 2}, "phi": {}, "olmo2": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4}, "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "granite": {"num_key_value_heads": 2, "residual_multiplier": 0.3}, "cohere": {"num_key_value_heads": 2},
    "bert": {}, "roberta": {}, "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
}  # fmt: skip
REFUSED = {
    "bloom": ({"n_layer": 3, "n_head": 4}, "is off by"),
    "mixtral": (GROUPED, "has experts"),
    "mpnet": ({}, "is off by"),
}
ENCODERS = ("bert", "roberta", "distilbert", "mpnet")


def model_of(family, more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **more})
    kind = transformers.AutoModel if family in ENCODERS else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def states_of(model, tokens):
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
    return [state[0].double().numpy() for state in out.hidden_states]


@pytest.mark.parametrize("family", UNDERSTOOD)
def test_blocks_are_those_of_the_model(family):
    model = model_of(family, UNDERSTOOD[family])
    blocks = Block.from_model(model, layers=range(2))
    states = states_of(model, np.random.default_rng(1).integers(3, 300, 15).tolist())
    for layer, block in enumerate(blocks):
        after = block.output(states[layer])
        assert np.linalg.norm(after - states[layer + 1]) <= 1e-5 * np.linalg.norm(after)
        assert (block.order == "post") == (family in ENCODERS)
        assert block.bounded == (family not in ENCODERS)


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_understood_is_refused_by_name(family):
    more, said = REFUSED[family]
    with pytest.raises(UnknownHead, match=f"{family}, block 0.*{said}"):
        Block.from_model(model_of(family, more), layers=[0])


def test_a_changed_block_is_noticed():
    model = model_of("llama", GROUPED)
    part = model.model.layers[1].mlp
    part.register_forward_hook(lambda _, args, out: 1.001 * out)
    assert len(Block.from_model(model, layers=[0])) == 1
    with pytest.raises(UnknownHead, match=r"llama, block 1: .* is off by"):
        Block.from_model(model, layers=[1])
    with pytest.raises(ValueError, match="layers must be 0 to 2, not 3"):
        Block.from_model(model, layers=[3])


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_states_of_a_model_are_inverted(family):
    """States that the model's own blocks made, in float64 from its weights."""
    model = model_of(family, UNDERSTOOD[family])
    block = Block.from_model(model, layers=[1])[0]
    before = states_of(model, [5, 17, 200, 31])[1]
    found = recover(BlockInversion(block, block.output(before)), random_state=0, n_starts=2)
    assert found.verdict in ("ambiguous", "not recovered")
    if found.verdict == "ambiguous":
        residual = block.output(found.x.T) - block.output(before)
        assert np.linalg.norm(residual) <= 1e-8 * np.linalg.norm(before)
    rows = model.get_input_embeddings().weight.detach().double().numpy()
    first = Block.from_model(model, layers=[0])[0]
    tokens = [5, 17, 200, 31]
    if family != "gpt2":
        factor = states_of(model, tokens)[0][0] @ rows[5] / (rows[5] @ rows[5])
        with_rows = recover(
            BlockInversion(first, first.output(states_of(model, tokens)[0])), vocabulary=factor * rows
        )
        assert with_rows.verdict == "recovered" and with_rows.tokens.tolist() == tokens
