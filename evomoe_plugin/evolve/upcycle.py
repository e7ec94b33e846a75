"""Make experts from the feed-forward networks of a dense model.

Copies, masked, noisy or partly reinitialised: `evolve.init_methods`. Slices: smaller experts that
partition the dense network's hidden units (fine-grained experts as in DeepSeekMoE, arXiv
2401.06066; cut from a dense network as in MoEfication, arXiv 2110.01786).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.config.checks import check_spawned_from
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import (
    check_rate,
    expert_counts,
    expert_ffn_dim,
    expert_slots,
    moe_layer_indices,
    resolved_rate,
    shared_ffn_dim,
)
from evomoe_plugin.evolve.dense_checkpoint import STRUCTURE, DenseCheckpoint, same
from evomoe_plugin.evolve.init_methods import METHODS as SPAWN_METHODS
from evomoe_plugin.evolve.init_methods import seed_of, spawn_tensor
from evomoe_plugin.gates import gate_class

METHODS = (*SPAWN_METHODS, "slice", "none")
SLICES = ("contiguous", "shuffled")

# A parameter inside an MoE layer: which layer, which part, the name there.
_INSIDE = re.compile(r"decoder\.layers\.(\d+)\.moe\.(shared\.experts|experts|gate)\.(.+)$")
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
        if not self.in_run:
            return field
        return f"moe_init_{field.removesuffix('_init')}"

    def check(self) -> None:
        """Raise `OptionError` for a value that cannot work."""
        if self.method not in METHODS:
            raise OptionError(self.option("method"), self.method, f"one of: {', '.join(METHODS)}")
        if self.slices not in SLICES:
            raise OptionError(self.option("slices"), self.slices, f"one of: {', '.join(SLICES)}")
        if self.slices != "contiguous" and self.method != "slice":
            raise OptionError(self.option("slices"), self.slices,
                              f"the method {self.method} cuts nothing: leave it out")
        check_rate(self.option("rate"), self.method, self.rate)
        if self.rescale and self.method not in ("mask", "slice"):
            raise OptionError(self.option("rescale"), True,
                              f"the method {self.method} has nothing to rescale: leave it out")
        self.gate_deviation  # noqa: B018  raises for what is no deviation

    @property
    def gate_deviation(self) -> float | None:
        """Standard deviation of the gates' initial weights; None: the gate's own initialisation."""
        if self.gate_init == "default":
            return None
        if self.gate_init == "zero":
            return 0.0
        try:
            deviation = float(self.gate_init.removeprefix("normal:"))
        except ValueError:
            deviation = -1.0
        if not self.gate_init.startswith("normal:") or not 0 < deviation < float("inf"):
            raise OptionError(self.option("gate_init"), self.gate_init,
                              "give default, zero, or normal:STD with a deviation above 0")
        return deviation


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
        _check_norms(dense, options)
        self.moe_layers = moe_layer_indices(options, options.decoder_layers)
        self._ids = {layer: n for n, layer in enumerate(self.moe_layers)}
        width = dense.model["decoder_ffn_embed_dim"]
        self.num_slices = self._check_experts(width) if recipe.method != "none" else 1
        self.num_shared_slices = self._check_shared(width) if recipe.method != "none" else 1
        self._check_gate()

    def _check_experts(self, width: int) -> int:
        """Number of slices of routed experts; 1: whole networks."""
        options, recipe = self.options, self.recipe
        method = f"--{recipe.option('method').replace('_', '-')}"
        if options.moe_expert_gated:
            raise OptionError("moe_expert_gated", True,
                              "the dense model's feed-forward network is not gated: leave it out, "
                              f"or start the experts afresh with {method} none")
        ffn_dim = expert_ffn_dim(options)
        if recipe.method != "slice":
            if ffn_dim != width:
                raise OptionError(_width_option(options, "expert"), _width_value(options, "expert"),
                                  f"experts of width {ffn_dim} are no {recipe.method} of the dense "
                                  f"model's network of width {width}: leave it out, or give "
                                  f"{method} slice")
            return 1
        if width % ffn_dim:
            raise OptionError(_width_option(options, "expert"), _width_value(options, "expert"),
                              f"the dense model's width {width} cannot be cut into experts of "
                              f"{ffn_dim}: give a divisor")
        slices = width // ffn_dim
        for count in set(expert_counts(options, len(self.moe_layers))) | set(
                expert_slots(options, len(self.moe_layers))):
            if count % slices:
                raise OptionError("moe_expert_count", options.moe_expert_count,
                                  f"{count} experts cannot hold {slices} slices (the dense width "
                                  f"{width} over {ffn_dim}) equally often: give a multiple of "
                                  f"{slices}, or other widths")
        return slices

    def _check_shared(self, width: int) -> int:
        options = self.options
        if not options.moe_shared_experts:
            return 1
        ffn_dim = shared_ffn_dim(options)
        if width % ffn_dim:
            raise OptionError(_width_option(options, "shared"), _width_value(options, "shared"),
                              f"the dense model's width {width} cannot be cut into shared experts "
                              f"of {ffn_dim}: give a divisor")
        return width // ffn_dim

    def _check_gate(self) -> None:
        recipe = self.recipe
        if recipe.gate_deviation is None:
            return
        option = recipe.option("gate_init")
        scorer = getattr(self.options, "moe_scorer", "linear")
        gate = self.options.moe_gate
        cls = gate_class(gate)
        if not cls.capabilities.gate_init:
            raise OptionError(option, recipe.gate_init,
                              f"the gate {gate} has no weights: leave it out")
        if recipe.gate_deviation == 0.0 and (
                not cls.capabilities.zero_init or scorer not in ("linear", "sigmoid")):
            with_scorer = f" with --moe-scorer {scorer}" if scorer != "linear" else ""
            raise OptionError(option, "zero", f"the gate {gate}{with_scorer} cannot learn from "
                                              "weights of 0: give default or normal:STD")
        if (recipe.gate_deviation == 0.0 and cls.capabilities.keeps_copies_equal
                and self._has_twins()):
            raise OptionError(option, "zero",
                              f"with it the gate {gate} treats all experts alike, and experts that "
                              "begin alike stay so for ever: give default or normal:STD, or a "
                              "--activation-dropout")

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
            slots > distinct for slots in expert_slots(options, len(self.moe_layers)))

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
            count = shape[0]
            expert = self._shared(layer, rest) if part != "experts" else self._routed(layer, rest)
            value = torch.stack([expert(e) for e in range(count)])
        else:
            if name not in self.dense.weights:
                raise OptionError(self.dense.option, self.dense.path, f"has no {name}")
            value = self.dense.weights[name].float()
        if value.shape != shape:
            raise self._misfit(name, value.shape, shape)
        return value

    def _misfit(self, name: str, given: torch.Size, wanted: torch.Size) -> OptionError:
        if "embed_tokens" in name or "output_projection" in name:
            return OptionError("DATA", "dict.txt", f"has {wanted[0]} tokens, the dense checkpoint "
                                                   f"was trained with {given[0]}: give the data "
                                                   "that belongs to it")
        return OptionError(self.dense.option, self.dense.path,
                           f"{name} has the shape {tuple(given)}, the model {tuple(wanted)}")

    def _routed(self, layer: int, name: str) -> Callable[[int], Tensor]:
        recipe, n = self.recipe, self._ids[layer]
        if recipe.method == "slice":
            return self._sliced(layer, name, self.num_slices, recipe.rescale)
        source = self.dense.ffn(layer)[name].float()
        rate = resolved_rate(recipe.method, recipe.rate)
        return lambda expert: spawn_tensor(
            name, source, recipe.method, key=seed_of(recipe.seed, n, expert, _EXPERT_STREAM),
            rate=rate, rescale=recipe.rescale)[0]

    def _shared(self, layer: int, name: str) -> Callable[[int], Tensor]:
        """Whole copies, or slices if their width is smaller."""
        return self._sliced(layer, name, self.num_shared_slices, False)

    def _sliced(self, layer: int, name: str, slices: int, rescale: bool) -> Callable[[int], Tensor]:
        """Expert e gets slice e mod `slices`; one of each slice sum to the dense network."""
        source = self.dense.ffn(layer)[name].float()
        scale = slices if rescale and name.startswith("fc2") else 1
        if name == "fc2_bias":
            return lambda expert: source * (scale / slices)
        units_SF = self.units(layer, source.size(0)).view(slices, -1)
        return lambda expert: source[units_SF[expert % slices]] * scale

    def units(self, layer: int, width: int) -> Tensor:
        """The hidden units of a layer, int64 [F], in the order in which slices take them."""
        if self.recipe.slices == "contiguous":
            return torch.arange(width)
        key = seed_of(self.recipe.seed, self._ids[layer], _SLICE_STREAM)
        return torch.randperm(width, generator=torch.Generator().manual_seed(key))

    def _gate(self, layer: int, name: str, shape: torch.Size) -> Tensor | None:
        deviation = self.recipe.gate_deviation
        if deviation is None or len(shape) < 2:
            return None
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
        lost = [name for name in self.dense.weights
                if name not in known and not self.dense.is_ffn(name, set(self.moe_layers))]
        if lost:
            raise OptionError(self.dense.option, self.dense.path,
                              f"has {lost[0]}, for which the MoE model has no place")


def _width_option(options: Any, kind: str) -> str:
    return f"moe_{kind}_ffn_dim" if getattr(options, f"moe_{kind}_ffn_dim") else (
        f"moe_{kind}_size_factor")


def _width_value(options: Any, kind: str) -> int:
    return getattr(options, _width_option(options, kind))


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
        if not same(field, wanted, value):
            raise OptionError(field, value, f"the dense checkpoint {dense.path} has {wanted}: "
                                            "leave it out, or give that")


def _check_norms(dense: DenseCheckpoint, options: Any) -> None:
    if options.moe_post_norm != dense.post_norm:
        remedy = "give it" if dense.post_norm else "leave it out"
        raise OptionError("moe_post_norm", options.moe_post_norm,
                          f"the dense checkpoint {dense.path} normalises "
                          f"{'after' if dense.post_norm else 'before'} each part of a layer: "
                          f"{remedy}")
