"""Whatever makes no sense is refused in one line: option, value, and what would be right."""

import pytest

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError

NAN, INF = float("nan"), float("inf")


def gate(name, **given):
    return {"moe_gate": name, **given}


def shared(**given):
    return {"moe_shared_experts": 1, **given}


def capped(**given):
    return {"moe_capacity_factor": 1.0, **given}


def grow(**given):
    return {
        "moe_gate": "top_any",
        "moe_expert_count": "4",
        "moe_max_experts": 8,
        "moe_adapt_record_interval": 100,
        "moe_adapt_window": 20,
        **given,
    }


# Options (4 decoder layers of width 8 and hidden width 32, 16 experts, 100 updates), and what the
# error must say.
BAD = [
    # which gate
    (gate("dense2sparse"), "--moe-gate dense2sparse: unknown gate; one of: base, dense, dense_to_"),
    (gate(""), "--moe-gate : unknown gate"),
    (gate("top-k"), "--moe-gate top-k: unknown gate"),
    (gate("expert_choice"), "--moe-gate expert_choice: experts choose among all tokens"),
    ({"moe_gating_use_fp32": "yes"}, "--moe-gating-use-fp32 yes: give true or false"),
    ({"moe_attention": "flash"}, "--moe-attention flash: one of: sdpa, stock"),
    # where experts are
    ({"moe_expert_parallel_size": 0}, "--moe-expert-parallel-size 0: give 1 or more"),
    (
        {"moe_expert_parallel_size": 3},
        "--moe-expert-parallel-size 3: does not divide the 16 experts of a layer",
    ),
    (
        {"moe_expert_parallel_size": 8, "moe_expert_count": "8,12"},
        "--moe-expert-parallel-size 8: does not divide the 12 experts",
    ),
    (
        {"moe_expert_parallel_size": 4, "moe_ep_chunks": 5},
        "--moe-ep-chunks 5: give 1 to 4, the number of experts of a layer on each rank",
    ),
    ({"moe_ep_chunks": 0}, "--moe-ep-chunks 0: give 1 to 16"),
    ({"moe_ep_wire_dtype": "fp8"}, "--moe-ep-wire-dtype fp8: one of: same, fp32, fp16, bf16"),
    ({"moe_ep_checkpoint": "many"}, "--moe-ep-checkpoint many: one of: auto, consolidated"),
    ({"moe_ep_consolidate_below": -1.0}, "--moe-ep-consolidate-below -1.0: give a number of GiB"),
    ({"moe_ep_chunks": 2}, "--moe-ep-chunks 2: every rank has all experts: leave it out, or"),
    ({"moe_ep_wire_dtype": "bf16"}, "--moe-ep-wire-dtype bf16: every rank has all experts"),
    ({"moe_ep_checkpoint": "sharded"}, "--moe-ep-checkpoint sharded: every rank has all"),
    ({"moe_ep_consolidate_below": 0.0}, "--moe-ep-consolidate-below 0.0: every rank has all"),
    # where MoE layers stand
    ({"moe_freq": 0}, "--moe-freq 0: give 1 or more"),
    ({"moe_freq": -2}, "--moe-freq -2: give 1 or more"),
    ({"moe_freq": 5}, "--moe-freq 5: gives no MoE layer in 4 decoder layers; give at most 4"),
    ({"moe_start_layer": 4}, "--moe-start-layer 4: the 4 decoder layers are 0 to 3"),
    ({"moe_start_layer": -1}, "--moe-start-layer -1: the 4 decoder layers are 0 to 3"),
    ({"moe_layers": "1,4"}, "--moe-layers 1,4: give layer numbers from 0 to 3, ascending"),
    ({"moe_layers": "-1"}, "--moe-layers -1: give layer numbers from 0 to 3"),
    ({"moe_layers": "2,1"}, "--moe-layers 2,1: give layer numbers from 0 to 3, ascending"),
    ({"moe_layers": "1,1"}, "--moe-layers 1,1: give layer numbers from 0 to 3, ascending, each"),
    ({"moe_layers": "all"}, "--moe-layers all: give layer numbers from 0: 5,8,11"),
    ({"moe_layers": ""}, "--moe-layers : give layer numbers from 0"),
    ({"moe_layers": "1,2,"}, "--moe-layers 1,2,: give layer numbers"),
    ({"moe_layers": "1", "moe_freq": 1}, "--moe-freq 1: --moe-layers 1 lists the layers"),
    ({"moe_layers": "1", "moe_start_layer": 1}, "--moe-start-layer 1: --moe-layers 1 lists the"),
    # how many experts
    ({"moe_expert_count": "0"}, "--moe-expert-count 0: give one number of at least 1"),
    ({"moe_expert_count": "-3"}, "--moe-expert-count -3"),
    ({"moe_expert_count": "many"}, "--moe-expert-count many"),
    ({"moe_expert_count": "4.5"}, "--moe-expert-count 4.5"),
    ({"moe_expert_count": "4,4,4"}, "3 counts for 2 MoE layers; give one number or 2"),
    ({"moe_expert_count": "4,0"}, "--moe-expert-count 4,0: give one number of at least 1"),
    ({"moe_expert_count": "4:8:16"}, "--moe-expert-count 4:8:16"),
    ({"moe_expert_count": "4:8,16"}, "--moe-expert-count 4:8,16"),
    ({"moe_expert_count": "0:8"}, "--moe-expert-count 0:8"),
    ({"moe_expert_count": ""}, "--moe-expert-count"),
    ({"moe_layers": "1,2,3", "moe_expert_count": "4,8"}, "2 counts for 3 MoE layers"),
    # how wide
    ({"moe_expert_ffn_dim": -1}, "--moe-expert-ffn-dim -1: give a width of at least 1, or 0"),
    ({"moe_expert_size_factor": 0}, "--moe-expert-size-factor 0: give 1 or more"),
    ({"moe_expert_size_factor": -4}, "--moe-expert-size-factor -4: give 1 or more"),
    ({"moe_expert_size_factor": 5}, "5: give a divisor of --decoder-ffn-embed-dim (32)"),
    ({"moe_expert_size_factor": 64}, "64: give a divisor of --decoder-ffn-embed-dim (32)"),
    (
        {"moe_expert_size_factor": 2, "moe_expert_ffn_dim": 8},
        "--moe-expert-size-factor 2: --moe-expert-ffn-dim already sets the width",
    ),
    ({"activation_fn": "silu"}, "--activation-fn silu: one of: relu, relu_squared, gelu"),
    # shared experts
    ({"moe_shared_experts": -1}, "--moe-shared-experts -1: give 0 or more"),
    ({"moe_shared_ffn_dim": 8}, "--moe-shared-ffn-dim 8: there are no shared experts"),
    ({"moe_shared_size_factor": 2}, "--moe-shared-size-factor 2: there are no shared experts"),
    ({"moe_shared_combine": "mix"}, "--moe-shared-combine mix: there are no shared experts"),
    (shared(moe_shared_combine="sum"), "--moe-shared-combine sum: one of: add, softmax, mix"),
    (shared(moe_shared_ffn_dim=-8), "--moe-shared-ffn-dim -8: give a width of at least 1"),
    (shared(moe_shared_size_factor=-1), "--moe-shared-size-factor -1: give 1 or more, or 0"),
    (shared(moe_shared_size_factor=3), "--moe-shared-size-factor 3: give a divisor"),
    (
        shared(moe_shared_size_factor=2, moe_shared_ffn_dim=8),
        "--moe-shared-size-factor 2: --moe-shared-ffn-dim already sets the width",
    ),
    (
        gate("hash", **shared(moe_shared_combine="softmax")),
        "--moe-shared-combine softmax: the gate hash has no logits: give add or mix",
    ),
    (
        gate("dselect_k", **shared(moe_shared_combine="softmax")),
        "--moe-shared-combine softmax: the gate dselect_k has no logits",
    ),
    (
        gate("top_any", **shared(moe_shared_combine="softmax")),
        "--moe-shared-combine softmax: the gate top_any has no logits",
    ),
    # null experts
    ({"moe_null_experts": -1}, "--moe-null-experts -1: give 0 or more"),
    (gate("top_k", moe_null_experts=-20), "--moe-null-experts -20: give 0 or more"),
    (
        gate("top_any", moe_aux="null=1"),
        "null: there are no null experts; and the gate top_any cannot have any",
    ),
    *(
        (
            gate(name, moe_null_experts=1, **more),
            f"--moe-null-experts 1: the gate {name} cannot select null experts: give 0",
        )
        for name, more in [
            ("hash", {}),
            ("base", {}),
            ("stable", {}),
            ("dselect_k", {}),
            ("relu", {}),
            ("top_any", {}),
            ("expert_choice", {"moe_allow_noncausal": True}),
        ]
    ),
    ({"moe_null_rate_target": 0.2}, "--moe-null-rate-target 0.2: only the loss null uses it"),
    (
        {"moe_null_experts": 1, "moe_null_rate_target": 1.5, "moe_aux": "null=1"},
        "--moe-null-rate-target 1.5: it is a probability",
    ),
    (
        {"moe_null_experts": 1, "moe_null_rate_target": -0.5, "moe_aux": "null=1"},
        "--moe-null-rate-target -0.5: it is a probability",
    ),
    (
        {"moe_null_experts": 1, "moe_aux": "null=1"},
        "--moe-aux null=1: the loss null needs a target: give --moe-null-rate-target",
    ),
    (
        {"moe_aux": "null=1", "moe_null_rate_target": 0.3},
        "--moe-aux null=1: null: there are no null experts; give --moe-null-experts",
    ),
    # capacity
    ({"moe_capacity_factor": 0.0}, "--moe-capacity-factor 0.0: give a number above 0"),
    ({"moe_capacity_factor": -1.0}, "--moe-capacity-factor -1.0: give a number above 0"),
    ({"moe_capacity_factor": NAN}, "--moe-capacity-factor nan"),
    ({"moe_capacity_factor": INF}, "--moe-capacity-factor inf"),
    ({"moe_eval_capacity_factor": 0.0}, "--moe-eval-capacity-factor 0.0: give a number above 0"),
    ({"moe_eval_capacity_factor": NAN}, "--moe-eval-capacity-factor nan"),
    ({"moe_eval_capacity_token_fraction": 0.0}, "0.0: give a fraction above 0 and at most 1"),
    ({"moe_eval_capacity_token_fraction": 1.1}, "1.1: give a fraction above 0 and at most 1"),
    ({"moe_eval_capacity_token_fraction": -0.5}, "-0.5: give a fraction above 0 and at most 1"),
    (
        {"moe_eval_capacity_token_fraction": 0.5, "moe_eval_capacity_factor": 1.0},
        "0.5: --moe-eval-capacity-factor already sets the capacity",
    ),
    (capped(moe_min_capacity=-1), "--moe-min-capacity -1: give 0 or more"),
    ({"moe_min_capacity": 8}, "--moe-min-capacity 8: experts have no capacity"),
    ({"moe_min_capacity": 0}, "--moe-min-capacity 0: experts have no capacity"),
    ({"moe_drop_policy": "probs"}, "--moe-drop-policy probs: experts have no capacity"),
    ({"moe_renormalize_after_drop": True}, "--moe-renormalize-after-drop True: experts have no"),
    (capped(moe_drop_policy="newest"), "--moe-drop-policy newest: one of: position"),
    *(
        (
            gate(name, moe_capacity_factor=1.0, **more),
            f"--moe-capacity-factor 1.0: the gate {name} sets the load of experts itself",
        )
        for name, more in [
            ("base", {}),
            ("dense", {}),
            ("expert_choice", {"moe_allow_noncausal": True}),
        ]
    ),
    (gate("base", moe_eval_capacity_factor=1.0), "--moe-eval-capacity-factor 1.0: the gate base"),
    (gate("base", moe_eval_capacity_token_fraction=0.5), "0.5: the gate base sets the load"),
    # auxiliary losses
    (
        {"moe_aux": "ballance=1"},
        "--moe-aux ballance=1: no loss named 'ballance' for the gate "
        "dense_to_sparse; one of: balance, switch, mi",
    ),
    ({"moe_aux": "balance=much"}, "give a number for balance: balance=0.01"),
    ({"moe_aux": "balance="}, "give a number for balance"),
    ({"moe_aux": "balance=-1"}, "give balance a coefficient of 0 or more"),
    ({"moe_aux": "balance=nan"}, "give balance a coefficient of 0 or more"),
    ({"moe_aux": "balance=inf"}, "give balance a coefficient of 0 or more"),
    ({"moe_aux": "z=1,z=2"}, "--moe-aux z=1,z=2: gives z twice"),
    ({"moe_aux": "z=1, none"}, "give none alone, or losses without it"),
    ({"moe_aux": "none,z=1"}, "--moe-aux none,z=1: give none alone, or losses without it"),
    ({"moe_aux": "balance:0.1"}, "no loss named 'balance:0.1'"),
    ({"moe_aux": "=1"}, "no loss named ''"),
    ({"moe_aux": "l1=1"}, "no loss named 'l1' for the gate dense_to_sparse"),
    ({"moe_aux": "efficiency=1"}, "no loss named 'efficiency' for the gate dense_to_sparse"),
    ({"moe_aux": "distill=0.3"}, "no loss named 'distill' for the gate dense_to_sparse"),
    (
        {"moe_aux": "diversity=1", "moe_scorer": "mlp"},
        "diversity: the gate dense_to_sparse has no vectors of experts here",
    ),
    ({"moe_aux": "simplicity=1", "moe_scorer": "mlp"}, "simplicity: the gate dense_to_sparse has"),
    (gate("hash", moe_aux="z=1"), "z: the gate hash has no logits"),
    (gate("hash", moe_aux="load=1"), "load: the gate hash has no logits"),
    (gate("hash", moe_aux="diversity=1"), "diversity: the gate hash has no vectors"),
    (gate("top_any", moe_aux="z=1"), "z: the gate top_any has no logits"),
    (gate("dselect_k", moe_aux="load=1"), "load: the gate dselect_k has no logits"),
    # scorers
    ({"moe_scorer": "quadratic"}, "one of: linear, mlp, gmm, cosine; unknown scorer"),
    ({"moe_scorer": "sigmoid"}, "--moe-scorer sigmoid: with --moe-gate dense_to_sparse one of"),
    (gate("switch", moe_scorer="sigmoid"), "--moe-scorer sigmoid: with --moe-gate switch one of"),
    (gate("top_p", moe_scorer="sigmoid"), "--moe-scorer sigmoid: with --moe-gate top_p one of"),
    ({"moe_scorer": "mlp", "moe_scorer_dim": 0}, "--moe-scorer-dim 0: give a width of at least 1"),
    ({"moe_scorer_dim": 32}, "--moe-scorer-dim 32: the scorer linear has no hidden width"),
    ({"moe_scorer": "cosine", "moe_scorer_dim": 32}, "the scorer cosine has no hidden width"),
    ({"moe_scorer": "mlp", "moe_scorer_dropout": 1.0}, "--moe-scorer-dropout 1.0: give 0"),
    ({"moe_scorer": "mlp", "moe_scorer_dropout": -0.1}, "--moe-scorer-dropout -0.1: give 0 or"),
    ({"moe_scorer_dropout": 0.1}, "--moe-scorer-dropout 0.1: the scorer linear has no"),
    ({"moe_scorer": "gmm", "moe_scorer_dropout": 0.1}, "the scorer gmm has no hidden layer"),
    (gate("hash", moe_scorer="mlp"), "--moe-scorer mlp: the gate hash does not use it"),
    (gate("base", moe_scorer="mlp"), "--moe-scorer mlp: the gate base does not use it"),
    (gate("top_any", moe_scorer="mlp"), "--moe-scorer mlp: the gate top_any does not use it"),
    # options of another gate
    (
        {"moe_top_k": 1},
        "--moe-top-k 1: the gate dense_to_sparse does not use it: leave it out, or "
        "use a gate that does (dselect_k, relu, top_k, top_p)",
    ),
    ({"moe_top_p": 0.5}, "--moe-top-p 0.5: the gate dense_to_sparse does not use it"),
    (
        gate("switch", moe_bias_update_rate=0.1),
        "--moe-bias-update-rate 0.1: the gate switch does n",
    ),
    ({"moe_bias_update_rate": -0.1}, "--moe-bias-update-rate -0.1: it is a step of the logits'"),
    ({"moe_temperature_scope": "layer"}, "--moe-temperature-scope layer: one of: global, token"),
    ({"moe_temperature_share": 1.5}, "--moe-temperature-share 1.5: it is a share of the run: give"),
    (
        {"moe_temperature_share": 0.5, "moe_temperature_updates": 10},
        "--moe-temperature-share 0.5: --moe-temperature-updates already sets the length",
    ),
    ({"moe_weight_scale": "one"}, "--moe-weight-scale one: one of: none, unit, mean, learned"),
    ({"moe_hash": "random"}, "--moe-hash random: the gate dense_to_sparse does not use it"),
    ({"moe_max_experts": 32}, "--moe-max-experts 32: the gate dense_to_sparse does not use it"),
    ({"moe_adapt_record_interval": 10}, "--moe-adapt-record-interval 10: the gate dense_to_sparse"),
    ({"moe_l1_factor": 1.5}, "--moe-l1-factor 1.5: the gate dense_to_sparse does not use it"),
    ({"moe_allow_noncausal": True}, "--moe-allow-noncausal True: the gate dense_to_sparse does"),
    (
        gate("top_k", moe_temperature_start=3.0),
        "--moe-temperature-start 3.0: the gate top_k does not use it",
    ),
    (gate("top_k", moe_hard_updates=5), "--moe-hard-updates 5: the gate top_k does not use it"),
    (gate("top_k", moe_second_expert_policy="all"), "--moe-second-expert-policy all: the gate"),
    (gate("gshard", moe_top_k=1), "--moe-top-k 1: the gate gshard does not use it"),
    (gate("switch", moe_top_k=1), "--moe-top-k 1: the gate switch does not use it"),
    (gate("switch", moe_jitter=0.01), "--moe-jitter 0.01: the gate switch does not use it"),
    (gate("top_p", moe_adapt_window=10), "--moe-adapt-window 10: the gate top_p does not use it"),
    (gate("dense", moe_gate_threshold=0.5), "--moe-gate-threshold 0.5: the gate dense does not"),
    # dense_to_sparse
    ({"moe_gate_threshold": 1.0}, "--moe-gate-threshold 1.0: gate values are probabilities"),
    ({"moe_gate_threshold": -0.1}, "--moe-gate-threshold -0.1"),
    ({"moe_gate_threshold": NAN}, "--moe-gate-threshold nan"),
    (
        {"moe_temperature_start": 0.2, "moe_temperature_end": 0.5},
        "--moe-temperature-start 0.2: the temperature decreases: give at least "
        "--moe-temperature-end",
    ),
    ({"moe_temperature_end": 0.0}, "--moe-temperature-end 0.0: give a temperature above 0"),
    ({"moe_temperature_start": NAN}, "--moe-temperature-start nan"),
    ({"moe_temperature_start": INF}, "--moe-temperature-start inf"),
    ({"moe_temperature_updates": -1}, "--moe-temperature-updates -1"),
    ({"max_update": 0}, "--moe-temperature-updates (not given): give it, or --max-update"),
    ({"moe_temperature_schedule": "step"}, "--moe-temperature-schedule step: one of: linear, exp"),
    ({"moe_hard_updates": -2}, "--moe-hard-updates -2"),
    ({"moe_gate_noise": "uniform"}, "--moe-gate-noise uniform: one of: gumbel, none"),
    ({"moe_combine_weights": "raw"}, "--moe-combine-weights raw: one of: gate, softmax"),
    ({"moe_eval_gate": "soft"}, "--moe-eval-gate soft: one of: reached, top1, dense"),
    # top_k
    (gate("top_k", moe_top_k=0), "--moe-top-k 0: give 1 or more"),
    (gate("top_k", moe_top_k=-2), "--moe-top-k -2: give 1 or more"),
    (gate("top_k", moe_top_k=17), "--moe-top-k 17: an MoE layer has 16 candidates: give at most"),
    (gate("top_k", moe_top_k=5, moe_expert_count="4,8"), "an MoE layer has 4 candidates"),
    (gate("top_k", moe_expert_count="1"), "--moe-top-k 2: an MoE layer has 1 candidates"),
    (gate("top_k", moe_top_k_weights="sum"), "--moe-top-k-weights sum: one of: raw, renormalized"),
    (gate("top_k", moe_sample_top_k=3), "--moe-sample-top-k 3: give 0 to --moe-top-k (2)"),
    (gate("top_k", moe_sample_top_k=-1), "--moe-sample-top-k -1: give 0 to --moe-top-k (2)"),
    (gate("top_k", moe_bias_update_rate=-0.1), "--moe-bias-update-rate -0.1: scores are at most 1"),
    (gate("top_k", moe_bias_update_rate=NAN), "--moe-bias-update-rate nan: scores are at most 1"),
    (gate("top_k", moe_bias_update_rate=2.0), "--moe-bias-update-rate 2.0: scores are at most 1"),
    (
        gate("top_k", moe_bias_update_rate=0.01, moe_sample_top_k=1),
        "--moe-sample-top-k 1: sampling ignores the bias",
    ),
    (
        gate("top_k", moe_batch_prioritized_routing=True),
        "--moe-batch-prioritized-routing True: experts have no capacity in training",
    ),
    (
        gate(
            "top_k",
            moe_batch_prioritized_routing=True,
            moe_capacity_factor=1.0,
            moe_drop_policy="probs",
        ),
        "--moe-batch-prioritized-routing already sets",
    ),
    # switch, gshard
    (gate("gshard", moe_expert_count="1"), "the gate gshard selects two candidates: give"),
    (gate("gshard", moe_second_expert_policy="best"), "--moe-second-expert-policy best: one of"),
    (
        gate("gshard", moe_batch_prioritized_routing=True),
        "--moe-batch-prioritized-routing True: experts have no capacity",
    ),
    (
        gate(
            "gshard",
            **capped(moe_normalize_gate_prob_before_dropping=True, moe_renormalize_after_drop=True),
        ),
        "--moe-normalize-gate-prob-before-dropping True: --moe-renormalize-after-drop normalises",
    ),
    # top_p
    (gate("top_p", moe_top_p=1.5), "--moe-top-p 1.5: it is a probability"),
    (gate("top_p", moe_top_p=-0.1), "--moe-top-p -0.1: it is a probability"),
    (gate("top_p", moe_top_p=NAN), "--moe-top-p nan: it is a probability"),
    (gate("top_p", moe_top_p_weights="raw"), "--moe-top-p-weights raw: one of: softmax, uniform"),
    (gate("top_p", moe_jitter=1.0), "--moe-jitter 1.0: give 0 or more and less than 1"),
    (gate("top_p", moe_top_p=0.0, moe_top_k=20), "--moe-top-k 20: an MoE layer has 16 candidates"),
    # top_any and its adaptation
    (grow(moe_top_any_ste="half"), "--moe-top-any-ste half: one of: full, active"),
    (grow(moe_top_any_weights="raw"), "--moe-top-any-weights raw: one of: uniform, score"),
    (grow(moe_top_any_scale=0.0), "--moe-top-any-scale 0.0: give a number above 0"),
    (grow(moe_top_any_scale=1000.0), "--moe-top-any-scale 1000.0: give a number"),
    (grow(moe_max_experts=-1), "--moe-max-experts -1: give 0 or more"),
    (grow(moe_max_experts=3), "--moe-max-experts 3: a layer starts with 4 experts"),
    (grow(moe_max_experts=0), "--moe-adapt-record-interval 100: there is no slot for another"),
    (grow(moe_adapt_record_interval=-5), "--moe-adapt-record-interval -5: give"),
    (grow(moe_adapt_window=-5), "--moe-adapt-window -5: give a number of updates"),
    (grow(moe_adapt_window=101), "--moe-adapt-window 101: give at most"),
    (grow(moe_adapt_record_interval=0), "--moe-adapt-window 20: routing is not recorded"),
    (grow(moe_adapt_source="best"), "--moe-adapt-source best: one of: most_used, keep"),
    (grow(moe_adapt_noise=-1.0), "--moe-adapt-noise -1.0: give 0 or more"),
    (grow(moe_adapt_source="keep", moe_adapt_noise=0.5), "--moe-adapt-noise 0.5: --moe-adapt"),
    # the others
    (gate("hash", moe_hash="md5"), "--moe-hash md5: one of: balanced, random, clustered"),
    (gate("stable", moe_stable_updates=-1), "--moe-stable-updates -1: give 0 or more"),
    (gate("stable", moe_stable_dim=0), "--moe-stable-dim 0: give a width of at least 1"),
    (gate("stable", max_update=0), "--moe-stable-updates (not given): give it, or --max-update"),
    (gate("dselect_k", moe_top_k=0), "--moe-top-k 0: give 1 or more"),
    (gate("dselect_k", moe_top_k=17), "--moe-top-k 17: "),
    (gate("dselect_k", moe_smooth_step_width=0.0), "--moe-smooth-step-width 0.0: give a width"),
    (gate("relu", moe_top_k=17), "--moe-top-k 17: "),
    (gate("relu", moe_l1_start=0.0), "--moe-l1-start 0.0: give a number above 0"),
    (gate("relu", moe_l1_factor=1.0), "--moe-l1-factor 1.0: give a factor above 1"),
    (
        gate("expert_choice", moe_allow_noncausal=True, moe_expert_choice_factor=0.0),
        "--moe-expert-choice-factor 0.0: ",
    ),
    (
        gate("expert_choice", moe_allow_noncausal=True, moe_expert_choice_factor=17.0),
        "--moe-expert-choice-factor 17.0: an MoE layer has 16 experts",
    ),
    # parts of fairseq that do not go with MoE layers
    (
        {"decoder_input_dim": 4, "share_decoder_input_output_embed": True},
        "--decoder-output-dim 8: with --share-decoder-input-output-embed it must be 4",
    ),
    ({"adaptive_input": True}, "--adaptive-input True: not supported by the MoE architectures"),
    ({"base_layers": 1}, "--base-layers 1: not supported by the MoE architectures"),
    ({"scale_heads": True}, "--scale-heads True: not supported by the MoE architectures"),
]


def test_there_are_enough_of_them():
    assert len(BAD) >= 150
    assert len({str(given) for given, _ in BAD}) == len(BAD)


@pytest.mark.parametrize("given, message", BAD, ids=[str(given) for given, _ in BAD])
def test_refused_in_one_line(moe_options, given, message):
    parts_of_fairseq = {"adaptive_input", "base_layers", "scale_heads"} & given.keys()
    options = moe_options(**{k: v for k, v in given.items() if k not in parts_of_fairseq})
    for name in parts_of_fairseq:
        setattr(options, name, given[name])
    with pytest.raises(OptionError) as error:
        validate(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    option, _, remedy = error.value.arguments
    assert str(error.value).startswith("--" + option.replace("_", "-"))
    assert remedy
