"""Whether an MoE model made from a dense one computes the same: measured on random tokens."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import models
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules import MultiheadAttention
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.reading import plain_config
from evomoe_plugin.evolve.dense_checkpoint import DenseCheckpoint
from evomoe_plugin.evolve.initial_values import build_without_memory
from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.models.language_model import MoELanguageModel

MAX_TOKENS = 64
_RENDERED = ("layernorm_embedding",)  # options that are text in ours and a bool in fairseq's
# fp32 rounding, relative to the largest logit.
_ROUNDING = 1e-5
_PART = 2**20  # bytes of a matrix at a time


@dataclass(frozen=True)
class LogitDifference:
    """Logits of an MoE model against those of the dense one, in evaluation mode."""

    largest: float
    """Absolute, over all tokens and vocabulary rows."""
    equal: bool
    """Whether it is no more than rounding."""
    tokens: int

    def __str__(self) -> str:
        verdict = "equal to" if self.equal else "differ from"
        return (
            f"logits {verdict} the dense model's (max difference {self.largest:.2g} on "
            f"{self.tokens} random tokens)"
        )


@contextlib.contextmanager
def streamed(
    model: TransformerLanguageModel,
    weights: Mapping[str, Tensor],
    rounded: torch.dtype | None = None,
) -> Iterator[None]:
    """Inside, a model without memory computes in fp32, with few rows of a matrix in memory at a
    time.

    Args:
        model: from `initial_values.build_without_memory`.
        weights: its state dict, in any dtypes; may read them when they are asked for.
        rounded: a dtype that fp32 weights are rounded to; None: they are not.
    """

    def fp32(value: Tensor) -> Tensor:
        return value.to(rounded or value.dtype).float()

    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            methods: dict[str, Callable[..., Tensor]] = {}
            if ".gate." in prefix:
                if path.endswith(".gate"):
                    own = {name: weights[f"{prefix}{name}"] for name in module.state_dict()}
                    module.load_state_dict(own, assign=True)
                    stack.callback(module.to, "meta")
                continue
            if any(isinstance(a, MultiheadAttention) for a in _around(model, path)):
                continue  # held by it
            if isinstance(module, MultiheadAttention):
                methods["forward"] = functools.partial(_attend, module, weights, prefix, fp32)
            elif type(module) is nn.Embedding:  # not one of positions, which is small
                methods["forward"] = functools.partial(_embed, weights, prefix, fp32)
            elif isinstance(module, nn.Linear):
                methods["forward"] = functools.partial(_project, module, weights, prefix, fp32)
            elif isinstance(module, ExpertFFN):
                compute = functools.partial(_compute, module, weights, prefix, fp32)
                methods |= {"forward_tokens": compute, "forward_rows": _of_rows(compute)}
            for name, method in methods.items():
                setattr(module, name, method)
                stack.callback(delattr, module, name)
            held = {}
            for name, tensor in {**module._parameters, **module._buffers}.items():
                if f"{prefix}{name}" not in weights:
                    continue
                if methods:  # what looks for its device or dtype finds it
                    held[name] = torch.empty(0, dtype=tensor.dtype)
                else:
                    value = weights[f"{prefix}{name}"]
                    held[name] = fp32(value) if tensor.dtype == torch.float32 else value
            stack.enter_context(_holding(module, held))
        yield


@contextlib.contextmanager
def _holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module has these parameters and buffers."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for name, value in tensors.items():
        kind: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        before.append((kind, name, kind[name]))
        kind[name] = nn.Parameter(value, False) if kind is module._parameters else value
    try:
        yield
    finally:
        for kind, name, value in before:
            kind[name] = value


def _parts(rows: int, width: int) -> Iterator[slice]:
    """Rows of a matrix that take up to `_PART` in fp32."""
    step = max(1, _PART // (4 * width))
    return (slice(start, start + step) for start in range(0, rows, step))


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that one is in."""
    parts = path.split(".")
    return (model.get_submodule(".".join(parts[:n])) for n in range(1, len(parts)))


def _attend(
    attention: MultiheadAttention,
    weights: Mapping[str, Tensor],
    prefix: str,
    fp32: Callable[[Tensor], Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """fairseq's attention, which looks into its projections, with their weights in memory."""
    with contextlib.ExitStack() as stack:
        for path, module in attention.named_modules(prefix=prefix[:-1]):
            names = [name for name, _ in module.named_parameters(recurse=False)]
            held = {name: fp32(weights[f"{path}.{name}"]) for name in names}
            stack.enter_context(_holding(module, held))
        return type(attention).forward(attention, *args, **kwargs)


def _embed(
    weights: Mapping[str, Tensor], prefix: str, fp32: Callable[[Tensor], Tensor], ids: Tensor
) -> Tensor:
    return fp32(F.embedding(ids, weights[f"{prefix}weight"]))


def _project(
    module: nn.Linear,
    weights: Mapping[str, Tensor],
    prefix: str,
    fp32: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    names = [name for name, value in module.named_parameters(recurse=False)]
    whole = {name: weights[f"{prefix}{name}"] for name in names}
    parts = []
    for rows in _parts(*whole["weight"].shape):
        with _holding(module, {name: fp32(value[rows]) for name, value in whole.items()}):
            parts.append(type(module).forward(module, x))
    return torch.cat(parts, -1)


def _compute(
    experts: ExpertFFN,
    weights: Mapping[str, Tensor],
    prefix: str,
    fp32: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    token_ids_N: Tensor,
    weights_N: Tensor | None,
    counts: Sequence[int] | Tensor,
    by_token: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`ExpertFFN.forward_tokens`, some hidden units of one expert at a time: the output is their
    sum."""
    names = [name for name, _ in experts.named_parameters(recurse=False)]
    whole = {name: weights[f"{prefix}{name}"] for name in names}
    y_TD, ends = torch.zeros_like(x_TD), torch.as_tensor(counts).cumsum(0).tolist()
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        pairs = slice(start, end)
        if start == end:
            continue
        for units in _parts(*whole["fc1_weight"].shape[1:]):
            held = {}
            for name, value in whole.items():
                if name == "fc2_bias":  # which is of no unit
                    held[name] = fp32(value[e : e + 1]) * (units.start == 0)
                else:
                    held[name] = fp32(value[e : e + 1, units])
            with _holding(experts, held):
                y_TD += ExpertFFN.forward_tokens(
                    experts,
                    x_TD,
                    token_ids_N[pairs],
                    None if weights_N is None else weights_N[pairs],
                    [end - start],
                )
    return y_TD


def _of_rows(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`ExpertFFN.forward_rows` by its `forward_tokens`."""
    return lambda rows_ND, counts: compute(rows_ND, torch.arange(len(rows_ND)), None, counts)


@torch.no_grad()
def measure_logit_difference(model: MoELanguageModel, dense: DenseCheckpoint) -> LogitDifference:
    """Compare `model` with the dense model on random tokens.

    Both compute in fp32, from weights rounded to the precision of `model`. Its mode, weights and
    routing records, and the random number generators, are left as they were.

    Args:
        model: whole on this rank: no FSDP, no sharded experts.
    Raises:
        OptionError: no model can be built from the dense checkpoint.
    """
    weight, training = next(model.parameters()), model.training
    tensors = {
        name: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not tensor.is_meta
    }
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), model.not_recording(), contextlib.ExitStack() as stack:
        other = stack.enter_context(_built(dense, weight))
        length = min(16, *_max_positions(model), *_max_positions(other))
        tokens_BT = torch.randint(
            dense.dictionary.nspecial,
            min(dense.vocabulary, len(dense.target_dictionary)),
            (MAX_TOKENS // length, length),
            generator=torch.Generator().manual_seed(1),
        ).to(weight.device)
        given = (tokens_BT, None, tokens_BT) if dense.family == "translation" else (tokens_BT,)
        try:
            logits_BTV = torch.func.functional_call(model.eval(), tensors, given)[0]
        finally:
            model.train(training)
        wanted_BTV = other(*given)[0]
        logits_BTV = logits_BTV[..., : wanted_BTV.size(2)]  # it may have more token ids
    largest = (logits_BTV - wanted_BTV).abs().max().item()
    equal = largest <= _ROUNDING * wanted_BTV.abs().max().item()
    return LogitDifference(largest, equal, tokens_BT.numel())


@contextlib.contextmanager
def _built(dense: DenseCheckpoint, like: Tensor) -> Iterator[TransformerLanguageModel]:
    """The dense model with its weights, in evaluation mode and fp32, on the device of `like`."""
    with report_config_faults(dense.option, dense.path):
        given = {name: value for name, value in dense.model.items() if name not in _RENDERED}
        cfg = OmegaConf.create({**plain_config(dense.cfg.model), **given})
        if dense.keeps_dtype and like.device.type == "cpu":
            model = build_without_memory(cfg, dense.dictionary).eval()
            with streamed(model, dense.weights, like.dtype):
                yield model
            return
        task = types.SimpleNamespace(
            source_dictionary=dense.dictionary, target_dictionary=dense.target_dictionary
        )
        model = models.build_model(cfg, task, from_checkpoint=True)
        model.load_state_dict(dict(dense.weights), strict=not dense.keeps_dtype, model_cfg=cfg)
    yield model.to(like.device, like.dtype).float().eval()


def _max_positions(model: Any) -> tuple[int, ...]:
    """The longest inputs: of a decoder, or of encoder and decoder."""
    longest = model.max_positions()
    return longest if isinstance(longest, tuple) else (longest,)
