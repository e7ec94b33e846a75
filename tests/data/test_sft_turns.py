"""Lines become context and targets."""

import json

import pytest

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.turns import Templates, Turn, read_turns


@pytest.fixture
def turns(tmp_path):
    """The turns of one record."""

    def read(record, **templates):
        path = tmp_path / "train.jsonl"
        path.write_text(json.dumps(record) + "\n")
        [(number, found)] = read_turns(path, Templates(**templates))
        assert number == 1
        return [(turn.text, turn.is_target) for turn in found]

    return read


def chat(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def test_prompt_and_response_are_taken_as_they_are(turns):
    found = turns({"prompt": "2 + 2 = ", "response": "4\n", "source": "by hand"})
    assert found == [("2 + 2 = ", False), ("4\n", True)]
    assert turns({"prompt": "", "response": " x"}) == [(" x", True)]


def test_templates(turns):
    found = turns(
        {"prompt": "2 + 2?", "response": "4"}, prompt="Question: {}\\n", response="Answer: {}!"
    )
    assert found == [("Question: 2 + 2?\nAnswer:", False), (" 4!", True)]


def test_chat_reads_all_but_the_assistant(turns):
    found = turns(
        chat(
            ("system", "Be short."),
            ("user", "Hi."),
            ("assistant", "Hello."),
            ("user", "Bye?"),
            ("assistant", "Bye."),
            ("user", "Thanks."),
        )
    )
    assert found == [
        ("Be short. User: Hi. Assistant:", False),
        (" Hello.", True),
        ("User: Bye? Assistant:", False),
        (" Bye.", True),
    ]


def test_two_responses_in_a_row_end_both(turns):
    found = turns(
        chat(("user", "Hi."), ("assistant", "One."), ("assistant", "Two.")), assistant="{}"
    )
    assert found == [("User: Hi. ", False), ("One.", True), ("Two.", True)]


BAD = {
    "not json": ("{'prompt': 1}", "is not JSON (Expecting property name"),
    "a blank line": ("", "is empty"),
    "a list": ("[1]", "is not an object but a list"),
    "a number": ("3", "is not an object but a number"),
    "no response": ('{"prompt": "a"}', "has no response"),
    "no prompt": ('{"response": "a"}', "has no prompt"),
    "prompt not a text": ('{"prompt": 3, "response": "a"}', "prompt is not a text but a number"),
    "response null": ('{"prompt": "a", "response": null}', "response is not a text but null"),
    "empty response": ('{"prompt": "a", "response": ""}', "response is empty"),
    "blank response": ('{"prompt": "a", "response": " \\n"}', "response is empty"),
    "half a character": ('{"prompt": "\\ud83d", "response": "a"}', "prompt contains a lone surr"),
    "both kinds": ('{"prompt": "a", "response": "b", "messages": []}', "has messages and a prompt"),
    "messages not a list": ('{"messages": {}}', "messages is not a list but an object"),
    "no messages": ('{"messages": []}', "has no assistant message"),
    "no assistant message": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "has no assistant message",
    ),
    "message not an object": ('{"messages": ["hi"]}', "message 1 is not an object but a text"),
    "no role": ('{"messages": [{"content": "a"}]}', "has no role of message 1"),
    "no content": ('{"messages": [{"role": "user"}]}', "has no content of message 1"),
    "unknown role": (
        '{"messages": [{"role": "tool", "content": "a"}]}',
        "role 'tool' of message 1 is none of: system, user, assistant",
    ),
    "content a list": (
        '{"messages": [{"role": "user", "content": []}]}',
        "content of message 1 is not a text but a list",
    ),
    "empty assistant message": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        "content of message 2 is empty",
    ),
    "deeply nested": ("[" * 100_000, "is nested too deeply"),
}
GOOD = '{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize("line, wrong", BAD.values(), ids=BAD)
def test_a_malformed_line_is_named(tmp_path, line, wrong):
    path = tmp_path / "train.jsonl"
    path.write_text(GOOD + line + "\n" + GOOD)
    with pytest.raises(OptionError) as error:
        list(read_turns(path, Templates()))
    assert str(error.value).startswith(f"DATA {path}, line 2: {wrong}")
    assert "each line must be" in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt": "\xff"}\n')
    with pytest.raises(OptionError, match="line 2: is not UTF-8 .byte 13"):
        list(read_turns(path, Templates()))


def test_an_empty_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.touch()
    with pytest.raises(OptionError, match="train.jsonl: is empty; each line"):
        list(read_turns(path, Templates()))


def test_the_last_line_needs_no_end(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(GOOD + GOOD.strip())
    assert list(read_turns(path, Templates())) == [
        (n, [Turn("a", False), Turn("b", True)]) for n in (1, 2)
    ]


@pytest.mark.parametrize("template", ["no place", "{} and {}", ""])
def test_a_template_has_one_place(template):
    with pytest.raises(OptionError, match="--user-template .*: give a text that contains {} once"):
        Templates(user=template).validate()
