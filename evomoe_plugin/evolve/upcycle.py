"""Make experts from the feed-forward networks of a dense model.

Copies, masked, noisy or partly reinitialised: `evolve.init_methods`. Slices: smaller experts that
partition the dense network's hidden units (fine-grained experts as in DeepSeekMoE, arXiv
2401.06066; cut from a dense network as in MoEfication, arXiv 2110.01786).
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.config.checks import check_spawned_from
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import (
    SPAWN_METHODS,
    check_rate,
    expert_counts,
    expert_ffn_dim,
    expert_slots,
    moe_layer_indices,
    resolved_rate,
    shared_ffn_dim,
)
from evomoe_plugin.evolve.dense_checkpoint import STRUCTURE, DenseCheckpoint
from evomoe_plugin.evolve.init_methods import seed_of, spawn_tensor
from evomoe_plugin.gates import gate_class

METHODS = (*SPAWN_METHODS, "slice", "none")
SLICES = ("contiguous", "shuffled")

_FFN = re.compile(r"decoder\.layers\.(\d+)\.(fc1|fc2)\.(weight|bias)$")
# A parameter inside an MoE layer: which layer, which part, the name there.
_INSIDE = re.compile(r"decoder\.layers\.(\d+)\.moe\.(shared\.experts|experts|gate)\.(.+)$")
_TANH_GELUS = ("gelu_fast", "gelu_accurate")
# Separate these random streams from each other and from other uses of the seed.
_EXPERT_STREAM, _SLICE_STREAM, _GATE_STREAM = 0x0C1E, 0x511C, 0x6A7E


@dataclass(frozen=True)
class Recipe:
    """How experts and gates are initialised."""

    method: str = "copy"
    """One of `METHODS`; `none` keeps the random initialisation."""
    rate: float | None = None
    """Of mask, noise and reinit; None: that of `--moe-spawn-rate`."""
    rescale: bool = False
    """mask: divide the remaining weights by 1 - rate. slice: multiply an expert's output by the
    number of slices, for gate weights that sum to 1 over all slices."""
    slices: str = "contiguous"
    """Which hidden units a slice takes: neighbours, or a seeded permutation."""
    gate_init: str = "default"
    """`default`, `zero`, or `normal:STD`."""
    seed: int = 1
    in_run: bool = False
    """Whether it comes from `--moe-init-…` options, for messages."""

    def option(self, field: str) -> str:
        """The option that sets `field`."""
        return f"moe_init_{field.removesuffix('_init')}" if self.in_run else field

    def misfit(self, field: str, remedy: str) -> OptionError:
        """An error that says what is wrong with the value of `field`."""
        return OptionError(self.option(field), getattr(self, field), remedy)

    def check(self) -> None:
        """Raise `OptionError` for a value that cannot work."""
        if self.method not in METHODS:
            raise self.misfit("method", f"one of: {', '.join(METHODS)}")
        if self.slices not in SLICES:
            raise self.misfit("slices", f"one of: {', '.join(SLICES)}")
        if self.slices != "contiguous" and self.method != "slice":
            raise self.misfit("slices", f"the method {self.method} cuts nothing: leave it out")
        check_rate(self.option("rate"), self.method, self.rate)
        if self.rescale and self.method not in ("mask", "slice"):
            raise self.misfit(
                "rescale", f"the method {self.method} has nothing to rescale: leave it out"
            )
        self.gate_deviation  # noqa: B018  raises for what is no deviation

    @property
    def gate_deviation(self) -> float | None:
        """Standard deviation of the gates' initial weights; None: the gate's own initialisation."""
        if self.gate_init == "default":
            return None
        if self.gate_init == "zero":
            return 0.0
        kind, _, number = self.gate_init.partition(":")
        with contextlib.suppress(ValueError):
            if kind == "normal" and 0 < float(number) < float("inf"):
                return float(number)
        raise self.misfit("gate_init", "give default, zero, or normal:STD with a deviation above 0")


class Upcycling:
    """Initial parameters of an MoE model made from a dense one.

    Args:
        dense: the source.
        options: the MoE model's, checked by `config.checks.validate`.
        recipe: how experts and gates are initialised.
    Raises:
        OptionError: models or recipe do not fit together.
    """

    def __init__(self, dense: DenseCheckpoint, options: Any, recipe: Recipe):
        recipe.check()
        self.dense = dense
        self.options = options
        self.recipe = recipe
        check_spawned_from(options, recipe.option("method"), recipe.method)
        check_structure(dense, options)
        if options.moe_post_norm != dense.post_norm:
            order, remedy = ("after", "give it") if dense.post_norm else ("before", "leave it out")
            raise OptionError(
                "moe_post_norm",
                options.moe_post_norm,
                f"the dense checkpoint {dense.path} normalises {order} each part of "
                f"a layer: {remedy}",
            )
        self.moe_layers = moe_layer_indices(options, options.decoder_layers)
        self._ids = {layer: n for n, layer in enumerate(self.moe_layers)}
        is_made = recipe.method != "none"
        self.num_slices = self._check_experts() if is_made else 1
        is_made = is_made and options.moe_shared_experts
        self.num_shared_slices = self._count_slices("shared") if is_made else 1
        self._check_gate()

    def _check_experts(self) -> int:
        """Number of slices of routed experts; 1: whole networks."""
        options, recipe = self.options, self.recipe
        method = f"--{recipe.option('method').replace('_', '-')}"
        if options.moe_expert_gated:
            raise OptionError(
                "moe_expert_gated",
                True,
                "the dense model's feed-forward network is not gated: leave it out, "
                f"or start the experts afresh with {method} none",
            )
        ffn_dim, width = expert_ffn_dim(options), self.dense.model["decoder_ffn_embed_dim"]
        if recipe.method != "slice":
            if ffn_dim != width:
                raise _width_misfit(
                    options,
                    "expert",
                    f"experts of width {ffn_dim} are no "
                    f"{recipe.method} of the dense model's network of width {width}"
                    f": leave it out, or give {method} slice",
                )
            return 1
        slices = self._count_slices("expert")
        layers = len(self.moe_layers)
        for count in {*expert_counts(options, layers), *expert_slots(options, layers)}:
            if count % slices:
                raise OptionError(
                    "moe_expert_count",
                    options.moe_expert_count,
                    f"{count} experts cannot hold {slices} slices (the dense width "
                    f"{width} over {ffn_dim}) equally often: give a multiple of "
                    f"{slices}, or other widths",
                )
        return slices

    def _count_slices(self, kind: str) -> int:
        """Experts of a kind, `expert` or `shared`, that the dense network is cut into."""
        is_shared, width = kind == "shared", self.dense.model["decoder_ffn_embed_dim"]
        ffn_dim = shared_ffn_dim(self.options) if is_shared else expert_ffn_dim(self.options)
        if width % ffn_dim:
            experts = "shared experts" if is_shared else "experts"
            raise _width_misfit(
                self.options,
                kind,
                f"the dense model's width {width} cannot be "
                f"cut into {experts} of {ffn_dim}: give a divisor",
            )
        return width // ffn_dim

    def _check_gate(self) -> None:
        recipe, gate = self.recipe, self.options.moe_gate
        if recipe.gate_deviation is None:
            return
        capabilities = gate_class(gate).capabilities
        if not capabilities.gate_init:
            raise recipe.misfit("gate_init", f"the gate {gate} has no weights: leave it out")
        if recipe.gate_deviation > 0:
            return
        scorer = getattr(self.options, "moe_scorer", "linear")
        if not capabilities.zero_init or scorer not in ("linear", "sigmoid"):
            with_scorer = f" with --moe-scorer {scorer}" if scorer != "linear" else ""
            raise recipe.misfit(
                "gate_init",
                f"the gate {gate}{with_scorer} cannot learn from "
                "weights of 0: give default or normal:STD",
            )
        if capabilities.keeps_copies_equal and self._has_twins():
            raise recipe.misfit(
                "gate_init",
                f"with it the gate {gate} treats all experts alike, "
                "and experts that begin alike stay so for ever: give default or "
                "normal:STD, or a --activation-dropout",
            )

    def _has_twins(self) -> bool:
        """Whether two experts of a layer start with equal weights and nothing random separates
        them."""
        options = self.options
        if options.moe_spawn_updates is not None and options.moe_spawn_method != "copy":
            return False  # the spawn makes them differ
        if any(getattr(options, name, 0) for name in ("activation_dropout", "relu_dropout")):
            return False
        distinct = {"copy": 1, "slice": self.num_slices}.get(self.recipe.method)
        return distinct is not None and any(
            slots > distinct for slots in expert_slots(options, len(self.moe_layers))
        )

    def value(self, name: str, shape: Iterable[int]) -> Tensor | None:
        """The initial value of the parameter `name`, fp32; None: its own initialisation.

        Raises:
            OptionError: the dense checkpoint lacks it, or has another shape.
        """
        shape = torch.Size(shape)
        inside = _INSIDE.match(name)
        if inside is not None:
            layer, part, rest = int(inside[1]), inside[2], inside[3]
            if part == "gate":
                return self._gate(layer, rest, shape)
            if self.recipe.method == "none":
                return None
            if part == "experts":
                expert = self._routed(layer, rest)
            else:
                expert = self._sliced(layer, rest, self.num_shared_slices, False)
            value = torch.stack([expert(e) for e in range(shape[0])])
        elif name in self.dense.weights:
            value = self.dense.weights[name].float()
        else:
            raise self.dense.misfit(f"has no {name}")
        if value.shape == shape:
            return value
        if "embed_tokens" in name or "output_projection" in name:
            raise OptionError(
                "DATA",
                "dict.txt",
                f"has {shape[0]} tokens, the dense checkpoint "
                f"was trained with {value.shape[0]}: give the "
                "data that belongs to it",
            )
        raise self.dense.misfit(
            f"{name} has the shape {tuple(value.shape)}, the model {tuple(shape)}"
        )

    def _routed(self, layer: int, name: str) -> Callable[[int], Tensor]:
        recipe, n = self.recipe, self._ids[layer]
        if recipe.method == "slice":
            return self._sliced(layer, name, self.num_slices, recipe.rescale)
        source = self.dense.ffn(layer)[name].float()
        rate = resolved_rate(recipe.method, recipe.rate)
        spawn = functools.partial(
            spawn_tensor, name, source, recipe.method, rate=rate, rescale=recipe.rescale
        )
        return lambda expert: spawn(key=seed_of(recipe.seed, n, expert, _EXPERT_STREAM))[0]

    def _sliced(self, layer: int, name: str, slices: int, rescale: bool) -> Callable[[int], Tensor]:
        """Expert e gets slice e mod `slices`; one of each slice sum to the dense network."""
        source = self.dense.ffn(layer)[name].float()
        scale = slices if rescale and name.startswith("fc2") else 1
        if name == "fc2_bias":
            return lambda expert: source * (scale / slices)
        # In the order in which slices take them.
        units_F = torch.arange(source.size(0))
        if self.recipe.slices != "contiguous":
            key = seed_of(self.recipe.seed, self._ids[layer], _SLICE_STREAM)
            units_F = torch.randperm(len(units_F), generator=torch.Generator().manual_seed(key))
        units_SF = units_F.view(slices, -1)
        return lambda expert: source[units_SF[expert % slices]] * scale

    def _gate(self, layer: int, name: str, shape: torch.Size) -> Tensor | None:
        deviation = self.recipe.gate_deviation
        if deviation is None or len(shape) < 2 or name.startswith("lexical."):
            return None  # --moe-lexical gives the start of its table
        if name.startswith("scorer."):  # stored are weights over the factor
            deviation /= getattr(self.options, "moe_gate_lr_factor", 1.0)
        if name.startswith("shared_weights") and deviation == 0.0:
            return None  # weighs shared experts, routes nothing
        # Keyed by the name's bytes: Python's hash differs between processes.
        key = seed_of(self.recipe.seed, self._ids[layer], _GATE_STREAM, *name.encode())
        generator = torch.Generator().manual_seed(key)
        return deviation * torch.randn(shape, generator=generator)

    def check_complete(self, names: Iterable[str]) -> None:
        """Raise `OptionError` if a dense weight would be lost.

        Args:
            names: all parameters and buffers of the MoE model.
        """
        known = set(names)
        for name in self.dense.weights:
            ffn = _FFN.match(name)
            if name not in known and (ffn is None or int(ffn[1]) not in self.moe_layers):
                raise self.dense.misfit(f"has {name}, for which the MoE model has no place")


def _width_misfit(options: Any, kind: str, remedy: str) -> OptionError:
    """An error that names the option which the width of a kind of experts comes from."""
    option = f"moe_{kind}_ffn_dim"
    if not getattr(options, option):
        option = f"moe_{kind}_size_factor"
    return OptionError(option, getattr(options, option), remedy)


def check_structure(dense: DenseCheckpoint, options: Any, given: Iterable[str] = STRUCTURE) -> None:
    """Raise `OptionError` unless the MoE model has the dense model's structure.

    Args:
        options: the MoE model's.
        given: which of `STRUCTURE` to compare.
    """
    for field in given:
        wanted, value = dense.model[field], getattr(options, field)
        if field in ("decoder_input_dim", "decoder_output_dim"):
            value = value or options.decoder_embed_dim
        if field == "max_target_positions" and not dense.model["decoder_learned_pos"]:
            continue
        if wanted != value and not (wanted in _TANH_GELUS and value in _TANH_GELUS):
            raise OptionError(
                field,
                value,
                f"the dense checkpoint {dense.path} has {wanted}: leave it out, or give that",
            )
