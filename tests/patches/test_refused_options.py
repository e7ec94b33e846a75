"""Options that fairseq parses and then trips over end in one line."""

import pytest
from fairseq import options

from evomoe_plugin.config.errors import OptionError
from tests.patches.test_commands import MOE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr-scheduler", "polynomial_decay"), r"^--total-num-update \(not given\): give it$"),
        (
            ("--max-tokens-valid", "x"),
            r"^--max-tokens-valid x: is not valid: malformed",
        ),
    ],
)
def test_values_that_its_configuration_does_not_take(runs, tmp_path, options, message):
    given = [str(a) for a in runs.arguments(tmp_path, *MOE, *options)]
    with pytest.raises(OptionError, match=message):  # which the hook for exceptions prints
        runs.run("train", *given)


def test_a_value_that_its_constructors_refuse(runs, capsys):
    given = ("--finetune-from-model", "a.pt", "--restore-file", "b.pt")
    assert runs.train("run", *MOE, *given, updates=1).status == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert line.startswith("error: fairseq does not accept these options: ValueError: --finetune")


def test_generation_for_one_of_two_ranks_is_not_begun(capsys):
    def parse(*given):
        arguments = ["no-data", "--path", "m.pt", "--distributed-world-size", "2", *given]
        return options.parse_args_and_arch(options.get_generation_parser(), arguments)

    assert parse("--distributed-rank", "1").distributed_rank == 1
    with pytest.raises(SystemExit):
        parse()
    assert "error: --distributed-world-size 2: no ranks are started" in capsys.readouterr().err
