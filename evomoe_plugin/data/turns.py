"""Files of prompts and answers: each line becomes text to read and text to learn, in turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomoe_plugin.config.errors import OptionError

ROLES = ("system", "user", "assistant")
PLACE = "{}"


class BadLine(ValueError):
    """What is wrong with a line, in words."""


@dataclass(frozen=True)
class Turn:
    """A stretch of text."""

    text: str
    learned: bool
    """Whether it is an answer, which ends with an end-of-sentence."""


@dataclass(frozen=True)
class Templates:
    r"""What stands around each text; `{}` is its place, `\n` a new line, `\t` a tab.

    In the templates of answers, what stands before the place is read, not learned, except for
    spaces right before it: tokenizers join them to the word that follows.
    """

    prompt: str = "{}"
    response: str = "{}"
    system: str = "{} "
    user: str = "User: {} "
    assistant: str = "Assistant: {}"

    def validate(self) -> None:
        """Raises OptionError for one without its place, or with several."""
        for role, template in vars(self).items():
            if template.count(PLACE) != 1:
                raise OptionError(f"{role}_template", repr(template),
                                  "give a text with {} once, where the content goes")

    def read(self, role: str, content: str) -> list[Turn]:
        """A content that is not learned."""
        before, after = self._around(role)
        return [Turn(before + content + after, False)]

    def learn(self, role: str, content: str) -> list[Turn]:
        """A content that is learned."""
        before, after = self._around(role)
        label = before.rstrip()
        return [Turn(label, False), Turn(before[len(label):] + content + after, True)]

    def _around(self, role: str) -> list[str]:
        template = getattr(self, role).replace("\\n", "\n").replace("\\t", "\t")
        return template.split(PLACE)


def read_turns(path: Path, templates: Templates) -> Iterator[tuple[int, list[Turn]]]:
    """The turns of each line of a file, and the number of the line, from 1.

    Read turns stand between learned ones, and the last one is learned: what follows the last
    answer is left out.

    Raises:
        OptionError: a line is malformed, or there is none.
    """
    number = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, _joined(_parse(line, templates))
            except BadLine as error:
                raise bad_line(path, number, error) from None
    if not number:
        raise OptionError("DATA", path, f"is empty; {REMEDY}")


REMEDY = ('each line must be {"prompt": "…", "response": "…"} or {"messages": [{"role": "user", '
          '"content": "…"}, {"role": "assistant", "content": "…"}]}')


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
        raise BadLine("is not JSON that can be read (nested too deeply)") from None
    if not isinstance(record, dict):
        raise BadLine(f"is not an object but {_kind(record)}")
    if "messages" not in record:
        prompt, response = (_text(record, name, "") for name in ("prompt", "response"))
        _check_answer(response, "response")
        return templates.read("prompt", prompt) + templates.learn("response", response)
    if "prompt" in record or "response" in record:
        raise BadLine("has messages and a prompt or response")
    return _chat(record["messages"], templates)


def _chat(messages: Any, templates: Templates) -> list[Turn]:
    if not isinstance(messages, list):
        raise BadLine(f"messages is not a list but {_kind(messages)}")
    turns, roles = [], set()
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise BadLine(f"{where} is not an object but {_kind(message)}")
        role, content = (_text(message, name, f" of {where}") for name in ("role", "content"))
        if role not in ROLES:
            raise BadLine(f"role {role!r} of {where} is none of: {', '.join(ROLES)}")
        roles.add(role)
        if role == "assistant":
            _check_answer(content, f"content of {where}")
            turns += templates.learn(role, content)
        else:
            turns += templates.read(role, content)
    if "assistant" not in roles:
        raise BadLine("has no message of the assistant, so that nothing is learned")
    return turns


def _text(record: dict, name: str, where: str) -> str:
    if name not in record:
        raise BadLine(f"has no {name}{where}")
    text = record[name]
    if not isinstance(text, str):
        raise BadLine(f"{name}{where} is not a text but {_kind(text)}")
    # JSON can spell halves of characters, which no tokenizer can write as bytes.
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise BadLine(f"{name}{where} holds half of a surrogate pair")
    return text


def _check_answer(text: str, name: str) -> None:
    if not text.strip():
        raise BadLine(f"{name} is empty, so that nothing is learned")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false",
             type(None): "null"}
    return names.get(type(value), "a number")


def _joined(turns: list[Turn]) -> list[Turn]:
    """Neighbours that are read become one, as a user types them in; none is empty."""
    joined: list[Turn] = []
    for turn in turns:
        if not turn.text:
            continue
        if joined and not joined[-1].learned and not turn.learned:
            turn = Turn(joined.pop().text + turn.text, False)
        joined.append(turn)
    while not joined[-1].learned:
        joined.pop()
    return joined
