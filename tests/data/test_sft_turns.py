"""Records become context and targets."""

import pytest

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.turns import BadRecord, Templates, read_turns


def turns(record, **templates):
    """The turns of one record."""
    found = read_turns(record, Templates(**templates))
    assert not found.are_ended
    return [tuple(turn) for turn in found.turns]


def chat(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def test_prompt_and_response_are_taken_as_they_are():
    found = turns({"prompt": "2 + 2 = ", "response": "4\n", "source": "by hand"})
    assert found == [("2 + 2 = ", False), ("4\n", True)]
    assert turns({"prompt": "", "response": " x"}) == [(" x", True)]


def test_templates():
    found = turns(
        {"prompt": "2 + 2?", "response": "4"}, prompt="Question: {}\\n", response="Answer: {}!"
    )
    assert found == [("Question: 2 + 2?\nAnswer:", False), (" 4!", True)]


def test_chat_reads_all_but_the_assistant():
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


def test_two_responses_in_a_row_end_both():
    found = turns(
        chat(("user", "Hi."), ("assistant", "One."), ("assistant", "Two.")), assistant="{}"
    )
    assert found == [("User: Hi. ", False), ("One.", True), ("Two.", True)]


def sharegpt(*turns, **given):
    turns = [{"from": role, "value": value} for role, value in turns]
    return {"conversations": turns, **given}


def test_formats_of_other_tools_are_chats():
    wanted = turns(
        chat(
            ("system", "S."),
            ("user", "a\nb"),
            ("assistant", "c"),
            ("user", "d"),
            ("assistant", "e"),
        )
    )
    found = turns(
        sharegpt(("human", "a\nb"), ("gpt", "c"), ("user", "d"), ("assistant", "e"), system="S.")
    )
    assert found == wanted
    assert found == turns(
        sharegpt(("system", "S."), ("human", "a\nb"), ("gpt", "c"), ("human", "d"), ("gpt", "e"))
    )
    record = {"instruction": "d", "input": "", "output": "e", "system": "S."}
    assert turns({**record, "history": [["a\nb", "c"]]}) == wanted
    assert turns({"instruction": "a", "input": "b", "output": "c", "text": "a b c"}) == turns(
        chat(("user", "a\nb"), ("assistant", "c"))
    )
    assert turns({"instruction": "a", "output": "c"}) == turns(
        chat(("user", "a"), ("assistant", "c"))
    )


def user(content):
    return {"role": "user", "content": content}


BAD = {
    "a list": ([1], "is not an object but a list"),
    "a number": (3, "is not an object but a number"),
    "nothing known": ({"text": "a"}, "has no prompt"),
    "no response": ({"prompt": "a"}, "has no response"),
    "no prompt": ({"response": "a"}, "has no prompt"),
    "prompt not a text": ({"prompt": 3, "response": "a"}, "prompt is not a text but a number"),
    "response null": ({"prompt": "a", "response": None}, "response is not a text but null"),
    "empty response": ({"prompt": "a", "response": ""}, "response is empty"),
    "blank response": ({"prompt": "a", "response": " \n"}, "response is empty"),
    "half a character": ({"prompt": "\ud83d", "response": "a"}, "prompt contains a lone surr"),
    "two formats": (
        {"prompt": "a", "response": "b", "messages": []},
        "has messages and prompt, which are of different formats",
    ),
    "messages not a list": ({"messages": {}}, "messages is not a list but an object"),
    "no messages": ({"messages": []}, "has no assistant message"),
    "no assistant message": ({"messages": [user("a")]}, "has no assistant message"),
    "message not an object": ({"messages": ["hi"]}, "message 1 is not an object but a text"),
    "no role": ({"messages": [{"content": "a"}]}, "has no role of message 1"),
    "no content": ({"messages": [{"role": "user"}]}, "has no content of message 1"),
    "unknown role": (
        chat(("tool", "a")),
        "role 'tool' of message 1 is none of: system, user, assistant",
    ),
    "content a list": ({"messages": [user([])]}, "content of message 1 is not a text but a list"),
    "empty assistant message": (
        chat(("user", "a"), ("assistant", "")),
        "content of message 2 is empty",
    ),
    "turn not an object": ({"conversations": [1]}, "turn 1 is not an object but a number"),
    "unknown from": (
        sharegpt(("observation", "a")),
        "from 'observation' of turn 1 is none of: human, gpt, system, user, assistant",
    ),
    "no value": ({"conversations": [{"from": "gpt"}]}, "has no value of turn 1"),
    "no gpt": (sharegpt(("human", "a")), "has no assistant message"),
    "empty gpt": (sharegpt(("human", "a"), ("gpt", " ")), "value of turn 2 is empty"),
    "system not a text": (sharegpt(("gpt", "a"), system=[1]), "system is not a text but a list"),
    "no output": ({"instruction": "a", "input": "b"}, "has no output"),
    "empty output": ({"instruction": "a", "output": ""}, "output is empty"),
    "input not a text": ({"instruction": "a", "input": 1, "output": "c"}, "input is not a text"),
    "no pair": (
        {"instruction": "a", "output": "c", "history": [["x"]]},
        "pair 1 of history is no list of an instruction and its response",
    ),
    "no text of a pair": (
        {"instruction": "a", "output": "c", "history": [["x", "y"], ["z", None]]},
        "text 2 of pair 2 of history is not a text but null",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_record_is_said(case):
    record, wrong = BAD[case]
    with pytest.raises(BadRecord) as error:
        read_turns(record, Templates())
    assert str(error.value).startswith(wrong) and "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["no place", "{} and {}", ""])
def test_a_template_has_one_place(template):
    with pytest.raises(OptionError, match="--user-template .*: give a text that contains {} once"):
        Templates(user=template).validate()
