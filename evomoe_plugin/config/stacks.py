"""The options of each stack of layers of a model: of an encoder, of a decoder."""

from __future__ import annotations

from typing import Any, cast

from evomoe_plugin.config.moe_layers import NO_LAYERS, PLACEMENT
from evomoe_plugin.config.options import ModelOptions, MoEOptions


class StackOptions:
    """The options of one stack of a model, under the names that a GPT's decoder has them.

    `decoder_layers` is the number of encoder layers for an encoder, and `moe_freq` what
    `--encoder-moe-freq` gives (0: no MoE layers), or else `--moe-freq`. All else is read from the
    model's options.

    Args:
        options: of the whole model.
        kind: "encoder" or "decoder".
    """

    def __init__(self, options: Any, kind: str):
        self._options = options
        self.kind = kind
        own = {name: getattr(options, f"{kind}_{name}", None) for name in PLACEMENT}
        if own["moe_freq"] == 0 and own["moe_layers"] is None:  # as in the moe branch
            own |= {"moe_freq": None, "moe_layers": NO_LAYERS}
        self._own = {name for name, value in own.items() if value is not None}
        lists = "moe_layers" in self._own or (self._own and options.moe_layers is not None)
        of_all = MoEOptions if lists else options  # a list and a frequency exclude each other
        self._placement = {
            name: own[name] if name in self._own else getattr(of_all, name) for name in PLACEMENT
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask before `__init__`
            raise AttributeError(name)
        if name in self._placement:
            return self._placement[name]
        return getattr(self._options, self.name_of(name))

    def name_of(self, name: str) -> str:
        """The model's option that `name` is read from."""
        if name.startswith("decoder_"):
            return f"{self.kind}_{name.removeprefix('decoder_')}"
        return f"{self.kind}_{name}" if name in self._own else name


def stacks(options: ModelOptions) -> list[ModelOptions]:
    """The options of each stack of a model, in the order in which a token passes them.

    A GPT has one, its own options; RoBERTa an encoder, a translation model an encoder and a
    decoder.
    """
    if not hasattr(options, "encoder_layers"):
        return [options]
    kinds = ("encoder", "decoder") if hasattr(options, "decoder_layers") else ("encoder",)
    return [cast(ModelOptions, StackOptions(options, kind)) for kind in kinds]
