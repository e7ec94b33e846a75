"""Ranks that wait for each other: out of memory, and what sharded experts do not support."""

import contextlib
import types

import pytest
import torch
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.trainer.layouts import Replicated, replicated
from evomoe_plugin.trainer.moe_trainer import MoETrainer
from tests.end_to_end.runs import assert_same_weights
from tests.patches.test_commands import MOE

OUT_OF_MEMORY = "CUDA out of memory"


class OutOfMemory(MoETrainer):
    """The trainer of one of some ranks, whose batches do not fit into memory."""

    model = criterion = torch.nn.Identity()
    optimizer, data_parallel_world_size, layout = None, 2, Replicated()
    device = torch.device("cpu")

    def __init__(self, ranks, error=None):
        self.error = error or RuntimeError(OUT_OF_MEMORY)
        self.cfg = OmegaConf.create(
            {
                "model": {},
                "ema": {"store_ema": False},
                "distributed_training": {"distributed_world_size": ranks},
            }
        )
        self.tpu = self.cuda = False
        self.task = types.SimpleNamespace(valid_step=self.step, train_step=self.step)
        self.tried, self.left_out = 0, False

    def step(self, *_args, **_kwargs):
        self.tried += 1
        raise self.error

    def get_criterion(self):
        return self.criterion

    def get_model(self):
        return self.model

    def get_num_updates(self):
        return 1

    def _prepare_sample(self, sample):
        return sample, False

    def _log_oom(self, _error):
        pass

    def zero_grad(self):
        self.left_out = True


ONE_LINE = r"^rank 0 ran out of memory on a batch after update 1: .* if any, is intact$"
IN_VALIDATION = r"^rank 0 ran out of memory in validation after update 1: .* --batch-size-valid or"
ALONE = r"^ran out of memory in validation after update 1"


@pytest.mark.parametrize(("ranks", "tries", "error"), [(1, 2, ALONE), (2, 1, IN_VALIDATION)])
def test_a_rank_without_memory_ends_the_validation(ranks, tries, error):
    trainer = OutOfMemory(ranks)
    with pytest.raises(RunFailed, match=error):
        trainer.valid_step({})
    assert trainer.tried == tries  # alone, it tries again as fairseq does


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(OUT_OF_MEMORY),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
def test_a_rank_without_memory_ends_the_run_that_others_are_part_of(error):
    alone = OutOfMemory(1, error)
    assert alone._forward_backward([{}], False) is None and alone.left_out
    trainer = OutOfMemory(2, error)
    with pytest.raises(RunFailed, match=ONE_LINE):
        trainer._forward_backward([{}], False)
    assert not trainer.left_out


NAN = "gate logits are NaN/Inf"


@pytest.mark.parametrize(
    ("ranks", "said"),
    [(1, f"^{NAN}$"), (2, f"^rank 0: {NAN}; several ranks write no crash.pt$")],
)
def test_what_ends_a_run_names_the_rank(ranks, said, caplog):
    trainer = OutOfMemory(ranks, RunFailed(NAN))
    with pytest.raises(RunFailed, match=said):
        trainer._forward_backward([{}], False)
    assert not caplog.messages  # each rank that fails would say it


def trainer_with(monkeypatch, name, pointwise):
    """A trainer with sharded experts, whose optimizer, `--optimizer NAME`, is pointwise or not."""
    monkeypatch.setattr(Trainer, "_build_optimizer", lambda _trainer: None)
    model = torch.nn.Identity()
    model.groups, model.expert_names = object(), ()
    trainer = MoETrainer.__new__(MoETrainer)
    trainer._model, trainer.layout = model, Replicated()
    trainer._optimizer = types.SimpleNamespace(supports_flat_params=pointwise)
    trainer.cfg = OmegaConf.create(
        {
            "optimizer": {"_name": name},
            "common": {"fp16": False, "bf16": False},
            "distributed_training": {"ddp_backend": "legacy_ddp"},
        }
    )
    return trainer


@pytest.mark.parametrize("name, pointwise", [("adagrad", False), ("mine", True)])
def test_an_optimizer_of_single_weights_may_be_sharded(monkeypatch, name, pointwise):
    trainer_with(monkeypatch, name, pointwise)._build_optimizer()


def test_any_other_is_refused(monkeypatch):
    with pytest.raises(OptionError, match="--optimizer mine with --moe-expert-parallel-size"):
        trainer_with(monkeypatch, "mine", False)._build_optimizer()


def test_one_rank_cannot_save_alone(monkeypatch):
    with pytest.raises(RunFailed, match="cannot write mine.pt: with --moe-expert-parallel-size"):
        trainer_with(monkeypatch, "mine", True).save_checkpoint("mine.pt", {})


@pytest.mark.parametrize(
    "precision", [(), pytest.param(("--fp16", "--fp16-init-scale", 4), marks=pytest.mark.slow)]
)
def test_ranks_with_the_same_experts_train_as_one_process(runs, precision):
    def train(ranks, experts_over):  # updates of the same eight batches
        divided = ("--update-freq", 8 // ranks, "--moe-expert-parallel-size", experts_over)
        options = (*MOE, "--attention-dropout", 0, "--batch-size", 1, "--ddp-backend", "legacy_ddp")
        return runs.train(str(ranks), *options, *divided, *precision, world=ranks, updates=2)

    one, four = train(1, 1), train(4, 2)
    assert one.status == four.status == 0 and len(one.losses()) == 2
    for update, numbers in one.losses().items():
        wanted = pytest.approx([float(x) for x in numbers], rel=1e-3)
        assert [float(x) for x in four.losses()[update]] == wanted
    files = (run.folder / "checkpoint_last.pt" for run in (one, four))
    assert_same_weights(*files, atol=1e-3 if precision else 1e-4)


@pytest.mark.parametrize("option", ["--offload-activations", "--log-interval=1"])
def test_layers_that_compute_their_activations_again_are_averaged_at_the_end(
    runs, monkeypatch, option
):
    """Their gradients may be added to more than once in a backward pass."""
    begun = []

    def reducing(layout, trainer):
        with monkeypatch.context() as patch:  # with more than one rank
            groups = types.SimpleNamespace(replicas=types.SimpleNamespace(size=lambda: 2))
            patch.setattr(replicated, "expert_groups_of", lambda _model: groups)
            begun.append(isinstance(reduce(layout, trainer), contextlib.nullcontext))
        return contextlib.nullcontext()

    reduce = Replicated.reducing
    monkeypatch.setattr(Replicated, "reducing", reducing)
    assert runs.train("run", *MOE, option, "--update-freq", 2, updates=1).status == 0
    assert begun == [option == "--offload-activations"]
