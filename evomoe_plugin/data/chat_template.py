"""Chats as a tokenizer's chat template writes them, rendered in a process with limits."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data import render_chats
from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer
from evomoe_plugin.data.tokenizers import Tokenizer

MAX_BYTES = 1 << 20
CPU_SECONDS = 5  # for one chat


class BadTemplate(ValueError):
    """Says how a chat template failed."""


class Message(NamedTuple):
    role: str
    content: str


class Span(NamedTuple):
    """A stretch of a rendered chat; a target is a response with the token that ends it."""

    text: str
    is_target: bool


class ChatTemplate:
    """A Jinja template, rendered as transformers does (`apply_chat_template`), but without a clock.

    Args:
        source: the template.
        name: its file or folder, for messages.
        variables: names and texts of special tokens.
        control_tokens: texts of special tokens, one of which ends a response.
    """

    def __init__(
        self, source: str, name: str, variables: Mapping[str, str], control_tokens: Collection[str]
    ):
        self.source, self.name = source, name
        nonce = secrets.token_hex(8)
        self._marks = f"\0{nonce}<", f"\0{nonce}>"
        self._setup = {
            "template": source,
            "variables": dict(variables),
            "marks": self._marks,
            "cpu_seconds": CPU_SECONDS,
        }
        ends = sorted(filter(None, control_tokens), key=len, reverse=True)
        self._end = re.compile(r"\s*(" + ("|".join(map(re.escape, ends)) or "(?!)") + ")")
        self._process: subprocess.Popen[str] | None = None

    def spans(self, messages: Sequence[Message]) -> list[Span]:
        """A chat, divided so that the texts joined are what the template gives.

        Targets are what the template encloses in `{% generation %}`. Without that, they are the
        contents of the assistant's messages, from the end of the generation prompt to the special
        token that follows; text after the last one is left out.

        Args:
            messages: the last is the assistant's.
        Raises:
            BadTemplate: the template fails, or responses cannot be told from other text.
        """
        numbers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        whole, *prompts = self._render(
            [(messages, False), *((messages[:n], True) for n in numbers)]
        )
        if self._marks[0] in whole:
            return self._marked_spans(whole)
        spans, done = [], 0
        starts = [*map(len, prompts), len(whole)]
        for n, prompt, end in zip(numbers, prompts, starts[1:], strict=True):
            if not whole.startswith(prompt):
                raise BadTemplate(
                    f"writes what precedes message {n + 1} in another way when asked for a "
                    "generation prompt: enclose responses in {% generation %} in the template"
                )
            start, stop = len(prompt), self._end_of(whole, messages[n], n, len(prompt), end)
            spans += [Span(whole[done:start], False), Span(whole[start:stop], True)]
            done = stop
        return spans

    def _end_of(self, whole: str, message: Message, n: int, start: int, end: int) -> int:
        """Where the response that begins at `start` ends, with its special token."""
        content = message.content.strip()
        first = found = whole.find(content, start, end)
        while found >= 0:
            if after := self._end.match(whole, found + len(content), end):
                return after.end()
            found = whole.find(content, found + 1, end)
        if first < 0:
            raise BadTemplate(
                f"does not write the content of message {n + 1} as it is: enclose responses in "
                "{% generation %} in the template"
            )
        return first + len(content)

    def _marked_spans(self, whole: str) -> list[Span]:
        before, after = self._marks
        spans = []
        *marked, _ = whole.split(after)
        for part in marked:
            context, _, response = part.partition(before)
            spans += [Span(context, False), Span(response, True)]
        return spans

    def prompt(self, text: str) -> tuple[str, str | None]:
        """A user's message up to the response, and the special token that ends the response.

        Raises:
            BadTemplate: the template fails.
        """
        user = Message("user", text)
        answered = self.spans([user, Message("assistant", "x")])
        [prompt] = self._render([([user], True)])
        ends = self._end.findall(answered[-1].text) if answered else []
        return prompt, ends[-1] if ends else None

    def _render(self, chats: Sequence[tuple[Sequence[Message], bool]]) -> list[str]:
        process = self._process or self._start()
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._send([[[m._asdict() for m in messages], prompts] for messages, prompts in chats])
        line = process.stdout.readline()
        if not line:
            status = process.wait()
            self.close()
            if status == -signal.SIGXCPU:
                raise BadTemplate(f"takes more than {self._setup['cpu_seconds']} s")
            raise BadTemplate(f"ended the process that renders it (status {status})")
        answer = json.loads(line)
        if "error" in answer:
            raise BadTemplate(f"fails: {answer['error']}")
        return answer["texts"]

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-P", render_chats.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._send(self._setup)
        return self._process

    def _send(self, value: Any) -> None:
        assert self._process and self._process.stdin
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End the process that renders; the next use starts another."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert stream
                    stream.close()


def chat_template_of(
    tokenizer: Tokenizer | None, given: str | None, folder: Path
) -> ChatTemplate | None:
    """The template that chats are written with; None: one for each role (`data.turns.Templates`).

    Args:
        given: a file; "none"; or None for the tokenizer's own, if it has one.
        folder: of the tokenizer, for messages.
    Raises:
        OptionError: the file cannot be read, or the tokenizer has no special tokens.
    """
    if given == "none":
        return None
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        if given is not None:
            fault = f"needs a tokenizer.json, and {folder} has none: omit it"
            raise OptionError("chat_template", given, fault)
        return None
    source, name = tokenizer.chat_template, f"of {folder}"
    if given is not None:
        source, name = _read_template(Path(given)), given
    if source is None:
        return None
    return ChatTemplate(source, name, tokenizer.names, tokenizer.control_tokens)


def _read_template(path: Path) -> str:
    option = "chat_template"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OptionError(option, path, f"has more than {MAX_BYTES >> 10} KiB: give a template")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OptionError(option, path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OptionError(option, path, f"is not UTF-8 (byte {error.start + 1})") from None
