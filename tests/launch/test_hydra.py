"""fairseq-hydra-train with the search-path plugin, from a folder that is not the clone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile

import pytest
import torch

from tests.cli.checkpoints import malicious
from tests.conftest import ROOT

PLUGIN = ROOT / "evomoe_plugin/launch/hydra_plugins/evomoe_searchpath/plugin.py"
SHORT = (
    "optimization.max_update=2",
    "dataset.batch_size=4",
    "task.tokens_per_sample=32",
    "dataset.disable_validation=true",
    "common.log_interval=1",
)


def load_plugin():
    spec = importlib.util.spec_from_file_location("plugin", PLUGIN)
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    return plugin


def hydra_train(runs, hydra_path, folder, *arguments):
    return runs.output(
        "hydra_train",
        "--config-name",
        "small/evomoe_dts",
        *arguments,
        *SHORT,
        f"task.data={runs.data}",
        f"checkpoint.save_dir={folder}/checkpoints",
        env={"PYTHONPATH": hydra_path},
        cwd=folder,
    )


def test_a_program_without_fairseq_is_left_alone(tmp_path, hydra_path):
    """The plugin is loaded by every Hydra program of the environment."""
    (tmp_path / "config.yaml").write_text("a: 1")
    code = f"""
import sys
from hydra import compose, initialize_config_dir
with initialize_config_dir(config_dir={str(tmp_path)!r}, version_base=None):
    assert compose("config").a == 1
assert "hydra_plugins.evomoe_searchpath" in sys.modules
assert not any(name.startswith(("evomoe_plugin", "fairseq", "torch")) for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": hydra_path})
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "is_ours"),
    [
        ("", False),
        ("--config-dir {theirs} --config-name plain common.log_interval=1", False),
        ("--config-dir {theirs} --config-name plain common.user_dir={other}", False),
        ("--config-dir {theirs} --config-name plain common.user_dir=evomoe_plugin", True),
        ("--config-dir {theirs} --config-name plain common.user_dir={gates}", True),
        ("--config-dir {ours} --config-name moe", True),
        ("--config-name small/evomoe_dts", True),
        ("--config-name nothing/of_ours", False),
    ],
)
def test_runs_of_fairseq_that_do_not_name_the_package_are_left_alone(
    tmp_path, monkeypatch, arguments, is_ours
):
    folders = {name: tmp_path / name for name in ("theirs", "ours", "other", "gates")}
    for folder in folders.values():
        folder.mkdir()
    (folders["theirs"] / "plain.yaml").write_text("common:\n  log_interval: 2")
    (folders["ours"] / "moe.yaml").write_text("defaults: [base]")
    (folders["ours"] / "base.yaml").write_text("common:\n  user_dir: evomoe_plugin")
    (folders["other"] / "__init__.py").write_text("import fairseq")
    (folders["gates"] / "__init__.py").write_text("from evomoe_plugin.gates import Gate")
    plugin = load_plugin()
    monkeypatch.delitem(sys.modules, plugin.PACKAGE)
    assert plugin.is_wanted(arguments.format(**folders).split()) is is_ours


def test_files_that_cannot_be_read_do_not_stop_the_search_for_the_name(tmp_path, monkeypatch):
    plugin = load_plugin()
    monkeypatch.delitem(sys.modules, plugin.PACKAGE)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("none")
    (tmp_path / "latin.yaml").write_bytes(b"# \xe9")
    (tmp_path / "plain.yaml").write_text("common:\n  log_interval: 2")
    arguments = ["--config-dir", str(tmp_path), "--config-name", "plain"]
    assert not plugin.is_wanted(arguments)
    (tmp_path / "plain.yaml").write_text("common:\n  user_dir: evomoe_plugin")
    assert plugin.is_wanted(arguments)


def test_a_user_dir_from_the_environment(monkeypatch):
    plugin = load_plugin()
    arguments = ["common.user_dir=${oc.env:GATES}"]
    monkeypatch.delenv("GATES", raising=False)
    assert plugin.user_dir_of(arguments) is None
    monkeypatch.setenv("GATES", "/my/gates")
    assert plugin.user_dir_of(arguments) == "/my/gates"


def test_a_plain_run_through_hydra_is_not_patched(tmp_path, hydra_path):
    code = """
import sys
from fairseq_cli.hydra_train import cli_main
sys.argv = ["fairseq-hydra-train", "--cfg", "job"]
cli_main()
assert "hydra_plugins.evomoe_searchpath" in sys.modules
assert not any(name.startswith("evomoe_plugin.") for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": hydra_path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "distributed_world_size" in done.stdout


@pytest.mark.slow
def test_two_processes_fully_sharded_in_another_folder(runs, tmp_path, hydra_path):
    """A relative user_dir, Hydra's change of folder, and fields that the yaml does not list."""
    status, out, err = hydra_train(
        runs,
        hydra_path,
        tmp_path,
        "hydra.job.chdir=true",
        "common.user_dir=evomoe_plugin",
        "distributed_training.distributed_world_size=2",
        "checkpoint.symlink=true",
        "distributed_training.ddp_backend=fully_sharded",
        "model.moe_temperature_end=0.2",
    )
    assert status == 0, err
    assert (tmp_path / "checkpoints/checkpoint_last.pt").exists()
    assert "num_updates" in out or "done training" in out


@pytest.mark.slow
def test_a_sweep_over_models_by_name(runs, tmp_path, hydra_path):
    status, out, err = hydra_train(
        runs,
        hydra_path,
        tmp_path,
        "-m",
        "model=transformer_lm_gpttiny_moe",
        "model.moe_temperature_end=0.2,0.3",
        "checkpoint.no_save=true",
        "distributed_training.ddp_backend=fully_sharded",
    )
    assert status == 0, err
    assert out.count("done training") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, status, message",
    [
        (
            "distributed_training.use_sharded_state=true",
            2,
            "--use-sharded-state with --ddp-backend legacy_ddp: needs --ddp-backend fully_sharded",
        ),
        (
            "model.moe_gatee=top_k",
            2,
            "model.moe_gatee: Key 'moe_gatee' not in 'GPTTinyMoEConfig'; did you mean moe_gate?",
        ),
    ],
)
def test_a_bad_option_is_one_line(runs, tmp_path, hydra_path, option, status, message):
    ended, _, err = hydra_train(runs, hydra_path, tmp_path, option)
    assert ended == status
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {message}"] and "Traceback" not in err


def test_a_checkpoint_is_recognised_without_unpickling_it(tmp_path):
    plugin = load_plugin()
    ours = tmp_path / "ours.pt"
    torch.save({"cfg": {"model": {"moe_expert_count": "4"}}, "model": {}}, ours)
    assert plugin.is_moe_checkpoint(str(ours))
    touched = tmp_path / "moe_expert_count"
    assert plugin.is_moe_checkpoint(str(malicious(tmp_path / "evil.pt", str(touched))))
    assert not touched.exists()
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(plugin._MOST) + b"moe_expert_count")
    assert not plugin.is_moe_checkpoint(str(bomb))
    damaged = bytearray(ours.read_bytes())
    damaged[-40:] = bytes(40)
    (tmp_path / "damaged.pt").write_bytes(damaged)
    for name in ("damaged.pt", "none.pt", "."):
        assert not plugin.is_moe_checkpoint(str(tmp_path / name))
