"""What a model is run on: plain text, token ids, or a chat in the model's own template; as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.audit.errors import AuditError, NoRoundTrip

if TYPE_CHECKING:
    from attnfit.audit.models.model import Model

Tokens = list[int]
Message = Mapping[str, Any]
# A text, its tokens, or the messages of a chat.
Text = str | Sequence[int] | Sequence[Message]
# Stand for the content of a message while a template is looked at: characters of private use.
MARK = "\ue000{}\ue001"


@dataclass(frozen=True)
class Tokenised:
    """A text as tokens.

    Attributes
    ----------
    tokens : list of int
    content : list of bool
        Whether each is more than a part of a chat template, which is no secret.
    """

    tokens: Tokens
    content: list[bool]


def is_chat(text: Text) -> bool:
    """Whether a text is a list of messages."""
    return not isinstance(text, str) and len(text) > 0 and isinstance(text[0], Mapping)


def tokenised(model: Model, text: Text) -> Tokenised:
    """Return the tokens of a text.

    Raises
    ------
    NoRoundTrip
        If the tokens do not stand for the text.
    AuditError
        If the text is empty or no text, or the model has no chat template for messages.
    """
    if isinstance(text, Mapping) or not isinstance(text, str | Sequence | np.ndarray):
        raise AuditError(
            f"a text must be a str, a list of token ids or a list of messages, not {type(text).__name__}; "
            "put the messages of a chat, or the tokens of a text, in a list of their own"
        )
    if not len(text):
        raise AuditError("text is empty: there is nothing to observe")
    if isinstance(text, str):
        tokens = _of_text(model, text)
    elif is_chat(text):
        return _of_chat(model, text)  # type: ignore[arg-type]
    else:
        tokens = _checked(model, text)
    return Tokenised(tokens, [True] * len(tokens))


def _checked(model: Model, ids: Sequence[Any]) -> Tokens:
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise AuditError(f"token {place} of the text is {token!r}, not a number: give ids or a str")
        if not 0 <= token < model.n_vocabulary:
            raise AuditError(f"token {place} of the text is {token}; {model.name!r} has {model.n_vocabulary}")
    return [int(token) for token in ids]


def _of_text(model: Model, text: str) -> Tokens:
    tokenizer = model.tokenizer
    tokens: Tokens = _ids(model, text)
    unknown = tokenizer.unk_token_id
    # Byte-level tokenizers often name their end-of-text token "unknown" although they have none.
    if unknown is not None and unknown in tokens and unknown != tokenizer.eos_token_id:
        place = tokens.index(unknown)
        raise NoRoundTrip(
            f"token {place} of the text is unknown to the tokenizer of {model.name!r}, after character "
            f"{len(model.detokenise(tokens[:place]))}; leave those characters out"
        )
    back = model.detokenise(tokens)
    # Encoders often fold case and accents: what they see must at least be stable.
    if back != text and not (model.kind == "encoder" and tokenizer(back)["input_ids"] == tokens):
        raise _other(model, text, back)
    return tokens


def _ids(model: Model, text: str, **options: Any) -> Any:
    try:
        encoded = model.tokenizer(text, **options)
    except (TypeError, UnicodeError) as error:
        at = f" at character {error.start}" if isinstance(error, UnicodeEncodeError) else ""
        raise NoRoundTrip(f"text is not valid Unicode{at}") from error
    return encoded if options else [int(token) for token in encoded["input_ids"]]


def _other(model: Model, text: str, back: str) -> NoRoundTrip:
    # Not the text itself: messages get into reports that are passed on.
    same = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
    return NoRoundTrip(
        f"the tokenizer of {model.name!r} turns the text into another one, from character {same} on"
    )


def _of_chat(model: Model, messages: Sequence[Message]) -> Tokenised:
    for place, message in enumerate(messages):
        named = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not named or not isinstance(message.get("content"), str):
            raise AuditError(f"message {place} of the chat must be an object with texts 'role' and 'content'")
    if not getattr(model.tokenizer, "chat_template", None):
        raise AuditError(
            f"model {model.name!r} has no chat template: give the texts as the model is run on them (--texts)"
        )
    shown = _rendered(model, messages)
    encoded = _ids(model, shown, add_special_tokens=False, return_offsets_mapping=True)
    tokens = [int(token) for token in encoded["input_ids"]]
    back = str(model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
    if back != shown and model.tokenizer(back, add_special_tokens=False)["input_ids"] != tokens:
        raise _other(model, shown, back)
    spans = _contents(model, messages, shown)
    places = encoded["offset_mapping"]
    content = [any(first < end and last > start for start, end in spans) for first, last in places]
    if not any(content):
        raise AuditError("the chat has no content: all of its messages are empty")
    return Tokenised(tokens, content)


def _rendered(model: Model, messages: Sequence[Message]) -> str:
    try:
        return str(model.tokenizer.apply_chat_template(list(map(dict, messages)), tokenize=False))
    # A template is a program of its own, which refuses what it does not know in its own ways.
    except Exception as error:
        raise AuditError(f"the chat template of {model.name!r} does not take this chat: {error}") from error


def _contents(model: Model, messages: Sequence[Message], shown: str) -> list[tuple[int, int]]:
    """Return where in a chat the contents of its messages are: the rest is what the template says of any."""
    marked = [{**message, "content": MARK.format(k)} for k, message in enumerate(messages)]
    rest, spans, at = _rendered(model, marked), [], 0
    for k, message in enumerate(messages):
        before, mark, rest = rest.partition(MARK.format(k))
        after = rest.partition(MARK.format(k + 1))[0]
        start = at + len(before)
        # Some templates strip what they are given.
        for content in (message["content"], message["content"].strip()):
            if mark and shown[at:start] == before and shown.startswith(content + after, start):
                at = start + len(content)
                spans.append((start, at))
                break
        else:
            raise AuditError(
                f"the chat template of {model.name!r} changes message {k}, so that its tokens cannot be told "
                "from those of the template: give the chat as token ids"
            )
    return spans
