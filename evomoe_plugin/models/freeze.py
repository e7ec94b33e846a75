"""`--moe-train-only`: other parameters are frozen, and the optimizer has no state for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from evomoe_plugin.gates import Gate
from evomoe_plugin.options import OptionError

# Of parameter names as in the checkpoint.
WORDS = {
    "experts": r"\.moe\.experts\.",
    "shared": r"\.moe\.shared\.",
    "gate": r"\.moe\.gate\.",
    "attention": r"\.self_attn\.",
    "ffn": r"\.fc[12]\.",
    "embeddings": r"embed_tokens\.|embed_positions\.|output_projection\.|project_(in|out)_dim\.",
    "norms": r"layer_?norm",
}


def trained_names(names: Iterable[str], train_only: str) -> set[str]:
    """Which of the parameters `names` the option `train_only` has trained.

    Raises:
        OptionError: a pattern is none, or matches nothing.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in filter(None, (part.strip() for part in train_only.split(","))):
        try:
            expression = re.compile(WORDS.get(pattern, pattern))
        except re.error as error:
            raise OptionError("moe_train_only", train_only,
                              f"{pattern} is neither one of {', '.join(WORDS)} nor a regular "
                              f"expression ({error})") from error
        matched = {name for name in names if expression.search(name)}
        if not matched:
            raise OptionError("moe_train_only", train_only,
                              f"{pattern} matches no parameter; one of {', '.join(WORDS)}, or a "
                              f"regular expression over names such as {names[-1]}")
        chosen |= matched
    if not chosen:
        raise OptionError("moe_train_only", train_only,
                          f"names nothing to train: give one of {', '.join(WORDS)}")
    return chosen


def freeze(model: nn.Module, options: Any, prefix: str = "") -> None:
    """Freeze the parameters of `model` that `--moe-train-only` does not match.

    Args:
        options: the model's.
        prefix: of its parameter names in the checkpoint.
    Raises:
        OptionError: as `trained_names`, or for experts that the run is to change.
    """
    named = {prefix + name: parameter for name, parameter in model.named_parameters()}
    trained = trained_names(named, options.moe_train_only)
    check_frozen(options, trained, named)
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)


def check_frozen(options: Any, trained: set[str], names: Iterable[str]) -> None:
    """Raise `OptionError` if experts are to be changed in the run that are frozen."""
    changes = {"moe_spawn_updates": ("experts",),
               "moe_adapt_record_interval": ("experts", "gate")}
    for option, words in changes.items():
        for word in words if getattr(options, option) else ():
            if any(re.search(WORDS[word], name) and name not in trained for name in names):
                raise OptionError(option, getattr(options, option),
                                  f"--moe-train-only {options.moe_train_only} freezes the {word}, "
                                  "which it changes: leave one of them out")


def wrap_apart(model: nn.Module, train_only: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Wrap parts of `model` so that all parameters outside of them are frozen.

    FSDP makes one parameter of all that it wraps, which is trained or frozen as a whole.

    Raises:
        OptionError: what is trained cannot be wrapped by itself.
    """
    cuts = _cut(model)
    if cuts is None:
        raise OptionError("moe_train_only", train_only,
                          "trains a gate without its experts, embeddings, or a part of a "
                          "module, which cannot be sharded apart from what is frozen: train more, "
                          "as experts,gate, or "
                          "leave --ddp-backend fully_sharded out")
    for parent, name in cuts:
        setattr(parent, name, wrap(getattr(parent, name)))


def _cut(module: nn.Module) -> list[tuple[nn.Module, str]] | None:
    """Parts of `module` (parent and name) without which all its parameters are frozen; None: there
    is no such division."""
    if isinstance(module, Gate) or any(p.requires_grad for p in module.parameters(recurse=False)):
        return None
    cuts: list[tuple[nn.Module, str]] = []
    for name, child in module.named_children():
        kinds = {p.requires_grad for p in child.parameters()}
        if True not in kinds:
            continue
        if False not in kinds and _can_be_wrapped(child):
            cuts.append((module, name))
            continue
        inner = _cut(child)
        if inner is None:
            return None
        cuts += inner
    return cuts


def _can_be_wrapped(module: nn.Module) -> bool:
    """Not embeddings and projections, whose weights may be tied, nor gates and lists."""
    inside = (nn.Embedding, nn.ModuleList, Gate)
    is_projection = isinstance(module, nn.Linear) and module.bias is None
    return not (isinstance(module, inside) or is_projection)
