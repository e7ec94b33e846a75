"""What a gate supports and what it adds."""

from __future__ import annotations

from dataclasses import dataclass

from evomoe_plugin.gates.scorers import SOFTMAX_SCORERS


@dataclass(frozen=True)
class Capabilities:
    """What a gate can be combined with; other options are refused before the first step."""

    scorers: tuple[str, ...] = SOFTMAX_SCORERS
    """Values of `--moe-scorer`, if its options have it."""
    logits: bool = True
    """Its `Choice` has logits, as the losses `load` and `z` and `--moe-shared-combine softmax`
    need."""
    vectors: bool = False
    """It has a vector for each expert (`Gate.vectors`) of its own."""
    null_experts: bool = True
    """Null experts can be candidates."""
    fixed_k: bool = False
    """Every token goes to the same number of candidates."""
    unit_weights: bool = False
    """The weights of a token with a selected candidate sum to 1."""
    capacity: bool = True
    """Experts can have a capacity; False if the gate sets their load itself."""
    losses: tuple[str, ...] = ()
    """Auxiliary losses of its own (`Choice.aux`), in addition to those of `gates.auxiliary`."""
    default_aux: str = "balance=1"
    """`--moe-aux` if the user gives none."""
    stats: tuple[str, ...] = ()
    """Scalar statistics of its own (`Choice.stats`)."""
    gate_init: bool = True
    """It has parameters that `--gate-init` can initialise."""
    zero_init: bool = True
    """It learns when they all start at 0 (`--gate-init zero`)."""
    keeps_copies_equal: bool = False
    """When they all start at 0, identical experts get the same tokens with the same weights in
    every update, so that they stay identical."""
