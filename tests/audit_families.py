"""Small random models of many families, made offline, with a tokenizer of their own."""

from functools import cache

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from attnfit.audit.models.directory import attention_for

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 256,
    "initializer_range": 0.2, **ENDS,
}  # fmt: skip
HEADS = SIZES | {"head_dim": 16}
PLAIN = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
OLD = {"vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 128,
       "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
HYBRID = {"sliding_window": 8, "layer_types": TYPES}
EXPERTS = {"num_local_experts": 4}
OPT = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
       "ffn_dim": 128, "max_position_embeddings": 256, "init_std": 0.2, **ENDS}  # fmt: skip
DEEPSEEK = PLAIN | {
    "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_shared_experts": 1,
}  # fmt: skip
MAMBA = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "initializer_range": 0.2, **ENDS}

# Attention through the library's interface, where candidates can be alternatives: since transformers 5.24.
GPTJ_WAY = "fast" if transformers.GPTJPreTrainedModel._supports_sdpa else "expanded"
CODEGEN_WAY = "fast" if transformers.CodeGenPreTrainedModel._supports_sdpa else "expanded"
# Name of the configuration, its settings, and the way that is right: fast, expanded or whole.
FAMILIES = {
    "llama": ("Llama", SIZES, "fast"),
    "qwen2": ("Qwen2", SIZES, "fast"),
    "qwen2, window": ("Qwen2", SIZES | {
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "fast"),
    "qwen3": ("Qwen3", HEADS, "fast"),
    "gemma": ("Gemma", HEADS, "fast"),
    "gemma2, window": ("Gemma2", HEADS | HYBRID | {"query_pre_attn_scalar": 16}, "fast"),
    "gemma2": ("Gemma2", HEADS | HYBRID | {"sliding_window": 4096, "query_pre_attn_scalar": 16}, "fast"),
    "gemma3, window": ("Gemma3Text", HEADS | HYBRID | {"query_pre_attn_scalar": 16}, "fast"),
    "mistral": ("Mistral", SIZES | {"sliding_window": None}, "fast"),
    "mistral, window": ("Mistral", SIZES | {"sliding_window": 8}, "fast"),
    "mixtral": ("Mixtral", SIZES | EXPERTS, "fast"),
    "gpt_neox": ("GPTNeoX", PLAIN, "fast"),
    "phi": ("Phi", SIZES, "fast"),
    "phi3, window": ("Phi3", SIZES | {"sliding_window": 8}, "fast"),
    "gpt2": ("GPT2", OLD, "fast"),
    "starcoder2": ("Starcoder2", SIZES, "fast"),
    "stablelm": ("StableLm", SIZES, "fast"),
    "olmo2": ("Olmo2", SIZES, "fast"),
    "smollm3": ("SmolLM3", SIZES, "fast"),
    "granite": ("Granite", SIZES | {"logits_scaling": 8.0}, "fast"),
    "cohere": ("Cohere", SIZES | {"logit_scale": 0.25}, "fast"),
    "cohere2, window": ("Cohere2", SIZES | HYBRID | {"logit_scale": 0.25}, "fast"),
    "opt": ("OPT", OPT | {"word_embed_proj_dim": 64}, "fast"),
    "opt, projected": ("OPT", OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}, "fast"),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK, "fast"),
    "falcon": ("Falcon", PLAIN | {"num_kv_heads": 2, "new_decoder_architecture": True}, "expanded"),
    "falcon, alibi": ("Falcon", PLAIN | {"alibi": True, "multi_query": False}, "expanded"),
    "gpt_oss, window": ("GptOss", HEADS | HYBRID | EXPERTS | {"num_experts_per_tok": 2}, "expanded"),
    "gptj": ("GPTJ", OLD | {"rotary_dim": 8}, GPTJ_WAY),
    "codegen": ("CodeGen", OLD | {"n_ctx": 256, "rotary_dim": 8}, CODEGEN_WAY),
    "gpt_neo, window": ("GPTNeo", {
        "vocab_size": 1000, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 128,
        "max_position_embeddings": 256, "attention_types": [[["local", "global", "local"], 1]],
        "window_size": 8, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}, "expanded"),
    "bloom": ("Bloom", {"vocab_size": 1000, "hidden_size": 64, "n_layer": 3, "n_head": 4,
                        "initializer_range": 0.2, **ENDS}, "expanded"),
    "mpt": ("Mpt", {"vocab_size": 1000, "d_model": 64, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2,
                    "max_seq_len": 256, "initializer_range": 0.2}, "expanded"),
    "mamba": ("Mamba", MAMBA | {"state_size": 8}, "whole"),
    "mamba2": ("Mamba2", MAMBA | {
        "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2,
        "chunk_size": 8}, "whole"),
    "rwkv": ("Rwkv", {
        "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "attention_hidden_size": 64,
        "intermediate_size": 128, "context_length": 256, "bos_token_id": 0, "eos_token_id": 0}, "whole"),
    "recurrent_gemma, window": ("RecurrentGemma", {
        **{name: value for name, value in PLAIN.items() if name != "max_position_embeddings"},
        "num_key_value_heads": 1, "attention_window_size": 8, "lru_width": 64,
        "block_types": ["recurrent", "attention", "recurrent"]}, "whole"),
}  # fmt: skip


def random_module(name, **changes):
    """A causal model of a family with random weights."""
    kind, settings, _ = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    family = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    torch.manual_seed(0)
    module = family._from_config(config, attn_implementation=attention_for(config, family))
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() == 1:
                weight.add_(0.05 * torch.randn_like(weight))
    return module


def words(seed, count):
    """Made-up words, some of them common."""
    rng = np.random.default_rng(seed)
    starts = list("bcdfglmnprstvz")
    known = ["".join(a + b for a, b in zip(rng.choice(starts, n), rng.choice(list("aeiou"), n), strict=True))
             for n in rng.integers(1, 5, 800)]  # fmt: skip
    return [known[place] for place in np.minimum(rng.geometric(0.004, count), 800) - 1]


def trained_tokenizer():
    """A byte-level BPE of 1,000 tokens, trained once; each caller may change its own."""
    made = Tokenizer.from_str(trained_pairs())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


@cache
def trained_pairs():
    """The same as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made = words(0, 3000 * 60)
    tokenizer.train_from_iterator([" ".join(made[at : at + 60]) for at in range(0, len(made), 60)], trainer)
    return tokenizer.to_str()


def text_of(tokenizer, length):
    """A text of so many tokens, rare ones among them."""
    for seed in range(100):
        rng = np.random.default_rng([length, seed])
        rare = " ".join(
            tokenizer.decode([token]).strip() for token in rng.integers(300, len(tokenizer), length // 3)
        )
        tokens = tokenizer(f"{rare} {' '.join(words(seed, length))}")["input_ids"][:length]
        text = tokenizer.decode(tokens)
        if len(tokens) == length and tokenizer(text)["input_ids"] == tokens:
            return text
    raise AssertionError("no text comes back from the tokenizer")
