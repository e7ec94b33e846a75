"""`--help` with an architecture shows what the architecture brings."""

from tests.conftest import ROOT


def test_help_lists_the_options_of_the_architecture_and_the_criterion(runs, capfd):
    plugin = ("--user-dir", ROOT / "evomoe_plugin")
    model = ("--arch", "transformer_lm_gpttiny_moe", "--criterion", "moe_cross_entropy")
    assert runs.run("train", *plugin, *model, "--help") == 0
    shown = capfd.readouterr()
    for flag in ("--moe-gate MOE_GATE", "--moe-top-k", "--moe-gate-loss-wt", "--decoder-layers"):
        assert flag in shown.out, flag
    assert not shown.err
