"""What makes options valid, and a run fit to start: checked before any process is."""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from evomoe_plugin.dispatch.exchange import WIRE_DTYPES
from evomoe_plugin.gates.auxiliary import coefficients
from evomoe_plugin.gates.base import gate_class, validate_gate
from evomoe_plugin.options import (
    ACTIVATIONS,
    DROP_POLICIES,
    SHARED_COMBINE,
    SPAWN_METHODS,
    UNSUPPORTED,
    MoEOptions,
    OptionError,
    check_choice,
    check_number,
    check_rate,
    expert_counts,
    expert_slots,
    moe_layer_indices,
    parse_bool,
)

logger = logging.getLogger(__name__)
_PROBABILITIES = ("dropout", "attention_dropout", "activation_dropout", "relu_dropout",
                  "decoder_layerdrop")


def validate(options: Any, warn: bool = True) -> None:
    """Check every option of an MoE model; log a warning for what is doubtful.

    Args:
        options: the fields of `MoEOptions`, of the gates' options and of fairseq's
            transformer_lm.
        warn: False where it has been said already, or does not matter.
    Raises:
        OptionError: naming the option, its value and what would be right.
    """

    for option in UNSUPPORTED:
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
    for option in _PROBABILITIES:
        if hasattr(options, option):
            check_number(options, option, least=0, most=1, remedy="it is a probability: give a "
                                                                  "number from 0 to 1")
    _check_experts(options)
    _check_expert_parallel(options)
    check_number(options, "moe_null_experts", least=0, remedy="give 0 or more")
    _check_capacity(options, gate)
    _check_init(options)
    _check_spawn(options)
    warnings = [*_capacity_warnings(options, gate), *_spawn_warnings(options, counts),
                *validate_gate(options, counts)]
    _check_null(options)
    for warning in warnings if warn else ():
        logger.warning(warning)


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


def _check_expert_parallel(options: Any) -> None:
    size = options.moe_expert_parallel_size
    check_number(options, "moe_expert_parallel_size", least=1, remedy="give 1 or more")
    check_choice(options, "moe_ep_wire_dtype", tuple(WIRE_DTYPES))
    check_choice(options, "moe_ep_checkpoint", ("auto", "consolidated", "sharded"))
    check_number(options, "moe_ep_consolidate_below", least=0,
                 remedy="give a number of GiB, 0 or more")
    slots = expert_slots(options, len(moe_layer_indices(options, options.decoder_layers)))
    for count in slots:
        if count % size:
            raise OptionError("moe_expert_parallel_size", size,
                              f"does not divide the {count} experts of a layer")
    least = min(slots) // size
    check_number(options, "moe_ep_chunks", least=1, most=least,
                 remedy=f"give 1 to {least}, the experts of a layer that a process holds")
    if size > 1 and getattr(options, "decoder_layerdrop", 0):
        raise OptionError("decoder_layerdrop", options.decoder_layerdrop,
                          "processes would leave out different layers, and wait for each other "
                          "for ever: leave it out, or --moe-expert-parallel-size")


def _check_expert_parallel_run(cfg: Any) -> None:
    """What else the run must be for experts to be divided over processes."""
    size = cfg.model.moe_expert_parallel_size
    if size == 1:
        return
    parallel = cfg.distributed_training
    world = parallel.distributed_world_size
    if all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        world = max(world, int(os.environ["WORLD_SIZE"]))
    elif "SLURM_NTASKS" in os.environ and parallel.distributed_init_method is None:
        world = max(world, int(os.environ["SLURM_NTASKS"]))
    if world % size:
        raise OptionError("moe_expert_parallel_size", size,
                          f"does not divide the {world} processes of --distributed-world-size")
    if parallel.ddp_backend not in ("fully_sharded", "legacy_ddp"):
        raise OptionError("ddp_backend", parallel.ddp_backend,
                          "with --moe-expert-parallel-size give fully_sharded or legacy_ddp")
    if parallel.use_sharded_state:
        raise OptionError("use_sharded_state", "with --moe-expert-parallel-size",
                          "leave it out: --moe-ep-checkpoint sharded writes a file a process")
    if parallel.zero_sharding != "none":
        raise OptionError("zero_sharding", parallel.zero_sharding,
                          "with --moe-expert-parallel-size give --ddp-backend fully_sharded")
    if cfg.ema is not None and cfg.ema.store_ema:
        raise OptionError("store_ema", True,
                          "knows nothing of experts on other processes: leave it out, or "
                          "--moe-expert-parallel-size")
    if cfg.optimization.use_bmuf:
        raise OptionError("use_bmuf", "with --moe-expert-parallel-size", "leave it out")


def _check_null(options: Any) -> None:

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
        check_spawned_from(options, "moe_init_method", options.moe_init_method)
        return
    for option in fields(MoEOptions):
        value = getattr(options, option.name)
        if option.name.startswith("moe_init_") and value != option.default:
            raise OptionError(option.name, value, "experts are made from nothing: leave it out, or "
                                                  "give --moe-init-from-dense")


def check_spawned_from(options: Any, option: str, method: str) -> None:
    """Raise `OptionError` if a spawn would throw away what `method` made of a dense model.

    Args:
        option: the one that `method` comes from.
    """
    if options.moe_spawn_updates is not None and method not in ("copy", "none"):
        raise OptionError(option, method,
                          "--moe-spawn-updates makes all experts from the first one, so that what "
                          "others are given would be lost: give copy or none, and --moe-spawn-"
                          "method and --moe-spawn-rate for what the spawn makes")


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
    check_rate("moe_spawn_rate", method, options.moe_spawn_rate)
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


def _check_changes(cfg: Any) -> None:
    """What else the run must be for weights to be changed in it, or set at its start.

    Fields that a hand-written yaml leaves out have the defaults, which no architecture changes.
    """
    given = {f.name: getattr(cfg.model, f.name, f.default) for f in fields(MoEOptions)}
    spawn, dense = given["moe_spawn_updates"], given["moe_init_from_dense"]
    if spawn is not None and cfg.ema is not None and cfg.ema.store_ema:
        raise OptionError("store_ema", True,
                          "the averages of experts would be of before the spawn: leave it out, or "
                          "--moe-spawn-updates")
    if dense is not None and cfg.checkpoint.finetune_from_model:
        raise OptionError("moe_init_from_dense", dense,
                          "--finetune-from-model gives the first weights already: leave one of "
                          "them out")
    changes = {"moe_spawn_updates": spawn, "moe_init_from_dense": dense,
               "moe_adapt_record_interval": getattr(
                   cfg.model, "moe_adapt_record_interval", None)}
    change = next((name for name, value in changes.items() if value), None)
    if change is not None:
        _check_owner_of_weights(cfg, f"--{change.replace('_', '-')}")
    if spawn is not None:
        for warning in _moments_warnings(cfg.optimizer, spawn):
            logger.warning(warning)


def _check_owner_of_weights(cfg: Any, change: str) -> None:
    """Raise `OptionError` where the optimizer, or a copy of the weights, would not see `change`."""
    parallel = cfg.distributed_training
    if parallel.zero_sharding != "none":
        raise OptionError("zero_sharding", parallel.zero_sharding,
                          f"keeps the optimizer's state where {change} cannot edit it: give "
                          "--ddp-backend fully_sharded")
    if cfg.optimization.use_bmuf:
        raise OptionError("use_bmuf", f"with {change}",
                          "keeps a copy of the weights, which would undo the change: leave it out")
    if parallel.ddp_backend == "slowmo":
        raise OptionError("ddp_backend", f"slowmo with {change}",
                          "keeps a copy of the weights, which would undo the change: give "
                          "legacy_ddp or fully_sharded")


# Above it, weights without moments take steps of more than twice the learning rate.
_MOST_BETA2 = 0.99


def largest_step(betas: Sequence[float], updates: int) -> float:
    """How many times the learning rate Adam moves a weight at most whose gradient stays the same
    and begins after `updates` updates of zeros: the moments begin, the corrections have ended."""
    def step(k: int) -> float:
        one, two = ((1 - beta**k) / (1 - beta ** (updates + k)) for beta in betas)
        return one / two**0.5 if two else 1.0

    beta1, beta2 = betas
    return max(map(step, range(1, 1 + int(5 / max(1 - beta1, 1 - beta2, 1e-3)))))


def _moments_warnings(optimizer: Any, updates: int) -> Iterator[str]:
    betas = getattr(optimizer, "adam_betas", None)
    if isinstance(betas, str):
        betas = ast.literal_eval(betas)
    if not betas or betas[1] <= _MOST_BETA2:
        return
    yield (f"--adam-betas {tuple(betas)} with --moe-spawn-updates {updates}: after the spawn the "
           "gate's weights, and those that are new, begin without moments amid the run: their "
           f"first steps are up to {largest_step(betas, updates):.1f} times --lr; with (0.9, 0.98) "
           f"it is {largest_step((0.9, 0.98), updates):.1f} times")


def validate_run(cfg: Any) -> None:
    """Check a whole fairseq run before any process is started.

    Args:
        cfg: fairseq's configuration; `cfg.model` is None for runs that take it from a checkpoint.
    Raises:
        OptionError: as `validate`, and for data that is not there.
    """
    _check_data(cfg)
    model = cfg.model
    if model is None:
        return
    _check_changes(cfg)
    # A hand-written yaml may leave fields to the architecture's defaults; then the check waits
    # for `build_model`, which knows them.
    if any(f.name not in model for f in fields(MoEOptions)):
        return
    validate(model)
    _check_expert_parallel_run(cfg)
    if cfg.criterion is not None and cfg.criterion._name == "cross_entropy":
        logger.warning("--criterion cross_entropy: gate losses are not added and routing is not "
                       "logged; --criterion moe_cross_entropy does both")
    for warning in _strong_losses(model, getattr(cfg.criterion, "moe_gate_loss_wt", 0.0)):
        logger.warning(warning)


# Losses that are about 1 or more when all is well; published coefficients are 0.001 to 0.03.
_LARGE_LOSSES = ("balance", "switch", "diversity", "simplicity", "efficiency")


def _strong_losses(model: Any, weight: float) -> Iterator[str]:

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
