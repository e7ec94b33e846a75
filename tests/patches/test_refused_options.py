"""Options that fairseq parses and then trips over end in one line."""

import pytest

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
    if "polynomial_decay" in options:
        at = given.index("--total-num-update")
        del given[at : at + 2]
    with pytest.raises(OptionError, match=message):  # which the hook for exceptions prints
        runs.run("train", *given)


def test_a_value_that_its_constructors_refuse(runs, capsys):
    options = ("--finetune-from-model", "a.pt", "--restore-file", "b.pt")
    assert runs.train("run", *MOE, *options, updates=1).status == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert line.startswith("error: fairseq does not accept these options: ValueError: --finetune")
