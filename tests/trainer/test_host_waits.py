"""A whole update as on a GPU: what the host waits for, and that what is logged stays the same."""

import json
import math
from collections import Counter

import pytest

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.gates.registry import gate_names
from evomoe_plugin.routing import waits
from evomoe_plugin.trainer import moe_trainer
from tests.host_waits import HostWaits, pretend_a_gpu

MODEL = """--arch transformer_lm_gpttiny_moe --criterion moe_cross_entropy --moe-expert-count 4
--update-freq 2 --sample-break-mode eos --optimizer fused_adamw --moe-gate-loss-wt 0.01""".split()
# These look at tensors that are on the host, or wait on a CPU only: a GPU's norm and factor are
# taken from it to itself.
ON_THE_HOST = (
    "trainer/host_padding.py",
    "routing/padding.py",
    "fairseq/modules/sinusoidal_positional_embedding.py",
    "_local_scalar_dense at models/vocabulary_loss.py",
    "to at fairseq/utils.py",
    "to at optim/fused_adam.py",
)
THE_NORM = "tolist at trainer/moe_trainer.py"
OF_BASE = "routing/assignment.py"
OPTIONS = {
    "expert_choice": ("--moe-gate", "expert_choice", "--moe-allow-noncausal"),
    "lexical": ("--moe-gate", "top_k", "--moe-lexical", "normal:3"),
    "capacity": ("--moe-gate", "top_k", "--moe-capacity-factor", "1"),
    "null": ("--moe-gate", "top_k", "--moe-null-experts", "1"),
    "bias": ("--moe-gate", "top_k", "--moe-bias-update-rate", "0.01"),
    "centred": ("--moe-gate", "top_k", "--moe-gate-centre", "0.9"),
}


@pytest.fixture
def steps(monkeypatch):
    """The waits of each update after the first, which is a logging step."""
    found = []
    step = moe_trainer.MoETrainer.train_step

    def train_step(self, samples, raise_oom=False):
        if self.get_num_updates() == 0:
            return step(self, samples, raise_oom)
        with HostWaits(allowed=None) as seen:
            logged = step(self, samples, raise_oom)
        found.append([wait for wait in seen.found if not wait.endswith(ON_THE_HOST)])
        return logged

    monkeypatch.setattr(moe_trainer.MoETrainer, "train_step", train_step)
    return found


# They do nothing after a layer's passes, of which tests/gates/test_host_waits.py tells.
LIKE_TOP_K = {"dense", "dselect_k", "gshard", "hash", "switch", "top_p"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_TOP_K else [])
        for name in sorted({*gate_names(), *OPTIONS})
    ],
)
def test_an_update_waits_once(runs, steps, monkeypatch, name):
    pretend_a_gpu(monkeypatch)
    options = OPTIONS.get(name, ("--moe-gate", name))
    assert runs.train("a", *MODEL, *options, "--log-interval", 100, updates=3).status == 0
    assert len(steps) == 2
    for found in steps:
        if name == "base":
            found = [wait for wait in found if not wait.endswith(OF_BASE)]
        assert Counter(found) == {THE_NORM: 1}


def test_a_forward_pass_that_is_not_finite_is_named(runs, monkeypatch, capsys):
    monkeypatch.setattr(waits, "waiting_costs", lambda _: True)
    options = "--moe-gate", "top_k", "--clip-norm", 0, "--lr", "1e30"
    assert runs.train("a", *MODEL, *options, updates=5).status != 0
    assert "moe: gate logits are NaN/Inf for" in "".join(capsys.readouterr())


def test_what_is_logged_later_is_the_same(runs, monkeypatch):
    """Also over an interval, at the end of an epoch and in the checkpoint's meters."""
    logs = []
    for later in (False, True):
        monkeypatch.setattr(waits, "waiting_costs", lambda _, later=later: later)
        made = runs.train(str(later), *MODEL, "--moe-gate", "top_k", "--log-interval", 3, updates=7)
        meters = made.checkpoint()["extra_state"]["metrics"]
        numbers = [
            {name: value for name, value in line.items() if _is_compared(name)} for line in made.log
        ]
        logs.append(json.dumps([numbers, sorted(meters), len(meters["default"])]))
        assert len(numbers) >= 3 and "loss" in numbers[0] and "load_cv2" in numbers[0]
    assert logs[0] == logs[1]


def test_a_run_that_fails_loses_no_numbers(runs, monkeypatch):
    """Those since the last line of the log are in the meters of crash.pt."""
    clip = moe_trainer.MoETrainer.clip_grad_norm

    def clip_grad_norm(trainer, clip_norm):
        norm = clip(trainer, clip_norm)
        return norm * math.nan if trainer.get_num_updates() == 5 else norm

    monkeypatch.setattr(moe_trainer.MoETrainer, "clip_grad_norm", clip_grad_norm)
    monkeypatch.setattr(waits, "waiting_costs", lambda _: True)
    run = runs.train("a", *MODEL, "--moe-gate", "top_k", "--log-interval", 3, updates=7)
    assert run.status != 0 and sorted(run.losses()) == [3]
    meters = run.checkpoint("crash.pt")["extra_state"]["metrics"]["train_inner"]
    states = {name: state for _, name, _, state in meters}
    assert states["clip"]["count"] == 2  # updates 4 and 5
    assert states["loss"]["count"] > 0 and states["load_cv2"]["count"] > 0


def _is_compared(name: str) -> bool:
    """Whether it is no time."""
    timed = ("_ms", "ups", "wps", "wall", "tflops", "mfu", "hours_left", "peak_gb")
    return not name.endswith(timed)
