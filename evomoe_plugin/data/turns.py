"""Files of prompts and responses: each line becomes alternating context and target text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evomoe_plugin.config.errors import OptionError

ROLES = ("system", "user", "assistant")
RESPONSES = ("response", "assistant")
PLACE = "{}"


class BadLine(ValueError):
    """Describes what is wrong with a line."""


class Turn(NamedTuple):
    """A stretch of text; a target is a response, trained on and ended by an end-of-sentence."""

    text: str
    is_target: bool


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
        """A content in its template. Raises BadLine, with `name`, for an empty response."""
        template = getattr(self, role).replace("\\n", "\n").replace("\\t", "\t")
        before, after = template.split(PLACE)
        if role not in RESPONSES:
            return [Turn(before + content + after, False)]
        if not content.strip():
            raise BadLine(f"{name} is empty, so there is nothing to train on")
        label = before.rstrip()
        return [Turn(label, False), Turn(before[len(label) :] + content + after, True)]


def read_turns(path: Path, templates: Templates) -> Iterator[tuple[int, list[Turn]]]:
    """The turns of each line of a file, with the number of the line, from 1.

    Between two targets there is at most one context turn. The last turn is a target: text after
    the last response is dropped.

    Raises:
        OptionError: a line is malformed, or the file is empty.
    """
    number = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, _merge_context(_parse(line, templates))
            except BadLine as error:
                raise bad_line(path, number, error) from None
    if not number:
        raise OptionError("DATA", path, f"is empty; {REMEDY}")


REMEDY = (
    'each line must be {"prompt": "…", "response": "…"} or {"messages": [{"role": "user", '
    '"content": "…"}, {"role": "assistant", "content": "…"}]}'
)


def bad_line(path: Path, number: int, wrong: Any) -> OptionError:
    """The error for a line of a file."""
    return OptionError("DATA", f"{path}, line {number}", f"{wrong}; {REMEDY}")


def _parse(line: bytes, templates: Templates) -> list[Turn]:
    if not line.strip():
        raise BadLine("is empty")
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadLine(f"is not UTF-8 (byte {error.start + 1})") from None
    except ValueError as error:
        raise BadLine(f"is not JSON ({error})") from None
    except RecursionError:
        raise BadLine("is nested too deeply") from None
    if not isinstance(record, dict):
        raise BadLine(f"is not an object but {_kind(record)}")
    if "messages" not in record:
        texts = {name: _text(record, name, "") for name in ("prompt", "response")}
        return [turn for name, text in texts.items() for turn in templates.turns(name, text, name)]
    if "prompt" in record or "response" in record:
        raise BadLine("has messages and a prompt or response")
    return _chat(record["messages"], templates)


def _chat(messages: Any, templates: Templates) -> list[Turn]:
    if not isinstance(messages, list):
        raise BadLine(f"messages is not a list but {_kind(messages)}")
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise BadLine(f"{where} is not an object but {_kind(message)}")
        role, content = (_text(message, name, f" of {where}") for name in ("role", "content"))
        if role not in ROLES:
            raise BadLine(f"role {role!r} of {where} is none of: {', '.join(ROLES)}")
        turns += templates.turns(role, content, f"content of {where}")
    if not any(turn.is_target for turn in turns):
        raise BadLine("has no assistant message, so there is nothing to train on")
    return turns


def _text(record: dict, name: str, where: str) -> str:
    if name not in record:
        raise BadLine(f"has no {name}{where}")
    text = record[name]
    if not isinstance(text, str):
        raise BadLine(f"{name}{where} is not a text but {_kind(text)}")
    # JSON strings may contain lone surrogates, which have no UTF-8 encoding.
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise BadLine(f"{name}{where} contains a lone surrogate")
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
