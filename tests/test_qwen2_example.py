"""The example from Qwen2 to Qwen2-MoE runs, and what it exports needs transformers alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    evomoe = programs / "evomoe"  # the clone's, even if the package is not installed
    evomoe.write_text(
        f"#!{sys.executable}\nimport sys\nfrom evomoe_plugin.cli import main\nsys.exit(main())\n"
    )
    evomoe.chmod(0o755)
    run = tmp_path / "run"
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), "/usr/bin:/bin"]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "UPDATES": "30",
    }
    command = [str(ROOT / "examples/qwen2_to_moe/run.sh"), str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    config = json.loads((run / "exported/config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"] and config["num_experts"] == 4
    assert not list((run / "exported").glob("*.py"))
    found = re.search(r"^Qwen2MoeForCausalLM, 4 experts, perplexity ([\d.]+)", done.stdout, re.M)
    assert found and 1 < float(found[1]) < 512  # of 1024 token ids
    card = (run / "exported/README.md").read_text()
    assert re.search(r"Perplexity per token on the split `valid`.*: [\d.]+", card)
    assert "| experts_per_token | 2 |" in card and "| train |" in card
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and again.stderr.endswith("exists already: give another folder\n")
