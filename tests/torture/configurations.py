"""Command lines drawn from all options that training shows, valid and not.

Each is refused in one line before the first update; or makes three, resumes from the second to the
same third, bit for bit, and evaluates to the loss that training logged.
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

from evomoe_plugin.gates import gate_names
from tests.torture import disks, forked, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, CASES, DRAW = "configurations", "Configurations", 5000, 1

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

_TEXTS = {
    "moe_expert_count": ("1", "2", "8", "2,4", "0", "x"),
    "moe_layers": ("0", "1", "0,1", "none", "7"),
    "moe_aux": ("balance=0.01", "z=0.001", "switch=0.01", "balance=x", "none", ""),
    "update_freq": ("1", "2", "1,2", "0", "x"),
    "adam_betas": ("(0.9,0.98)", "(0.9,1.0)", "0.9", "x"),
    "betas": ("(0.9,0.98)", "(0.9,0.999)", "x"),
    "valid_subset": ("valid", "train", "vald", "valid,train"),
    "train_subset": ("train", "valid", "x"),
    "optimizer_overrides": ("{}", "{'lr': 0.1}", "x"),
    "best_checkpoint_metric": ("loss", "ppl", "x"),
    "restore_file": ("checkpoint_last.pt", "nowhere.pt"),
    "activation_fn": ("gelu", "relu", "swish", "x"),
    "adaptive_softmax_cutoff": ("8,16", "x"),
    "quant_noise_pq": ("0", "0.1"),
    "phase_ratio": ("(0.3,0.3,0.4)", "x"),
}
_WHOLE = (0, 1, 2, 3, 4, 8, -1, 10**6)
_REAL = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, -1.0, 1e-8, 1e6, math.nan, math.inf)
_USUAL_SHARES = (0.95, 0.6)
"""Of values that are drawn from the first half of these, since the other half is hardly ever valid:
every other command line is meant to be valid."""

_LIMIT_SECONDS, _MEMORY = 90, 3 * 2**30


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
    plugin = [name for name in known if name.startswith("moe_")]
    usual = _USUAL_SHARES[seed % 2]
    count = min(1 + int(dice.expovariate(1 / 3)), 12)
    names = {
        dice.choice(plugin if plugin and dice.random() < 0.4 else list(known)) for _ in range(count)
    }
    line = ["--task", "language_modeling", "--arch", arch, *ARCHITECTURES[arch][0]]
    for name, value in chosen.items():
        line += [f"--{name.replace('_', '-')}", value]
    if dice.random() < 0.08:
        backend = dice.choice(["fully_sharded", "legacy_ddp", "pytorch_ddp"])
        line += ["--distributed-world-size", "2", "--ddp-backend", backend]
    if "moe_gate" in known and dice.random() < 0.5:
        names.add("moe_gate")
    for name in sorted(names):
        line += _with_value(known[name], dice, usual)
    return line


def _with_value(action: argparse.Action, dice: random.Random, usual: float) -> list[str]:
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return [flag]
    values: Sequence[Any]
    if action.dest in _TEXTS:
        values = _TEXTS[action.dest]
    elif action.dest == "moe_gate":
        values = (*gate_names(), *["x"] * len(gate_names()))
    elif action.choices:
        values = [*map(str, action.choices)]
        return [flag, dice.choice(values)]
    elif action.type is int or isinstance(action.default, int):
        values = _WHOLE
    elif action.type is float or isinstance(action.default, float):
        values = _REAL
    else:  # the help of an option with names lists them, each with its explanation
        words = re.findall(r"(?:^|[:;,] |or )([a-z_0-9:.]+)", action.help or "")
        values = (*words, "1", "0", "0.5", "true", "x", "", "1,2")
    likely = dice.random() < usual
    value = dice.choice(values[: 1 + len(values) // 2] if likely else values)
    return [f"{flag}={value}"]


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
    return (8,)


@functools.cache
def _evaluation(text: Path) -> Any:
    return forked.configuration("eval_lm", tiny.evaluation_arguments(text, text))


def prepare(work: Path) -> None:
    _evaluation(tiny.data(work))
    for arch in ARCHITECTURES:
        actions(arch, *_USUAL.values())


def arguments(seed: int, text: Path, folder: Path) -> list[str]:
    """Of fairseq-train; what is drawn comes last, and wins."""
    return [
        *(str(text), "--user-dir", "evomoe_plugin", "--save-dir", str(folder)),
        *("--tokens-per-sample", "32", "--batch-size", "4", "--lr", "0.003", "--clip-norm", "1.0"),
        *("--max-update", str(UPDATES), "--save-interval-updates", "1", "--num-workers", "0"),
        *("--log-format", "json", "--log-interval", "1", "--seed", "7"),
        *drawn(seed),
    ]


def case(seed: int, work: Path) -> Outcome:
    text, folder = tiny.data(work), folder_of(NAME, seed, work)
    ended = forked.call(lambda: _three_steps(seed, text, folder), 4 * _LIMIT_SECONDS)
    if ended.value is not None:
        return Outcome(*ended.value)
    fault = disks.verdict(ended) or ("" if ended.status else "nothing was returned")
    return Outcome("refused by the parser", fault)


def _three_steps(seed: int, text: Path, folder: Path) -> tuple[str, str]:
    """Kind and fault, in a child that has parsed the command line once for all steps."""
    cfg = forked.configuration("train", arguments(seed, text, folder / "run"))
    trained = forked.call(lambda: forked.start("train", cfg), _LIMIT_SECONDS, _MEMORY)
    lines = logged(trained.lines, "train_inner")
    fault = disks.verdict(trained)
    if fault:
        return "training", f"{fault} (after {len(lines)} updates)"
    if trained.status != 0:
        if lines and not re.search("NaN|Nan|nan|memory|scale", trained.error):
            return "training", f"refused after {len(lines)} updates: {trained.error}"
        return ("refused" if not lines else "ended with a message"), ""
    bad = next((name for line in lines for name, v in line.items() if str(v) in _NOT_FINITE), "")
    if bad:
        return "training", f"the log says {bad} is NaN/Inf, and nothing else does"
    fault = _resume(cfg, folder)
    if fault:
        return "resuming", fault
    fault = _evaluate(cfg, text, folder, logged(trained.lines, "valid"))
    return ("evaluating", fault) if fault else ("trained, resumed and evaluated", "")


_NOT_FINITE = ("nan", "inf", "-inf", "NaN", "Infinity")


def logged(lines: Sequence[str], tag: str) -> list[dict]:
    """The JSON records of a log."""
    found = (line.partition(f"| {tag} | ")[2] for line in lines)
    return [json.loads(text) for text in found if text.startswith("{")]


_RESETS = ("reset_optimizer", "reset_meters", "reset_dataloader", "reset_lr_scheduler")


def _resume(cfg: Any, folder: Path) -> str:
    given = cfg.checkpoint
    if any(given[name] for name in _RESETS) or given.optimizer_overrides != "{}":
        return ""  # asked to go on otherwise
    saved = sorted((folder / "run").glob("checkpoint_*_2[.-]*"))
    if not saved:
        return ""
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
        return ""
    return tiny.difference({n: first[n] for n in last}, {n: second[n] for n in last})


def _evaluate(cfg: Any, text: Path, folder: Path, valid: list[dict]) -> str:
    path = folder / "run" / "checkpoint_last.pt"
    key = "valid_inner_loss" if valid and "valid_inner_loss" in valid[-1] else "valid_loss"
    plain = cfg.criterion._name in ("moe_cross_entropy", "cross_entropy")
    if not path.exists() or not plain or not valid or key not in valid[-1]:
        return ""
    if int(valid[-1]["valid_num_updates"]) != UPDATES or cfg.dataset.valid_subset != "valid":
        return ""
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
