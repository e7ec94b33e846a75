"""Which layers of a stack are MoE layers, and how many experts each has."""

from __future__ import annotations

import re

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, MoEOptions, option_name, stack_kind

NO_LAYERS = "none"  # Value of `--moe-layers` for a dense model
PLACEMENT = ("moe_freq", "moe_start_layer", "moe_layers")


def moe_layer_indices(options: ModelOptions, num_layers: int) -> list[int]:
    """Indices, from 0, of the layers of a stack that are MoE layers; none with `--moe-layers none`.

    Raises:
        OptionError: there would be no MoE layer otherwise, or a given index does not exist.
    """
    last, kind = num_layers - 1, stack_kind(options)
    if options.moe_layers is not None:
        return _listed_layers(options, last)
    freq, start = options.moe_freq, options.moe_start_layer
    if freq < 1:
        name = option_name(options, "moe_freq")
        none = name.replace("moe_freq", "moe_layers").replace("_", "-")
        without = "a model" if name == "moe_freq" else f"an {kind}".replace("an d", "a d")
        raise OptionError(
            name, freq, f"give 1 or more; for {without} without MoE layers, --{none} none"
        )
    if start is None and freq > num_layers:
        raise OptionError(
            option_name(options, "moe_freq"),
            freq,
            f"gives no MoE layer in {num_layers} {kind} layers; give at most {num_layers}",
        )
    if start is not None and not 0 <= start <= last:
        raise OptionError(
            option_name(options, "moe_start_layer"),
            start,
            f"the {num_layers} {kind} layers are 0 to {last}",
        )
    return list(range(freq - 1 if start is None else start, num_layers, freq))


def _listed_layers(options: ModelOptions, last: int) -> list[int]:
    text = str(options.moe_layers).replace(" ", "")
    name = option_name(options, "moe_layers")
    for option in ("moe_freq", "moe_start_layer"):
        if getattr(options, option) != getattr(MoEOptions, option):
            raise OptionError(
                option_name(options, option),
                getattr(options, option),
                f"--{name.replace('_', '-')} {text} lists the layers: leave one of them out",
            )
    if text == NO_LAYERS:
        return []
    try:
        indices = [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(name, text, "give layer numbers from 0: 5,8,11") from None
    if indices != sorted(set(indices)) or not (0 <= indices[0] and indices[-1] <= last):
        raise OptionError(name, text, f"give layer numbers from 0 to {last}, ascending, each once")
    return indices


def expert_counts(options: ModelOptions, num_moe_layers: int | None = None) -> list[int]:
    """Routed experts of each MoE layer, `num_moe_layers` numbers; None: of the whole model.

    Raises:
        OptionError: not a number, list or range of counts, or one that does not fit the layers.
    """
    if num_moe_layers is None:
        num_moe_layers = len(moe_layer_indices(options, options.decoder_layers))
    text = str(options.moe_expert_count).replace(" ", "")
    wanted = "give one number of at least 1, one per MoE layer (4,4,8,16), or FIRST:LAST"
    try:
        numbers = [int(part) for part in re.split("[,:]", text)]
    except ValueError:
        raise OptionError("moe_expert_count", text, wanted) from None
    if min(numbers) < 1:
        raise OptionError("moe_expert_count", text, wanted)
    if ":" in text:
        if len(numbers) != 2 or "," in text:
            raise OptionError("moe_expert_count", text, wanted)
        first, last = numbers
        steps = max(num_moe_layers - 1, 1)
        return [round(first + (last - first) * i / steps) for i in range(num_moe_layers)]
    if len(numbers) == 1:
        return numbers * num_moe_layers
    if len(numbers) != num_moe_layers:
        raise OptionError(
            "moe_expert_count",
            text,
            f"{len(numbers)} counts for {num_moe_layers} MoE layers; "
            f"give one number or {num_moe_layers}",
        )
    return numbers


def expert_slots(options: ModelOptions, num_moe_layers: int | None = None) -> list[int]:
    """E of each MoE layer: its expert slots, not all of which may be used at the start.

    Raises:
        OptionError: as `expert_counts`.
    """
    most = getattr(options, "moe_max_experts", 0)
    return [max(count, most) for count in expert_counts(options, num_moe_layers)]
