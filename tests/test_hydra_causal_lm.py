"""The runs of `hydra_configs` with decoders of Llama's kind: sizes, and that each starts."""

from __future__ import annotations

import copy

import pytest
import torch

from evomoe_plugin.config.hf_config import read_hf_config
from evomoe_plugin.config.run_checks import check_run
from evomoe_plugin.models.accounting import count_parameters
from tests.models.hf_models import save_hf
from tests.test_hydra_configs import CAUSAL_LM, CONFIGS, data, resolved, task_with  # noqa: F401

RUNS = sorted(
    f"{folder}/{path.stem}"
    for folder in ("paper", "small")
    for path in (CONFIGS / folder).glob("*.yaml")
    if path.stem.startswith(CAUSAL_LM)
)
FROM_SCRATCH = {"paper/llama_small_evomoe", "small/llama_evomoe"}
# Of small runs, the model that tests make; of paper's, the vocabulary of the model they convert.
TINY = {"llama2_dense2moe": "llama 2", "qwen2_dcmoe": "qwen2", "phi2_dynmoe": "phi"}


def config(run, folder="nowhere", *overrides):
    given = () if run in FROM_SCRATCH else (f"model.moe_init_from_dense={folder}",)
    return resolved(run, *given, *overrides)


def test_every_paper_run_has_a_small_one():
    assert {run.split("/")[1].split("_")[-1] for run in RUNS if run.startswith("paper/")} == {
        *(run.split("_")[-1] for run in RUNS if run.startswith("small/")),
        "sft",
    }


@pytest.mark.parametrize(
    "run, overrides, vocabulary, billions",
    [
        # Dense2MoE's README: 22 B with 8 experts from layer 16 on.
        ("paper/llama2_7b_dense2moe", (), 32000, 14.3),
        ("paper/llama2_7b_dense2moe", ("model.moe_freq=1",), 32000, 21.9),
        # Phi-2 has 2.78 B; with 8 slots for experts in every other layer. The 4 that it begins with
        # are 5.3 B, as DynMoE-Phi-2-2.7B.
        ("paper/phi2_dynmoe", (), 51200, 8.65),
        ("paper/qwen2_dcmoe", (), 152064, None),
    ],
)
def test_parameters_on_the_meta_device(run, overrides, vocabulary, billions):
    cfg = config(run, "nowhere", *overrides)
    with torch.device("meta"):
        model = task_with(cfg, vocabulary).build_model(cfg.model)
    total = sum(p.numel() for p in model.parameters())
    assert total == count_parameters(model.decoder.args, vocabulary).total
    if billions is not None:
        assert total / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder for each small run, with more tokens than the data has."""
    made = {}

    def folder(run):
        name = TINY[run.removeprefix("small/")]
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf")
            save_hf(made[name], name, num_hidden_layers=4, max_position_embeddings=128)
        return made[name]

    return folder


@pytest.mark.parametrize("run", RUNS)
def test_no_run_is_refused(run, data, tiny):  # noqa: F811
    folder = "nowhere"
    if run.startswith("small/") and run not in FROM_SCRATCH:
        folder = str(tiny(run))
    cfg = copy.deepcopy(config(run, folder))
    cfg.task.data = str(data)
    if not run.endswith("_sft"):
        check_run(cfg, cfg.distributed_training.distributed_world_size)
    if folder != "nowhere":
        wanted = read_hf_config("hf_config", folder).options
        assert cfg.model.decoder_ffn_embed_dim == wanted["decoder_ffn_embed_dim"] == 48
        model = task_with(cfg, 40).build_model(cfg.model)
        assert len(model.decoder.layers) == 4
        assert model.decoder.moe_layers


def test_what_dense2moe_and_dcmoe_say():
    cfg = config("paper/llama2_7b_dense2moe")
    assert (cfg.model.moe_start_layer, cfg.model.moe_freq, cfg.model.moe_top_k) == (16, 2, 2)
    assert cfg.model.moe_expert_count == "8" and cfg.model.moe_aux == "mi=1"
    assert cfg.optimization.lr == [5e-5] and cfg.task.tokens_per_sample == 4096
    assert config("paper/llama2_7b_dense2moe_sft").task._name == "language_modeling_sft"
    cfg = config("paper/qwen2_dcmoe").model
    assert (cfg.moe_expert_count, cfg.moe_expert_size_factor) == ("4", 4)
    assert (cfg.moe_shared_experts, cfg.moe_shared_size_factor, cfg.moe_null_experts) == (2, 8, 1)
    assert cfg.moe_top_p == 0.7
