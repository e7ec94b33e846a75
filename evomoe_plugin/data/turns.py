"""Prompts with responses, and chats: each record becomes alternating context and target text.

The fields of a record are those of the tools that such data is made for: `prompt` and `response`;
OpenAI's `messages`; ShareGPT's `conversations`; Alpaca's `instruction`, `input` and `output`, with
LLaMA-Factory's `system` and `history`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.chat_template import ChatTemplate, Message

ROLES = ("system", "user", "assistant")
RESPONSES = ("response", "assistant")
PLACE = "{}"
# ShareGPT's names of the roles, and the usual ones.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
# The fields that tell a format.
_FORMATS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction",),
    "prompt": ("prompt", "response"),
}
FORMATS = (
    'each must be {"prompt": "…", "response": "…"}, {"messages": [{"role": "user", "content": '
    '"…"}, {"role": "assistant", "content": "…"}]}, {"conversations": [{"from": "human", "value": '
    '"…"}, {"from": "gpt", "value": "…"}]} or {"instruction": "…", "input": "…", "output": "…"}'
)


class BadRecord(ValueError):
    """Describes what is wrong with a record."""


class Turn(NamedTuple):
    """A stretch of text; a target is a response, which is trained on."""

    text: str
    is_target: bool


class Turns(NamedTuple):
    """A record. Between two targets there is at most one context turn; the last turn is a target.

    `are_ended` says that targets contain the token that ends them; others are followed by an
    end-of-sentence.
    """

    turns: list[Turn]
    are_ended: bool = False


@dataclass(frozen=True)
class Templates:
    r"""The text around each content: `{}` is the content, `\n` a newline, `\t` a tab.

    In the templates of responses, text before `{}` is context, not target, except for spaces
    directly before it: tokenizers join them to the following word.
    """

    prompt: str = "{}"
    response: str = "{}"
    system: str = "{} "
    user: str = "User: {} "
    assistant: str = "Assistant: {}"

    def validate(self) -> None:
        """Raises OptionError for a template that does not contain `{}` exactly once."""
        for role, template in vars(self).items():
            if template.count(PLACE) != 1:
                fault = "give a text that contains {} once, in the place of the content"
                raise OptionError(f"{role}_template", repr(template), fault)

    def turns(self, role: str, content: str, name: str) -> list[Turn]:
        """A content in its template. Raises BadRecord, with `name`, for an empty response."""
        template = getattr(self, role).replace("\\n", "\n").replace("\\t", "\t")
        before, after = template.split(PLACE)
        if role not in RESPONSES:
            return [Turn(before + content + after, False)]
        _check_response(content, name)
        label = before.rstrip()
        return [Turn(label, False), Turn(before[len(label) :] + content + after, True)]


def read_turns(
    record: Any, templates: Templates, chat_template: ChatTemplate | None = None
) -> Turns:
    """The turns of a record; text after the last response is dropped.

    Args:
        record: a JSON value.
        chat_template: for chats, instead of the templates of their roles.
    Raises:
        BadRecord: it has another form.
        BadTemplate: the chat template cannot write it.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"is not an object but {_kind(record)}")
    name = _format_of(record)
    if name == "prompt":
        texts = {name: _text(record, name, "") for name in ("prompt", "response")}
        turns = [turn for name, text in texts.items() for turn in templates.turns(name, text, name)]
        return Turns(_merge_context(turns))
    messages = list(_READERS[name](record))
    last = max((n for n, m in enumerate(messages) if m[0].role == "assistant"), default=None)
    if last is None:
        raise BadRecord("has no assistant message, so there is nothing to train on")
    messages = messages[: last + 1]
    if chat_template is None:
        turns = [turn for m, where in messages for turn in templates.turns(*m, where)]
        return Turns(_merge_context(turns))
    for message, where in messages:
        if message.role == "assistant":
            _check_response(message.content, where)
    spans = chat_template.spans([message for message, _ in messages])
    return Turns(_merge_context([Turn(*span) for span in spans]), are_ended=True)


def _format_of(record: dict[str, Any]) -> str:
    found = {
        name: next(field for field in fields if field in record)
        for name, fields in _FORMATS.items()
        if any(field in record for field in fields)
    }
    if len(found) > 1:
        raise BadRecord(f"has {' and '.join(found.values())}, which are of different formats")
    return next(iter(found), "prompt")


def _openai(record: dict[str, Any]) -> Iterator[tuple[Message, str]]:
    for message, where in _objects(record, "messages", "message"):
        role, content = (_text(message, name, f" of {where}") for name in ("role", "content"))
        if role not in ROLES:
            raise BadRecord(f"role {role!r} of {where} is none of: {', '.join(ROLES)}")
        yield Message(role, content), f"content of {where}"


def _sharegpt(record: dict[str, Any]) -> Iterator[tuple[Message, str]]:
    yield from _system(record)
    for turn, where in _objects(record, "conversations", "turn"):
        role, content = (_text(turn, name, f" of {where}") for name in ("from", "value"))
        if role not in _SHAREGPT_ROLES:
            raise BadRecord(f"from {role!r} of {where} is none of: {', '.join(_SHAREGPT_ROLES)}")
        yield Message(_SHAREGPT_ROLES[role], content), f"value of {where}"


def _alpaca(record: dict[str, Any]) -> Iterator[tuple[Message, str]]:
    yield from _system(record)
    history = record.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        where = f"pair {number} of history"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord(f"{where} is no list of an instruction and its response")
        texts = {f"text {n} of {where}": text for n, text in enumerate(pair, 1)}
        for role, name in zip(("user", "assistant"), texts, strict=True):
            yield Message(role, _text(texts, name, "")), name
    parts = [_text(record, "instruction", "")]
    if record.get("input"):
        parts.append(_text(record, "input", ""))
    yield Message("user", "\n".join(parts)), "instruction"
    yield Message("assistant", _text(record, "output", "")), "output"


_READERS = {"messages": _openai, "conversations": _sharegpt, "instruction": _alpaca}


def _system(record: dict[str, Any]) -> Iterator[tuple[Message, str]]:
    if record.get("system"):
        yield Message("system", _text(record, "system", "")), "system"


def _objects(record: dict[str, Any], name: str, of_one: str) -> Iterator[tuple[dict, str]]:
    """The objects of a list, with their names for errors."""
    values = record[name]
    if not isinstance(values, list):
        raise BadRecord(f"{name} is not a list but {_kind(values)}")
    for number, value in enumerate(values, 1):
        where = f"{of_one} {number}"
        if not isinstance(value, dict):
            raise BadRecord(f"{where} is not an object but {_kind(value)}")
        yield value, where


def _check_response(text: str, name: str) -> None:
    if not text.strip():
        raise BadRecord(f"{name} is empty, so there is nothing to train on")


def _text(record: dict, name: str, where: str) -> str:
    if name not in record:
        raise BadRecord(f"has no {name}{where}")
    text = record[name]
    if not isinstance(text, str):
        raise BadRecord(f"{name}{where} is not a text but {_kind(text)}")
    # JSON strings may contain lone surrogates, which have no UTF-8 encoding.
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise BadRecord(f"{name}{where} contains a lone surrogate")
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _merge_context(turns: list[Turn]) -> list[Turn]:
    """Join adjacent context turns, drop empty turns, and end with a target."""
    merged: list[Turn] = []
    for turn in (turn for turn in turns if turn.text):
        if merged and not merged[-1].is_target and not turn.is_target:
            turn = Turn(merged.pop().text + turn.text, False)
        merged.append(turn)
    while not merged[-1].is_target:
        merged.pop()
    return merged
