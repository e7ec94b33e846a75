"""Experts from dense models of Hugging Face folders."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.convert import convert
from evomoe_plugin.evolve.dense_checkpoint import read_dense
from evomoe_plugin.evolve.import_hf import import_hf
from evomoe_plugin.evolve.start import init_from_dense, recipe_of
from evomoe_plugin.evolve.upcycle import Recipe
from tests.conftest import ROOT
from tests.evolve.conftest import trainer_of
from tests.evolve.dense_models import build, dictionary_of
from tests.models.hf_models import VOCABULARY, save_hf

KINDS = ["llama 2", "llama 3", "mistral", "qwen2", "qwen3", "phi", "stablelm", "stablelm parallel"]
TOP_2 = {
    "moe_gate": "top_k",
    "moe_top_k_weights": "renormalized",
    "moe_expert_count": "4",
    "moe_freq": 2,
}
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A maker of folders, one of each kind."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp("hf")
            made[name] = str(path), save_hf(path, name)
        return made[name]

    return folder


def experts_of(state, name, layer=1):
    return state["model"][f"decoder.layers.{layer}.moe.experts.{name}"]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_every_kind_compute_what_the_dense_model_did(folders, kind):
    folder, theirs = folders(kind)
    converted = convert(folder, TOP_2, Recipe(), max_update=100)
    assert converted.logits.equal
    model = build(converted.state, dictionary_of(VOCABULARY))
    tokens = torch.randint(4, VOCABULARY, (2, 40))
    with torch.no_grad():
        wanted = theirs(tokens).logits
        torch.testing.assert_close(model(tokens)[0], wanted, rtol=0, atol=ROUNDING)
    assert len(model.decoder.moe_layers) == 1


def test_gpt2(tmp_path):
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=36, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=35
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    converted = convert(str(tmp_path), TOP_2, Recipe(), max_update=100)
    assert converted.logits.equal
    assert converted.state["cfg"]["model"]["_name"] == "transformer_lm_moe"


@pytest.mark.parametrize("method", ["mask", "noise", "reinit"])
def test_gated_experts_differ_and_come_from_the_dense_network(folders, method):
    folder, _ = folders("qwen2")
    recipe = Recipe(method, seed=5)
    state = convert(folder, TOP_2, recipe, max_update=100).state
    source = read_dense("DENSE", folder).ffn(1)
    assert set(source) == {"fc1_weight", "fc2_weight", "fc3_weight"}
    for name, whole in source.items():
        stack = experts_of(state, name)
        for n, expert in enumerate(stack):
            like = torch.corrcoef(torch.stack([expert.flatten(), whole.flatten()]))[0, 1]
            assert 0.4 < like < 0.999
            assert all((expert != other).float().mean() > 0.05 for other in stack[n + 1 :])
    again = convert(folder, TOP_2, recipe, max_update=100).state
    assert torch.equal(experts_of(again, "fc3_weight"), experts_of(state, "fc3_weight"))


@pytest.mark.parametrize("order", ["contiguous", "shuffled"])
@pytest.mark.parametrize("kind", ["qwen2", "phi"])
def test_slices_sum_to_the_dense_network(folders, kind, order):
    folder, theirs = folders(kind)
    given = {**TOP_2, "moe_expert_size_factor": 4}
    state = convert(folder, given, Recipe("slice", slices=order), max_update=100).state
    mlp = theirs.model.layers[1].mlp
    x = torch.randn(7, 32)
    names = ("fc1_weight", "fc2_weight", "fc3_weight" if kind == "qwen2" else "fc1_bias")
    stacks = [experts_of(state, name) for name in names]
    parts = []
    for first, second, third in zip(*stacks, strict=True):
        if kind == "qwen2":
            parts.append((F.silu(x @ first.t()) * (x @ third.t())) @ second)
        else:
            parts.append(F.gelu(x @ first.t() + third, approximate="tanh") @ second)
    whole = sum(parts)
    if kind == "phi":
        whole = whole + experts_of(state, "fc2_bias").sum(0)
    with torch.no_grad():
        torch.testing.assert_close(whole, mlp(x), rtol=0, atol=ROUNDING)


def test_fresh_gated_experts_lie_in_the_bounds_of_a_new_layer(folders):
    folder, _ = folders("phi")
    given = {**TOP_2, "moe_expert_gated": True, "moe_expert_ffn_dim": 20}
    state = convert(folder, given, Recipe("none"), max_update=100).state
    first, second = (experts_of(state, name) for name in ("fc3_weight", "fc2_weight"))
    assert first.shape == (4, 20, 32)
    assert 0.9 * 32**-0.5 < first.abs().max() <= 32**-0.5
    assert 0.9 * 20**-0.5 < second.abs().max() <= 20**-0.5


def test_weights_keep_their_dtype_and_come_in_several_files(tmp_path):
    theirs = save_hf(tmp_path, "llama 2", torch.bfloat16, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    weights = theirs.state_dict()
    dense = import_hf("DIR", str(tmp_path))["model"]
    table = dense["decoder.embed_tokens.weight"]
    assert table.dtype == torch.bfloat16
    assert torch.equal(table, weights["model.embed_tokens.weight"])
    state = convert(str(tmp_path), TOP_2, Recipe("noise"), max_update=100).state
    parameters = {
        name: value
        for name, value in state["model"].items()
        if name.startswith("decoder.layers") and ".gate." not in name and value.dim()
    }
    assert {value.dtype for value in parameters.values()} == {torch.bfloat16}
    assert torch.equal(
        experts_of(convert(str(tmp_path), TOP_2, Recipe(), max_update=100).state, "fc2_weight")[3],
        weights["model.layers.1.mlp.down_proj.weight"].t(),
    )


def test_a_run_starts_with_what_the_verb_would_write(folders, make_model):
    folder, _ = folders("stablelm")
    model = make_model(
        arch="causal_lm_moe",
        hf_config=folder,
        **TOP_2,
        moe_init_from_dense=folder,
        moe_init_method="reinit",
        moe_init_gate="normal:0.1",
    )
    init_from_dense(trainer_of(model, num_updates=0))
    expected = convert(folder, TOP_2, recipe_of(model.decoder.args)).state["model"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_the_dense_checkpoint_can_be_upcycled_too(folders, tmp_path):
    folder, _ = folders("qwen3")
    torch.save(import_hf("DIR", folder), tmp_path / "dense.pt")
    one = convert(str(tmp_path / "dense.pt"), TOP_2, Recipe("mask"), max_update=100).state
    other = convert(folder, TOP_2, Recipe("mask"), max_update=100).state
    assert one["model"].keys() == other["model"].keys()
    for name, value in one["model"].items():
        if ".gate." not in name:  # drawn in another order
            assert torch.equal(value, other["model"][name]), name


def test_what_does_not_fit_is_refused(folders):
    folder, _ = folders("llama with biases")
    with pytest.raises(OptionError, match="its gated feed-forward networks have biases"):
        convert(folder, TOP_2, Recipe(), max_update=100)
    folder, _ = folders("qwen2")
    with pytest.raises(OptionError, match="--arch transformer_lm_moe: .* give causal_lm_moe"):
        convert(folder, TOP_2, Recipe(), arch="transformer_lm_moe", max_update=100)
    with pytest.raises(OptionError, match="--rope-theta 7.0: the dense checkpoint .* has 100.0"):
        convert(folder, {**TOP_2, "rope_theta": 7.0}, Recipe(), max_update=100)
    folder, _ = folders("mixtral")
    with pytest.raises(OptionError, match="is a mixtral, which has experts already"):
        convert(folder, TOP_2, Recipe(), max_update=100)


MEMORY = """
import os, re, sys, threading, time
import torch
import evomoe_plugin
evomoe_plugin.register()
from evomoe_plugin.checkpoint.huggingface import import_gpt2
from evomoe_plugin.evolve.convert import convert
from evomoe_plugin.evolve.import_hf import import_hf
from evomoe_plugin.evolve.upcycle import Recipe

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def peak_of(make):
    base, most, done = held(), [0.0], threading.Event()
    def watch():
        while not done.is_set():
            most[0] = max(most[0], held())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    state = make()["model"]
    done.set()
    thread.join()
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in state.values()}
    return most[0] - base, sum(tensors.values()) / 2**20, max(tensors.values()) / 2**20

folder, tiny, kind = sys.argv[1:]
given = {"moe_gate": "top_k", "moe_expert_count": "4", "moe_freq": 2}
makers = {
    "import": lambda f: import_gpt2(f).state if kind == "gpt2" else import_hf("DIR", f),
    "noise": lambda folder: convert(folder, given, Recipe("noise"), max_update=9).state,
}
for make in makers.values():
    make(tiny)  # what is imported and built once
for name, make in makers.items():
    if os.fork() == 0:  # memory that one has freed would hide what the other takes
        print(name, *peak_of(lambda: make(folder)), flush=True)
        os._exit(0)
    os.wait()
"""


def save_gpt2(folder, **sizes):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**(small | sizes), eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama 2", "gpt2"])
def test_peak_memory_is_the_result_and_one_tensor(tmp_path, kind):
    if kind == "gpt2":
        save_gpt2(tmp_path / "tiny")
        save_gpt2(tmp_path / "large", n_embd=512, n_layer=8, n_head=8, vocab_size=2000)
    else:
        save_hf(tmp_path / "tiny", kind, torch.bfloat16)
        save_hf(
            tmp_path / "large",
            kind,
            torch.bfloat16,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            MEMORY,
            tmp_path / "large",
            tmp_path / "tiny",
            kind,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
            # Freed memory goes back at once, as that of larger tensors does anyway.
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    assert run.returncode == 0, run.stderr
    rows = [row.split() for row in run.stdout.splitlines() if row.startswith(("import", "noise"))]
    assert [name for name, *_ in rows] == ["import", "noise"]
    for (_, *numbers), least in zip(rows, (60, 130), strict=True):
        peak, result, tensor = map(float, numbers)
        assert result > least
        assert 0.95 * result < peak < result + tensor + 12  # MiB: interpreter and allocator
