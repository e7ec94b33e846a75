"""What `register_gate` refuses, in words, before anything is registered."""

from dataclasses import dataclass, field

import pytest

from evomoe_plugin.gates import Gate, gate_names, register_gate
from evomoe_plugin.models.config import MoELanguageModelConfig


@dataclass
class Unnamed:
    dropout: float = field(default=0.5, metadata={"help": "…"})


@dataclass
class Helpless:
    moe_something: float = 0.5


@dataclass
class Made:
    moe_somethings: list = field(default_factory=list, metadata={"help": "…"})


@dataclass
class Taken:
    moe_top_k: float = field(default=0.5, metadata={"help": "…"})


@pytest.mark.parametrize(
    "options, message",
    [
        (Unnamed, "the option dropout must be named moe_"),
        (Helpless, "the option moe_something needs a help text"),
        (Made, "the option moe_somethings needs a default value"),
        (Taken, "there is an option moe_top_k already, of type <class 'int'>"),
    ],
)
def test_options_that_cannot_become_flags(options, message):
    with pytest.raises(ValueError, match=message):

        @register_gate("refused")
        class Refused(Gate):
            Options = options

    assert "refused" not in gate_names()
    assert "moe_something" not in MoELanguageModelConfig.__dataclass_fields__


def test_a_name_that_is_taken():
    with pytest.raises(ValueError, match="a gate named top_k is already registered"):

        @register_gate("top_k")
        class Other(Gate):
            pass


@pytest.mark.parametrize(
    "flags", [{"TAKES_NULL": False}, {"DEFAULT_AUX": "none", "HAS_LOGITS": False}]
)
def test_class_flags_of_before_capabilities(flags):
    former = type("Former", (Gate,), flags)
    with pytest.raises(
        ValueError,
        match=f"^Former: {', '.join(flags)} have no effect any more: "
        r"give capabilities = Capabilities\(…\)$",
    ):
        register_gate("refused")(type("Former", (former,), {}))
    assert "refused" not in gate_names()
