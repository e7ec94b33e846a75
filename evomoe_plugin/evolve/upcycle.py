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

from evomoe_plugin.checkpoint.hf_weights import with_rows
from evomoe_plugin.config.checks import check_spawned_from
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.moe_layers import expert_counts, expert_slots, moe_layer_indices
from evomoe_plugin.config.options import ModelOptions, expert_ffn_dim, shared_ffn_dim
from evomoe_plugin.config.rates import SPAWN_METHODS, check_rate, resolved_rate
from evomoe_plugin.config.stacks import stacks
from evomoe_plugin.evolve.dense_checkpoint import DEFAULT_ARCHS, DenseCheckpoint, family_of
from evomoe_plugin.evolve.init_methods import seed_of, spawn_tensor
from evomoe_plugin.gates import gate_class

METHODS = (*SPAWN_METHODS, "slice", "none")
SLICES = ("contiguous", "shuffled")

_FFN = re.compile(r"(.+)\.layers\.(\d+)\.(?:fc1|fc2|fc3)\.(?:weight|bias)$")
# A parameter inside an MoE layer: of which stack, which layer, which part, the name there.
_INSIDE = re.compile(r"(.+)\.layers\.(\d+)\.moe\.(shared\.experts|experts|gate)\.(.+)$")
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


@dataclass(frozen=True)
class _Part:
    """A stack of the MoE model."""

    options: ModelOptions
    ids: dict[int, int]
    """The number of each MoE layer in the model, by its index in the stack."""
    num_slices: int
    num_shared_slices: int


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
        is_gpt = dense.family == "gpt"
        if is_gpt and options.moe_post_norm != dense.post_norm:
            order, remedy = ("after", "give it") if dense.post_norm else ("before", "leave it out")
            raise OptionError(
                "moe_post_norm",
                options.moe_post_norm,
                f"the dense checkpoint {dense.path} normalises {order} each part of "
                f"a layer: {remedy}",
            )
        self._parts: dict[str, _Part] = {}
        count = 0
        for path, part in zip(dense.paths, stacks(options), strict=True):
            layers = moe_layer_indices(part, part.decoder_layers)
            is_made = bool(layers) and recipe.method != "none"
            self._parts[path] = _Part(
                part,
                {layer: count + n for n, layer in enumerate(layers)},
                self._check_experts(path, part) if is_made else 1,
                self._count_slices(path, part, "shared")
                if is_made and options.moe_shared_experts
                else 1,
            )
            count += len(layers)
        self._check_gate()

    @property
    def slots(self) -> list[int]:
        """Experts of each MoE layer of the model."""
        return [count for part in self._parts.values() for count in expert_slots(part.options)]

    @property
    def widths(self) -> list[int]:
        """Hidden widths of the experts, of each stack with MoE layers."""
        return [expert_ffn_dim(part.options) for part in self._parts.values() if part.ids]

    @property
    def num_layers(self) -> int:
        """All layers of the model."""
        return sum(part.options.decoder_layers for part in self._parts.values())

    def _check_experts(self, path: str, options: ModelOptions) -> int:
        """Number of slices of routed experts; 1: whole networks."""
        recipe = self.recipe
        method = f"--{recipe.option('method').replace('_', '-')}"
        if options.moe_expert_gated and not self.dense.is_gated:
            raise OptionError(
                "moe_expert_gated",
                True,
                "the dense model's feed-forward network is not gated: leave it out, "
                f"or start the experts afresh with {method} none",
            )
        if self.dense.is_gated and self.dense.model["decoder_ffn_bias"]:
            raise self.dense.misfit(
                "its gated feed-forward networks have biases, gated experts have none: start the "
                f"experts afresh with {method} none"
            )
        ffn_dim, width = expert_ffn_dim(options), self.dense.ffn_dim(path)
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
        slices = self._count_slices(path, options, "expert")
        for count in {*expert_counts(options), *expert_slots(options)}:
            if count % slices:
                raise OptionError(
                    "moe_expert_count",
                    options.moe_expert_count,
                    f"{count} experts cannot hold {slices} slices (the dense width "
                    f"{width} over {ffn_dim}) equally often: give a multiple of "
                    f"{slices}, or other widths",
                )
        return slices

    def _count_slices(self, path: str, options: ModelOptions, kind: str) -> int:
        """Experts of a kind, `expert` or `shared`, that the dense network is cut into."""
        is_shared, width = kind == "shared", self.dense.ffn_dim(path)
        ffn_dim = shared_ffn_dim(options) if is_shared else expert_ffn_dim(options)
        if width % ffn_dim:
            experts = "shared experts" if is_shared else "experts"
            raise _width_misfit(
                options,
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
        return any(
            slots > {"copy": 1, "slice": part.num_slices}.get(self.recipe.method, slots)
            for part in self._parts.values()
            for slots in expert_slots(part.options)
        )

    def value(self, name: str, shape: Iterable[int]) -> Tensor | None:
        """The initial value of the parameter `name`, fp32 unless the dense model keeps its dtype;
        None: its own initialisation.

        Raises:
            OptionError: the dense checkpoint lacks it, or has another shape.
        """
        shape = torch.Size(shape)
        inside = _INSIDE.match(name)
        if inside is not None:
            path, layer, inner, rest = inside[1], int(inside[2]), inside[3], inside[4]
            if inner == "gate":
                return self._gate(self._parts[path].ids[layer], rest, shape)
            if self.recipe.method == "none":
                return None
            if inner == "experts":
                expert = self._routed(path, layer, rest)
            else:
                slices = self._parts[path].num_shared_slices
                expert = self._sliced(path, layer, rest, slices, False)
            # Into one buffer, so that no more than one expert is held beside it.
            first = expert(0)
            value = first.new_empty(shape[0], *first.shape)
            value[0] = first
            del first
            for e in range(1, shape[0]):
                value[e] = expert(e)
        elif name in self.dense.weights:
            value = self.dense.weight(name)
            if self.dense.keeps_dtype:
                value = with_rows(name, value, shape[0])
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

    def _source(self, path: str, layer: int, name: str) -> Tensor:
        """A tensor of the dense network in the dtype of what is made of it."""
        source = self.dense.ffn_tensor(path, layer, name)
        return source if self.dense.keeps_dtype else source.float()

    def _routed(self, path: str, layer: int, name: str) -> Callable[[int], Tensor]:
        recipe, n = self.recipe, self._parts[path].ids[layer]
        if recipe.method == "slice":
            return self._sliced(path, layer, name, self._parts[path].num_slices, recipe.rescale)
        source = self._source(path, layer, name)
        rate = resolved_rate(recipe.method, recipe.rate)
        spawn = functools.partial(
            spawn_tensor, name, source, recipe.method, rate=rate, rescale=recipe.rescale
        )
        return lambda expert: spawn(key=seed_of(recipe.seed, n, expert, _EXPERT_STREAM))[0]

    def _sliced(
        self, path: str, layer: int, name: str, slices: int, rescale: bool
    ) -> Callable[[int], Tensor]:
        """Expert e gets slice e mod `slices`; one of each slice sum to the dense network."""
        source = self._source(path, layer, name)
        scale = slices if rescale and name.startswith("fc2") else 1
        if name == "fc2_bias":
            return lambda expert: source * (scale / slices)
        # In the order in which slices take them.
        units_F = torch.arange(source.size(0))
        if self.recipe.slices != "contiguous":
            key = seed_of(self.recipe.seed, self._parts[path].ids[layer], _SLICE_STREAM)
            units_F = torch.randperm(len(units_F), generator=torch.Generator().manual_seed(key))
        units_SF = units_F.view(slices, -1)
        return lambda expert: source[units_SF[expert % slices]] * scale

    def _gate(self, n: int, name: str, shape: torch.Size) -> Tensor | None:
        deviation = self.recipe.gate_deviation
        if deviation is None or len(shape) < 2 or name.startswith("lexical."):
            return None  # --moe-lexical gives the start of its table
        if name.startswith("scorer."):  # stored are weights over the factor
            deviation /= getattr(self.options, "moe_gate_lr_factor", 1.0)
        if name.startswith("shared_weights") and deviation == 0.0:
            return None  # weighs shared experts, routes nothing
        # Keyed by the name's bytes: Python's hash differs between processes.
        key = seed_of(self.recipe.seed, n, _GATE_STREAM, *name.encode())
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
            is_expert = ffn is not None and int(ffn[2]) in self._parts[ffn[1]].ids
            if name not in known and not is_expert:
                raise self.dense.misfit(f"has {name}, for which the MoE model has no place")


def _width_misfit(options: Any, kind: str, remedy: str) -> OptionError:
    """An error that names the option which the width of a kind of experts comes from."""
    option = f"moe_{kind}_ffn_dim"
    if not getattr(options, option):
        option = f"moe_{kind}_size_factor"
    return OptionError(option, getattr(options, option), remedy)


def check_family(dense: DenseCheckpoint, arch: str, options: object) -> None:
    """Raise `OptionError` unless the architecture, with these options, has the dense model's kind
    of decoder."""
    if dense.family != family_of(options):
        raise OptionError(
            "arch",
            arch,
            f"the dense model {dense.path} is of another kind: give {DEFAULT_ARCHS[dense.family]}",
        )


def check_structure(
    dense: DenseCheckpoint, options: Any, given: Iterable[str] | None = None
) -> None:
    """Raise `OptionError` unless the MoE model has the dense model's structure.

    Args:
        options: the MoE model's.
        given: which options to compare; None: the dense model's `structure`.
    """
    check_family(dense, options._name, options)
    for field in dense.structure if given is None else given:
        wanted, value = dense.model[field], getattr(options, field)
        if field in ("decoder_input_dim", "decoder_output_dim"):
            value = value or options.decoder_embed_dim
        side = {"max_target_positions": "decoder", "max_source_positions": "encoder"}.get(field)
        if side is not None and not dense.model[f"{side}_learned_pos"]:
            continue
        if wanted != value and not (wanted in _TANH_GELUS and value in _TANH_GELUS):
            raise OptionError(
                field,
                value,
                f"the dense checkpoint {dense.path} has {wanted}: leave it out, or give that",
            )
