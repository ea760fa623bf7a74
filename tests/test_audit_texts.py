"""Texts, token ids and chats: what a model is run on, and what of it counts."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from audit_families import random_module, trained_tokenizer
from audit_models import audit_cache, tiny  # noqa: F401
from test_cli import one_error, run

from attnfit import audit
from attnfit.audit import calibration, cells
from attnfit.audit.models.texts import tokenised

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "user bada <|im_end|> fo"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small Llama with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = trained_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    random_module("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(home, audit_cache, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    for name, size in {"N_SEQUENCES": 60, "N_CONTEXTS": 4, "LENGTH": 24}.items():
        monkeypatch.setattr(calibration, name, size)
    return audit.load(home)


def test_a_chat_is_what_its_template_says(model):
    shown = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nuser bada <|im_end|> fo<|im_end|>\n"
    found = tokenised(model, CHAT)
    assert found.tokens == model.tokenizer(shown, add_special_tokens=False)["input_ids"]
    assert model.detokenise(found.tokens) == shown
    # A word of the content that the template says too is content once.
    said = [t for t, kept in zip(found.tokens, found.content, strict=True) if kept]
    assert model.detokenise(said) == "be briefuser bada <|im_end|> fo"


def test_special_tokens_in_a_text_are_text(model):
    text = "bada <|im_start|> fo<|im_end|>"
    assert model.detokenise(model.tokenise(text)) == text
    found = audit.invert(model, audit.observe(model, text, "hidden:2"))
    assert (found.text, found.verified) == (text, True)


def test_what_a_template_strips_is_no_content(model):
    model.tokenizer.chat_template = TEMPLATE.replace("m['content']", "m['content'] | trim")
    chat = [{"role": "user", "content": "  bada fo \n"}]
    found = tokenised(model, chat)
    said = [t for t, kept in zip(found.tokens, found.content, strict=True) if kept]
    assert model.detokenise(said) == "bada fo"


def test_templates_that_change_a_message_are_refused(model):
    model.tokenizer.chat_template = TEMPLATE.replace("m['content']", "m['content'] | replace('a', 'u')")
    with pytest.raises(audit.AuditError, match=r"changes message 0.*give the chat as token ids"):
        model.tokenise([{"role": "user", "content": "bada"}])
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(audit.AuditError, match="does not take this chat: roles must alternate"):
        model.tokenise(CHAT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "empty"),
        ("", "empty"),
        ([1, 2, 10**6], "token 2 of the text is 1000000"),
        ([1, True], "token 1 of the text is True"),
        ([3, "a"], "token 1 of the text is 'a'"),
        ([3.0], "token 0 of the text is 3.0"),
        (CHAT[0], "put the messages of a chat"),
        (7, "not int; put"),
        ([{"role": "user"}], "message 0 of the chat must be an object with texts 'role' and 'content'"),
        ([CHAT[0], 3], "message 1"),
        ([{"role": "user", "content": ""}], "no content"),
    ],
)
def test_what_is_no_text(model, text, message):
    with pytest.raises(audit.AuditError, match=message):
        model.tokenise(text)


def test_a_model_without_a_template_says_so(tiny):  # noqa: F811
    with pytest.raises(audit.AuditError, match="'tiny' has no chat template: give the texts as"):
        tiny.tokenise(CHAT)
    for texts, what in ((CHAT, "messages of a chat"), ([1, 2], "tokens of a text")):
        with pytest.raises(audit.AuditError, match=f"put the {what} in a list of their own"):
            audit.run(tiny, texts)


def test_token_ids_are_run_as_they_are(tiny):  # noqa: F811
    tokens = tiny.tokenise(tiny.private_texts[0])
    found = audit.invert(tiny, audit.observe(tiny, tokens, "hidden:1"))
    assert (found.tokens, found.verified) == (tokens, True)
    # No text of its own stands for these, which is what ids are for.
    odd = [tokens[1], 5, 7, *tokens[:3]]
    assert audit.invert(tiny, audit.observe(tiny, odd, "logits")).tokens == odd


def test_shares_are_of_the_content(model):
    """Tokens of the template come back too, and are no leak."""
    report = audit.run(model, [CHAT], ["hidden:2"], [None, "noise:0.2"], budget=1000)
    counted = tokenised(model, CHAT)
    for pair in report.pairs:
        (cell,) = (c for c in report.cells if c.key == cells.Key("hidden:2", pair.defence, 0))
        right = [good and kept for good, kept in zip(cell.right, counted.content, strict=True)]
        assert (pair.tokens_right, pair.tokens) == (sum(right), sum(counted.content))
        assert (pair.all_right, pair.all_tokens) == (sum(cell.right), len(counted.tokens))
        assert pair.leak == pair.token_share == sum(right) / sum(counted.content)
        assert pair.as_json()["all_share"] == sum(cell.right) / len(counted.tokens)
    assert report.pair("hidden:2").token_share == 1.0
    told = report.as_json(redact=False)
    assert told["settings"]["texts"] == [CHAT]
    assert report.as_json()["settings"]["texts"] is None


def test_masked_hides_no_template(model):
    from attnfit.audit.settings import default_access

    assert "masked" in default_access(model, ["a"]) and "masked" not in default_access(model, ["a", CHAT])
    (cell, *_) = audit.run(model, [CHAT], ["masked"], budget=10).cells
    assert cell.status == "error" and "those of a chat are its template's" in cell.message


def test_a_checkpoint_knows_chats(model, tmp_path):
    """Also one that equals a text as JSON; a run goes on from its own only."""
    kept = tmp_path / "kept"
    audit.run(model, [CHAT], ["hidden:2"], budget=1000, checkpoint=kept)
    again = audit.run(model, [CHAT], ["hidden:2"], budget=1000, checkpoint=kept)
    assert again.pair("hidden:2").tokens == sum(tokenised(model, CHAT).content)
    with pytest.raises(audit.AuditError, match="of another audit: texts differ"):
        audit.run(model, [json.dumps(CHAT)], ["hidden:2"], budget=1000, checkpoint=kept)


def test_the_command_takes_chats(home, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text(json.dumps(CHAT) + "\n\n")
    words = ["audit", home, "--access", "hidden:2", "--defences", "none", "--budget", 1000]
    done = run(*words, "--chat", "chats.jsonl", "--fail-above", 0.5, "--report", "out.html")
    assert done.exit_code == 1, done.output
    assert "the tokens of the chat template are no secret and do not count" in " ".join(done.stdout.split())
    assert "100 % with the tokens of the chat template" in (tmp_path / "out.html").read_text()
    assert "--chat chats.jsonl" in (tmp_path / "out.html").read_text()


def test_the_command_takes_token_ids(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    tokens = tiny.tokenise(tiny.private_texts[0])
    (tmp_path / "ids.jsonl").write_text(f"{tokens}\n[]\n")
    words = ["audit", "tiny", "--access", "hidden:1", "--defences", "none", "--budget", 1000]
    done = run(*words, "--tokens", "ids.jsonl", "--json", "out.json")
    assert done.exit_code == 3, done.output
    assert "line 2: text is empty" in " ".join(done.output.split())
    pair = json.loads((tmp_path / "out.json").read_text())["pairs"][0]
    assert (pair["tokens_right"], pair["n_errors"]) == (len(tokens), 1)
    (tmp_path / "bad.jsonl").write_text("[1, 2]\n{}\n")
    (tmp_path / "worse.jsonl").write_text("[1, 2\n")
    assert "line 2 is no list" in one_error(run(*words, "--tokens", "bad.jsonl"))
    assert "line 1 is not JSON" in one_error(run(*words, "--chat", "worse.jsonl"))
    both = run(*words, "--tokens", "ids.jsonl", "--chat", "bad.jsonl")
    assert "--chat and --tokens both say what to audit with" in one_error(both)
