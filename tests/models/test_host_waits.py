"""A model's forward pass, loss and backward pass as on a GPU: what the host waits for."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from tests.host_waits import HostWaits, pretend_a_gpu
from tests.models.conftest import BOTH_FAMILIES, VOCABULARY

# These read tensors that are always on the CPU, or wait on a CPU only.
NO_WAITS = ("fairseq/modules/sinusoidal_positional_embedding.py", "to at models/rotary.py")
ON_A_CPU = "_local_scalar_dense at models/vocabulary_loss.py"


@BOTH_FAMILIES
def test_a_micro_batch_waits_three_times(make_model, task, monkeypatch):
    """None of them with our trainer, which tells of padding, and looks for NaN later."""
    pretend_a_gpu(monkeypatch)
    model = make_model(moe_gate="dense_to_sparse").train()
    wanted = {
        "_local_scalar_dense at routing/padding.py": 2,  # of tokens and targets
        "_local_scalar_dense at models/moe_stack.py": 1,  # whether all is finite
    }
    tokens = torch.randint(4, VOCABULARY, (2, 12))
    sample = {
        "net_input": {"src_tokens": tokens, "src_lengths": torch.full((2,), 12)},
        "target": tokens.roll(-1, 1),
        "ntokens": tokens.numel(),
    }
    with HostWaits({*wanted, *NO_WAITS, ON_A_CPU}) as waits:
        MoECrossEntropyCriterion(task, False, 0.01)(model, sample)[0].backward()
    found = [wait for wait in waits.found if not wait.endswith(NO_WAITS) and wait != ON_A_CPU]
    assert Counter(found) == Counter(wanted)
