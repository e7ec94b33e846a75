"""Checks of a model's options."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.moe_layers import expert_counts, expert_slots
from evomoe_plugin.config.options import (
    ACTIVATIONS,
    MATMUL_DTYPES,
    UNSUPPORTED,
    CausalLMModelOptions,
    ModelOptions,
    MoEOptions,
    head_dim,
    is_causal,
    is_causal_lm,
    kv_heads,
    option_name,
)
from evomoe_plugin.config.rates import SPAWN_METHODS, check_rate
from evomoe_plugin.config.stacks import stacks
from evomoe_plugin.config.values import check_choice, check_number, parse_bool
from evomoe_plugin.dispatch.all_to_all import TRANSPORT_DTYPES
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.option_checks import validate_gate
from evomoe_plugin.gates.registry import gate_class
from evomoe_plugin.gates.weight_scale import WEIGHT_SCALES

logger = logging.getLogger(__name__)
_PROBABILITIES = (
    "dropout attention_dropout activation_dropout relu_dropout decoder_layerdrop "
    "encoder_layerdrop pooler_dropout moe_null_rate_target"
).split()
_CHOICES = {
    "activation_fn": ACTIVATIONS,
    "moe_attention": ("sdpa", "stock"),
    "moe_matmul_dtype": MATMUL_DTYPES,
    "moe_shared_combine": ("add", "softmax", "mix", "sigmoid"),
    "moe_ep_wire_dtype": tuple(TRANSPORT_DTYPES),
    "moe_ep_checkpoint": ("auto", "consolidated", "sharded"),
    "moe_drop_policy": (None, "position", "probs", "random"),
    "moe_weight_scale": WEIGHT_SCALES,
}
_MINIMA = (
    ("moe_expert_ffn_dim", 0, "give a width of at least 1, or 0 for that of a dense FFN"),
    ("moe_expert_size_factor", 1, "give 1 or more"),
    ("moe_shared_size_factor", 0, "give 1 or more, or 0"),
    ("moe_shared_experts", 0, "give 0 or more"),
    ("moe_shared_ffn_dim", 0, "give a width of at least 1, or 0 for that of the routed experts"),
    ("moe_expert_parallel_size", 1, "give 1 or more"),
    ("moe_ep_consolidate_below", 0, "give a number of GiB, 0 or more"),
    ("moe_null_experts", 0, "give 0 or more"),
    ("moe_log_experts", 0, "give a number of updates, or 0 for never"),
    ("moe_min_capacity", 0, "give 0 or more"),
    (
        "moe_spawn_updates",
        1,
        "give the number of updates before the spawn, 1 or more; leave it out for none",
    ),
)


def validate(options: ModelOptions, warn: bool = True) -> None:
    """Check all options of an MoE model, and log warnings.

    Args:
        options: the fields of `MoEOptions`, of the gates' options and of fairseq's
            transformer_lm.
        warn: whether to log warnings.
    Raises:
        OptionError: with the option, its value and the remedy.
    """
    resolve_renamed(options, warn)
    for option in UNSUPPORTED:
        if getattr(options, option, None):
            raise OptionError(
                option,
                getattr(options, option),
                "not supported by the MoE architectures: leave it out",
            )
    parts = stacks(options)
    if parts[0] is options:
        _check_widths(options)
    else:
        _refuse_given(options, _OF_LANGUAGE_MODELS, "only language models have it", "a GPT")
    counts = [count for part in parts for count in expert_counts(part)]
    parse_bool("moe_gating_use_fp32", options.moe_gating_use_fp32)
    gate = gate_class(options.moe_gate)
    for option, allowed in _CHOICES.items():
        check_choice(options, option, allowed)
    for option, least, remedy in _MINIMA:
        check_number(options, option, f"[{least}, inf)", remedy)
    for option in _PROBABILITIES:
        if hasattr(options, option):
            check_number(
                options, option, "[0, 1]", "it is a probability: give a number from 0 to 1"
            )
    check_number(
        options,
        "moe_weight_total",
        "(0, inf)",
        "give a sum above 0, such as the number of experts per token",
    )
    check_number(options, "moe_peak_tflops", "(0, inf)", "give a number above 0, such as 312")
    if options.moe_weight_scale not in ("unit", "mean"):
        _refuse_given(
            options,
            ("moe_weight_total",),
            "weights are not scaled to a sum",
            "--moe-weight-scale unit",
        )
    if is_causal_lm(options):
        _check_causal_lm(options)
    for part in parts:
        _check_experts(part)
    if not counts:
        _check_dense(options)
        return
    parts = [part for part in parts if expert_counts(part)]
    for part in parts:
        _check_expert_parallel(part)
    _check_capacity(options, gate)
    if options.moe_init_from_dense is not None:
        check_spawned_from(options, "moe_init_method", options.moe_init_method)
    else:
        _refuse_given(
            options, _named("moe_init_"), "there is no dense model", "--moe-init-from-dense"
        )
    _check_spawn(options)
    warnings = [
        *(warning for part in parts for warning in _capacity_warnings(part, gate)),
        *_spawn_warnings(options, counts),
        *(warning for part in parts for warning in validate_gate(part, expert_counts(part))),
    ]
    _check_null(options)
    for warning in dict.fromkeys(warnings) if warn else ():
        logger.warning(warning)


# Of the options that all models have.
_OF_LANGUAGE_MODELS = (
    "moe_post_norm",
    "moe_document_mask",
)


def _check_widths(options: ModelOptions) -> None:
    width = options.decoder_embed_dim
    input_dim, output_dim = options.decoder_input_dim or width, options.decoder_output_dim or width
    if options.share_decoder_input_output_embed and input_dim != output_dim:
        raise OptionError(
            "decoder_output_dim",
            output_dim,
            f"with --share-decoder-input-output-embed it must be {input_dim}, the "
            "decoder's input dimension",
        )


_OF_GPTS = {
    "moe_attention": "sdpa",
    "moe_post_norm": False,
    "decoder_learned_pos": False,
    "layernorm_embedding": False,
    "no_decoder_final_norm": False,
    "decoder_input_dim": 0,
    "decoder_output_dim": 0,
}


def _check_causal_lm(options: CausalLMModelOptions) -> None:
    """Check the options that only `causal_lm` architectures have, and that those have no others."""
    for option, allowed in {
        "decoder_norm": ("rms", "layer"),
        "decoder_qk_norm": ("none", "shared", "separate", "joint"),
        "decoder_ffn": ("gated", "plain"),
    }.items():
        check_choice(options, option, allowed)
    for option, default in _OF_GPTS.items():
        value = getattr(options, option, default)
        # Resolved, a width of 0 is the decoder's.
        if value not in (default, options.decoder_embed_dim if default == 0 else default):
            raise OptionError(
                option, value, "causal_lm architectures have no such part: leave it out"
            )
    for option in ("decoder_kv_heads", "decoder_head_dim"):
        check_number(options, option, "[0, inf)", "give 1 or more, or 0 for the default")
    check_number(options, "decoder_norm_eps", "(0, inf)", "give a number above 0, such as 1e-5")
    check_number(options, "rope_theta", "(0, inf)", "give a number above 0, such as 10000")
    check_number(options, "rope_fraction", "(0, 1]", "give a share above 0 and at most 1")
    heads, width = options.decoder_attention_heads, options.decoder_embed_dim
    if not options.decoder_head_dim and width % heads:
        raise OptionError(
            "decoder_attention_heads",
            heads,
            f"does not divide --decoder-embed-dim {width}: give a divisor, or --decoder-head-dim",
        )
    if heads % kv_heads(options):
        raise OptionError(
            "decoder_kv_heads",
            options.decoder_kv_heads,
            f"give a divisor of --decoder-attention-heads ({heads})",
        )
    rotated = int(head_dim(options) * options.rope_fraction)
    if rotated < 2 or rotated % 2:
        raise OptionError(
            "rope_fraction",
            options.rope_fraction,
            f"rotates {rotated} of {head_dim(options)} dimensions of a head: give a share that "
            "rotates an even number",
        )


def _check_dense(options: ModelOptions) -> None:
    unused = [
        "moe_init_from_dense",
        "moe_null_rate_target",
        *_named("moe_spawn_"),
        *_named("moe_ep_"),
    ]
    unused += ["moe_expert_parallel_size", "moe_capacity_factor", "moe_eval_capacity_factor"]
    _refuse_given(options, unused, "the model has no MoE layer", "--moe-layers")


def resolve_renamed(options: Any, warn: bool) -> None:
    """Move the value of `moe_products_dtype`, the old name, to `moe_matmul_dtype`, in place.

    Args:
        options: a model's, also of a checkpoint written under the old name.
        warn: log that the name is deprecated.
    Raises:
        OptionError: both are given and differ.
    """
    old = getattr(options, "moe_products_dtype", None)
    if old is None:
        return
    new = getattr(options, "moe_matmul_dtype", MoEOptions.moe_matmul_dtype)
    if new not in (MoEOptions.moe_matmul_dtype, old):
        raise OptionError(
            "moe_products_dtype",
            old,
            f"is the old name of --moe-matmul-dtype, given as {new}: leave it out",
        )
    if warn:
        logger.warning("--moe-products-dtype is deprecated: give --moe-matmul-dtype %s", old)
    from omegaconf import open_dict  # the layer in plain PyTorch does without

    with open_dict(options):
        options.moe_matmul_dtype, options.moe_products_dtype = old, None


def _check_experts(options: ModelOptions) -> None:
    for kind in ("expert", "shared"):
        factor = getattr(options, f"moe_{kind}_size_factor")
        if factor > 1 and getattr(options, f"moe_{kind}_ffn_dim"):
            raise OptionError(
                f"moe_{kind}_size_factor",
                factor,
                f"--moe-{kind}-ffn-dim already sets the width: leave one of them out",
            )
        if options.decoder_ffn_embed_dim % (factor or 1):
            width = option_name(options, "decoder_ffn_embed_dim").replace("_", "-")
            raise OptionError(
                f"moe_{kind}_size_factor",
                factor,
                f"give a divisor of --{width} ({options.decoder_ffn_embed_dim})",
            )
    if not options.moe_shared_experts:
        _refuse_given(
            options,
            ("moe_shared_ffn_dim", "moe_shared_size_factor", "moe_shared_combine"),
            "there are no shared experts",
            "--moe-shared-experts",
        )


def _refuse_given(options: ModelOptions, unused: Iterable[str], reason: str, needed: str) -> None:
    for option in unused:
        value, default = getattr(options, option), getattr(MoEOptions, option)
        if value != default and str(value).lower() != str(default).lower():
            raise OptionError(option, value, f"{reason}: leave it out, or give {needed}")


def _named(prefix: str) -> list[str]:
    return [field.name for field in fields(MoEOptions) if field.name.startswith(prefix)]


def _check_expert_parallel(options: ModelOptions) -> None:
    size = options.moe_expert_parallel_size
    slots = expert_slots(options)
    for count in slots:
        if count % size:
            raise OptionError(
                "moe_expert_parallel_size", size, f"does not divide the {count} experts of a layer"
            )
    least = min(slots) // size
    check_number(
        options,
        "moe_ep_chunks",
        f"[1, {least}]",
        f"give 1 to {least}, the number of experts of a layer on each rank",
    )
    if size == 1:
        _refuse_given(
            options, _named("moe_ep_"), "every rank has all experts", "--moe-expert-parallel-size"
        )
    elif getattr(options, "decoder_layerdrop", 0.0) > 0:
        raise OptionError(
            option_name(options, "decoder_layerdrop"),
            options.decoder_layerdrop,
            "ranks would skip different layers and deadlock: leave it out, or "
            "--moe-expert-parallel-size",
        )


def _check_null(options: ModelOptions) -> None:
    target = options.moe_null_rate_target
    wanted = "null" in gate_class(options.moe_gate).aux_coefficients(options)
    if wanted and target is None:
        raise OptionError(
            "moe_aux", options.moe_aux, "the loss null needs a target: give --moe-null-rate-target"
        )
    if target is not None and not wanted:
        raise OptionError(
            "moe_null_rate_target",
            target,
            "only the loss null uses it: leave it out, or add null=… to --moe-aux",
        )


def _check_capacity(options: ModelOptions, gate: type[Gate]) -> None:
    for option in ("moe_capacity_factor", "moe_eval_capacity_factor"):
        check_number(
            options, option, "(0, inf)", "give a number above 0, or leave it out for no limit"
        )
    fraction = options.moe_eval_capacity_token_fraction
    if fraction != -1:
        check_number(
            options,
            "moe_eval_capacity_token_fraction",
            "(0, 1]",
            "give a fraction above 0 and at most 1, or -1 for no limit",
        )
        if options.moe_eval_capacity_factor is not None:
            raise OptionError(
                "moe_eval_capacity_token_fraction",
                fraction,
                "--moe-eval-capacity-factor already sets the capacity: leave one of them out",
            )
    limits = [
        option
        for option in (
            "moe_capacity_factor",
            "moe_eval_capacity_factor",
            "moe_eval_capacity_token_fraction",
        )
        if getattr(options, option) != getattr(MoEOptions, option)
    ]
    if limits and not gate.capabilities.capacity:
        raise OptionError(
            limits[0],
            getattr(options, limits[0]),
            f"the gate {options.moe_gate} sets the load of experts itself: leave it out",
        )
    if not limits:
        _refuse_given(
            options,
            ("moe_min_capacity", "moe_drop_policy", "moe_renormalize_after_drop"),
            "experts have no capacity",
            "--moe-capacity-factor",
        )


def _capacity_warnings(options: ModelOptions, gate: type[Gate]) -> list[str]:
    warnings = []
    if options.moe_eval_capacity_factor is not None or (
        options.moe_eval_capacity_token_fraction != -1
    ):
        warnings.append(
            "a capacity in evaluation: a token's output depends on the other tokens of "
            "the batch, and perplexity on the batch size"
        )
    fixed = gate.has_fixed_k(options) and not options.moe_null_experts
    if not is_causal(options):
        return warnings
    if options.moe_capacity_factor is not None and not fixed:
        warnings.append(
            f"--moe-capacity-factor {options.moe_capacity_factor}: the capacity follows the number "
            "of pairs, which depends on later tokens: training is not causal; evaluation has no "
            "capacity by default"
        )
    if options.moe_capacity_factor is not None and options.moe_drop_policy in ("probs", "random"):
        warnings.append(
            f"--moe-drop-policy {options.moe_drop_policy}: in training, later tokens can displace "
            "earlier ones, which is not causal; evaluation has no capacity by default"
        )
    return warnings


def check_spawned_from(options: ModelOptions, option: str, method: str) -> None:
    """Raise `OptionError` if a spawn would overwrite what `method` made from a dense model.

    Args:
        option: the option with the value `method`.
    """
    if options.moe_spawn_updates is not None and method not in ("copy", "none"):
        raise OptionError(
            option,
            method,
            "--moe-spawn-updates makes all experts from the first one and would "
            "overwrite the others: give copy or none, and --moe-spawn-method and "
            "--moe-spawn-rate for the spawn",
        )


def _check_spawn(options: ModelOptions) -> None:
    updates, method = options.moe_spawn_updates, options.moe_spawn_method
    if updates is None:
        _refuse_given(
            options, _named("moe_spawn_"), "experts are not spawned", "--moe-spawn-updates"
        )
        return
    if options.max_update and updates >= options.max_update:
        raise OptionError(
            "moe_spawn_updates",
            updates,
            f"the run ends at update {options.max_update}: give less than --max-update",
        )
    check_choice(options, "moe_spawn_method", SPAWN_METHODS)
    check_choice(options, "moe_spawn_moments", ("copy", "reset"))
    check_rate("moe_spawn_rate", method, options.moe_spawn_rate)
    trainable = parse_bool("moe_spawn_trainable_masked", options.moe_spawn_trainable_masked)
    for option, is_given in (
        ("moe_spawn_rescale", options.moe_spawn_rescale),
        ("moe_spawn_trainable_masked", not trainable),
    ):
        if is_given and method != "mask":
            raise OptionError(
                option,
                getattr(options, option),
                f"--moe-spawn-method {method} masks nothing: leave it out, or give mask",
            )


def _spawn_warnings(options: ModelOptions, counts: Sequence[int]) -> list[str]:
    updates = options.moe_spawn_updates
    if updates is None:
        return []
    warnings = []
    if min(counts) == 1:
        warnings.append(
            f"--moe-spawn-updates {updates}: a layer has only one expert, which the "
            "spawn changes without adding others"
        )
    if options.moe_spawn_method == "copy":
        warnings.append(
            "--moe-spawn-method copy: experts start identical, so that only the tokens "
            "the gate sends them make them differ"
        )
    if options.moe_shared_experts and options.moe_shared_combine != "add":
        warnings.append(
            f"--moe-shared-combine {options.moe_shared_combine}: until the spawn there "
            "is no gate, and shared experts have weight 1"
        )
    return warnings
