"""examples/sft: its command is understood, and its files are read as meant."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from evomoe_plugin.config.run_checks import check_run
from evomoe_plugin.tasks.language_modeling_sft import LanguageModelingSFTTask

EXAMPLE = Path(__file__).parents[2] / "examples/sft"


@pytest.fixture
def command(tmp_path, sft_folder):
    """What the script would have started, and the folder that it made."""
    stub, seen = tmp_path / "bin/fairseq-train", tmp_path / "seen.json"
    stub.parent.mkdir()
    stub.write_text(
        f"#!{sys.executable} -S\nimport json, sys\n"
        f"json.dump(sys.argv[1:], open({str(seen)!r}, 'w'))\n"
    )
    stub.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}",
        "PREPARED": str(sft_folder),
        "DATA": str(tmp_path / "data"),
    }
    subprocess.run(["bash", EXAMPLE / "train.sh", "--cpu"], check=True, env=environment)
    return json.loads(seen.read_text())


def test_fairseq_understands_the_command_and_the_task_its_files(command, tmp_path):
    args = options.parse_args_and_arch(options.get_training_parser(), command)
    assert (args.data, args.cpu) == (str(tmp_path / "data"), True)
    cfg = convert_namespace_to_omegaconf(args)
    check_run(cfg, cfg.distributed_training.distributed_world_size)
    # As the quickstart's model has them.
    assert (cfg.model.moe_expert_count, cfg.model.moe_expert_ffn_dim) == ("8", 1024)
    task = LanguageModelingSFTTask.setup_task(cfg.task)
    for split, count in (("train", 30), ("valid", 4), ("test", 4)):
        task.load_dataset(split)
        assert len(task.dataset(split).examples) == count
    row = task.dataset("valid")[0]
    read, learned = (
        task.dictionary.string(ids, bpe_symbol="sentencepiece")
        for ids in (row["source"], row["target"][row["target"] != 1])
    )
    # The new line between them is learned; this tokenizer has neither it nor # but as bytes.
    assert read.startswith("# Return the cube of a number.\ndef cube")
    assert learned.startswith("\ndef cube")


def test_the_responses_are_python():
    for path in EXAMPLE.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            compile(json.loads(line)["response"], path.name, "exec")


def test_no_prompt_of_the_test_split_is_trained_on():
    prompts = {
        path.stem: [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        for path in EXAMPLE.glob("*.jsonl")
    }
    everything = sum(prompts.values(), [])
    assert len(set(everything)) == len(everything) == 38


def test_the_readme_names_the_same_templates():
    readme, script = (EXAMPLE / name for name in ("README.md", "train.sh"))
    templates = re.findall(r"--(?:prompt|response)-template '.*?'", readme.read_text())
    assert len(templates) == 2
    assert all(template in script.read_text() for template in templates)
