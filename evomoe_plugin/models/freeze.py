"""`--moe-train-only`: freeze all other parameters, without optimizer state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.gates import Gate
from evomoe_plugin.models.fsdp import is_wrapped

# Patterns of parameter names in the checkpoint.
WORDS = {
    "experts": r"\.moe\.experts\.",
    "shared": r"\.moe\.shared\.",
    "gate": r"\.moe\.gate\.",
    "attention": r"\.(self|encoder)_attn\.",
    "ffn": r"\.fc[123]\.",
    "embeddings": r"embed_tokens\.|embed_positions\.|output_projection\.|project_(in|out)_dim\."
    r"|lm_head\.(weight|bias)",
    "norms": r"layer_?norm",
    "head": r"lm_head\.dense\.|classification_heads\.",
}


def trained_names(names: Iterable[str], train_only: str, of_part: bool = False) -> set[str]:
    """The parameters among `names` that `train_only` matches.

    Args:
        of_part: the names are of a part of a model, in which a pattern may match nothing.
    Raises:
        OptionError: a pattern is invalid, or matches nothing.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in filter(None, (part.strip() for part in train_only.split(","))):
        try:
            expression = re.compile(WORDS.get(pattern, pattern))
        except re.error as error:
            raise OptionError(
                "moe_train_only",
                train_only,
                f"{pattern} is neither one of {', '.join(WORDS)} nor a regular "
                f"expression ({error})",
            ) from error
        matched = {name for name in names if expression.search(name)}
        if not (matched or of_part):
            raise OptionError(
                "moe_train_only",
                train_only,
                f"{pattern} matches no parameter; one of {', '.join(WORDS)}, or a "
                f"regular expression over names such as {names[-1]}",
            )
        chosen |= matched
    if not (chosen or of_part):
        raise OptionError(
            "moe_train_only", train_only, f"matches no parameter: give one of {', '.join(WORDS)}"
        )
    return chosen


def freeze(model: nn.Module, options: ModelOptions) -> None:
    """Freeze the parameters of `model` that `--moe-train-only` does not match.

    Args:
        model: whole; its layers may be wrapped for activation checkpointing.
        options: of the model.
    Raises:
        OptionError: as `trained_names`, or if experts that the run changes are frozen.
    """
    named = dict(model.named_parameters())
    trained = trained_names(named, options.moe_train_only or "")
    check_frozen(options, trained, named)
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)


def freeze_part(part: nn.Module, train_only: str, prefix: str) -> None:
    """Freeze the parameters of a part that a model gets later.

    Args:
        prefix: of its parameter names in the model.
    """
    named = {prefix + name: parameter for name, parameter in part.named_parameters()}
    trained = trained_names(named, train_only, of_part=True)
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)


def give_gradients(layers: nn.ModuleList) -> None:
    """Make activation checkpointing compute the gradients of layers that are trained."""
    for layer in layers:
        if any(p.requires_grad for p in layer.parameters()):
            layer.register_forward_pre_hook(_with_gradient)


def _with_gradient(_layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make a checkpointed layer's input require a gradient, without which checkpointing gives the
    layer none; it does not if everything before is frozen."""
    x, *others = given
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return (x, *others)


def check_frozen(options: ModelOptions, trained: set[str], names: Iterable[str]) -> None:
    """Raise `OptionError` if the run changes experts that are frozen."""
    changes = {"moe_spawn_updates": ("experts",), "moe_adapt_record_interval": ("experts", "gate")}
    for option, words in changes.items():
        for word in words if getattr(options, option) else ():
            if any(re.search(WORDS[word], name) and name not in trained for name in names):
                raise OptionError(
                    option,
                    getattr(options, option),
                    f"--moe-train-only {options.moe_train_only} freezes the {word}, "
                    "which it changes: leave one of them out",
                )


def wrap_apart(model: nn.Module, train_only: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Wrap submodules of `model` such that all parameters outside of them are frozen.

    FSDP flattens each wrapped module into one parameter, which is trained or frozen as a whole.

    Raises:
        OptionError: the trained parameters cannot be wrapped separately.
    """
    for parent, name in list(_cut(model, "", train_only)):
        setattr(parent, name, wrap(getattr(parent, name)))


def _cut(module: nn.Module, path: str, train_only: str) -> Iterator[tuple[nn.Module, str]]:
    """Submodules of `module` (parent and name) outside of which all parameters are frozen."""

    def inseparable(what: str) -> OptionError:
        reason = f"--ddp-backend fully_sharded cannot shard {what}, or use another --ddp-backend"
        return OptionError("moe_train_only", train_only, reason)

    if _holds_tied_weights(module):
        raise inseparable(
            f"{path}, whose weights may be tied, separately from frozen ones: leave embeddings out"
        )
    own = dict(module.named_parameters(recurse=False))
    trained = [name for name, parameter in own.items() if parameter.requires_grad]
    if trained:
        raise inseparable(
            f"a part of {path} apart from the rest: match all of its parameters, "
            f"not {trained[0]} alone"
        )
    for name, child in module.named_children():
        kinds = {p.requires_grad for p in child.parameters()}
        if True not in kinds or is_wrapped(child):
            continue
        inside = f"{path}.{name}".lstrip(".")
        if isinstance(child, Gate):  # returns a plan, in which FSDP cannot see gradients
            words = ["experts", "gate", *(["shared"] if getattr(module, "shared", None) else [])]
            raise inseparable(f"the gate {inside} apart from its experts: train {','.join(words)}")
        if False not in kinds and not (
            any(isinstance(m, nn.ModuleList) for m in child.modules()) or _holds_tied_weights(child)
        ):
            yield module, name
        else:
            yield from _cut(child, inside, train_only)


def _holds_tied_weights(module: nn.Module) -> bool:
    is_projection = isinstance(module, nn.Linear) and module.bias is None
    return isinstance(module, nn.Embedding) or is_projection
