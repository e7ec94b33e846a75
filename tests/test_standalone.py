"""The layer in plain PyTorch."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evomoe_plugin import MoELayer
from evomoe_plugin.gates import gate_names
from evomoe_plugin.routing import stats as st

ROOT = Path(__file__).parents[1]
D, F, E, V = 12, 20, 4, 30
OPTIONS = {
    "dense_to_sparse": {"temperature_updates": 4, "aux": "balance=0.1"},
    "top_k": {"top_k": 2, "aux": "balance=0.01,z=0.001"},
    "stable": {"max_updates": 10},
    "expert_choice": {"allow_noncausal": True},
}


def made(gate: str, **more) -> MoELayer:
    torch.manual_seed(1)
    given = {"token_counts": range(1, V + 1), **OPTIONS.get(gate, {}), **more}
    return MoELayer(D, F, E, gate=gate, **given)


def by_hand(moe: MoELayer, x_TD, plan) -> torch.Tensor:
    """Each routed pair by itself."""
    y_TD = torch.zeros_like(x_TD)
    ffn = moe.layer.experts.state_dict()
    for token, expert, weight in zip(
        plan.token_ids_N.tolist(), plan.expert_ids_N.tolist(), plan.weights_N, strict=True
    ):
        hidden = torch.nn.functional.gelu(
            ffn["fc1_weight"][expert] @ x_TD[token] + ffn["fc1_bias"][expert]
        )
        y_TD[token] += weight * (hidden @ ffn["fc2_weight"][expert] + ffn["fc2_bias"][expert])
    return y_TD


@pytest.mark.parametrize("gate", gate_names())
def test_every_gate_trains_and_goes_on_from_its_state(gate):
    moe = made(gate)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.02)
    ids = torch.randint(V, (3, 7))
    x, target = torch.randn(3, 7, D), torch.randn(3, 7, D)

    def step(moe, optimizer) -> float:
        result = moe(x, token_ids=ids)
        loss = torch.nn.functional.mse_loss(result.output, target)
        optimizer.zero_grad()
        (loss + result.aux_loss).backward()
        optimizer.step()
        moe.finish_update(result.stats)
        return float(loss)

    losses = [step(moe, optimizer) for _ in range(6)]
    assert min(losses[3:]) < losses[0] and moe.num_updates == 6
    other = made(gate)
    other.load_state_dict(copy.deepcopy(moe.state_dict()))
    assert other.num_updates == 6
    with torch.no_grad():
        results = [one.eval()(x, token_ids=ids) for one in (moe, other)]
    assert torch.equal(results[0].output, results[1].output)
    assert results[0].summary() == results[1].summary()
    assert results[0].stats[st.TOKENS] == 21


def test_outputs_and_losses_are_the_layers():
    moe = made("top_k", gated=False).eval()
    x = torch.randn(2, 5, D)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    result = moe(x, token_mask=mask)
    plan = moe.layer.gate(x.view(-1, D), moe.layer.context(mask.view(-1)))
    torch.testing.assert_close(result.output.view(-1, D), by_hand(moe, x.view(-1, D), plan))
    assert not result.output[~mask].any()
    expected = 0.01 * plan.aux["balance"] + 0.001 * plan.aux["z"]
    torch.testing.assert_close(result.aux_loss, expected.to(result.aux_loss.dtype))
    assert list(result.losses) == ["balance", "z"]
    assert result.summary()["experts_per_token"] == 2.0


def test_schedules_count_updates():
    moe = made("dense_to_sparse", gate_noise="none").eval()
    x = torch.randn(64, D)
    assert moe(x).summary()["experts_per_token"] > 2
    moe.set_num_updates(4)
    assert moe(x).summary()["experts_per_token"] == 1
    assert moe.state_dict()["layer.num_updates"] == 4


def test_a_bias_follows_the_loads_of_all_micro_batches():
    moe = made("top_k", top_k=1, bias_update_rate=0.5)
    x = torch.randn(40, D)
    parts = [moe(x[:30]).stats, moe(x[30:]).stats]
    whole = copy.deepcopy(moe)
    moe.finish_update(*parts)
    whole.finish_update(whole(x).stats)
    bias_E = moe.layer.gate.bias_C
    assert bias_E.abs().max() == 0.5 and torch.equal(bias_E, whole.layer.gate.bias_C)


def test_noise_is_of_the_generator_or_of_the_given_keys():
    moe = made("dense_to_sparse")
    x = torch.randn(6, D)
    torch.manual_seed(3)
    first, second = moe(x).output, moe(x).output
    torch.manual_seed(3)
    assert torch.equal(moe(x).output, first) and not torch.equal(first, second)
    keys = torch.arange(6)
    whole = moe(x, token_keys=keys).output
    torch.testing.assert_close(moe(x[2:], token_keys=keys[2:]).output, whole[2:])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"temperatur_end": 0.3}, TypeError, "did you mean temperature_end"),
        ({"adapt_window": 5, "gate": "top_any"}, TypeError, "no option adapt_window"),
        ({"spawn_updates": 5}, TypeError, "no option spawn_updates"),
        ({"temperature_end": "cold"}, TypeError, "must be of type float"),
        ({"shared_experts": True}, TypeError, "must be of type int"),
        ({"temperature_start": 0.1}, ValueError, "^temperature_start 0.1: .* temperature_end"),
        ({"max_updates": None}, ValueError, "give it, or max_updates"),
        ({"gate": "topk"}, ValueError, "unknown gate; one of"),
        ({"gate": "hash", "max_updates": None, "token_counts": ()}, ValueError, "no vocabulary"),
        ({"activation": "geglu"}, ValueError, "one of: gelu"),
        ({"num_experts": 0}, ValueError, "^num_experts 0"),
        ({"model_dim": 0}, ValueError, "at least 1"),
        ({"dropout": 1.5}, ValueError, "probability"),
    ],
)
def test_bad_options_are_refused(given, error, message):
    values = {"model_dim": D, "ffn_dim": F, "num_experts": E, "max_updates": 9} | given
    with pytest.raises(error, match=message):
        MoELayer(**values)


def test_bad_inputs_are_refused():
    moe = made("hash")
    with pytest.raises(ValueError, match=r"last size must be 12"):
        moe(torch.randn(3, D + 1))
    with pytest.raises(ValueError, match=r"token_ids is \[3\]: it must be \[2, 3\]"):
        moe(torch.randn(2, 3, D), token_ids=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="token ids"):
        moe(torch.randn(3, D))


def test_the_examples_of_the_documentation_run(capsys):
    page = (ROOT / "docs/pytorch.md").read_text()
    plain, transformers = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    exec(plain, {"__name__": "plain"})
    loss, experts = map(float, re.findall(r"[\d.]+\d", capsys.readouterr().out))
    assert loss < 1 and experts == 1  # 3.9 at first
    pytest.importorskip("transformers")
    names = {"__name__": "transformers_example"}
    exec(transformers, names)
    assert torch.isfinite(names["loss"]) and names["mlps"][1].moe.num_updates == 3


_WITHOUT = """
import sys
ABSENT = set("fairseq fairscale hydra omegaconf pyarrow rich safetensors sentencepiece tokenizers "
             "iopath packaging jinja2 transformers".split())
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import torch
from evomoe_plugin import MoELayer
moe = MoELayer(8, 16, 4, max_updates=10)
result = moe(torch.randn(5, 8))
(result.output.sum() + result.aux_loss).backward()
moe.finish_update(result.stats)
print(sorted(result.summary())[0], moe.num_updates)
from evomoe_plugin import cli
cli.main(["doctor"])
cli.main(["export", "c.pt", "out"])
"""


def test_it_needs_torch_alone():
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["dead_experts", "1"]
    install = "is not installed: pip install 'evomoe_plugin[fairseq]'"
    assert [line.endswith(install) for line in done.stderr.splitlines()] == [True, True]
