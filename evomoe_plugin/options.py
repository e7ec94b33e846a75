"""The MoE options every gate shares, and what makes them valid.

The dataclasses here and beside each gate are what fairseq turns into command line flags and Hydra
fields. They know nothing of fairseq.
"""

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

logger = logging.getLogger(__name__)


class OptionError(ValueError):
    """An option has a value that cannot work: one line with option, value and remedy."""

    def __init__(self, option: str, value: Any, remedy: str):
        flag = "--" + option.replace("_", "-") if re.fullmatch(r"[a-z0-9_]+", option) else option
        super().__init__(f"{flag} {value}: {remedy}")
        self.arguments = (option, value, remedy)

    def __reduce__(self):  # crosses process boundaries when a spawned rank raises it
        return type(self), self.arguments


@dataclass
class MoEOptions:
    """Where MoE layers stand and what they are made of, whatever the gate."""

    moe_freq: int = field(
        default=2,
        metadata={"help": "every N-th decoder layer is an MoE layer; 1 makes every layer one"},
    )
    moe_start_layer: Optional[int] = field(
        default=None,
        metadata={"help": "the first MoE layer, from 0 (default: layer N-1 of --moe-freq N)"},
    )
    moe_layers: Optional[str] = field(
        default=None,
        metadata={"help": "the MoE layers, from 0, one by one (5,8,11), instead of --moe-freq and "
                          "--moe-start-layer"},
    )
    moe_expert_count: str = field(
        default="16",
        metadata={"help": "routed experts of each MoE layer: one number, one per MoE layer "
                          "(4,4,8,16), or FIRST:LAST to grow evenly with depth"},
    )
    moe_expert_ffn_dim: int = field(
        default=0,
        metadata={"help": "hidden width of an expert; 0 takes --decoder-ffn-embed-dim"},
    )
    moe_expert_size_factor: int = field(
        default=1,
        metadata={"help": "an expert's hidden width is --decoder-ffn-embed-dim divided by this"},
    )
    moe_expert_gated: bool = field(
        default=False,
        metadata={"help": "experts are gated: W2 (act(W1 x) * W3 x), without biases; SwiGLU with "
                          "--activation-fn swish, GEGLU with gelu"},
    )
    moe_gate: str = field(
        default="dense_to_sparse",
        metadata={"help": "the gate that routes tokens to experts, by its registered name"},
    )
    # A string, because fairseq makes a boolean whose default is True a flag that turns it off.
    moe_gating_use_fp32: str = field(
        default="true",
        metadata={"help": "compute the gate in fp32 whatever the model's precision (true|false)",
                  "argparse_const": "true"},
    )
    moe_aux: Optional[str] = field(
        default=None,
        metadata={"help": "auxiliary losses and their coefficients, balance=0.01,z=0.001 or none "
                          "(default: what belongs to the gate); all are multiplied by "
                          "--moe-gate-loss-wt"},
    )
    moe_shared_experts: int = field(
        default=0, metadata={"help": "experts that every token goes to, beside the routed ones"}
    )
    moe_shared_ffn_dim: int = field(
        default=0,
        metadata={"help": "hidden width of a shared expert; 0 takes that of the routed ones"},
    )
    moe_shared_size_factor: int = field(
        default=0,
        metadata={"help": "a shared expert's hidden width is --decoder-ffn-embed-dim divided by "
                          "this; 0 takes that of the routed ones"},
    )
    moe_shared_combine: str = field(
        default="add",
        metadata={"help": "weights of shared experts: add (1), softmax (together with the chosen "
                          "routed ones, as DCMoE), mix (a learned share for all of them, as "
                          "residual MoE)"},
    )
    moe_null_experts: int = field(
        default=0,
        metadata={"help": "candidates of the gate that stand for no computation at all"},
    )
    moe_null_rate_target: Optional[float] = field(
        default=None,
        metadata={"help": "mean probability of null experts that the loss `null` aims at"},
    )
    moe_capacity_factor: Optional[float] = field(
        default=None,
        metadata={"help": "in training an expert takes at most ceil(factor * pairs / experts) "
                          "tokens (default: no limit)"},
    )
    moe_eval_capacity_factor: Optional[float] = field(
        default=None, metadata={"help": "the same in evaluation (default: no limit)"}
    )
    moe_eval_capacity_token_fraction: float = field(
        default=-1.0,
        metadata={"help": "in evaluation an expert takes at most this fraction of the batch's "
                          "tokens; -1: no limit"},
    )
    moe_min_capacity: Optional[int] = field(
        default=None, metadata={"help": "a capacity is at least so many tokens (default: 0)"}
    )
    moe_drop_policy: Optional[str] = field(
        default=None,
        metadata={"help": "whom an expert at its capacity keeps: position (the first; the "
                          "default), probs (the most probable) or random"},
    )
    moe_renormalize_after_drop: bool = field(
        default=False,
        metadata={"help": "what a token keeps after dropping gets the weight of what it had"},
    )
    moe_post_norm: bool = field(
        default=False,
        metadata={"help": "layers normalise what they give, not what they take, as fairseq's plain "
                          "transformer_lm; for models made from such a one"},
    )
    moe_init_from_dense: Optional[str] = field(
        default=None,
        metadata={"help": "checkpoint of a dense transformer_lm that a run without a checkpoint of "
                          "its own begins with: experts are made from its feed-forward networks"},
    )
    moe_init_method: str = field(
        default="copy",
        metadata={"help": "how: copy, mask, noise, reinit (each expert the whole network), slice "
                          "(smaller experts, a part each), none (experts start afresh)"},
    )
    moe_init_rate: Optional[float] = field(
        default=None,
        metadata={"help": "of mask (share of the weights), noise (share of their deviation), "
                          "reinit (share of the hidden units); default: 0.3, 0.1, 0.5"},
    )
    moe_init_rescale: bool = field(
        default=False,
        metadata={"help": "mask: what is left is divided by 1 - rate; slice: an expert's output is "
                          "multiplied by the number of slices"},
    )
    moe_init_slices: str = field(
        default="contiguous",
        metadata={"help": "hidden units of a slice: contiguous or shuffled"},
    )
    moe_init_gate: str = field(
        default="default",
        metadata={"help": "weights of the gates: default, zero, or normal:STD"},
    )
    moe_train_only: Optional[str] = field(
        default=None,
        metadata={"help": "train these parameters alone, the others are frozen: words (experts, "
                          "shared, gate, attention, ffn, embeddings, norms) or regular expressions "
                          "over their names, with commas between"},
    )
    moe_spawn_updates: Optional[int] = field(
        default=None,
        metadata={"help": "EvoMoE's first phase, expert-diversify: for so many updates only the "
                          "first expert of each layer works, without gate; then all experts are "
                          "spawned from it (default: no such phase)"},
    )
    moe_spawn_method: str = field(
        default="mask",
        metadata={"help": "how experts are spawned: mask (a share of the weights is zero), noise "
                          "(is added), reinit (a share of the hidden units is drawn afresh), copy"},
    )
    moe_spawn_rate: Optional[float] = field(
        default=None,
        metadata={"help": "share of weights or hidden units, or noise as a share of a weight's "
                          "standard deviation (default: mask 0.3, reinit 0.5, noise 0.1)"},
    )
    moe_spawn_rescale: bool = field(
        default=False,
        metadata={"help": "divide the weights that mask leaves by the share that is left"},
    )
    # A string like moe_gating_use_fp32.
    moe_spawn_trainable_masked: str = field(
        default="true",
        metadata={"help": "weights that mask made zero learn on; false keeps them zero for ever "
                          "(true|false)"},
    )
    moe_spawn_moments: str = field(
        default="copy",
        metadata={"help": "the optimizer's moments of spawned experts: copy (those of the expert "
                          "they come from; zero for weights masked or drawn afresh) or reset "
                          "(zero)"},
    )


def parse_bool(option: str, value: Any) -> bool:
    """`value` (bool, or true/false in any case) as a bool, or an `OptionError`."""
    text = str(value).strip().lower()
    if text not in ("true", "false"):
        raise OptionError(option, value, "give true or false")
    return text == "true"


def moe_layer_indices(options: Any, num_layers: int) -> list[int]:
    """Indices, from 0, of the decoder layers that are MoE layers.

    Raises:
        OptionError: no layer would be one, or one that is asked for does not exist.
    """
    last = num_layers - 1
    if options.moe_layers is not None:
        return _listed_layers(options, last)
    freq, start = options.moe_freq, options.moe_start_layer
    if freq < 1:
        raise OptionError("moe_freq", freq,
                          "give 1 or more; for a model without MoE layers use a stock "
                          "transformer_lm architecture")
    if start is None and freq > num_layers:
        raise OptionError("moe_freq", freq,
                          f"gives no MoE layer in {num_layers} decoder layers; "
                          f"give at most {num_layers}")
    if start is not None and not 0 <= start <= last:
        raise OptionError("moe_start_layer", start,
                          f"the {num_layers} decoder layers are 0 to {last}")
    return list(range(freq - 1 if start is None else start, num_layers, freq))


def _listed_layers(options: Any, last: int) -> list[int]:
    text = str(options.moe_layers).replace(" ", "")
    for option in ("moe_freq", "moe_start_layer"):
        if getattr(options, option) != getattr(MoEOptions, option):
            raise OptionError(option, getattr(options, option),
                              f"--moe-layers {text} says which layers: leave one of them out")
    try:
        indices = [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError("moe_layers", text, "give layer numbers from 0: 5,8,11") from None
    if indices != sorted(set(indices)) or not (0 <= indices[0] and indices[-1] <= last):
        raise OptionError("moe_layers", text,
                          f"give layer numbers from 0 to {last}, ascending, each once")
    return indices


def expert_counts(options: Any, num_moe_layers: int) -> list[int]:
    """Routed experts of each MoE layer, `num_moe_layers` numbers.

    Raises:
        OptionError: not a number, list or range of counts, or none that fits the layers.
    """
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
        raise OptionError("moe_expert_count", text,
                          f"{len(numbers)} counts for {num_moe_layers} MoE layers; "
                          f"give one number or {num_moe_layers}")
    return numbers


def expert_slots(options: Any, num_moe_layers: int) -> list[int]:
    """E of each MoE layer: the experts it has room for, of which it may start with fewer.

    Raises:
        OptionError: as `expert_counts`.
    """
    most = getattr(options, "moe_max_experts", 0)
    return [max(count, most) for count in expert_counts(options, num_moe_layers)]


def expert_ffn_dim(options: Any) -> int:
    """F: hidden width of a routed expert."""
    return options.moe_expert_ffn_dim or (
        options.decoder_ffn_embed_dim // options.moe_expert_size_factor)


def shared_ffn_dim(options: Any) -> int:
    """Hidden width of a shared expert."""
    if options.moe_shared_size_factor:
        return options.decoder_ffn_embed_dim // options.moe_shared_size_factor
    return options.moe_shared_ffn_dim or expert_ffn_dim(options)


# Parts of fairseq's transformer_lm that change what a feed-forward network or the vocabulary is,
# and NormFormer's scales, which fairseq itself takes and then ignores in its decoder.
_UNSUPPORTED = (
    "character_embeddings", "adaptive_input", "adaptive_softmax_cutoff", "quant_noise_pq",
    "quant_noise_scalar", "base_layers", "decoder_layers_to_keep", "decoder_xformers_att_config",
    "scale_fc", "scale_attn", "scale_heads", "scale_resids",
)

def spawn_rate(options: Any) -> float:
    """The rate of the method that spawns experts, the default resolved."""
    if options.moe_spawn_rate is not None:
        return options.moe_spawn_rate
    return DEFAULT_SPAWN_RATES.get(options.moe_spawn_method, 0.0)


def gated_updates(options: Any) -> int:
    """Updates of the run in which gates work: all, or those after the spawn; 0: not known."""
    return max(0, (options.max_update or 0) - (options.moe_spawn_updates or 0))


# fairseq's, by name.
ACTIVATIONS = ("relu", "relu_squared", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear",
               "swish")
SHARED_COMBINE = ("add", "softmax", "mix")
DROP_POLICIES = ("position", "probs", "random")
SPAWN_METHODS = ("copy", "mask", "noise", "reinit")
# mask and noise are our choice; reinit's is Drop-Upcycling's (arXiv 2502.19261).
DEFAULT_SPAWN_RATES = {"mask": 0.3, "noise": 0.1, "reinit": 0.5}


def validate(options: Any, warn: bool = True) -> None:
    """Check every option of an MoE model; log a warning for what is doubtful.

    Args:
        options: the fields of `MoEOptions`, of the gates' options and of fairseq's
            transformer_lm.
        warn: False where it has been said already, or does not matter.
    Raises:
        OptionError: naming the option, its value and what would be right.
    """
    from evomoe_plugin.gates.base import gate_class, validate_gate

    for option in _UNSUPPORTED:
        if getattr(options, option, None):
            raise OptionError(option, getattr(options, option),
                              "not supported by the MoE architectures: leave it out")
    width = options.decoder_embed_dim
    input_dim, output_dim = options.decoder_input_dim or width, options.decoder_output_dim or width
    if options.share_decoder_input_output_embed and input_dim != output_dim:
        raise OptionError("decoder_output_dim", output_dim,
                          f"with --share-decoder-input-output-embed it must be {input_dim}, the "
                          "decoder's input dimension")
    counts = expert_counts(options, len(moe_layer_indices(options, options.decoder_layers)))
    parse_bool("moe_gating_use_fp32", options.moe_gating_use_fp32)
    gate = gate_class(options.moe_gate)
    check_choice(options, "activation_fn", ACTIVATIONS)
    _check_experts(options)
    check_number(options, "moe_null_experts", least=0, remedy="give 0 or more")
    _check_capacity(options, gate)
    _check_init(options)
    _check_spawn(options)
    warnings = [*_capacity_warnings(options, gate), *_spawn_warnings(options, counts),
                *validate_gate(options, counts)]
    _check_null(options)
    for warning in warnings if warn else ():
        logger.warning(warning)


def check_choice(options: Any, option: str, allowed: Sequence[str]) -> None:
    """Raise `OptionError` unless the option's value is one of `allowed`."""
    if getattr(options, option) not in allowed:
        raise OptionError(option, getattr(options, option), f"one of: {', '.join(allowed)}")


def check_number(
    options: Any, option: str, remedy: str, *, least: float | None = None,
    above: float | None = None, most: float | None = None, below: float | None = None,
) -> None:
    """Raise `OptionError` with `remedy` unless the option's value is finite and within the bounds.

    None, the value of an option that was not given, passes.
    """
    value = getattr(options, option)
    if value is None:
        return
    fits = math.isfinite(value) and (least is None or value >= least) and (
        above is None or value > above) and (most is None or value <= most) and (
        below is None or value < below)
    if not fits:
        raise OptionError(option, value, remedy)


def _check_experts(options: Any) -> None:
    check_number(options, "moe_expert_ffn_dim", least=0,
                 remedy="give a width of at least 1, or 0 for --decoder-ffn-embed-dim")
    check_number(options, "moe_expert_size_factor", least=1, remedy="give 1 or more")
    check_number(options, "moe_shared_size_factor", least=0, remedy="give 1 or more, or 0")
    for kind in ("expert", "shared"):
        factor = getattr(options, f"moe_{kind}_size_factor")
        if factor > 1 and getattr(options, f"moe_{kind}_ffn_dim"):
            raise OptionError(f"moe_{kind}_size_factor", factor,
                              f"--moe-{kind}-ffn-dim gives the width already: leave one of them "
                              "out")
        if options.decoder_ffn_embed_dim % (factor or 1):
            raise OptionError(f"moe_{kind}_size_factor", factor,
                              "give a divisor of --decoder-ffn-embed-dim "
                              f"({options.decoder_ffn_embed_dim})")
    check_number(options, "moe_shared_experts", least=0, remedy="give 0 or more")
    check_number(options, "moe_shared_ffn_dim", least=0,
                 remedy="give a width of at least 1, or 0 for that of the routed experts")
    check_choice(options, "moe_shared_combine", SHARED_COMBINE)
    for option in ("moe_shared_ffn_dim", "moe_shared_size_factor", "moe_shared_combine"):
        value = getattr(options, option)
        if not options.moe_shared_experts and value != getattr(MoEOptions, option):
            raise OptionError(option, value, "there are no shared experts: leave it out, or give "
                                             "--moe-shared-experts")


def _check_null(options: Any) -> None:
    from evomoe_plugin.gates.auxiliary import coefficients
    from evomoe_plugin.gates.base import gate_class

    target = options.moe_null_rate_target
    check_number(options, "moe_null_rate_target", least=0, most=1,
                 remedy="it is a probability: give a number from 0 to 1")
    wanted = "null" in coefficients(options, gate_class(options.moe_gate))
    if wanted and target is None:
        raise OptionError("moe_aux", options.moe_aux,
                          "the loss null has nothing to aim at: give --moe-null-rate-target")
    if target is not None and not wanted:
        raise OptionError("moe_null_rate_target", target,
                          "only the loss null uses it: leave it out, or add null=… to --moe-aux")


def _check_capacity(options: Any, gate: Any) -> None:
    for option in ("moe_capacity_factor", "moe_eval_capacity_factor"):
        check_number(options, option, above=0,
                     remedy="give a number above 0, or leave it out for no limit")
    fraction = options.moe_eval_capacity_token_fraction
    if fraction != -1:
        check_number(options, "moe_eval_capacity_token_fraction", above=0, most=1,
                     remedy="give a fraction above 0 and at most 1, or -1 for no limit")
        if options.moe_eval_capacity_factor is not None:
            raise OptionError("moe_eval_capacity_token_fraction", fraction,
                              "--moe-eval-capacity-factor gives the capacity already: leave one "
                              "of them out")
    check_number(options, "moe_min_capacity", least=0, remedy="give 0 or more")
    if options.moe_drop_policy is not None:
        check_choice(options, "moe_drop_policy", DROP_POLICIES)
    limits = [option for option in ("moe_capacity_factor", "moe_eval_capacity_factor",
                                    "moe_eval_capacity_token_fraction")
              if getattr(options, option) != getattr(MoEOptions, option)]
    if limits and not gate.TAKES_CAPACITY:
        raise OptionError(limits[0], getattr(options, limits[0]),
                          f"the gate {options.moe_gate} sets the load of experts itself: leave "
                          "it out")
    for option in ("moe_min_capacity", "moe_drop_policy", "moe_renormalize_after_drop"):
        value = getattr(options, option)
        if not limits and value != getattr(MoEOptions, option):
            raise OptionError(option, value, "no expert has a capacity: leave it out, or give "
                                             "--moe-capacity-factor")


def _capacity_warnings(options: Any, gate: Any) -> Iterator[str]:
    if options.moe_eval_capacity_factor is not None or (
            options.moe_eval_capacity_token_fraction != -1):
        yield ("a capacity in evaluation: what a token gets depends on the tokens beside it, and "
               "perplexity on the batch size")
    fixed = gate.has_fixed_picks(options) and not options.moe_null_experts
    if options.moe_capacity_factor is not None and not fixed:
        yield (f"--moe-capacity-factor {options.moe_capacity_factor}: the capacity follows the "
               "number of pairs, which later tokens have a part in: training is not causal; "
               "evaluation has no capacity by default")
    if options.moe_capacity_factor is not None and options.moe_drop_policy in ("probs", "random"):
        yield (f"--moe-drop-policy {options.moe_drop_policy}: in training, later tokens can push "
               "out earlier ones, which is not causal; evaluation has no capacity by default")


def _check_init(options: Any) -> None:
    if options.moe_init_from_dense is not None:
        return
    for option in fields(MoEOptions):
        value = getattr(options, option.name)
        if option.name.startswith("moe_init_") and value != option.default:
            raise OptionError(option.name, value, "experts are made from nothing: leave it out, or "
                                                  "give --moe-init-from-dense")


def _check_spawn(options: Any) -> None:
    updates, method = options.moe_spawn_updates, options.moe_spawn_method
    given = [f.name for f in fields(MoEOptions) if f.name.startswith("moe_spawn_")
             and str(getattr(options, f.name)).lower() != str(f.default).lower()]
    if updates is None:
        if given:
            raise OptionError(given[0], getattr(options, given[0]),
                              "experts are not spawned: leave it out, or give "
                              "--moe-spawn-updates")
        return
    check_number(options, "moe_spawn_updates", least=1,
                 remedy="give the number of updates before the spawn, 1 or more; leave it out for "
                        "none")
    if options.max_update and updates >= options.max_update:
        raise OptionError("moe_spawn_updates", updates,
                          f"the run ends at update {options.max_update}: give less than "
                          "--max-update")
    check_choice(options, "moe_spawn_method", SPAWN_METHODS)
    check_choice(options, "moe_spawn_moments", ("copy", "reset"))
    if method == "copy" and options.moe_spawn_rate is not None:
        raise OptionError("moe_spawn_rate", options.moe_spawn_rate,
                          "--moe-spawn-method copy changes nothing: leave it out, or give mask, "
                          "noise or reinit")
    most = {"mask": {"below": 1}, "reinit": {"most": 1}}.get(method, {})
    check_number(options, "moe_spawn_rate", above=0, **most,
                 remedy={"mask": "it is a share of the weights: give more than 0 and less than 1",
                         "reinit": "it is a share of the hidden units: give more than 0 and at "
                                   "most 1"}.get(method, "give a number above 0"))
    trainable = parse_bool("moe_spawn_trainable_masked", options.moe_spawn_trainable_masked)
    for option, is_given in (("moe_spawn_rescale", options.moe_spawn_rescale),
                             ("moe_spawn_trainable_masked", not trainable)):
        if is_given and method != "mask":
            raise OptionError(option, getattr(options, option),
                              f"--moe-spawn-method {method} masks nothing: leave it out, or give "
                              "mask")


def _spawn_warnings(options: Any, counts: Sequence[int]) -> Iterator[str]:
    updates = options.moe_spawn_updates
    if updates is None:
        return
    if min(counts) == 1:
        yield (f"--moe-spawn-updates {updates}: a layer has one expert only, which is changed at "
               "the spawn and finds no other beside it")
    if options.moe_spawn_method == "copy":
        yield ("--moe-spawn-method copy: experts begin alike, so that only what the gate sends "
               "them tells them apart")
    if options.moe_shared_experts and options.moe_shared_combine != "add":
        yield (f"--moe-shared-combine {options.moe_shared_combine}: until the spawn there is no "
               "gate to weigh by, and shared experts count in full")


def validate_run(cfg: Any) -> None:
    """Check a whole fairseq run before any process is started.

    Args:
        cfg: fairseq's configuration; `cfg.model` is None for runs that take it from a checkpoint.
    Raises:
        OptionError: as `validate`, and for data that is not there.
    """
    _check_data(cfg)
    model = cfg.model
    # A hand-written yaml may leave fields to the architecture's defaults; then the check waits
    # for `build_model`, which knows them.
    if model is None or any(f.name not in model for f in fields(MoEOptions)):
        return
    validate(model)
    if model.moe_spawn_updates is not None and cfg.ema is not None and cfg.ema.store_ema:
        raise OptionError("store_ema", True,
                          "the averages of experts would be of before the spawn: leave it out, or "
                          "--moe-spawn-updates")
    if model.moe_init_from_dense is not None and cfg.checkpoint.finetune_from_model:
        raise OptionError("moe_init_from_dense", model.moe_init_from_dense,
                          "--finetune-from-model gives the first weights already: leave one of "
                          "them out")
    if cfg.criterion is not None and cfg.criterion._name == "cross_entropy":
        logger.warning("--criterion cross_entropy: gate losses are not added and routing is not "
                       "logged; --criterion moe_cross_entropy does both")
    for warning in _strong_losses(model, getattr(cfg.criterion, "moe_gate_loss_wt", 0.0)):
        logger.warning(warning)


# Losses that are about 1 or more when all is well; published coefficients are 0.001 to 0.03.
_LARGE_LOSSES = ("balance", "switch", "diversity", "simplicity", "efficiency")


def _strong_losses(model: Any, weight: float) -> Iterator[str]:
    from evomoe_plugin.gates.auxiliary import coefficients
    from evomoe_plugin.gates.base import gate_class

    chosen = coefficients(model, gate_class(model.moe_gate))
    strong = [name for name in _LARGE_LOSSES if chosen.get(name, 0.0) * weight > 0.1]
    if strong:
        yield (f"--moe-gate-loss-wt {weight}: the auxiliary loss {strong[0]} is added "
               f"{chosen[strong[0]] * weight:g} times; 0.01 is usual")


def _check_data(cfg: Any) -> None:
    task = cfg.task
    if task is None or getattr(task, "_name", None) != "language_modeling":
        return
    folder = Path(str(task.data).split(os.pathsep)[0])
    remedy = "give a folder made by `evomoe prepare` or fairseq-preprocess"
    if not folder.is_dir():
        raise OptionError("DATA", task.data, f"no such folder; {remedy}")
    if not (folder / "dict.txt").is_file():
        raise OptionError("DATA", task.data, f"has no dict.txt; {remedy}")
    if cfg.model is not None and not list(folder.glob(f"{cfg.dataset.train_subset}*.idx")):
        raise OptionError("DATA", task.data,
                          f"has no {cfg.dataset.train_subset}.idx to train on; {remedy}")
