"""Which errors end a run in one line, judged by whose code raised them and when."""

import pytest
import torch
import torch.distributed as dist

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.launch import explained as module
from evomoe_plugin.launch.explained import explained
from evomoe_plugin.trainer import first_step


def of(*modules, error=None):
    """`error`, as raised in the last of these modules, which the ones before it call."""
    try:
        raise_in(modules, error or ValueError("no such value"))
    except Exception as raised:
        return raised


def raise_in(modules, error):
    call = None
    for name in reversed(modules):
        names = {"__name__": name, "call": call, "error": error}
        body = "raise error" if call is None else "call()"
        exec(f"def through(): {body}", names)
        call = names["through"]
    call()


@pytest.fixture(autouse=True)
def before_the_first_step():
    first_step.begin_run()


@pytest.mark.parametrize(
    ("modules", "refused"),
    [
        (("fairseq_cli.train", "fairseq.optim.adam"), True),
        (("fairseq.optim.sgd", "torch.optim.sgd"), True),
        (("fairseq.tasks", "json.decoder"), True),
        (("fairseq.tasks", "evomoe_plugin.models.decoder"), False),
        (("fairseq.tasks", "evomoe_plugin.models.decoder", "torch.nn"), False),
        (("fairseq.tasks", "my_gates.gate"), False),
        (("fairseq.tasks", "my_gates.gate", "fairseq.utils"), True),
    ],
)
def test_fairseq_refuses_what_its_own_code_raises(modules, refused):
    reason = explained(of(*modules))
    assert (reason is not None) == refused
    if refused:
        assert str(reason).startswith("fairseq does not accept these options: ValueError: no such")


def test_errors_of_steps_keep_their_traceback():
    class Model(torch.nn.Module):
        def forward(self):
            raise_in(["fairseq.modules"], ValueError("in a forward pass"))

    with pytest.raises(ValueError) as caught:
        Model()()
    assert explained(caught.value) is None
    first_step.begin_step()
    assert explained(of("fairseq.data.iterators")) is None


def test_one_line_errors_stay_as_they_are():
    for error in (OptionError("lr", 1, "give less"), RunFailed("a full disk")):
        assert explained(of("fairseq.trainer", error=error)) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/x.cc:81] Timed out waiting 5000ms"), "time"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "lost its"),
        (dist.DistStoreError("wait timeout after 5000ms, keys: /a"), "until the time was up"),
        (dist.DistBackendError("NCCL error: remote process exited or there was"), "lost its"),
        (RuntimeError("DataLoader timed out after 5 seconds"), None),
        (RuntimeError("the option timeout must be a number"), None),
        (OSError("Broken pipe"), None),
        (dist.DistBackendError("NCCL error: invalid usage"), None),
    ],
)
def test_other_ranks_are_what_collectives_tell_of(monkeypatch, error, said):
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)
    reason = explained(of("evomoe_plugin.trainer", error=error))
    assert (reason is None) == (said is None)
    if said:
        assert str(reason).startswith("rank 1 ") and said in str(reason)
