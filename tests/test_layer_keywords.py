"""What type checkers know of `MoELayer`. mypy reads this file too (pyproject.toml)."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import pytest

from evomoe_plugin import MoELayer, gates
from evomoe_plugin.standalone import known_options

NAME: str = "top_k"  # not a literal, for type checkers


def keywords_by_gate() -> dict[str, dict[str, Any]]:
    """Name of a gate ("" for any) -> keyword -> type, of the overloads of `MoELayer`."""
    found = {}
    for overloaded in typing.get_overloads(MoELayer.__init__):
        unpacked = typing.get_type_hints(overloaded)["options"]
        (keywords,) = typing.get_args(unpacked)
        hints = typing.get_type_hints(keywords)
        (name,) = typing.get_args(hints.pop("gate")) or ("",)
        found[name] = hints
    return found


def widened(hint: Any, default: Any) -> Any:
    """true and false may be given as such, though they are strings on the command line."""
    return bool | str if default in ("true", "false") else hint


def test_the_keywords_are_the_options_of_each_gate():
    found = keywords_by_gate()
    shared = found.pop("")
    classes = {name: gates.gate_class(name) for name in gates.gate_names()}
    assert found.keys() == {  # without those that other tests register
        name for name, cls in classes.items() if cls.__module__.startswith(f"{gates.__name__}.")
    }
    of_layer = typing.get_type_hints(MoELayer.__init__)
    for name in ("model_dim", "ffn_dim", "num_experts", "gate", "options"):
        del of_layer[name]
    for name, hints in found.items():
        options = classes[name].Options
        types = typing.get_type_hints(options)
        assert hints == of_layer | {
            keyword: widened(types[option], getattr(options, option))
            for keyword, option in known_options(classes[name]).items()
        }, name
    in_all = set.intersection(*(set(hints.items()) for hints in found.values()))
    assert set(shared.items()) == in_all


def test_what_is_right_is_accepted() -> None:
    more: dict[str, Any] = {"top_k": 1}
    layers = [
        MoELayer(8, 16, 4, temperature_updates=5, gating_use_fp32=False),
        MoELayer(8, 16, 4, gate="dense_to_sparse", temperature_updates=5, capacity_factor=1),
        MoELayer(model_dim=8, ffn_dim=16, num_experts=4, gate="top_k", top_k=1, scorer="mlp"),
        MoELayer(8, 16, 4, gate="hash", hash="random", token_counts=[1, 2], gated=True),
        MoELayer(8, 16, 4, gate=NAME, shared_experts=1),
        MoELayer(8, 16, 4, gate="top_k", **more),  # options of any name
    ]
    assert {layer.layer.num_experts for layer in layers} == {4}


# mypy reports an ignored error that is none.
WRONG: list[Callable[[], MoELayer]] = [
    lambda: MoELayer(8, 16, 4, temperatur_end=0.3, max_updates=9),  # type: ignore[call-overload]
    lambda: MoELayer(8, 16, 4, gate="top_k", temperature_end=0.3),  # type: ignore[call-overload]
    lambda: MoELayer(8, 16, 4, gate="top_k", top_k="2"),  # type: ignore[call-overload]
    lambda: MoELayer(8, 16, 4, gate="top_k", moe_top_k=2),  # type: ignore[call-overload]
    lambda: MoELayer(8, 16, 4, gate="top_k", dropout=None),  # type: ignore[call-overload]
    lambda: MoELayer(8, 16, 4, gate=NAME, temperature_end=0.3),  # type: ignore[call-overload]
    lambda: MoELayer(8, 16, gate="top_k"),  # type: ignore[call-overload]
]


@pytest.mark.parametrize("make", WRONG)
def test_what_type_checkers_refuse_is_refused_at_run_time_too(make):
    with pytest.raises(TypeError):
        make()
