"""A checkpoint with a program in it, given to any of fairseq's own commands: nothing is run."""

import functools
import types

import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.start import init_from_dense
from evomoe_plugin.trainer import run_state
from evomoe_plugin.trainer.layouts import Replicated
from tests.checkpoint.test_reading import Program
from tests.evolve.conftest import make_config, make_model, task, trainer_of  # noqa: F401
from tests.evolve.dense_models import dense_config, dictionary_of, save_dense

REFUSED = "system, which is not data .*refused"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "dense.pt")


@pytest.fixture
def bad(good, tmp_path, request):
    """A file, and what would be there if it had been run."""
    state = torch.load(good, weights_only=False)
    trace = tmp_path / "trace"
    state["last_optimizer_state"] = {}
    state[request.param]["program"] = Program(trace)
    torch.save(state, tmp_path / "bad.pt")
    return tmp_path / "bad.pt", trace


def program_in(*parts):
    return pytest.mark.parametrize("bad", parts, indirect=True)


def refused(bad, run):
    path, trace = bad
    with pytest.raises(OptionError, match=REFUSED) as raised:
        run(str(path))
    assert "\n" not in str(raised.value) and not trace.exists()


@program_in("model")
def test_as_the_dense_model_of_a_start(bad, make_model):  # noqa: F811
    def run(path):
        init_from_dense(trainer_of(make_model(moe_init_from_dense=path), num_updates=0))

    refused(bad, run)


@pytest.mark.parametrize(
    "bad, option",
    [
        *(
            (part, "restore_file")
            for part in ("cfg", "model", "extra_state", "last_optimizer_state")
        ),
        ("extra_state", "finetune_from_model"),
    ],
    indirect=["bad"],
)
def test_as_the_checkpoint_that_a_run_goes_on_from(bad, tmp_path, option):
    cfg = dense_config("--save-dir", str(tmp_path / "run"))
    trainer = types.SimpleNamespace(
        cfg=cfg,
        layout=Replicated(),
        tpu=False,
        data_parallel_world_size=1,
        data_parallel_rank=0,
        checkpoint_suffix="",
        get_model=torch.nn.Identity,
    )
    trainer.load_checkpoint = functools.partial(run_state.load_checkpoint, trainer)

    def run(path):
        cfg.checkpoint[option] = path
        checkpoint_utils.load_checkpoint(cfg.checkpoint, trainer)

    refused(bad, run)


@program_in("cfg")
def test_as_the_model_to_evaluate(bad, tmp_path):
    dictionary_of().save(str(tmp_path / "dict.txt"))

    def run(path):
        args = options.parse_args_and_arch(
            options.get_eval_lm_parser(),
            [str(tmp_path), "--task", "language_modeling", "--path", path],
        )
        eval_lm.main(convert_namespace_to_omegaconf(args))

    refused(bad, run)
