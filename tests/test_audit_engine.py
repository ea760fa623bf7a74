"""Candidates after a shared prefix, compared with plain forward passes of transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from attnfit.audit import position  # noqa: E402
from attnfit.audit.candidates import CandidateSet  # noqa: E402
from attnfit.audit.embedding_newton import EmbeddingNewton  # noqa: E402
from attnfit.audit.engine.prefix import Prefix  # noqa: E402
from attnfit.audit.engine.prior import Prior  # noqa: E402
from attnfit.audit.engine.ways import Fast  # noqa: E402
from attnfit.audit.errors import AuditError  # noqa: E402
from attnfit.audit.logits import last_states  # noqa: E402
from attnfit.audit.models.blocks import capture  # noqa: E402
from attnfit.audit.models.directory import attention_for  # noqa: E402
from attnfit.audit.models.model import Model  # noqa: E402
from attnfit.audit.reference import Reference  # noqa: E402
from attnfit.audit.target import Target  # noqa: E402

TOKENS = [3, 700, 41, 41, 9, 260, 12]


def new_model(family):
    """A small random model of one architecture."""
    torch.manual_seed(1)
    shape = {"vocab_size": 800, "max_position_embeddings": 64}
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=800, n_embd=48, n_layer=3, n_head=4, n_positions=64)
    elif family == "gemma2":
        config = transformers.Gemma2Config(
            **shape, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )  # fmt: skip
    else:
        kinds = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
        config = kinds[family](
            **shape,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    family = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    module = family._from_config(config, attn_implementation=attention_for(config, family))
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return Model(family, module, None, "causal")


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen2", "gemma2"])
def model(request):
    return new_model(request.param)


@pytest.mark.parametrize("length", [0, 1, 6])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_candidates_are_plain_forward_passes(model, layer, length):
    prefix = Prefix(model, layer)
    if length:
        extended = prefix.extend(TOKENS[:length])
        np.testing.assert_allclose(extended, model.states(TOKENS[:length], layer), rtol=1e-5, atol=1e-5)
    candidates = [5, TOKENS[length], 799, 5]
    states = prefix.candidates(candidates)
    for token, state in zip(candidates, states, strict=True):
        plain = model.states([*TOKENS[:length], token], layer)[-1]
        np.testing.assert_allclose(state, plain, rtol=1e-5, atol=1e-5)
    assert prefix.tokens == TOKENS[:length]
    assert prefix.n_candidates == 4


def test_prefixes_grow_and_shrink(model):
    prefix = Prefix(model, 3)
    prefix.extend(TOKENS)
    prefix.crop(2)
    prefix.candidates([1, 2, 3])
    rest = prefix.extend(TOKENS[2:])
    np.testing.assert_allclose(rest, model.states(TOKENS, 3)[2:], rtol=1e-5, atol=1e-5)
    assert model.module.config._attn_implementation == attention_for(model.module.config, type(model.module))


@pytest.mark.parametrize("chunk", [2, 1024])
def test_a_candidate_that_was_just_tried_is_not_run_again(model, monkeypatch, chunk):
    monkeypatch.setattr(Fast, "chunk", chunk)
    prefix = Prefix(model, 1, 3)
    prefix.extend(TOKENS[:3])
    for at in (3, 4, 5):
        prefix.candidates([*range(5), 799, TOKENS[at]])
        run = prefix.n_forwards
        assert prefix.extend([TOKENS[at]]).shape == (1, model.width)
        assert prefix.n_forwards == run
    assert prefix.tokens == TOKENS[:6]
    prefix.candidates([TOKENS[6]])
    prefix.extend(TOKENS[6:])
    np.testing.assert_allclose(prefix.states[0], model.states(TOKENS, 3), rtol=1e-5, atol=1e-5)


def test_what_was_tried_elsewhere_is_run_again(model):
    """After other tokens, or in another place, a candidate has other keys and values."""
    prefix = Prefix(model, 3)
    prefix.candidates([TOKENS[1]])
    prefix.extend(TOKENS[:1])
    prefix.extend(TOKENS[1:2])
    prefix.candidates([TOKENS[1]])
    prefix.crop(1)
    prefix.extend(TOKENS[1:2])
    prefix.candidates([TOKENS[2]])
    prefix.embedded(model.embeddings[[1, 2]])
    prefix.extend(TOKENS[2:3])
    prefix.extend(TOKENS[3:])
    assert prefix.n_forwards == 1 + len(TOKENS)
    np.testing.assert_allclose(prefix.states[0], model.states(TOKENS, 3), rtol=1e-5, atol=1e-5)


def test_the_prior_uses_a_prefix_that_is_run_anyway(model):
    for layer, shared in ((model.n_layers + 1, True), (model.n_layers, True), (model.n_layers - 1, False)):
        prefix = Prefix(model, layer)
        prior = Prior(model, prefix)
        for length in (2, 5):
            prefix.extend(TOKENS[len(prefix.tokens) : length])
            plain = torch.log_softmax(torch.from_numpy(model.logits(TOKENS[:length]))[-1], -1)
            np.testing.assert_allclose(prior.after(prefix.tokens), plain, atol=1e-4)
        assert prior.n_forwards == (0 if shared else 5)


def test_several_layers_in_one_pass(model):
    prefix = Prefix(model, 1, 3)
    prefix.extend(TOKENS[:4])
    first, third = prefix.embedded_at_all(model.embeddings[[7, 8]])
    np.testing.assert_allclose(first[1], model.states([*TOKENS[:4], 8], 1)[-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(third[0], model.states([*TOKENS[:4], 7], 3)[-1], rtol=1e-5, atol=1e-5)


def test_the_prior_is_the_models_own(model):
    prior = Prior(model)
    for length in (3, 7, 7, 2, 5):
        plain = torch.log_softmax(torch.from_numpy(model.logits(TOKENS[:length]))[-1], -1)
        np.testing.assert_allclose(prior.after(TOKENS[:length]), plain, atol=1e-4)
    assert float(prior.after([]).std()) == 0.0


def test_the_prior_allows_for_a_token_before_the_text(tiny):  # noqa: F811
    prior = Prior(tiny)
    end = tiny.tokenizer.eos_token_id
    tokens = tiny.tokenise(tiny.private_texts[0])
    opened = torch.softmax(torch.from_numpy(tiny.logits([end, *tokens])), -1)
    plain = torch.softmax(torch.from_numpy(tiny.logits(tokens)), -1)
    np.testing.assert_allclose(prior.after([]).exp(), opened[0], atol=1e-5)
    np.testing.assert_allclose(prior.after(tokens[:2]).exp(), (opened[2] + plain[1]) / 2, atol=1e-5)
    np.testing.assert_allclose(prior.after(tokens[:6]).exp(), plain[5], atol=1e-5)


def test_the_jacobian_is_autodiffs(model):
    """Forward differences against backward passes through the plain model."""
    prefix = Prefix(model, 2)
    prefix.extend(TOKENS[:4])
    e = model.embeddings[17].clone()
    target = Target(torch.zeros(48), torch.zeros(48), torch.full((48,), 2.0))
    search = EmbeddingNewton(CandidateSet(prefix, target), model.embeddings, 10**6)
    found = search._jacobian(e, prefix.embedded(e[None])[0]).matrix

    def plain(vector):
        vectors = torch.cat([model.embeddings[TOKENS[:4]], vector[None]])
        out = model.base(inputs_embeds=vectors[None], output_hidden_states=True, use_cache=False)
        return out.hidden_states[2][0, -1] / 2.0

    exact = torch.autograd.functional.jacobian(plain, e).T
    assert float((found - exact).norm() / exact.norm()) < 2e-2


def test_newton_finds_a_token_it_was_not_told(model):
    prefix = Prefix(model, 2)
    prefix.extend(TOKENS[:4])
    truth = 321
    state = prefix.candidates([truth])[0]
    scale = prefix.candidates(range(0, 800, 20)).std(0)
    evaluated = CandidateSet(prefix, Target(state, torch.zeros(48), scale))
    evaluated.add(list(range(16)))
    assert EmbeddingNewton(evaluated, model.embeddings, 10**6).search()
    assert evaluated.nearest()[0] == truth


@pytest.mark.parametrize(("rank", "stage"), [(100, "likely"), (500, "newton")])
def test_likely_words_come_before_newtons_method(model, monkeypatch, rank, stage):
    """Where neither probe nor regression tells anything, the prior does, as far as it is asked."""
    assert Fast.chunk >= position.LIKELY_BATCH and position.LIKELY % position.LIKELY_BATCH == 0
    monkeypatch.setattr(position, "BATCHES", ())
    monkeypatch.setattr(position, "LIKELY", position.LIKELY_BATCH)
    monkeypatch.setattr(position, "regressed_embedding", lambda *_: None)
    monkeypatch.setattr(position, "local_embeddings", lambda *_: torch.zeros(0, model.n_vocabulary))
    prefix, truth = Prefix(model, 2), 321
    prefix.extend(TOKENS[:4])
    state = prefix.candidates([truth])[0]
    scale = prefix.candidates(range(0, 800, 20)).std(0)
    evaluated = CandidateSet(prefix, Target(state, torch.zeros(48), scale))
    others = [token for token in range(model.n_vocabulary) if token != truth]
    order = [*others[:rank], truth, *others[rank:]]
    prior = torch.empty(model.n_vocabulary)
    prior[order] = -torch.arange(model.n_vocabulary, dtype=torch.float32)
    blank = SimpleNamespace(
        probe=SimpleNamespace(estimate=lambda _: None),
        scores=lambda rows: torch.zeros(model.n_vocabulary) if rows is None else rows,
    )
    search = position.PositionSearch(
        evaluated, position.Clues(blank, blank, prior), model.embeddings, 10**6, cheap=False
    )
    assert search.run() == stage
    assert evaluated.nearest()[0] == truth
    assert (evaluated.n_candidates <= 16 + position.LIKELY) == (stage == "likely")


@pytest.mark.parametrize(("batches", "stage"), [(position.BATCHES, "regression"), ((), "likely")])
def test_a_probe_that_is_wrong_altogether_does_not_outvote_the_prior(model, monkeypatch, batches, stage):
    prefix, truth = Prefix(model, 2), 321
    prefix.extend(TOKENS[:4])
    state = prefix.candidates([truth])[0]
    evaluated = CandidateSet(
        prefix, Target(state, torch.zeros(48), prefix.candidates(range(0, 800, 20)).std(0))
    )
    others = [token for token in range(model.n_vocabulary) if token != truth]
    order = [*others[:40], truth, *others[40:]]
    prior = torch.empty(model.n_vocabulary)
    prior[order] = -0.1 * torch.arange(model.n_vocabulary, dtype=torch.float32)
    scores = torch.arange(model.n_vocabulary, dtype=torch.float32)
    scores[truth] = -1e5
    monkeypatch.setattr(position, "regressed_embedding", lambda *_: None)
    monkeypatch.setattr(position, "local_embeddings", lambda *_: torch.zeros(3, 1))
    wrong = SimpleNamespace(
        probe=SimpleNamespace(estimate=lambda _: None),
        scores=lambda rows: scores if rows is None else scores.expand(len(rows), -1),
    )
    search = position.PositionSearch(
        evaluated, position.Clues(wrong, wrong, prior), model.embeddings, 10**6, cheap=False
    )
    monkeypatch.setattr(position, "BATCHES", batches)
    monkeypatch.setattr(position, "LIKELY", position.LIKELY_BATCH)
    assert search.run() == stage
    assert evaluated.nearest()[0] == truth
    assert evaluated.n_candidates <= 16 + (200 if batches else position.LIKELY)


# ---- logits that are not plain -----------------------------------------------------------------------------


def test_logits_are_the_models_own(model):
    with torch.no_grad():
        own = model.module(torch.tensor([TOKENS])).logits[0]
    np.testing.assert_allclose(model.logits(TOKENS), own, rtol=1e-4, atol=1e-4)


def test_capped_logits_are_uncapped():
    capped = new_model("gemma2")
    assert capped.softcap == 3.0
    logits = capped.logits(TOKENS)
    assert 2.0 < np.abs(logits).max() < 3.0
    states, _ = last_states(capped, logits)
    truth = torch.from_numpy(capped.states(TOKENS, 4))
    assert float((states - truth).norm() / truth.norm()) < 1e-2


def test_scaled_logits_are_the_models_own():
    config = transformers.CohereConfig(
        vocab_size=800, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, logit_scale=0.25, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    scaled = Model("scaled", transformers.AutoModelForCausalLM.from_config(config), None, "causal")
    with torch.no_grad():
        np.testing.assert_allclose(
            scaled.logits(TOKENS), scaled.module(torch.tensor([TOKENS])).logits[0], atol=1e-5
        )
    states, _ = last_states(scaled, scaled.logits(TOKENS))
    truth = torch.from_numpy(scaled.states(TOKENS, 3))
    assert float((states - truth).norm() / truth.norm()) < 1e-3


def test_logits_that_the_head_does_not_give_are_refused():
    odd = new_model("llama")
    odd.module.lm_head.register_forward_hook(lambda module, args, out: out.square())
    with pytest.raises(AuditError, match="not its head's output"):
        odd.logits(TOKENS)
    assert odd.states(TOKENS, 2).shape == (7, 48)


# ---- hooks -------------------------------------------------------------------------------------------------


def n_hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.module.modules())


@pytest.mark.parametrize("side", ["input", "output"])
def test_no_hook_outlives_an_interruption(side):
    llama = new_model("llama")

    def stop(*_):
        raise KeyboardInterrupt

    handle = llama.blocks[1].register_forward_pre_hook(stop)
    before = n_hooks(llama)
    with pytest.raises(KeyboardInterrupt):
        capture(llama.base, [llama.blocks[2]], side, input_ids=torch.tensor([TOKENS]))
    assert n_hooks(llama) == before
    handle.remove()


def test_no_hook_outlives_one_that_cannot_be_set():
    llama = new_model("llama")
    with pytest.raises(AttributeError):
        capture(llama.base, [llama.blocks[0], None], "output", input_ids=torch.tensor([TOKENS]))
    assert n_hooks(llama) == 0


def test_words_like_those_whose_states_are_near_come_before_likely_ones(model, monkeypatch, tmp_path):
    """Once the states after another text are known, they stand in for the regression; a budget smaller than
    the vocabulary does not pay for making them.
    """
    monkeypatch.setenv("ATTNFIT_CACHE", str(tmp_path))
    monkeypatch.setattr(position, "BATCHES", ())
    prefix, truth = Prefix(model, 2), 321
    prefix.extend(TOKENS[:4])
    state = prefix.candidates([truth])[0]
    scale = prefix.candidates(range(0, 800, 20)).std(0)
    made = Reference(model, 2, scale)
    blank = SimpleNamespace(
        probe=SimpleNamespace(
            estimate=lambda _: None, precision=torch.eye(48), displacement=torch.zeros_like
        ),
        scores=lambda rows: torch.zeros(model.n_vocabulary),
    )
    flat = torch.zeros(model.n_vocabulary)

    def search(budget):
        evaluated = CandidateSet(prefix, Target(state, torch.zeros(48), scale))
        clues = position.Clues(blank, blank, flat)
        found = position.PositionSearch(
            evaluated, clues, model.embeddings, budget, cheap=False, reference=made
        )
        monkeypatch.setattr(found, "_try_likely", lambda: False)
        monkeypatch.setattr(found, "_newton", lambda: False)
        monkeypatch.setattr(found, "_scan", lambda: False)
        return found.run(), evaluated

    assert search(model.n_vocabulary - 1)[0] is None
    assert not made.learned
    # As long as it is not made, embeddings are asked first, and may do.
    monkeypatch.setattr(position, "BATCHES", (16,))
    monkeypatch.setattr(position, "regressed_embedding", lambda *_: None)
    blank.scores = lambda rows: torch.nn.functional.one_hot(torch.tensor(truth), model.n_vocabulary) * 1e3
    monkeypatch.setattr(position.PositionSearch, "shortlist", lambda self: self._try(list(range(16))))
    assert search(model.n_vocabulary)[0] == "regression"
    assert not made.learned
    blank.scores = lambda rows: flat
    stage, evaluated = search(model.n_vocabulary)
    assert stage == "likeness" and evaluated.nearest()[0] == truth
    assert made.learned and evaluated.n_candidates < 400
