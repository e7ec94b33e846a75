"""Values of fairseq's own options that it takes, and then trips over: refused before it starts.

Most are assertions, divisions by zero and missing files in constructors, whose messages name no
option.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

from evomoe_plugin.config.errors import OptionError

Fault = tuple[str, Any, str]
"""Option, value, and what would be right."""


def check_fairseq(cfg: Any, num_ranks: int, on_gpu: bool) -> None:
    """Raise `OptionError` for a value of fairseq's options that its training trips over.

    Args:
        cfg: fairseq's configuration of a training run.
        num_ranks: of the run, on all machines.
        on_gpu: whether it runs on GPUs.
    """
    for faults in (
        _of_the_optimizer(cfg, on_gpu),
        _of_the_schedule(cfg),
        _of_the_task(cfg, num_ranks),
        _of_the_model(cfg, num_ranks, on_gpu),
    ):
        for option, value, remedy in faults:
            raise OptionError(option, value, remedy)


def _name(component: Any) -> str | None:
    return getattr(component, "_name", None)


_NO_MEMORY_EFFICIENT = ("adadelta", "adagrad", "lamb", "sgd")


def _of_the_optimizer(cfg: Any, on_gpu: bool) -> Iterator[Fault]:
    name, options = _name(cfg.optimizer), cfg.optimizer
    if name == "lamb" and not importlib.util.find_spec("apex"):
        yield "optimizer", name, "needs NVIDIA's apex: install it, or give adam or fused_adamw"
    for option in ("memory_efficient_fp16", "memory_efficient_bf16"):
        if getattr(cfg.common, option) and name in _NO_MEMORY_EFFICIENT:
            yield option, f"with --optimizer {name}", f"give --{option[-4:]}"
    if getattr(options, "fp16_adam_stats", False) and not on_gpu:
        yield "fp16_adam_stats", "without a GPU", "leave it out"
    for option in ("adam_betas", "adamax_betas", "lamb_betas"):
        value = getattr(options, option, None)
        if value is not None and not _are_betas(value):
            yield option, value, "give two numbers from 0 to below 1, as (0.9,0.98)"
    if cfg.optimization.use_bmuf:
        yield (
            "use_bmuf",
            True,
            "no checkpoint has its copy of the weights, so that a resumed run would be another: "
            "leave it out",
        )
    overrides = cfg.checkpoint.optimizer_overrides
    if not isinstance(_literal(overrides), dict):
        yield "optimizer_overrides", overrides, "give a dictionary, as {'lr': 0.1}"


def _are_betas(value: Any) -> bool:
    betas = _literal(value) if isinstance(value, str) else value
    try:
        return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    except TypeError:
        return False


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _of_the_schedule(cfg: Any) -> Iterator[Fault]:
    name, options = _name(cfg.lr_scheduler), cfg.lr_scheduler
    if name == "pass_through" and _name(cfg.optimizer) != "composite":
        yield "lr_scheduler", name, "is of --optimizer composite alone: give another"
    elif name == "tri_stage":
        yield from _of_three_stages(cfg, options)
    elif name == "polynomial_decay" and float(options.total_num_update) <= 0:
        yield "total_num_update", options.total_num_update, "give a number of updates above 0"
    elif name == "triangular" and not options.max_lr > cfg.optimization.lr[0]:
        yield "max_lr", options.max_lr, f"give more than --lr ({cfg.optimization.lr[0]})"
    elif name == "manual":
        for option in ("epoch2lr", "update2lr"):
            given = _literal(getattr(options, option))
            if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
                yield option, getattr(options, option), "give text keys, as {'1,3-5': 0.1}"
    elif name == "step":
        rates = cfg.optimization.lr
        if options.lr_deacy_period <= 0:
            yield "lr_deacy_period", options.lr_deacy_period, "give a number of updates above 0"
        if not 0 < options.lr_decay <= 1:
            yield "lr_decay", options.lr_decay, "give a factor above 0, at most 1"
        if not 0 <= options.min_lr < rates[0]:
            yield "min_lr", options.min_lr, f"give 0 or more, less than --lr ({rates[0]})"


def _of_three_stages(cfg: Any, options: Any) -> Iterator[Fault]:
    ratio = _literal(options.phase_ratio) if isinstance(options.phase_ratio, str) else None
    if options.final_lr_scale <= 0:
        yield "final_lr_scale", options.final_lr_scale, "give a factor above 0"
    if ratio is not None:
        if sum(ratio) != 1:
            yield "phase_ratio", options.phase_ratio, "give three shares that add up to 1"
        if cfg.optimization.max_update <= 0:
            yield "phase_ratio", options.phase_ratio, "is of --max-update: give that too"
    elif options.decay_steps <= 0 or min(options.warmup_steps, options.hold_steps) < 0:
        yield (
            "decay_steps",
            options.decay_steps,
            "give updates above 0, with --warmup-steps and --hold-steps, or --phase-ratio",
        )


def _of_the_task(cfg: Any, num_ranks: int) -> Iterator[Fault]:
    if _name(cfg.task) == "language_modeling":
        for option in ("self_target", "past_target"):
            if getattr(cfg.task, option, False) and hasattr(cfg.model, "decoder_layers"):
                yield option, True, "decoders predict the next token: leave it out"
    if cfg.common.model_parallel_size != 1:
        yield (
            "model_parallel_size",
            cfg.common.model_parallel_size,
            "needs Megatron's models: give 1, and --ddp-backend fully_sharded to divide weights",
        )
    path = cfg.common.quantization_config_path
    if path is not None and not os.path.isfile(path):
        yield "quantization_config_path", path, "no such file"
    if any(number < 1 for number in cfg.optimization.update_freq):
        yield "update_freq", str(list(cfg.optimization.update_freq)), "give numbers of 1 or more"
    if cfg.dataset.num_workers < 0:
        yield "num_workers", cfg.dataset.num_workers, "give 0 or more"
    share, shares = cfg.dataset.shard_id, cfg.dataset.num_shards
    if shares < 1:
        yield "num_shards", shares, "give 1 or more"
    if not 0 <= share < shares:
        yield "shard_id", share, f"give 0 to {shares - 1}, less than --num-shards"
    zero = cfg.distributed_training.zero_sharding
    if zero != "none" and num_ranks == 1:
        yield "zero_sharding", zero, "there is one rank, nothing is divided: leave it out"


_SHARES = (
    *("dropout", "attention_dropout", "activation_dropout", "relu_dropout"),
    *("adaptive_softmax_dropout", "decoder_layerdrop", "encoder_layerdrop", "quant_noise_pq"),
)


def _of_the_model(cfg: Any, num_ranks: int, on_gpu: bool) -> Iterator[Fault]:
    model = cfg.model

    def given(name: str) -> Any:
        return getattr(model, name, None)

    for option in _SHARES:
        value = given(option)
        if isinstance(value, (int, float)) and not 0 <= value <= 1:
            yield option, value, "give a share from 0 to 1"
    if _name(cfg.criterion) == "adaptive_loss" and given("adaptive_softmax_cutoff") is None:
        yield (
            "criterion",
            "adaptive_loss",
            "is of models with --adaptive-softmax-cutoff: give that, or another criterion",
        )
    if given("decoder_xformers_att_config") and not importlib.util.find_spec("xformers"):
        yield (
            "decoder_xformers_att_config",
            model.decoder_xformers_att_config,
            "needs xformers: install it, or leave it out",
        )
    width, heads = given("decoder_embed_dim"), given("decoder_attention_heads")
    if width is not None and heads is not None:
        if heads < 1 or width < 1 or width % heads:
            yield (
                "decoder_attention_heads",
                heads,
                f"give a divisor of --decoder-embed-dim ({width})",
            )
        learned = given("decoder_learned_pos") or given("no_token_positional_embeddings")
        if not (learned or hasattr(model, "rope_theta")) and width < 4:
            yield "decoder_embed_dim", width, "give 4 or more, or --decoder-learned-pos"
    for option in ("encoder_ffn_embed_dim", "decoder_ffn_embed_dim"):
        if given(option) is not None and given(option) < 1:
            yield option, given(option), "give 1 or more"
    kept = given("decoder_layers_to_keep")
    if kept is not None and not re.fullmatch(r"\d+(,\d+)*", kept):
        yield "decoder_layers_to_keep", kept, "give numbers of layers, from 0, as 0,2"
    elif kept is not None and not _loads_other_weights(cfg.checkpoint):
        yield (
            "decoder_layers_to_keep",
            kept,
            "is of weights that are loaded: give --finetune-from-model, or leave it out",
        )
    if (given("quant_noise_scalar") or 0) > 0 and not on_gpu:
        yield "quant_noise_scalar", model.quant_noise_scalar, "needs a GPU: leave it out"
    if (_name(model) or "").startswith("transformer_lm") and not hasattr(model, "moe_gate"):
        yield from _of_a_decoder(cfg, num_ranks)


def _loads_other_weights(checkpoint: Any) -> bool:
    named = checkpoint.restore_file != "checkpoint_last.pt"
    return named or bool(checkpoint.finetune_from_model or checkpoint.continue_once)


def _of_a_decoder(cfg: Any, num_ranks: int) -> Iterator[Fault]:
    """Of fairseq's own language model; ours refuse what they do not have."""
    model = cfg.model
    shared = model.share_decoder_input_output_embed
    if shared and model.decoder_output_dim != model.decoder_input_dim:
        yield (
            "decoder_output_dim",
            model.decoder_output_dim,
            f"with --share-decoder-input-output-embed it must be --decoder-input-dim "
            f"({model.decoder_input_dim})",
        )
    together = "with --share-decoder-input-output-embed"
    for option in ("character_embeddings", "adaptive_softmax_cutoff", "adaptive_input"):
        if shared and getattr(model, option):
            yield option, together, "no checkpoint of both can be read: leave one of them out"
    if model.adaptive_input and not model.adaptive_input_cutoff:
        yield "adaptive_input", True, "give --adaptive-input-cutoff too"
    if model.tie_adaptive_weights and not model.adaptive_input:
        yield "tie_adaptive_weights", True, "give --adaptive-input too, or leave it out"
    if model.base_layers > 0 and num_ranks == 1:
        yield "base_layers", model.base_layers, "one expert a rank needs several: leave it out"
