"""`--help` with an architecture shows what the architecture brings."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.distributed
def test_help_lists_the_options_of_the_architecture_and_the_criterion():
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "fairseq_cli.train",
            "--user-dir",
            "evomoe_plugin",
            "--arch",
            "transformer_lm_gpttiny_moe",
            "--criterion",
            "moe_cross_entropy",
            "--help",
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )
    assert shown.returncode == 0
    for flag in ("--moe-gate MOE_GATE", "--moe-top-k", "--moe-gate-loss-wt", "--decoder-layers"):
        assert flag in shown.stdout, flag
    assert not shown.stderr
