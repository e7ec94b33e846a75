"""The keywords of `MoELayer` with each gate, for type checkers and completion.

They repeat the dataclasses of the gates' options, of which type checkers cannot make keywords;
`tests/test_layer_keywords.py` holds them equal. What they mean: docs/options.md.
"""

from collections.abc import Sequence
from typing import Literal, Required, TypedDict


class LayerKeywords(TypedDict, total=False):
    """With every gate."""

    activation: str
    gated: bool
    dropout: float
    layer_id: int
    seed: int
    max_updates: int | None
    token_counts: Sequence[int]
    gating_use_fp32: bool | str
    aux: str | None
    weight_scale: str
    weight_total: float
    shared_experts: int
    shared_ffn_dim: int
    shared_combine: str
    null_experts: int
    null_rate_target: float | None
    capacity_factor: float | None
    eval_capacity_factor: float | None
    eval_capacity_token_fraction: float
    min_capacity: int | None
    drop_policy: str | None
    renormalize_after_drop: bool


class ScorerKeywords(LayerKeywords, total=False):
    """With gates that have a scorer."""

    lexical: str
    lexical_lr_factor: float
    lexical_decay_updates: int
    gate_init_scale: float
    gate_lr_factor: float
    gate_warmup_updates: int
    gate_centre: float
    scorer: str
    scorer_dim: int
    scorer_dropout: float


class TopKCountKeywords(LayerKeywords, total=False):
    """With gates that select k candidates per token."""

    top_k: int


class PriorityKeywords(LayerKeywords, total=False):
    """With gates that can order tokens by confidence."""

    batch_prioritized_routing: bool


class BalanceBiasKeywords(LayerKeywords, total=False):
    """With gates that can balance the load by a bias."""

    bias_update_rate: float


class AnyGate(LayerKeywords, total=False):
    """With a gate whose name is not known to the type checker."""

    gate: Required[str]


class Base(LayerKeywords, total=False):
    gate: Required[Literal["base"]]


class Dense(ScorerKeywords, total=False):
    gate: Required[Literal["dense"]]


class DenseToSparse(BalanceBiasKeywords, ScorerKeywords, total=False):
    gate: Literal["dense_to_sparse"]  # the default
    temperature_start: float
    temperature_end: float
    temperature_updates: int | None
    temperature_share: float
    temperature_scope: str
    temperature_schedule: str
    gate_threshold: float
    hard_updates: int | None
    hard_top_k: int
    gate_noise: str
    combine_weights: str
    eval_gate: str


class DSelectK(TopKCountKeywords, total=False):
    gate: Required[Literal["dselect_k"]]
    smooth_step_width: float


class ExpertChoice(ScorerKeywords, total=False):
    gate: Required[Literal["expert_choice"]]
    expert_choice_factor: float
    allow_noncausal: bool


class GShard(PriorityKeywords, ScorerKeywords, total=False):
    gate: Required[Literal["gshard"]]
    second_expert_policy: str
    normalize_gate_prob_before_dropping: bool


class Hash(LayerKeywords, total=False):
    gate: Required[Literal["hash"]]
    hash: str


class Relu(TopKCountKeywords, ScorerKeywords, total=False):
    gate: Required[Literal["relu"]]
    l1_start: float
    l1_factor: float


class Stable(LayerKeywords, total=False):
    gate: Required[Literal["stable"]]
    stable_updates: int | None
    stable_dim: int


class Switch(ScorerKeywords, total=False):
    gate: Required[Literal["switch"]]


class TopAny(LayerKeywords, total=False):
    gate: Required[Literal["top_any"]]
    top_any_ste: str
    top_any_weights: str
    top_any_scale: float
    top_any_learned_scale: bool


class TopK(TopKCountKeywords, PriorityKeywords, BalanceBiasKeywords, ScorerKeywords, total=False):
    gate: Required[Literal["top_k"]]
    top_k_weights: str
    sample_top_k: int


class TopP(TopKCountKeywords, ScorerKeywords, total=False):
    gate: Required[Literal["top_p"]]
    top_p: float
    top_p_weights: str
    jitter: float
