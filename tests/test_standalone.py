"""The layer in plain PyTorch."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

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
        ({"dropout": None}, TypeError, "dropout=None: must be of type float"),
        ({"model_dim": 16.0}, TypeError, "model_dim=16.0: must be of type int"),
        ({"num_experts": "4"}, TypeError, "num_experts='4': must be of type int"),
        ({"gated": "no"}, TypeError, "gated='no': must be of type bool"),
        ({"max_updates": 1e4}, TypeError, "max_updates=10000.0: must be of type int"),
        ({"gate": "top_k", "moe_top_k": 2}, TypeError, "no option moe_top_k: here it is top_k"),
        ({"aux": {"balance": 0.1}}, TypeError, "aux=.*must be of type str"),
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
    with pytest.raises(ValueError, match="x is int64: give tokens as floating-point"):
        moe(torch.ones(3, D, dtype=torch.int64))
    with pytest.raises(ValueError, match="token_mask is int64: it must be bool"):
        moe(torch.randn(3, D), token_mask=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="token_ids is int32: it must be int64"):
        moe(torch.randn(3, D), token_ids=torch.zeros(3, dtype=torch.int32))
    result = moe(torch.randn(3, D), token_ids=torch.zeros(3, dtype=torch.int64))
    for given in ((), (result,), (result.summary(),)):
        with pytest.raises(TypeError, match="takes the `stats` of each forward pass"):
            moe.finish_update(*given)
    with pytest.raises(ValueError, match="num_updates=-1: give 0 or more"):
        moe.set_num_updates(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    moe = made("top_k").to(dtype)
    x = torch.randn(3, 7, D, dtype=dtype)
    result = moe(x)
    (result.output.sum() + result.aux_loss).backward()
    assert result.output.dtype == dtype
    wide = copy.deepcopy(moe).double().eval()(x.double())
    close = {"atol": 0.02, "rtol": 0.05} if dtype != torch.float64 else {}
    torch.testing.assert_close(moe.eval()(x).output.double(), wide.output, **close)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    moe, x = made("dense_to_sparse"), torch.randn(3, 7, D, requires_grad=True)

    def grads(recompute):
        torch.manual_seed(3)  # of the noise
        moe.zero_grad()
        run = functools.partial(checkpoint, use_reentrant=use_reentrant) if recompute else _call
        output, aux_loss = run(lambda x: ((out := moe(x)).output, out.aux_loss), x)
        (output.square().sum() + aux_loss).backward()
        return {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}

    torch.testing.assert_close(grads(True), grads(False))


def _call(function, x):
    return function(x)


def test_copies_are_of_the_same_state(tmp_path):
    moe, x = made("top_k", bias_update_rate=0.5), torch.randn(9, D)
    result = moe(x)
    (result.output.sum() + result.aux_loss).backward()
    moe.finish_update(result.stats)
    torch.save(moe, tmp_path / "moe.pt")
    loaded = torch.load(tmp_path / "moe.pt", weights_only=False)
    expected = moe.eval()(x).output
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), loaded):
        assert copied.num_updates == 1
        assert torch.equal(copied.eval()(x).output, expected)


def test_no_tokens_and_only_padding():
    moe = made("dense_to_sparse")
    for x, mask in ((torch.zeros(0, 5, D), None), (torch.randn(2, 3, D), torch.zeros(2, 3) > 0)):
        result = moe(x, token_mask=mask)
        (result.output.sum() + result.aux_loss).backward()
        assert result.aux_loss == 0 and not result.output.any()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in moe.parameters())


def test_frozen_weights_pass_gradients_on():
    moe, x = made("top_k").requires_grad_(False), torch.randn(5, D, requires_grad=True)
    moe(x).output.sum().backward()
    assert x.grad.any() and all(p.grad is None for p in moe.parameters())


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


def _train_on_two(rank: int, file: str) -> None:
    """On each of two ranks: DDP leaves equal states; FSDP (fully_shard) equals one process."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    moe = made("top_k", bias_update_rate=0.1)
    wrapped = torch.nn.parallel.DistributedDataParallel(moe)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    torch.manual_seed(rank)
    for _ in range(3):
        result = wrapped(torch.randn(6, D))
        optimizer.zero_grad()
        (result.output.square().sum() + result.aux_loss).backward()
        optimizer.step()
        stats = {name: value.clone() for name, value in result.stats.items()}
        for value in stats.values():
            dist.all_reduce(value)
        moe.finish_update(stats)
    for value in moe.state_dict().values():
        other = value.clone()
        dist.broadcast(other, 0)
        assert torch.equal(value, other)
    alone, sharded = made("top_k").eval(), fully_shard(made("top_k").eval())
    x = torch.randn(6, D)
    torch.testing.assert_close(sharded(x).output, alone(x).output)
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_and_sharded(tmp_path):
    torch.multiprocessing.spawn(_train_on_two, (str(tmp_path / "ranks"),), nprocs=2)


@pytest.mark.slow
def test_compiled():
    moe, x, keys = made("top_k"), torch.randn(3, 5, D), torch.arange(15).view(3, 5)
    compiled = torch.compile(moe, backend="aot_eager")
    results = []
    for run in (moe, compiled):
        moe.zero_grad()
        result = run(x, token_keys=keys)
        (result.output.square().sum() + result.aux_loss).backward()
        results.append([result.output.detach(), *(p.grad.clone() for p in moe.parameters())])
    torch.testing.assert_close(results[0], results[1])
