"""What every test shares."""

import gc
import os
import signal
import types
from pathlib import Path

import pytest
import torch

import evomoe_plugin
from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.gates.registry import option_fields
from evomoe_plugin.launch import ranks
from tests.rank_server import new_context
from tests.tiny_runs import module_runs, runs, tiny_data  # noqa: F401 - fixtures
from tests.torture.forked import remember_parsing

ROOT = Path(__file__).parents[1]

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; read when Triton is imported, as by transformers.
    os.environ.setdefault("TRITON_INTERPRET", "1")
evomoe_plugin.register()
ranks.new_context = new_context
remember_parsing()
# Workers of pytest-xdist share few cores; tiny_runs has set this for what they start.
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A shell has its background jobs ignore Ctrl-C; so would commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Tests in these folders, and tests with one of these fixtures, train with fairseq's commands, start
# processes or form process groups. Single tests elsewhere carry the mark.
DISTRIBUTED_FOLDERS = {"end_to_end", "launch", "trainer", "dispatch"}
DISTRIBUTED_FIXTURES = {"tiny_data", "run_command", "hydra_train", "wheel", "interrupted"}
TIERS = pytest.StashKey[dict[str, list[str]]]()


def tiers_of(item: pytest.Item) -> list[str]:
    """The tiers that a test is marked with: `unit`, `distributed`, `slow`."""
    return [name for name in ("unit", "distributed", "slow") if item.get_closest_marker(name)]


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with its tier: `slow` as given, `distributed` as above, else `unit`."""
    for item in items:
        if not tiers_of(item):
            folder = item.path.relative_to(ROOT / "tests").parts[0]
            distributed = folder in DISTRIBUTED_FOLDERS or not DISTRIBUTED_FIXTURES.isdisjoint(
                item.fixturenames
            )
            item.add_marker("distributed" if distributed else "unit")
    config.stash[TIERS] = {item.nodeid: tiers_of(item) for item in items}


def pytest_collection_finish() -> None:
    """Let collections of garbage pass over torch, fairseq and the tests, a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def moe_options():
    """A maker of MoE options with defaults, 100 updates, 4 layers, and what is given."""

    def make(**given):
        fields = {
            **vars(MoEOptions()),
            **{name: option.default for name, option in option_fields().items()},
            "max_update": 100,
            "decoder_layers": 4,
            "decoder_embed_dim": 8,
            "decoder_ffn_embed_dim": 32,
            "activation_fn": "gelu",
            "decoder_input_dim": 0,
            "decoder_output_dim": 0,
            "share_decoder_input_output_embed": False,
        }
        unknown = given.keys() - fields.keys()
        assert not unknown, unknown
        return types.SimpleNamespace(**{**fields, **given})

    return make


@pytest.fixture(scope="session")
def hydra_path(tmp_path_factory) -> str:
    """PYTHONPATH with the clone and its Hydra plugin, where an install would have put it."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "hydra_plugins").symlink_to(ROOT / "evomoe_plugin/launch/hydra_plugins")
    return f"{ROOT}{os.pathsep}{folder}"
