"""What a gate is, and the registry of gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from evomoe_plugin.options import OptionError
from evomoe_plugin.routing.plan import RoutingPlan


@dataclass(frozen=True)
class GateContext:
    """What a gate may know beside the tokens themselves."""

    num_updates: int = 0
    """Completed updates of the training run."""
    token_mask_T: Tensor | None = None
    """bool, False for padding; None: no padding."""
    noise_keys_T: Tensor | None = None
    """int64 noise keys of the tokens (`routing.noise`); None where nothing may be random."""


class Gate(nn.Module):
    """A gate for one MoE layer.

    Subclasses are registered with `@register_gate(name)`. `Options` is a dataclass of the gate's
    own options, which become flags and Hydra fields; option names start with `moe_`.
    """

    Options: ClassVar[type]
    AUX: ClassVar[tuple[str, ...]] = ()
    """Names of the auxiliary losses in the plans of this gate."""
    STATS: ClassVar[tuple[str, ...]] = ()
    """Names of the scalar statistics it adds to those of every gate."""

    def __init__(self, model_dim: int, num_experts: int, options: Any):
        super().__init__()
        self.model_dim = model_dim
        self.num_experts = num_experts

    @classmethod
    def validate(cls, options: Any, expert_counts: Sequence[int]) -> Iterable[str]:
        """Warnings about `options`; raises `OptionError` where they cannot work."""
        return ()

    @classmethod
    def num_parameters(cls, options: Any, model_dim: int, num_experts: int) -> int:
        """Number of parameters the gate will have."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, context: GateContext) -> RoutingPlan:
        """Route tokens `x_TD`; in training mode or not as the module's `training` says."""
        raise NotImplementedError


_GATES: dict[str, type[Gate]] = {}


def register_gate(name: str) -> Callable[[type[Gate]], type[Gate]]:
    """Class decorator: make a gate available as `--moe-gate NAME`."""

    def register(cls: type[Gate]) -> type[Gate]:
        if _GATES.setdefault(name, cls) is not cls:
            raise ValueError(f"a gate named {name} is already registered: {_GATES[name]}")
        return cls

    return register


def gate_names() -> list[str]:
    """Registered gates, sorted."""
    return sorted(_GATES)


def gate_class(name: str) -> type[Gate]:
    """The gate registered as `name`, or an `OptionError` that lists those there are."""
    if name not in _GATES:
        raise OptionError("moe_gate", name, f"unknown gate; one of: {', '.join(gate_names())}")
    return _GATES[name]
