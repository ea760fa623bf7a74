"""Heads of models of the transformers library: what is observed gives the maps of a forward pass, and a fit
predicts those of other texts.
"""

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from attnfit import AttentionRegressor, heads, problems
from attnfit.heads.weights import UnknownHead
from attnfit.objectives.head_checks import sums_note

ENCODERS = ("bert", "distilbert", "roberta")
GPT2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 0}
DISTIL = {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
USUAL = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 0,
    "bos_token_id": 0,
}  # fmt: skip
GROUPED, WINDOW = {"num_key_value_heads": 2}, {"sliding_window": 8}
FAMILIES = {
    "llama": GROUPED,
    "gpt2": {},
    "bert": {},
    "distilbert": {},
    "mistral": GROUPED | WINDOW,
    "qwen2": GROUPED | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | WINDOW | {"head_dim": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 9},
    "gemma3_text": GROUPED | WINDOW
    | {"head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window_pattern": 2},
    "phi": {},
    "phi3": GROUPED | WINDOW,
    "gpt_neox": {},
    "cohere": GROUPED,
}  # fmt: skip


def tiny(family, **more):
    """Return a small model with random weights, biases and gains included."""
    usual = {"gpt2": GPT2, "distilbert": DISTIL}.get(family, USUAL)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, initializer_range=0.2, **(usual | FAMILIES.get(family, {}) | more))
    model = (AutoModel if family in ENCODERS else AutoModelForCausalLM).from_config(config).eval()
    noise = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.05 * torch.randn(weight.shape, generator=noise)
    return model


def texts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(5, 100, n).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_observed_gives_the_maps_of_the_model(family):
    model = tiny(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in (0, 1):
            seen = heads.observe(model, texts(27, 40), layer, 3)
            assert seen.error < 1e-5
            model.set_attn_implementation("eager")
            with torch.no_grad():
                out = model.base_model(torch.tensor([texts(27, 40)[1]]), output_attentions=True)
            expected = out.attentions[layer][0, 3].numpy()
            assert np.abs(seen.recomputed()[1] - expected).max() < 1e-5
            inner = heads.observe(model, texts(27), layer, 3, inner=True)
            assert inner.error < 1e-5 and inner.queries[0].shape == (27, inner.rank)
    if "sliding_window" in FAMILIES[family]:
        assert "causal:8" in {heads.observe(model, texts(27), k, 0).mask for k in (0, 1)}
    assert (seen.qk_norm is not None) == (family in ("qwen3", "gemma3_text"))
    assert (seen.softcap is not None) == (family == "gemma2")
    assert (seen.rotary is None) == (family in ("gpt2", "bert", "distilbert"))


def test_a_sink_is_seen():
    model = tiny("gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=16, **GROUPED, **WINDOW)
    model.model.layers[1].self_attn.sinks.data.fill_(0.5)
    seen = heads.observe(model, texts(27, 40), 1, 2)
    sigma = float(model.model.layers[1].self_attn.sinks[2].detach())
    assert seen.sink and seen.truth.sigma == pytest.approx(sigma)
    assert seen.maps[0].sum(axis=1).min() < 0.99


def test_a_head_that_is_not_understood_is_refused():
    olmo = tiny("olmo2", **GROUPED)
    with pytest.raises(UnknownHead, match="normed over all heads together: pass inner=True"):
        heads.observe(olmo, texts(20), 0, 0)
    assert heads.observe(olmo, texts(20), 0, 0, inner=True).error < 1e-5
    llama = tiny("llama")
    llama.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: 1.01 * out)
    with pytest.raises(
        UnknownHead, match=r"llama, layer 0, head 0: maps recomputed .* off by .* both layouts"
    ):
        heads.observe(llama, texts(20), 0, 0)
    with pytest.raises(ValueError, match="layer must be 0 to 1, not 2"):
        heads.observe(llama, texts(20), 2, 0)
    with pytest.raises(ValueError, match="head must be 0 to 3, not 4"):
        heads.observe(llama, texts(20), 1, 4)
    with pytest.raises(ValueError, match="pass tokenizer="):
        heads.observe(llama, ["words"], 1, 0)


def test_three_lines_fit_a_head_and_predict_another_text():
    model = tiny("llama", hidden_size=16, num_attention_heads=4, head_dim=4, num_hidden_layers=1)
    seen = heads.observe(model, texts(60, 60, 50), layer=0, head=1)
    head = seen[:2].regressor(random_state=0).fit(*seen[:2].fit_args())
    assert head.relative_error(*seen[2:].fit_args()) < 1e-2


def test_heads_of_a_group_share_their_keys():
    rng = np.random.default_rng(0)
    A, T = rng.standard_normal((2, 50, 5))
    W_Q, W_K = rng.standard_normal((2, 5, 3)) / 2.0, rng.standard_normal((5, 3))

    def attend(A):
        e = np.exp(np.einsum("ti,hif,jf,sj->hts", A, W_Q, W_K, A) - 0.5)
        return e / (e.sum(axis=2, keepdims=True) + np.exp(np.array([0.3, -0.2]))[:, None, None])

    model = AttentionRegressor(rank=3, sink=True, random_state=0).fit(A, attend(A))
    assert model.factors_[0].shape == (2, 5, 3) and model.factors_[1].shape == (5, 3)
    # exp(-0.5) on every logit is exp(0.5) on the sink.
    assert np.abs(model.sink_ - np.array([0.8, 0.3])).max() < 1e-5
    assert model.relative_error(T, attend(T)) < 1e-6
    assert model.predict(T).shape == (2, 50, 50)


def shares(rng, n=60, scale=1.0):
    e = np.exp(scale * rng.standard_normal((n, n)))
    return e / e.sum(axis=1, keepdims=True)


def test_rows_that_do_not_sum_to_one_are_named_with_their_cause():
    rng = np.random.default_rng(0)
    full = shares(rng)
    assert sums_note(full, None) is None
    for dtype in (np.float32, np.float16):
        assert sums_note(full.astype(dtype), None) is None
    assert sums_note(torch.tensor(full).to(torch.bfloat16), None) is None
    top = np.where(full >= np.sort(full, axis=1)[:, -8:-7], full, 0.0)
    assert "60 of 60 rows sum to" in sums_note(top, None) and "top-k" in sums_note(top, None)
    dropped = full * (rng.random(full.shape) < 0.8) / 0.8
    assert "dropout" in sums_note(dropped, None)
    assert "sink=True" in sums_note(0.7 * full, None)
    assert "not causal" in sums_note(full, "causal")
    lower = np.tril(full)
    assert sums_note(lower / lower.sum(axis=1, keepdims=True), "causal") is None
    assert "padding" in sums_note(np.concatenate([0.7 * full[:50], np.zeros((10, 60))]), None)
    assert sums_note(5.0 * full, None) is None


def test_top_k_and_dropout_are_exact_with_a_mask():
    rng = np.random.default_rng(1)
    A, T = rng.standard_normal((2, 60, 5))
    X = rng.standard_normal((5, 5)) / 3.0

    def attend(A):
        e = np.exp(A @ X @ A.T)
        return e / e.sum(axis=1, keepdims=True)

    full = attend(A)
    top = np.where(full >= np.sort(full, axis=1)[:, -20:-19], full, 0.0)
    dropped = full * (rng.random(full.shape) < 0.9) / 0.9
    for maps in (top, dropped):
        with pytest.warns(UserWarning, match="mask=maps > 0"):
            AttentionRegressor(loss="log_ratio").fit(A, maps)
        model = AttentionRegressor(loss="log_ratio").fit(A, maps, mask=maps > 0)
        assert model.relative_error(T, attend(T)) < 1e-9


def test_masks_by_name():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((9, 3))
    t, s = np.indices((9, 9))
    for name, seen in (("causal:3", (s <= t) & (s > t - 3)), ("window:2", np.abs(t - s) <= 2)):
        problem = problems.Attention(A, A, shares(rng, 9), mask=name)
        assert ((problem.predict(np.zeros((3, 3))) > 0) == seen).all()


def test_a_slope_with_the_distance_is_a_feature():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((40, 4))
    distance = np.subtract.outer(np.arange(40.0), np.arange(40.0))
    e = np.where(distance >= 0, np.exp(A @ np.diag([1.0, -1.0, 0.5, 0.0]) @ A.T - 0.25 * distance), 0.0)
    model = AttentionRegressor(mask="causal").fit(
        A, e / e.sum(axis=1, keepdims=True), pair_features=[-distance]
    )
    assert model.feature_coef_[0] == pytest.approx(0.25, abs=1e-6)


def test_few_pairs_are_counted():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((8, 8))
    model = AttentionRegressor(rank=6, softcap=5.0, max_iter=1, n_starts=1)
    with pytest.warns() as said:
        model.fit(A, shares(rng, 8))
    assert any("64 pairs serve 96 unknowns" in str(w.message) for w in said)


def test_survey_knows_every_head():
    model = tiny("llama", hidden_size=16, num_attention_heads=2, head_dim=8, num_key_value_heads=1)
    table = heads.survey(model, texts(30, 30), max_iter=1)
    assert [(row.layer, row.head) for row in table.rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    seen = heads.observe(model, texts(30, 30), 1, 1)
    row, B = table.rows[3], np.stack(seen.maps)
    t, s = np.indices((30, 30))
    assert row.profile[1] == pytest.approx(float(B[:, t - s == 1].sum()) / 60, rel=1e-5)
    assert row.mean_distance == pytest.approx(float((B * (t - s)).sum()) / 60, rel=1e-5)
    assert row.sink_share == pytest.approx(float(B[:, 1:, 0].mean()), rel=1e-5)
    assert 1 <= row.rank <= 8 and 0 < row.held_out_error < 3
    frame = table.to_frame()
    assert frame.shape == (4, 16) and frame["distance_0"][3] == row.profile[0]
    assert table.to_markdown().count("\n") == 5 and table._repr_html_().count("<tr>") == 5
    assert len(repr(table).splitlines()) == 5
    assert len(table.picture().axes) == 8
