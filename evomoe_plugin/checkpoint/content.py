"""Check that a file of torch holds what a checkpoint of fairseq does, before any of it is used.

Its checksums say that it is what was written; this says that a run wrote it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from evomoe_plugin.config.errors import OptionError


def check_content(state: Mapping[str, Any], path: str) -> None:
    """Raise `OptionError` if a part of the state is missing or of another kind.

    Args:
        state: in the form of today's fairseq.
    """
    fault = next(_faults(state), None)
    if fault is not None:
        raise OptionError("checkpoint", path, f"is no checkpoint of a run: {fault}")


def _faults(state: Mapping[str, Any]) -> Iterator[str]:
    yield from _faults_of_weights(state.get("model"))
    history = state.get("optimizer_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        yield "its optimizer_history is no list of records"
    elif history and not _is_count(history[-1].get("num_updates", 0)):
        yield f"its number of updates is {history[-1]['num_updates']!r}"
    options = state.get("cfg") or state.get("args")
    if isinstance(options, Mapping):
        if not isinstance(options.get("model"), (Mapping, argparse.Namespace)):
            yield "its options (cfg) name no model"
        elif isinstance(options, DictConfig):
            yield from _resolvers(options)
    elif not isinstance(options, argparse.Namespace):
        yield "it has no options (cfg)"
    extra = state.get("extra_state")
    if not isinstance(extra, dict):
        yield "it does not say how far the run was (extra_state)"
    else:
        yield from _faults_of_place(extra.get("train_iterator", {}))
    optimizer = state.get("last_optimizer_state")
    if optimizer is not None and not _is_optimizer_state(optimizer):
        yield "its optimizer state is none"


def _is_optimizer_state(state: Any) -> bool:
    """Whether it is of one of torch's optimizers, or of several by name (fairseq's composite)."""
    if not isinstance(state, dict):
        return False
    if "state" in state:
        return isinstance(state["state"], dict)
    return all(isinstance(one, dict) and "state" in one for one in state.values())


def _faults_of_weights(model: Any) -> Iterator[str]:
    if not isinstance(model, dict) or not model:
        yield "its 'model' is not tensors by name"
        return
    for name, value in model.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            yield f"{name!r} of its 'model' is no tensor"
        elif value.layout is torch.strided and (
            value.untyped_storage().nbytes() < value.numel() * value.element_size()
        ):
            yield f"{name} has {value.numel()} elements, of which the file does not hold each"


def _resolvers(options: DictConfig) -> Iterator[str]:
    """Values that would look elsewhere when they are read, as into the environment."""
    plain = OmegaConf.to_container(options, resolve=False)
    for name, value in _strings("", plain):
        if re.search(r"\$\{[^}]*:", value):
            yield f"its option {name} is computed by a resolver of OmegaConf, {value[:80]}"


def _strings(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name.lstrip("."), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(f"{name}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(name, item)


def _faults_of_place(place: Any) -> Iterator[str]:
    if not isinstance(place, dict):
        yield "its place in the data is none"
        return
    for name in ("epoch", "iterations_in_epoch"):
        if not _is_count(place.get(name, 0)):
            yield f"its place in the data has {name} {place[name]!r}"


_MOST = 10**9
"""Of updates, epochs and batches: no run has as many."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < _MOST


def check_moments(optimizer: torch.optim.Optimizer, path: str, elementwise: bool) -> None:
    """Raise `OptionError` if the state that an optimizer has loaded is not of its parameters.

    Args:
        elementwise: its tensors have the shapes of the parameters.
    """
    names: set[str] = set()
    for entry in optimizer.state.values():
        names.update(entry)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entry = {**optimizer.state.get(parameter, {})}
            if entry:
                entry.setdefault("step", group.get("step"))  # which some optimizers count by group
                fault = _fault_of_entry(entry, names, parameter, elementwise)
                if fault:
                    raise OptionError(
                        "checkpoint",
                        path,
                        f"its optimizer state {fault}: take an earlier one, or --reset-optimizer",
                    )


# What optimizers of Adam's kind keep beside the number of steps: the first moment, and one of two.
_FIRST, _SECOND = "exp_avg", {"exp_avg_sq", "exp_inf"}


def _fault_of_entry(
    entry: Mapping[str, Any], names: set[str], parameter: Tensor, elementwise: bool
) -> str:
    names = set(names)
    if _FIRST in entry or not _SECOND.isdisjoint(entry):
        names |= {_FIRST, "step"} | (set() if _SECOND & entry.keys() else {"exp_avg_sq"})
    missing = {name for name in names if entry.get(name) is None}
    if missing and elementwise:
        return f"of a parameter has no {min(missing)}"
    for name, value in entry.items():
        if not torch.is_tensor(value) or not value.is_floating_point() or not value.dim():
            continue
        if elementwise and value.numel() != parameter.numel():
            return f"has {name} of {value.numel()} numbers for {parameter.numel()} weights"
        if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
            return f"has NaN/Inf in {name}"
    return ""
