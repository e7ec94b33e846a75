"""Flags of the published systems become ours."""

from __future__ import annotations

import pytest
from fairseq import options

import evomoe_plugin  # noqa: F401  registers the models
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.published_flags import ARCHS, ROWS, translate

GUMBEL = "--use-gumbel-softmax"
SOFTMAX = "--moe-gate dense_to_sparse --moe-combine-weights softmax"
# Given, what it becomes, and what the line on the first flag says.
CASES = [
    (GUMBEL, SOFTMAX, f"is {SOFTMAX} here"),
    (
        f"--use-gumbel-gates {GUMBEL}",
        "--moe-combine-weights gate --moe-gate dense_to_sparse",
        "is --moe-combine-weights gate here",
    ),
    ("--use-gumbel-gates", "", "has no effect: needs --use-gumbel-softmax"),
    ("--moe-top1-expert", "--moe-gate switch", "is --moe-gate switch here"),
    (
        f"--moe-top1-expert {GUMBEL}",
        SOFTMAX,
        "has no effect: --use-gumbel-softmax takes its place",
    ),
    ("--moe-topk-expert", "--moe-gate dense", "is --moe-gate dense here"),
    (
        f"--moe-topk-expert {GUMBEL}",
        SOFTMAX,
        "has no effect: --use-gumbel-softmax takes its place",
    ),
    ("--topk 4", "", "has no effect: all experts are candidates"),
    (
        "--moe-train-capacity-token-fraction 2.0 --moe-top1-expert",
        "--moe-capacity-factor 2.0 --moe-gate switch",
        "is --moe-capacity-factor 2.0 here",
    ),
    ("--moe-train-capacity-token-fraction=2.0", "", "has no effect: needs --moe-top1-expert"),
    *(
        (f"{flag} {value} {GUMBEL}", f"{ours} {SOFTMAX}", f"is {ours} here")
        for flag, value, ours in (
            ("--gumbel-decay-scheduler", "Linear", "--moe-temperature-schedule linear"),
            ("--gumbel-decay-scheduler", "Exp", "--moe-temperature-schedule exp"),
            ("--gumbel-decay-scheduler", "None", "--moe-temperature-schedule constant"),
            ("--gumbel-decay-factor", "5000", "--moe-temperature-updates 5000"),
            ("--max-temperature", "2.0", "--moe-temperature-start 2.0"),
            ("--min-temperature", "0.5", "--moe-temperature-end 0.5"),
            ("--switch-to-hard-gumbel-softmax", "-1", "--moe-hard-updates -1"),
        )
    ),
    ("--max-temperature 2.0", "", "has no effect: needs --use-gumbel-softmax"),
    (
        "--moe-normalize-expert-grad sqrt_world_size",
        "",
        "has no effect: an expert's gradient is averaged over all tokens",
    ),
    ("--use-moe-pad-mask", "", "has no effect: padding is never routed"),
    ("--record-a2a-perf-stats", "", "has no effect: ep_wait_ms is always in the log"),
    ("--dummy-a2a", "", "has no effect: rows are always exchanged"),
    ("--save-trace", "", "has no effect: the published code ignores it too"),
    ("--is-moe", "", "has no effect: the architecture says so"),
    ("--moe-gate-loss-transform none", "", "has no effect: none turns it off"),
    ("--alternate-ffn-embed-dim 0", "", "has no effect: 0 turns it off"),
    ("--alternate-decoder-ffn-embed-dim 0", "", "has no effect: 0 turns it off"),
]


@pytest.mark.parametrize(("given", "ours", "said"), CASES, ids=[given for given, *_ in CASES])
def test_each_flag_becomes_ours(given, ours, said):
    words, lines = translate(["data", *given.split(), "--lr", "0.1"])
    assert words == ["data", "--lr", "0.1", *ours.split()]
    first = given.replace("=", " ").split(" --")[0]
    assert lines[0] == f"{first} {said}"
    assert len(lines) == given.count("--")


def test_every_row_has_a_case():
    assert {row.flag for row in ROWS} == {given.replace("=", " ").split()[0] for given, *_ in CASES}


def test_our_own_command_lines_are_left_as_they_are():
    words = "data --arch roberta_large_moe --lr=0.1 --moe-freq 2 --moe-gate switch --seed 1".split()
    assert translate(words) == (words, [])


def test_a_dense_transformer_of_fairseq_with_moe_layers():
    ((theirs, ours),) = ARCHS.items()
    assert translate(["--arch", theirs]) == (["--arch", theirs], [])
    words, lines = translate(["--arch", theirs, "--moe-freq", "2"])
    assert words[-2:] == ["--arch", ours]
    assert lines == [f"--arch {theirs} is --arch {ours} here"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--moe-top1-expert --moe-topk-expert",
            "--moe-topk-expert (given): is --moe-gate dense here and contradicts "
            "--moe-top1-expert: leave one of them out",
        ),
        (
            "--moe-top1-expert --moe-gate=dense",
            "--moe-top1-expert (given): is --moe-gate switch here and contradicts --moe-gate: "
            "leave one of them out",
        ),
        (
            f"{GUMBEL} --max-temperature 2.0 --moe-temperature-start 1",
            "--max-temperature 2.0: is --moe-temperature-start 2.0 here and contradicts "
            "--moe-temperature-start: leave one of them out",
        ),
        (f"{GUMBEL}=false", f"{GUMBEL} false: takes no value: leave the value out"),
        ("--max-temperature", "--max-temperature (not given): give its value"),
        (f"--max-temperature {GUMBEL}", "--max-temperature (not given): give its value"),
        ("--moe-gate-loss-transform neg_log", "--moe-gate-loss-transform neg_log: give none"),
        ("--alternate-ffn-embed-dim 8", "--alternate-ffn-embed-dim 8: give 0"),
        (
            f"{GUMBEL} --gumbel-decay-scheduler linear",
            "--gumbel-decay-scheduler linear: give Linear or Exp or None",
        ),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(OptionError) as refused:
        translate(given.split())
    assert str(refused.value) == message


def test_the_parser_takes_them(caplog, capsys):
    caplog.set_level("INFO")
    command = f"""data --task masked_lm --arch roberta_large_moe --criterion masked_lm
    --moe-topk-expert {GUMBEL} --max-temperature 1.5 --is-moe""".split()
    args = options.parse_args_and_arch(options.get_training_parser(), command)
    assert (args.moe_gate, args.moe_temperature_start) == ("dense_to_sparse", 1.5)
    assert "--max-temperature 1.5 is --moe-temperature-start 1.5 here" in caplog.messages
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(
            options.get_training_parser(), [*command, "--moe-gate", "top_k"]
        )
    assert end.value.code == 2
    assert "contradicts --moe-gate" in capsys.readouterr().err


def test_commands_that_evaluate_leave_options_of_the_model_out(caplog, capsys):
    """As the checkpoint says them; the flags are those of the published WMT recipe."""
    caplog.set_level("INFO")
    moe = f"""--moe-expert-count 4 --moe-freq 2 --moe-gating-use-fp32 --encoder-moe-freq=2
    --moe-gate-loss-wt 0 --moe-normalize-expert-grad world_size --moe-top1-expert --is-moe
    --moe-eval-capacity-token-fraction -1.0 {GUMBEL} --max-temperature 2.0""".split()
    command = ["data", *moe, *"--path x.pt --beam 4 --lenpen 0.6 --remove-bpe".split()]
    generating = options.get_generation_parser()
    generating.add_argument("--arch", "-a", default="wav2vec2")  # as fairseq-generate does
    for parser in (generating, options.get_interactive_generation_parser()):
        caplog.clear()
        args = options.parse_args_and_arch(parser, command)
        assert (args.data, args.path, args.beam, args.lenpen) == ("data", "x.pt", 4, 0.6)
        assert not {name for name in vars(args) if name.startswith(("moe", "max_temp"))}
        said = " is ignored here: the model is built as its checkpoint says"
        for line in ("--is-moe", GUMBEL, "--max-temperature 2.0", "--moe-freq 2"):
            assert line + said in caplog.messages
        assert len(caplog.messages) == sum(word.startswith("--") for word in moe)
    args = options.parse_args_and_arch(
        options.get_eval_lm_parser(), ["data", "--path", "x.pt", "--moe-expert-parallel-size", "2"]
    )
    assert args.moe_expert_parallel_size == 2  # the command has it
    for given, named in (("--lr 0.3 --arch x", "--lr 0.3"), ("--lr=1", "--lr 1")):
        parser = options.get_interactive_generation_parser()
        with pytest.raises(SystemExit) as end:
            options.parse_args_and_arch(parser, [*command, *given.split()])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {named}: this command has no such option, and")
    with pytest.raises(SystemExit):
        options.parse_args_and_arch(parser, [*command, "--beem", "5"])
    assert "no such option; did you mean --beam?" in capsys.readouterr().err
