"""The MoE layer for models in plain PyTorch; needs torch alone."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evomoe_plugin import gates
from evomoe_plugin import layer_keywords as kw
from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates.registry import own_options
from evomoe_plugin.layer import build_layer
from evomoe_plugin.routing import noise
from evomoe_plugin.routing import stats as st

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
# The options of every gate, and those of the layer that need no trainer.
_SHARED_OPTIONS = (
    "moe_gating_use_fp32 moe_aux moe_weight_scale moe_weight_total moe_shared_experts "
    "moe_shared_ffn_dim moe_shared_combine moe_null_experts moe_null_rate_target "
    "moe_capacity_factor moe_eval_capacity_factor moe_eval_capacity_token_fraction "
    "moe_min_capacity moe_drop_policy moe_renormalize_after_drop"
).split()
# Prefixes of gates' options whose work is the trainer's.
_OF_TRAINER = ("moe_adapt_", "moe_max_experts")
# What errors call an option -> the keyword.
_KEYWORDS = {
    "decoder_embed_dim": "model_dim",
    "decoder_ffn_embed_dim": "ffn_dim",
    "moe_expert_count": "num_experts",
    "max_update": "max_updates",
}


@dataclasses.dataclass(frozen=True)
class MoEOutput:
    """What a layer returns."""

    output: Tensor
    """As the input; zeros for padding and for tokens without an expert."""
    aux_loss: Tensor
    """A scalar to add to the loss, a mean over tokens: each auxiliary loss times its coefficient
    (option `aux`). Without any, 0."""
    losses: dict[str, Tensor]
    """The auxiliary losses by name, without coefficients."""
    stats: dict[str, Tensor]
    """Sums over tokens, detached (`routing.stats`); may be added over micro-batches and ranks."""

    def summary(self) -> dict[str, float]:
        """The numbers to log (`routing.stats.summarize`): experts_per_token, load_max, …

        Waits for the device.
        """
        layers = {name: value.unsqueeze(0) for name, value in self.stats.items()}
        return st.summarize({n: v for n, v in layers.items() if st.is_logged(n, v[0])})


class MoELayer(nn.Module):
    """Routed experts in the place of an FFN, in plain PyTorch.

        moe = MoELayer(model_dim=512, ffn_dim=2048, num_experts=8, gate="top_k", top_k=2)
        result = moe(x)                       # x: [..., 512]
        (criterion(result.output) + result.aux_loss).backward()
        optimizer.step()
        moe.finish_update(result.stats)       # schedules and balancing biases go on

    The options are those of docs/options.md without their prefix `moe_`: `temperature_end`,
    `capacity_factor`, `shared_experts`, `aux="balance=0.01"`. Those of the trainer (spawning and
    adapting experts, expert parallelism) are not available. Type checkers know those of each gate
    (`layer_keywords`).

    Args:
        model_dim: D, width of the tokens.
        ffn_dim: F, hidden width of an expert.
        num_experts: E.
        gate: its name (`--moe-gate`).
        activation: gelu, relu, silu or tanh.
        gated: experts are W2 (act(W1 x) * W3 x), without biases, not W2 act(W1 x + b1) + b2.
        dropout: of hidden units.
        layer_id: index among the model's MoE layers, whose noise and tables differ by it.
        seed: of noise and tables.
        max_updates: length of the training, of which some schedules are a share.
        token_counts: frequency of each token id, for gates that use token ids.
        options: of the gate and of the layer.
    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: a value that cannot work.
    """

    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.DenseToSparse]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.Base]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.Dense]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.DSelectK]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.ExpertChoice]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.GShard]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.Hash]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.Relu]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.Stable]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.Switch]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.TopAny]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.TopK]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.TopP]
    ) -> None: ...
    @overload
    def __init__(
        self, model_dim: int, ffn_dim: int, num_experts: int, **options: Unpack[kw.AnyGate]
    ) -> None: ...
    def __init__(
        self,
        model_dim: int,
        ffn_dim: int,
        num_experts: int,
        *,
        gate: str = "dense_to_sparse",
        activation: str = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
        layer_id: int = 0,
        seed: int = 1,
        max_updates: int | None = None,
        token_counts: Sequence[int] = (),
        **options: Any,
    ):
        super().__init__()
        _check_types(
            {
                "model_dim": (model_dim, int),
                "ffn_dim": (ffn_dim, int),
                "num_experts": (num_experts, int),
                "gate": (gate, str),
                "activation": (activation, str),
                "gated": (gated, bool),
                "dropout": (dropout, float),
                "layer_id": (layer_id, int),
                "seed": (seed, int),
                "max_updates": (max_updates, int | None),
            }
        )
        for name, size in {"model_dim": model_dim, "ffn_dim": ffn_dim}.items():
            if size < 1:
                raise ValueError(f"{name}={size}: give a width of at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: one of: {', '.join(ACTIVATIONS)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: give a probability of at least 0 and below 1")
        try:
            cls = gates.gate_class(gate)
            values = cls.Options(
                decoder_embed_dim=model_dim,
                decoder_ffn_embed_dim=ffn_dim,
                decoder_layers=1,
                moe_freq=1,
                moe_expert_count=str(num_experts),
                moe_expert_gated=gated,
                moe_gate=gate,
                seed=seed,
                max_update=max_updates,
                **_parsed(cls, options),
            )
            validate(values)
            info = gates.LayerInfo(
                model_dim=model_dim,
                num_experts=num_experts,
                num_null=values.moe_null_experts,
                layer_id=layer_id,
                seed=seed,
                token_counts_V=tuple(token_counts),
            )
            self.layer = build_layer(
                info, values, ACTIVATIONS[activation], nn.Dropout(dropout) if dropout else None
            )
        except OptionError as error:
            raise ValueError(_by_keyword(str(error))) from None
        self.model_dim = model_dim
        self._coefficients = dict(cls.aux_coefficients(values))

    @property
    def num_updates(self) -> int:
        """Completed updates, which schedules depend on; in the state dict."""
        return int(self.layer.num_updates)

    def set_num_updates(self, num_updates: int) -> None:
        """Set the number of completed updates.

        Raises:
            TypeError: it is no int.
            ValueError: it is negative.
        """
        _check_types({"num_updates": (num_updates, int)})
        if num_updates < 0:
            raise ValueError(f"num_updates={num_updates}: give 0 or more")
        self.layer.set_num_updates(num_updates)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        token_keys: Tensor | None = None,
    ) -> MoEOutput:
        """Apply the layer.

        Args:
            x: tokens, [..., D].
            token_mask: bool [...], False for padding, which is neither routed nor counted.
            token_ids: int64 [...], for gates that use them.
            token_keys: int64 [...]: noise is a function of them (`evomoe_plugin.sequence_keys`),
                whatever the batch. None: drawn from torch's generator in training; no noise in
                evaluation.
        Raises:
            ValueError: a tensor of another shape or dtype, or missing token ids.
        """
        if not x.is_floating_point():
            raise ValueError(f"x is {_dtype(x)}: give tokens as floating-point vectors")
        if x.dim() < 1 or x.size(-1) != self.model_dim:
            raise ValueError(f"x is {list(x.shape)}: its last size must be {self.model_dim}")
        shape = x.shape[:-1]
        for name, given, dtype in (
            ("token_mask", token_mask, torch.bool),
            ("token_ids", token_ids, torch.int64),
            ("token_keys", token_keys, torch.int64),
        ):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} is {list(given.shape)}: it must be {list(shape)}")
            if given is not None and given.dtype != dtype:
                raise ValueError(f"{name} is {_dtype(given)}: it must be {_name(dtype)}")
        if token_keys is None and self.training:
            position = torch.arange(shape.numel(), device=x.device)
            draw = torch.randint(2**62, (), device=x.device)
            token_keys = noise.fold(draw, position)
        mask_T, ids_T, keys_T = (
            None if given is None else given.reshape(-1)
            for given in (token_mask, token_ids, token_keys)
        )
        y_TD, aux_A, stats = self.layer(
            x.reshape(-1, self.model_dim), mask_T, token_keys_T=keys_T, token_ids_T=ids_T
        )
        losses = dict(zip(self.layer.gate.aux_names, aux_A.unbind(), strict=True))
        weighted = [self._coefficients[name] * loss for name, loss in losses.items()]
        aux_loss = torch.stack(weighted).sum() if weighted else y_TD.new_zeros(())
        return MoEOutput(y_TD.view_as(x), aux_loss, losses, stats)

    @torch.no_grad()
    def finish_update(self, *stats: dict[str, Tensor]) -> None:
        """Count an update, after the optimizer's step.

        Gates that balance loads by a bias, or follow running means, change by what was routed.

        Args:
            stats: of each forward pass of the update; over several ranks, their sums.
        Raises:
            TypeError: there are none, or they are something else, such as a summary.
        """
        if not stats or not all(
            isinstance(one, dict) and all(isinstance(value, Tensor) for value in one.values())
            for one in stats
        ):
            raise TypeError("finish_update takes the `stats` of each forward pass of the update")
        total = {name: sum(one[name] for one in stats[1:]) + stats[0][name] for name in stats[0]}
        num_updates = self.num_updates + 1
        if self.layer.gate.changes_after_updates:
            layers = {name: value.unsqueeze(0) for name, value in total.items()}
            self.layer.gate.finish_update(num_updates, total, layers)
        self.set_num_updates(num_updates)

    def extra_repr(self) -> str:
        gate = type(self.layer.gate).__name__
        return f"model_dim={self.model_dim}, num_experts={self.layer.num_experts}, gate={gate}"


def known_options(cls: type[gates.Gate]) -> dict[str, str]:
    """Keyword -> name of the option, of those that `MoELayer` takes with a gate."""
    of_gate = (field.name for field in own_options(cls))
    names = [*_SHARED_OPTIONS, *(n for n in of_gate if not n.startswith(_OF_TRAINER))]
    return {name.removeprefix("moe_"): name for name in names}


def _parsed(cls: type[gates.Gate], given: dict[str, Any]) -> dict[str, Any]:
    """Options by their full names.

    Raises:
        TypeError: see `MoELayer`.
    """
    hints, known = typing.get_type_hints(cls.Options), known_options(cls)
    found = {}
    for keyword, value in given.items():
        if keyword not in known:
            if (short := keyword.removeprefix("moe_")) in known:
                raise TypeError(f"MoELayer has no option {keyword}: here it is {short}")
            near = difflib.get_close_matches(keyword, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(sorted(known))}"
            raise TypeError(f"MoELayer has no option {keyword} with this gate: {hint}")
        name = known[keyword]
        if isinstance(value, bool) and isinstance(getattr(cls.Options, name), str):
            value = str(value).lower()  # true and false are strings on the command line
        _check_types({keyword: (value, hints[name])})
        found[name] = value
    return found


def _check_types(given: dict[str, tuple[Any, Any]]) -> None:
    """Raise TypeError for a value that is not of its type; keyword -> value and type."""
    for keyword, (value, hint) in given.items():
        if not _fits(value, hint):
            kinds = [one for one in typing.get_args(hint) or (hint,) if one is not type(None)]
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{keyword}={value!r}: must be of type {names}")


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _by_keyword(message: str) -> str:
    """An error's message with keywords in the place of flags."""

    def keyword(match: re.Match) -> str:
        name = match[1].replace("-", "_")
        return _KEYWORDS.get(name, name.removeprefix("moe_"))

    return re.sub(r"--([a-z0-9-]+)", keyword, message)


def _dtype(tensor: Tensor) -> str:
    return _name(tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
