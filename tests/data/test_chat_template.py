"""Chat templates: what transformers renders, divided into targets; and what a template may do."""

import importlib
import os
import time

import pytest

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.chat_template import BadTemplate, ChatTemplate, Message, chat_template_of
from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer, tokenizer_files
from tests.data import chat_templates as sources
from tests.data.tiny_tokenizers import save

CONTROL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "</s>", "<s>", "<|end|>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    Message("user", "Hi <b> ёж?"),
    Message("assistant", "Hello."),
    Message("user", "Hello.  Bye? "),
    Message("assistant", " t "),
]
SYSTEM = [Message("system", "Be short."), *CHAT]


@pytest.fixture
def template():
    made = []

    def make(source, control=CONTROL, **names):
        made.append(ChatTemplate(source, "chat.jinja", {**NAMES, **names}, control))
        return made[-1]

    yield make
    for each in made:
        each.close()


CASES = {
    "chatml": (sources.CHATML, SYSTEM, ["Hello.<|im_end|>", " t <|im_end|>"]),
    "inst": (sources.INST, SYSTEM, [" Hello. </s>", " t </s>"]),
    "headers": (sources.HEADERS, CHAT, ["Hello.<|eot_id|>", "t<|eot_id|>"]),
    "thinking": (
        sources.THINKING,
        CHAT,
        ["Hello.<|im_end|>", "<think>\n\n</think>\n\n t <|im_end|>"],
    ),
    "ends": (sources.ENDS, CHAT, ["Hello.<|im_end|>", " t <|im_end|>"]),
    "marked": (sources.MARKED, SYSTEM, [" Hello.</s>", "  t </s>"]),
    "no clock": (
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + sources.CHATML,
        CHAT,
        ["Hello.<|im_end|>", " t <|im_end|>"],
    ),
    "no special token": ("{% for m in messages %}{{ m.content }}|{% endfor %}", CHAT, None),
}


@pytest.mark.parametrize("case", CASES)
def test_targets_are_responses_with_their_ends(template, case):
    source, chat, wanted = CASES[case]
    spans = template(source).spans(chat)
    assert [s.text for s in spans if s.is_target] == (wanted or ["Hello.", " t"])
    assert [s.is_target for s in spans] == [False, True] * 2


@pytest.fixture(scope="module")
def transformers():
    return importlib.import_module("transformers")


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"no clock"}))  # transformers has one
def test_texts_are_those_of_transformers(template, transformers, case, tmp_path):
    source, chat, _ = CASES[case]
    theirs = transformers.AutoTokenizer.from_pretrained(save(tmp_path / "t", "llama2"))
    messages = [message._asdict() for message in chat]
    ours = template(source)
    for prompted in (False, True):
        wanted = theirs.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompted
        )
        [found] = ours._render([(chat, prompted)])
        for mark in ours._marks:
            found = found.replace(mark, "")
        assert found == wanted
    joined = "".join(span.text for span in ours.spans(chat))
    whole = theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert whole.startswith(joined) and "t" not in whole[len(joined) :]


def test_ids_are_those_of_transformers(transformers, tmp_path):
    folder = save(tmp_path / "t", "llama3", chat_template=sources.CHATML)
    tokenizer = HuggingFaceTokenizer(tokenizer_files(str(folder)))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate(
        tokenizer.chat_template, "", tokenizer.names, [*tokenizer.control_tokens, "<|im_end|>"]
    )
    messages = [message._asdict() for message in SYSTEM]
    spans = ours.spans(SYSTEM)
    parts = tokenizer.encode_parts([span.text for span in spans], special=True)
    [prompt, end] = ours.prompt("Hi.")
    ours.close()
    wanted = theirs.apply_chat_template(messages, return_dict=False)
    found = [i for part in parts for i in part]
    assert found == wanted[: len(found)]
    assert theirs.decode(wanted[len(found) :]) == "\n"
    assert (prompt, end) == (
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    )


def test_templates_lie_in_either_file(tmp_path):
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    for n, (value, wanted) in enumerate({"a": "a", None: None}.items()):
        folder = save(tmp_path / str(n), "gpt2", chat_template=value)
        assert HuggingFaceTokenizer(tokenizer_files(str(folder))).chat_template == wanted
    folder = save(tmp_path / "several", "gpt2", chat_template=several)
    assert HuggingFaceTokenizer(tokenizer_files(str(folder))).chat_template == "y"
    (folder / "chat_template.jinja").write_text("{{ 'file' }}")
    assert HuggingFaceTokenizer(tokenizer_files(str(folder))).chat_template == "{{ 'file' }}"


UNFIT = {
    "refuses": (
        sources.INST,
        [CHAT[0], CHAT[0], CHAT[1]],
        "fails: TemplateError: roles must alternate",
    ),
    "rewrites": (
        "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
        CHAT,
        "does not write the content of message 2 as it is: enclose responses in {% generation %}",
    ),
    "moves": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
        CHAT,
        "writes what precedes message 2 in another way when asked for a generation prompt",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_templates_whose_responses_cannot_be_told(template, case):
    source, chat, message = UNFIT[case]
    with pytest.raises(BadTemplate) as error:
        template(source).spans(chat)
    assert message in str(error.value) and "\n" not in str(error.value)


HOSTILE = {
    "attributes": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "SecurityError: access to attribute '__class__' of 'str' object is unsafe.",
    ),
    "functions": (
        "{{ raise_exception.__globals__['sys'].exit(3) }}",
        "SecurityError: access to attribute '__globals__' of 'function' object is unsafe.",
    ),
    "by filter": ("{{ (messages | attr('__class__')).x }}", "SecurityError: access to attribute"),
    "by format": ("{{ '{0.__class__.x}'.format(messages) }}", "SecurityError: access to attri"),
    "changes": ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
    "imports": ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment"),
    "range": ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
    "loops": (
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "takes more than 1 s",
    ),
    "power": ("{{ 9 ** (9 ** 9) }}", "takes more than 1 s"),
    "memory": ("{{ 'a' * 10 ** 10 }}", "needs more than 1,024 MiB of memory"),
    "width": ("{{ 'a'.center(10 ** 10) }}", "needs more than 1,024 MiB of memory"),
    "doubling": (
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}",
        " more than 1",  # s or MiB, whichever comes first
    ),
    "output": (
        "{% for i in range(99999) %}{{ '%1000d' % i }}{% endfor %}",
        "gives more than 8,388,608 characters",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum"),
    "syntax": ("\n{% for %}", "TemplateSyntaxError (line 2): "),
    "undefined": ("{{ no.thing }}", "UndefinedError: 'no' is undefined"),
    "clock": ("{{ strftime_now('%Y') }}", "UndefinedError: 'strftime_now' is undefined"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_template_must_not_do(template, monkeypatch, tmp_path, case):
    source, message = HOSTILE[case]
    monkeypatch.setattr("evomoe_plugin.data.chat_template.CPU_SECONDS", 1)
    made = template(source)
    started = time.monotonic()
    with pytest.raises(BadTemplate) as error:
        made.prompt("x")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - started < 60


def test_another_process_follows_one_that_ended(template):
    made = template(sources.CHATML)
    made.prompt("x")
    made._process.kill()
    with pytest.raises(BadTemplate, match=r"ended the process that renders it .status -9"):
        made.prompt("y")
    assert made.prompt("y")[1] == "<|im_end|>"


def test_the_process_ends_with_its_template(template):
    made = template(sources.CHATML)
    made.prompt("x")
    process = made._process
    assert process.poll() is None
    made.close()
    assert process.poll() is not None
    assert made.prompt("y")[1] == "<|im_end|>"  # by a new one


def test_template_files(tmp_path):
    tokenizer = HuggingFaceTokenizer(tokenizer_files(str(save(tmp_path / "t", "gpt2"))))
    path = tmp_path / "chat.jinja"

    def given(value):
        return chat_template_of(tokenizer, value, tmp_path)

    assert given(None) is given("none") is chat_template_of(None, None, tmp_path) is None
    path.write_bytes("\ufeff{{ 1 }}".encode())
    assert (given(str(path)).source, given(str(path)).name) == ("{{ 1 }}", str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(OptionError, match=r"--chat-template .*chat.jinja: is not UTF-8 \(byte 1\)"):
        given(str(path))
    os.truncate(path, (1 << 20) + 1)
    with pytest.raises(OptionError, match="has more than 1024 KiB: give a template"):
        given(str(path))
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        given(str(tmp_path / "none.jinja"))
    with pytest.raises(OptionError, match="--chat-template x: needs a tokenizer.json, and"):
        chat_template_of(None, "x", tmp_path)
