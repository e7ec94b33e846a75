"""Values of fairseq's options that it would trip over, refused by name before anything starts."""

import copy

import pytest
from omegaconf import OmegaConf, open_dict

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.fairseq_checks import check_fairseq
from tests.torture import forked


@pytest.fixture(scope="module")
def stock():
    """Of fairseq's own language model."""
    return forked.configuration(
        "train",
        [
            *("no-data", "--user-dir", "evomoe_plugin", "--task", "language_modeling"),
            *("--arch", "transformer_lm_gpt", "--optimizer", "adam", "--lr", "0.1"),
            *(
                "--criterion",
                "cross_entropy",
                "--batch-size",
                "4",
                "--share-decoder-input-output-embed",
            ),
        ],
    )


STEP = {"_name": "step", "lr_deacy_period": 2, "lr_decay": 0.5, "min_lr": 0.0}
STAGES = {
    "_name": "tri_stage",
    "phase_ratio": None,
    "final_lr_scale": 0.01,
    "warmup_steps": 1,
    "hold_steps": 1,
    "decay_steps": 2,
}
APART = {"model.share_decoder_input_output_embed": False}

BAD = [
    ({"optimizer": {"_name": "lamb"}}, "--optimizer lamb: needs NVIDIA's apex"),
    (
        {"optimizer": {"_name": "sgd"}, "common.memory_efficient_fp16": True},
        "--memory-efficient-fp16 with --optimizer sgd: give --fp16",
    ),
    ({"optimizer.fp16_adam_stats": True}, "--fp16-adam-stats without a GPU"),
    ({"optimizer.adam_betas": "(0.9, 1.0)"}, r"--adam-betas \(0.9, 1.0\): give two numbers"),
    ({"optimizer.adam_betas": "0.9"}, "--adam-betas 0.9: give two numbers"),
    ({"optimization.use_bmuf": True}, "--use-bmuf True: no checkpoint has its copy of the weights"),
    ({"checkpoint.optimizer_overrides": "x"}, "--optimizer-overrides x: give a dictionary"),
    ({"lr_scheduler": {"_name": "pass_through"}}, "--lr-scheduler pass_through: is of --opt"),
    (
        {"lr_scheduler": {"_name": "polynomial_decay", "total_num_update": 0}},
        "--total-num-update 0: give a number of updates above 0",
    ),
    (
        {"lr_scheduler": {"_name": "triangular", "max_lr": 0.1}},
        r"--max-lr 0.1: give more than --lr \(0.1\)",
    ),
    ({"lr_scheduler": {**STEP, "lr_deacy_period": 0}}, "--lr-deacy-period 0: give"),
    ({"lr_scheduler": {**STEP, "lr_decay": 2.0}}, "--lr-decay 2.0: give a factor"),
    ({"lr_scheduler": {**STEP, "min_lr": 0.1}}, r"--min-lr 0.1: give 0 or more, less than --lr"),
    ({"lr_scheduler": {**STAGES, "decay_steps": 0}}, "--decay-steps 0: give updates above 0"),
    ({"lr_scheduler": {**STAGES, "final_lr_scale": 0.0}}, "--final-lr-scale 0.0: give"),
    ({"lr_scheduler": {**STAGES, "phase_ratio": "(0.3,0.3,0.3)"}}, "--phase-ratio .* add up to 1"),
    ({"task.self_target": True}, "--self-target True: decoders predict the next token"),
    ({"common.model_parallel_size": 2}, "--model-parallel-size 2: needs Megatron's models"),
    ({"common.quantization_config_path": "nowhere"}, "--quantization-config-path nowhere: no such"),
    ({"optimization.update_freq": [1, 0]}, r"--update-freq \[1, 0\]: give numbers of 1 or more"),
    ({"dataset.num_workers": -1}, "--num-workers -1: give 0 or more"),
    ({"dataset.num_shards": 0}, "--num-shards 0: give 1 or more"),
    ({"dataset.shard_id": 1}, "--shard-id 1: give 0 to 0, less than --num-shards"),
    ({"distributed_training.zero_sharding": "os"}, "--zero-sharding os: there is one rank"),
    ({"model.attention_dropout": 1.5}, "--attention-dropout 1.5: give a share from 0 to 1"),
    ({"criterion": {"_name": "adaptive_loss"}}, "--criterion adaptive_loss: is of models with"),
    ({"model.decoder_xformers_att_config": "{}"}, "--decoder-xformers-att-config {}: needs"),
    ({"model.decoder_attention_heads": 5}, r"--decoder-attention-heads 5: give a divisor of .*768"),
    (
        {"model.decoder_embed_dim": 2, "model.decoder_attention_heads": 2},
        "--decoder-embed-dim 2: give 4 or more",
    ),
    ({"model.decoder_ffn_embed_dim": 0}, "--decoder-ffn-embed-dim 0: give 1 or more"),
    (
        {"lr_scheduler": {"_name": "manual", "epoch2lr": "{}", "update2lr": "{2: 0.1}"}},
        r"--update2lr \{2: 0.1\}: give text keys, as",
    ),
    ({"model.decoder_layers_to_keep": "x"}, "--decoder-layers-to-keep x: give numbers of layers"),
    ({"model.decoder_layers_to_keep": "0"}, "--decoder-layers-to-keep 0: is of weights that are"),
    ({"model.quant_noise_scalar": 0.1}, "--quant-noise-scalar 0.1: needs a GPU"),
    ({"model.decoder_output_dim": 4}, "--decoder-output-dim 4: with --share-decoder-input-output"),
    (
        {"model.adaptive_softmax_cutoff": "8,16"},
        "--adaptive-softmax-cutoff with --share-decoder-input-output-embed: no checkpoint of both",
    ),
    ({**APART, "model.adaptive_input": True}, "--adaptive-input True: give --adaptive-input-cut"),
    ({**APART, "model.tie_adaptive_weights": True}, "--tie-adaptive-weights True: give --adapt"),
    ({"model.base_layers": 1}, "--base-layers 1: one expert a rank needs several"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m[2:30] for _, m in BAD])
def test_values_that_fairseq_trips_over(stock, changes, message):
    cfg = copy.deepcopy(stock)
    check_fairseq(cfg, 1, on_gpu=False)
    with open_dict(cfg):
        for name, value in changes.items():
            OmegaConf.update(cfg, name, value, merge=False)
    with pytest.raises(OptionError, match=f"^{message}"):
        check_fairseq(cfg, 1, on_gpu=False)
