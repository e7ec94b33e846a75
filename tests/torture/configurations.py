"""Command lines drawn from all options that training shows, valid and not.

Each is refused in one line that names an option, before the first update; or makes three, resumes
from the second to the same third, bit for bit, and evaluates to the loss that training logged.
Those of even seeds are meant to be valid: an option that is refused is left out, and what is left
is tried again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from evomoe_plugin.gates import gate_names
from evomoe_plugin.gates.registry import gate_class, option_fields, own_options
from evomoe_plugin.trainer.peak_flops import peak_flops
from tests.end_to_end.conftest import write_text
from tests.torture import disks, forked, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, CASES, DRAW = "configurations", "Configurations", 5000, 2

UPDATES = 3
_SIZES = (
    *("--decoder-layers", "2", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
    *("--decoder-attention-heads", "2", "--share-decoder-input-output-embed"),
)
_MOE = (*_SIZES, "--moe-expert-count", "4")
ARCHITECTURES = {
    "transformer_lm_gpttiny_moe": (_MOE, 0.6),
    "transformer_lm_llama_tiny_moe": (_MOE, 0.25),
    "transformer_lm": (
        (*_SIZES, "--decoder-input-dim", "32", "--decoder-output-dim", "32"),
        0.15,
    ),
}
_CHOSEN = {
    "optimizer": "adam sgd nag adagrad adamax adadelta adafactor fused_adamw lamb".split(),
    "lr_scheduler": (
        "fixed inverse_sqrt polynomial_decay cosine reduce_lr_on_plateau triangular tri_stage "
        "step manual pass_through"
    ).split(),
    "criterion": (
        "moe_cross_entropy cross_entropy label_smoothed_cross_entropy adaptive_loss"
    ).split(),
}
_USUAL = {"optimizer": "adam", "lr_scheduler": "fixed", "criterion": "moe_cross_entropy"}

# Of the machine, of other places, or what the harness itself decides.
_LEFT_OUT = frozenset(
    """
    help user_dir data save_dir task arch optimizer lr_scheduler criterion lr seed log_file
    log_format log_interval tensorboard_logdir wandb_project azureml_logging aim_repo aim_run_hash
    tpu use_plasma_view plasma_path device_id distributed_rank distributed_backend
    distributed_init_method distributed_port distributed_num_procs distributed_no_spawn
    distributed_world_size nprocs_per_node heartbeat_timeout pipeline_balance pipeline_devices
    pipeline_encoder_balance pipeline_encoder_devices pipeline_decoder_balance
    pipeline_decoder_devices pipeline_chunks pipeline_checkpoint pipeline_model_parallel
    max_epoch max_update stop_time_hours no_seed_provided suppress_crashes reset_logging cpu
    hf_config moe_init_from_dense tokenizer bpe scoring
    """.split()
)

# What an option with a text for a value takes; the second half is hardly ever right.
_TEXTS = {
    "moe_expert_count": ("1", "2", "8", "2,4", "0", "x"),
    "moe_layers": ("0", "1", "0,1", "none", "7", "x"),
    "moe_aux": ("balance=0.01", "z=0.001", "none", "switch=0.01", "balance=x", ""),
    "moe_train_only": ("experts", "gate,norms", "attention", "embeddings", "x", ""),
    "moe_lexical": ("zero", "normal:0.1", "hash:2", "hash:x"),
    "moe_init_gate": ("default", "zero", "normal:0.1", "normal:x"),
    "moe_shared_combine": ("add", "softmax", "mix", "sigmoid", "x"),
    "moe_scorer": ("linear", "mlp", "gmm", "cosine", "x"),
    "moe_spawn_method": ("mask", "noise", "reinit", "copy", "x"),
    "moe_spawn_moments": ("copy", "reset", "x"),
    "moe_init_method": ("copy", "mask", "noise", "reinit", "slice", "none", "x"),
    "moe_weight_scale": ("none", "unit", "mean", "x"),
    "moe_temperature_schedule": ("linear", "exp", "cosine", "constant", "x"),
    "moe_temperature_scope": ("global", "token", "x"),
    "moe_top_p_weights": ("softmax", "uniform", "sparsemixer", "x"),
    "moe_top_k_weights": ("raw", "renormalized", "x"),
    "moe_top_any_weights": ("uniform", "score", "x"),
    "moe_top_any_ste": ("full", "active", "x"),
    "moe_second_expert_policy": ("all", "sampling", "random", "x"),
    "moe_hash": ("balanced", "random", "clustered", "x"),
    "moe_gate_noise": ("gumbel", "none", "x"),
    "moe_gate_loss_combine_method": ("average", "sum", "x"),
    "moe_eval_gate": ("reached", "top1", "dense", "x"),
    "moe_ep_wire_dtype": ("same", "fp32", "fp16", "bf16", "x"),
    "moe_ep_checkpoint": ("auto", "consolidated", "sharded", "x"),
    "moe_drop_policy": ("position", "probs", "random", "x"),
    "moe_combine_weights": ("gate", "softmax", "x"),
    "moe_attention": ("sdpa", "stock", "x"),
    "moe_adapt_source": ("most_used", "keep", "x"),
    "moe_matmul_dtype": ("same", "bf16", "x"),
    "moe_products_dtype": ("same", "bf16", "x"),
    "moe_gating_use_fp32": ("true", "false", "x"),
    "moe_spawn_trainable_masked": ("true", "false", "x"),
    "decoder_ffn": ("gated", "plain", "x"),
    "decoder_norm": ("rms", "layer", "x"),
    "decoder_qk_norm": ("none", "shared", "separate", "x"),
    "rope_scaling": ('{"rope_type": "linear", "factor": 2.0}', "{}", "x"),
    "update_freq": ("1", "2", "1,2", "0", "x"),
    "adam_betas": ("(0.9,0.98)", "(0.9,1.0)", "0.9", "x"),
    "adafactor_eps": ("(1e-30,1e-3)", "(0,0)", "x"),
    "adamax_betas": ("(0.9,0.98)", "(0.9,1.0)", "x"),
    "lamb_betas": ("(0.9,0.98)", "x"),
    "betas": ("(0.9,0.98)", "(0.9,0.999)", "x"),
    "valid_subset": ("valid", "train", "vald", "valid,train"),
    "train_subset": ("train", "valid", "x"),
    "gen_subset": ("valid", "x"),
    "optimizer_overrides": ("{}", "{'lr': 0.1}", "x"),
    "best_checkpoint_metric": ("loss", "ppl", "x"),
    "restore_file": ("checkpoint_last.pt", "nowhere.pt"),
    "continue_once": ("nowhere.pt", ""),
    "finetune_from_model": ("nowhere.pt", ""),
    "checkpoint_suffix": ("-a", "", "/x", "."),
    "activation_fn": ("gelu", "relu", "swish", "x"),
    "adaptive_softmax_cutoff": ("8,16", "x"),
    "adaptive_input_cutoff": ("8,16", "x"),
    "decoder_layers_to_keep": ("0", "0,1", "7", "x"),
    "shorten_data_split_list": ("train", "train,valid", "x"),
    "epoch2lr": ("{}", "{1: 0.1}", "x"),
    "update2lr": ("{2: 0.1}", "{}", "x"),
    "update_epoch_batch_itr": ("true", "false", "x"),
    "total_num_update": ("10", "3", "0", "x"),
    "max_tokens_valid": ("256", "64", "0", "x"),
    "batch_size_valid": ("2", "4", "0", "x"),
    "quant_noise_pq": ("0", "0.1"),
    "phase_ratio": ("(0.3,0.3,0.4)", "x"),
}
_WHOLE = (1, 2, 4, 3, 0, 8, -1, 10**6)
_REAL = (0.1, 0.5, 0.3, 1.0, 1e-8, 0.0, 2.0, -1.0, 1e6, math.nan, math.inf)
_SIZES_OF_MODELS = re.compile("decoder_layers|base_layers|base_sublayers|.*_(dim|heads|experts)")
"""Options whose largest value is a model that nobody's memory holds."""
_USUAL_SHARES = (0.95, 0.6)
"""Of values that are drawn from the first half of these, by the seed's parity."""

# What an option or a choice needs beside it, where the command line is meant to be valid.
_NEEDS = {
    "moe_spawn_": ("--moe-spawn-updates=2",),
    "moe_adapt_": ("--moe-gate=top_any", "--moe-adapt-record-interval=2"),
    "moe_ep_": (
        *("--distributed-world-size=2", "--ddp-backend=legacy_ddp"),
        "--moe-expert-parallel-size=2",
    ),
    "polynomial_decay": ("--total-num-update=10",),
    "triangular": ("--max-lr=0.1",),
    "tri_stage": ("--warmup-steps=1", "--hold-steps=1", "--decay-steps=8"),
    "step": ("--lr-deacy-period=2",),
}
_NEVER_ALONE = ("moe_init_", "scale_", "character_", "base_")
"""Options that need a file or another model: those that are meant to be valid have none."""

_LIMIT_SECONDS, _MEMORY = 90, 3 * 2**30
_MOST_LEFT_OUT = 5


@functools.cache
def actions(arch: str, optimizer: str, scheduler: str, criterion: str) -> dict[str, Any]:
    """The options that a command line with these has, by name."""
    from fairseq import options

    parser = options.get_training_parser()
    names = ("--arch", arch, "--optimizer", optimizer, "--lr-scheduler", scheduler)
    given = ["x", "--task", "language_modeling", *names, "--criterion", criterion]
    given += ["--max-lr", "1"]  # without a default, which some schedulers need
    options.parse_args_and_arch(parser, given, parse_known=True)
    return {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest not in _LEFT_OUT
    }


def drawn(seed: int) -> list[str]:
    """The command line of a seed, without data and folders."""
    dice = random.Random(seed)
    shares = [share for _, share in ARCHITECTURES.values()]
    (arch,) = dice.choices(list(ARCHITECTURES), shares)
    chosen = {
        name: _USUAL[name] if dice.random() < 0.7 else dice.choice(values)
        for name, values in _CHOSEN.items()
    }
    known = actions(arch, chosen["optimizer"], chosen["lr_scheduler"], chosen["criterion"])
    valid, usual = seed % 2 == 0, _USUAL_SHARES[seed % 2]
    line = ["--task", "language_modeling", "--arch", arch, *ARCHITECTURES[arch][0]]
    for name, value in chosen.items():
        line += [_flag(name), value]
    if dice.random() < 0.08:
        backend = dice.choice(["fully_sharded", "legacy_ddp", "pytorch_ddp"])
        line += ["--distributed-world-size=2", f"--ddp-backend={backend}"]
    names = sorted(known)
    if "moe_gate" in known:
        gate = dice.choice(gate_names()) if valid or dice.random() < 0.3 else None
        if gate is not None:
            line.append(f"--moe-gate={gate}")
        if valid:
            own = {field.name for field in own_options(gate_class(str(gate)))}
            others = option_fields().keys() - own
            names = [n for n in names if n not in others and not n.startswith(_NEVER_ALONE)]
    plugin = [name for name in names if name.startswith("moe_")]
    count = min(1 + int(dice.expovariate(1 / 4)), 12)
    picked = {
        dice.choice(plugin if plugin and dice.random() < 0.5 else names) for _ in range(count)
    }
    needs = [*chosen.values(), *sorted(picked)] if valid else []
    for prefix, needed in _NEEDS.items():
        if any(name.startswith(prefix) for name in needs):
            line += needed
    for name in sorted(picked):
        line += _with_value(known[name], dice, usual)
    return line


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _with_value(action: argparse.Action, dice: random.Random, usual: float) -> list[str]:
    flag = _flag(action.dest)
    if flag not in action.option_strings:
        flag = action.option_strings[-1]
    if action.nargs == 0:
        return [flag]
    values: Sequence[Any]
    if action.dest in _TEXTS:
        values = _TEXTS[action.dest]
    elif action.dest == "moe_gate":
        values = (*gate_names(), *["x"] * len(gate_names()))
    elif action.choices:
        return [f"{flag}={dice.choice([*map(str, action.choices)])}"]
    elif action.type is int or isinstance(action.default, int):
        values = _WHOLE[:-1] if _SIZES_OF_MODELS.fullmatch(action.dest) else _WHOLE
    elif action.type is float or isinstance(action.default, float):
        values = _REAL
    else:
        values = ("1", "0", "true", "x", "", "1,2", "0.5")
    likely = dice.random() < usual
    return [f"{flag}={dice.choice(values[: (1 + len(values)) // 2] if likely else values)}"]


def chosen_options(line: Sequence[str]) -> list[str]:
    """The options of a command line, by name, with their values."""
    found, rest = [], list(line)
    while rest:
        flag = rest.pop(0)
        if "=" in flag or not rest or rest[0].startswith("--"):
            found.append(flag)
        else:
            found.append(f"{flag}={rest.pop(0)}")
    return found


def coverage(seeds: Iterable[int]) -> dict[str, str]:
    """What the command lines of some seeds contain: options, their values, pairs of options."""
    options, values, pairs = Counter(), set(), set()
    known: set[str] = set()
    for seed in seeds:
        line = chosen_options(drawn(seed))
        values.update(line)
        names = sorted({option.partition("=")[0] for option in line})
        options.update(names)
        pairs.update(itertools.combinations(names, 2))
    for arch in ARCHITECTURES:
        for each in (
            *((o, "fixed", "moe_cross_entropy") for o in _CHOSEN["optimizer"]),
            *(("adam", s, "moe_cross_entropy") for s in _CHOSEN["lr_scheduler"]),
            *(("adam", "fixed", c) for c in _CHOSEN["criterion"]),
        ):
            known.update(a.option_strings[-1] for a in actions(arch, *each).values())
    reached = known.intersection(options)
    return {
        "options": f"{len(reached)} of {len(known)}",
        "options with a value": f"{len(values):,}",
        "pairs of options": f"{len({p for p in pairs if known.issuperset(p)}):,} of "
        f"{len(known) * (len(known) - 1) // 2:,}",
    }


def smoke() -> Iterable[int]:
    return (24,)


def _text(work: Path) -> Path:
    """A shorter one than others train on: three updates, and validation after two of them."""
    folder = work / "short-data"
    if not folder.is_dir():
        write_text(folder, train=60, valid=12)
    return folder


@functools.cache
def _evaluation(text: Path) -> Any:
    return forked.configuration("eval_lm", tiny.evaluation_arguments(text, text))


def prepare(work: Path) -> None:
    forked.remember_parsing()
    _evaluation(_text(work))
    for arch, (sizes, _) in ARCHITECTURES.items():
        actions(arch, *_USUAL.values())
        usual = [word for name, value in _USUAL.items() for word in (_flag(name), value)]
        line = ["--task", "language_modeling", "--arch", arch, *sizes, *usual]
        forked.configuration("train", arguments(line, _text(work), work))
    peak_flops(torch.device("cpu"), torch.float32)  # which each run would measure


def arguments(line: Sequence[str], text: Path, folder: Path) -> list[str]:
    """Of fairseq-train; what is drawn comes last, and wins."""
    return [
        *(str(text), "--user-dir", "evomoe_plugin", "--save-dir", str(folder)),
        *("--tokens-per-sample", "32", "--batch-size", "4", "--lr", "0.003", "--clip-norm", "1.0"),
        *("--max-update", str(UPDATES), "--save-interval-updates", "2", "--num-workers", "0"),
        *("--log-format", "json", "--log-interval", "1", "--seed", "7"),
        *line,
    ]


def case(seed: int, work: Path) -> Outcome:
    text, folder = _text(work), folder_of(NAME, seed, work)
    line, left_out = drawn(seed), 0
    while True:
        ended = forked.call(functools.partial(_three_steps, line, text, folder), 4 * _LIMIT_SECONDS)
        if ended.value is not None:
            kind, fault, message = ended.value
        else:
            fault = disks.verdict(ended) or ("" if ended.status else "nothing was returned")
            kind, message = "refused by the parser", ended.error
        if kind.startswith("refused") and not fault and not _OPTION.search(message):
            fault = f"no option is named: {message}"
        fewer = _without(line, message)
        if fault or seed % 2 or not kind.startswith("refused") or fewer == line:
            break
        if left_out == _MOST_LEFT_OUT:
            break
        line, left_out = fewer, left_out + 1
        shutil.rmtree(folder)
        folder.mkdir()
    if left_out:
        kind += ", without what was refused"
        fault = fault and f"{fault} (with {' '.join(line)})"
    named = _OPTION.search(message)
    return Outcome(f"{kind}: {named[0]}" if named else kind, fault)


_OPTION = re.compile(r"--[a-z][\w-]+|DATA")


def _without(line: Sequence[str], message: str) -> list[str]:
    """A command line without the first option that a refusal names, of those that can go."""
    options = chosen_options(line)
    for flag in _OPTION.findall(message):
        kept = [option for option in options if option.partition("=")[0] != flag]
        if len(kept) < len(options) and flag not in _STAY:
            return kept
    return list(line)


_STAY = ("--task", "--arch", *map(_flag, _CHOSEN))


def _three_steps(line: Sequence[str], text: Path, folder: Path) -> tuple[str, str, str]:
    """Kind, fault and message, in a child that has parsed the command line once for all steps."""
    cfg = forked.configuration("train", arguments(line, text, folder / "run"))
    trained = forked.call(lambda: forked.start("train", cfg), _LIMIT_SECONDS, _MEMORY)
    updates = logged(trained.lines, "train_inner")
    fault = disks.verdict(trained)
    if fault:
        return "training", f"{fault} (after {len(updates)} updates)", ""
    if trained.status != 0:
        if updates and not re.search("NaN|Nan|nan|memory|scale", trained.error):
            fault = f"refused after {len(updates)} updates: {trained.error}"
        return ("refused" if not updates else "ended with a message"), fault, trained.error
    # The perplexity of a loss may be too large for a number.
    numbers = [(name, v) for one in updates for name, v in one.items() if name != "ppl"]
    bad = next((name for name, v in numbers if str(v) in _NOT_FINITE), "")
    if bad:
        return "training", f"the log says {bad} is NaN/Inf, and nothing else does", ""
    done = ["trained"]
    for step, run in (
        ("resumed", lambda: _resume(cfg, folder)),
        ("evaluated", lambda: _evaluate(cfg, text, folder, logged(trained.lines, "valid"))),
    ):
        fault = run()
        if fault:
            return f"to be {step}", fault, ""
        if fault is not None:
            done.append(step)
    return ", ".join(done), "", ""


_NOT_FINITE = ("nan", "inf", "-inf", "NaN", "Infinity")


def logged(lines: Sequence[str], tag: str) -> list[dict]:
    """The JSON records of a log."""
    found = (line.partition(f"| {tag} | ")[2] for line in lines)
    return [json.loads(text) for text in found if text.startswith("{")]


_RESETS = ("reset_optimizer", "reset_meters", "reset_dataloader", "reset_lr_scheduler")


def _resume(cfg: Any, folder: Path) -> str | None:
    """What is wrong with the same run from its second update on; None: it cannot be compared."""
    given = cfg.checkpoint
    if any(given[name] for name in _RESETS) or given.optimizer_overrides != "{}":
        return None  # asked to go on otherwise
    if given.no_save_optimizer_state:
        return None  # which counts updates from 0 again
    saved = sorted((folder / "run").glob("checkpoint_*_2[.-]*"))
    if not saved:
        return None
    again = folder / "again"
    again.mkdir()
    for path in saved:
        target = again / re.sub(r"checkpoint_\d+_2(?=[.-])", "checkpoint_last", path.name)
        shutil.copytree(path, target) if path.is_dir() else shutil.copyfile(path, target)
    other = copy.deepcopy(cfg)
    other.checkpoint.save_dir = str(again)
    other.checkpoint.restore_file = "checkpoint_last.pt"
    ended = forked.call(lambda: forked.start("train", other), _LIMIT_SECONDS, _MEMORY)
    if ended.status != 0:
        return disks.verdict(ended) or f"ended with {ended.status}: {ended.error}"
    first, second = (tiny.content(f) for f in (folder / "run", again))
    last = [name for name in second if "last" in name and name in first]
    if not last:
        return None
    return tiny.difference({n: first[n] for n in last}, {n: second[n] for n in last})


def _evaluate(cfg: Any, text: Path, folder: Path, valid: list[dict]) -> str | None:
    """What is wrong with the evaluation of the last checkpoint; None: no loss was logged."""
    path = folder / "run" / "checkpoint_last.pt"
    key = "valid_inner_loss" if valid and "valid_inner_loss" in valid[-1] else "valid_loss"
    plain = cfg.criterion._name == "moe_cross_entropy" or (
        cfg.criterion._name == "cross_entropy" and not cfg.criterion.sentence_avg
    )  # fairseq's logs a loss per sample with --sentence-avg
    if getattr(cfg.task, "add_bos_token", False):
        return None  # whose score evaluation leaves out, and training's loss does not
    if getattr(cfg.model, "moe_eval_capacity_factor", None):
        return None  # the tokens that compete for places are those of a batch
    if not path.exists() or not plain or not valid or key not in valid[-1]:
        return None
    if int(valid[-1]["valid_num_updates"]) != UPDATES or cfg.dataset.valid_subset != "valid":
        return None
    evaluation = copy.deepcopy(_evaluation(text))
    evaluation.common_eval.path = str(path)
    for name in evaluation.task:
        if name in cfg.task and name != "data":
            evaluation.task[name] = cfg.task[name]

    def run() -> float:
        return forked.start("eval_lm", evaluation)["loss"].item()

    ended = forked.call(run, _LIMIT_SECONDS, _MEMORY)
    fault = disks.verdict(ended)
    if fault or ended.status != 0:
        return fault or f"ended with {ended.status}: {ended.error}"
    logged_loss = float(valid[-1][key])
    whole = cfg.dataset.max_valid_steps is None and not cfg.common.fp16 and not cfg.common.bf16
    if whole and abs(ended.value - logged_loss) > 2e-3 * max(1, abs(logged_loss)):
        return f"a loss of {ended.value:.4f}, training logged {logged_loss}"
    return ""
