"""The optimizer's state by parameter name, in whatever layout a run saved it.

Three layouts exist: one entry a parameter; one entry for all of them, end to end (plain --fp16);
and fairscale's, one entry a parameter in the order of the FSDP modules, with a map to them.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from evomoe_plugin.checkpoint.fsdp_shards import flat_parameters
from evomoe_plugin.config.errors import OptionError

PARAMETER_NAMES = "optimizer_parameter_names"
"""The key of a checkpoint's list of parameter names, in the order of its optimizer's entries."""


@dataclass(frozen=True)
class OptimizerLayout:
    """The parameters of an optimizer's state, in its order.

    Attributes:
        names: of the parameters, in the order of the state.
        shapes: theirs.
        modules: the FSDP module of each, by number; None without FSDP.
        is_flat: whether one entry holds all parameters end to end.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    modules: tuple[int, ...] | None = None
    is_flat: bool = False

    def by_name(self, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """`state["state"]` by name, every tensor with the parameter's shape.

        Raises:
            OptionError: the state is not of these parameters.
        """
        entries = state["state"]
        if self.is_flat:
            return self._by_name_from_flat(entries.get(0, {}))
        if len(state["param_groups"]) != 1:
            raise _does_not_fit(f"{len(state['param_groups'])} groups of parameters")
        check_number_trained(state, self)
        named = {self.names[i]: values for i, values in entries.items()}
        for name, values in named.items():
            shape = self.shapes[self.names.index(name)]
            for key, value in values.items():
                if _is_moment(value) and value.shape != shape:
                    raise _does_not_fit(
                        f"{key} of {name} has shape {tuple(value.shape)}, the "
                        f"parameter {tuple(shape)}"
                    )
        return named

    def _by_name_from_flat(self, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
        named: dict[str, dict[str, Any]] = {name: {} for name in self.names if values}
        sizes = [math.prod(shape) for shape in self.shapes]
        for key, value in values.items():
            parts: Iterable[Any] = [value] * len(sizes)
            if _is_moment(value):
                if value.numel() != sum(sizes):
                    raise _does_not_fit(
                        f"{key} has {value.numel()} numbers, the parameters {sum(sizes)}"
                    )
                parts = (p.view(s) for p, s in zip(value.split(sizes), self.shapes, strict=True))
            for name, part in zip(self.names, parts, strict=True):
                named[name][key] = part
        return named

    def state(self, named: dict[str, dict[str, Any]], old: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state in this layout; the rest (lr, loss scale) is `old`'s.

        Parameters without an entry, which were never updated, get moments of zero.
        """
        old = {k: v for k, v in old.items() if k not in ("param_id_map", "uncollected_local_ids")}
        count = 1 if self.is_flat else len(self.names)
        groups = [dict(old["param_groups"][0], params=list(range(count)))]
        new = dict(old, state={}, param_groups=groups)
        if self.modules is not None:
            new["param_id_map"] = dict(enumerate(self.modules))
            new["uncollected_local_ids"] = []
        if not named:
            return new
        like = next(iter(named.values()))
        entries = [
            named.get(name)
            or {k: v.new_zeros(shape) if _is_moment(v) else v for k, v in like.items()}
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]
        if self.is_flat:
            entries = [
                {
                    k: torch.cat([e[k].reshape(-1) for e in entries]) if _is_moment(v) else v
                    for k, v in like.items()
                }
            ]
        new["state"] = dict(enumerate(entries))
        return new


def fsdp_layout(state: dict, trained: Container[str] | None = None) -> OptimizerLayout:
    """The layout that `fsdp_metadata` describes, of a checkpoint or of a model.

    Args:
        trained: names of the parameters that are not frozen; None: all.
    """
    names, shapes, modules = [], [], []
    module = -1
    for path, _, parameter in flat_parameters(state):
        prefix = f"{path}." if path else ""
        if trained is not None and prefix + parameter["names"][0] not in trained:
            continue  # as one, so are all that were made into one parameter
        module += 1
        names += [prefix + name for name in parameter["names"]]
        shapes += [torch.Size(shape) for shape in parameter["shapes"]]
        modules += [module] * len(parameter["names"])
    return OptimizerLayout(tuple(names), tuple(shapes), tuple(modules))


def check_number_trained(state: dict[str, Any], layout: OptimizerLayout) -> None:
    """Raise `OptionError` if the state has more or fewer parameters, or elements, than `layout`:
    others were frozen when it was saved."""
    saved = sum(len(group["params"]) for group in state.get("param_groups", ()))
    trained = len(layout.names)
    # One entry may be all parameters end to end.
    if saved > 1 and not layout.is_flat and saved != trained:
        raise OptionError(
            "checkpoint",
            "with other frozen parameters",
            f"its optimizer state is of {saved} parameters, {trained} are trained "
            "now: give --reset-optimizer, or the same --moe-train-only",
        )
    if layout.is_flat:
        total = sum(math.prod(shape) for shape in layout.shapes)
        for key, value in state.get("state", {}).get(0, {}).items():
            if saved == 1 and _is_moment(value) and value.numel() != total:
                raise OptionError(
                    "checkpoint",
                    "with other frozen parameters",
                    f"its optimizer state ({key}) is of {value.numel()} numbers, "
                    f"{total} are trained now: give --reset-optimizer, or the same "
                    "--moe-train-only",
                )


def plain_layout(state: dict, model: OptimizerLayout) -> OptimizerLayout:
    """The layout of a checkpoint without FSDP, whose parameters `model` names in another order.

    Files that do not name the optimizer's entries, as fairseq's own, list parameters in their
    order, among buffers and second names.
    """
    shapes = dict(zip(model.names, model.shapes, strict=True))
    listed = state.get(PARAMETER_NAMES) or state["model"]
    names = tuple(name for name in listed if name in shapes)
    return OptimizerLayout(
        names,
        tuple(shapes[name] for name in names),
        is_flat=is_flat(state["last_optimizer_state"], model),
    )


def is_flat(state: dict[str, Any], model: OptimizerLayout) -> bool:
    """Whether a state without FSDP has all of the model's parameters end to end."""
    return len(state["param_groups"][0]["params"]) == 1 and len(model.names) > 1


def _is_moment(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def _does_not_fit(why: str) -> OptionError:
    return OptionError(
        "checkpoint",
        "with another parallelism",
        f"its optimizer state does not fit ({why}): give --reset-optimizer",
    )
