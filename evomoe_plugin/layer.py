"""The MoE layer: combines gate and experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomoe_plugin.config.options import (
    ModelOptions,
    expert_ffn_dim,
    has_gated_experts,
    shared_ffn_dim,
)
from evomoe_plugin.config.values import parse_bool
from evomoe_plugin.dispatch.all_to_all import TRANSPORT_DTYPES, Exchange, Meter
from evomoe_plugin.dispatch.parallel_ffn import ParallelExpertFFN
from evomoe_plugin.dispatch.process_groups import ExpertGroups, expert_groups
from evomoe_plugin.experts import ExpertFFN, ExpertStack, SharedExperts
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.gradients import attach_zero_grads
from evomoe_plugin.gates.registry import gate_class
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.capacity import UNLIMITED, CapacityRule, apply_capacity
from evomoe_plugin.routing.plan import RoutingPlan, first_expert_plan
from evomoe_plugin.routing.stability import token_routing


class MoELayer(nn.Module):
    """Route tokens to experts and sum their weighted outputs.

    The layer keeps no state between forward pass and loss: auxiliary losses and statistics are
    outputs, so that activation checkpointing and FSDP can neither lose nor double them. The losses
    are one tensor, in the order of `gate.aux_names`: checkpointing passes no gradients through
    containers.

    Args:
        gate: of the layer.
        experts: routed experts, all of them or sharded over ranks.
        shared: experts that every token goes to.
        capacity: of an expert in training.
        eval_capacity: of an expert in evaluation.
        spawn_updates: length of the dense phase in updates, in which every token goes to expert 0
            and the gate is not used (EvoMoE's first phase, arXiv 2112.14397); the schedules of the
            gate start after it.
        groups: process groups of sharded experts; `experts` is a `ParallelExpertFFN` then.
        meter: of the all-to-all exchanges.
    """

    def __init__(
        self,
        gate: Gate,
        experts: ExpertStack,
        shared: SharedExperts | None = None,
        capacity: CapacityRule = UNLIMITED,
        eval_capacity: CapacityRule = UNLIMITED,
        spawn_updates: int = 0,
        groups: ExpertGroups | None = None,
        meter: Meter | None = None,
    ):
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared = shared
        self.capacity = capacity
        self.eval_capacity = eval_capacity
        self.spawn_updates = spawn_updates
        self.groups = groups
        self.meter = meter
        self.counts_weights = False  # whether statistics include WEIGHT_E
        # Of parameters of the experts, [E, ...] -> [1, ...], if the dense phase is to have expert 0
        # without the others, which other ranks hold.
        self.first_row: Callable[[Tensor], Tensor] | None = None
        # FSDP flattens them into one parameter.
        self.expert_names = tuple(experts.state_dict())
        # In the checkpoint: evaluation routes as training did at that update.
        self.num_updates: Tensor
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._num_updates = 0
        self.register_load_state_dict_post_hook(_read_num_updates)
        if groups is not None:
            self.register_state_dict_post_hook(_leave_experts_out)
            self.register_load_state_dict_pre_hook(_take_own_experts)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate.num_experts

    @property
    def held_experts(self) -> slice:
        """The experts whose weights this rank holds."""
        return slice(None) if self.groups is None else self.groups.own(self.num_experts)

    def set_num_updates(self, num_updates: int) -> None:
        """Set the number of completed updates, which schedules depend on."""
        if num_updates != self._num_updates:
            self._num_updates = num_updates
            self.num_updates.fill_(num_updates)

    @property
    def in_dense_phase(self) -> bool:
        """Whether only expert 0 is used, without a gate."""
        return self._num_updates < self.spawn_updates

    def gate_updates(self, num_updates: int) -> int:
        """Completed updates since the dense phase, which the gate's schedules count."""
        return max(0, num_updates - self.spawn_updates)

    def context(
        self,
        token_mask_T: Tensor | None = None,
        token_keys_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        token_weights_T: Tensor | None = None,
    ) -> GateContext:
        """The inputs of the gate."""
        return GateContext(
            self.gate_updates(self._num_updates),
            token_mask_T,
            token_keys_T,
            token_ids_T,
            token_weights_T,
            noise_key=(self.gate.info.seed, self._num_updates, self.gate.info.layer_id),
        )

    def forward(
        self,
        x_TD: Tensor,
        token_mask_T: Tensor | None = None,
        token_keys_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        token_weights_T: Tensor | None = None,
        with_token_routing: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Apply the layer.

        Args:
            x_TD: tokens.
            token_mask_T: bool, False for padding, which is neither routed nor counted.
            token_keys_T: int64 keys of the tokens (`routing.noise.sequence_keys`); None: no noise.
            token_ids_T: int64 token ids, for gates that use them.
            token_weights_T: weight of each token in the auxiliary losses; None: 1.
            with_token_routing: add `routing.stability.token_routing` to the statistics.
        Returns:
            y_TD, zeros for tokens without an expert; the auxiliary losses, [A] with gradient;
            the statistics by name (`routing.stats`), detached.
        """
        if self.in_dense_phase:
            plan = self._first_expert_plan(x_TD, token_mask_T)
        else:
            context = self.context(token_mask_T, token_keys_T, token_ids_T, token_weights_T)
            plan = self._within_capacity(self.gate(x_TD, context))
        y_TD = self._outputs(x_TD, plan)
        # For parameters that the gate does not use in this update or with these losses.
        y_TD = attach_zero_grads(y_TD, self.gate)
        losses = list(plan.aux.values())
        aux = torch.stack(losses) if losses else x_TD.new_zeros(0, dtype=torch.float32)
        stats = {**plan.stats, **self._weights(plan), **self._exchanged(plan)}
        if with_token_routing:
            stats |= token_routing(plan)
        return y_TD, aux, stats

    def zero_stats(self) -> dict[str, Tensor]:
        """The statistics of a forward pass without tokens, for a layer that LayerDrop skips."""
        device = self.num_updates.device
        plan = self._first_expert_plan(torch.zeros(0, 1, device=device), None)
        gate_stats = {} if self.in_dense_phase else self.gate.zero_stats(device)
        return {**plan.stats, **gate_stats, **self._weights(plan), **self._exchanged(plan)}

    def _first_expert_plan(self, x_TD: Tensor, token_mask_T: Tensor | None) -> RoutingPlan:
        names = [st.DROPPED] if self._has_capacity else []
        if self.gate.info.num_null:
            names += [st.NULL_PAIRS, st.NULL_MASS]
        return first_expert_plan(
            x_TD, token_mask_T, self.num_experts, aux_names=self.gate.aux_names, zero_stats=names
        )

    def _weights(self, plan: RoutingPlan) -> dict[str, Tensor]:
        if not self.counts_weights:
            return {}
        # The first place is that of pairs that a plan only reserves.
        sum_E1 = torch.zeros(
            self.num_experts + 1, dtype=torch.float64, device=plan.weights_N.device
        )
        sum_E1.index_add_(0, plan.expert_ids_N + 1, plan.weights_N.detach().double())
        return {st.WEIGHT_E: sum_E1[1:]}

    def _exchanged(self, plan: RoutingPlan) -> dict[str, Tensor]:
        """Statistics of the pairs that this rank sends to others, summed over ranks later."""
        if self.groups is None:
            return {}
        to_R = plan.tokens_per_expert_E.double().view(self.groups.size, -1).sum(1)
        to_R[self.groups.rank] = 0
        sent_R = torch.zeros_like(to_R)
        sent_R[self.groups.rank] = to_R.sum()
        return {st.SENT_R: sent_R, st.RECEIVED_R: to_R}

    def _outputs(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        if self.shared is None:
            return self._expert_outputs(x_TD, plan)
        shared = partial(self.shared, x_TD, plan.shared_weights_TS)
        if self.groups is None:
            return self._expert_outputs(x_TD, plan) + shared()
        y_TD, shared_TD = self.experts(x_TD, plan, overlap_fn=shared)  # overlaps the exchange
        return y_TD + shared_TD

    def _expert_outputs(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        experts: Any = self.experts
        if self.in_dense_phase and self.first_row is not None:
            return experts.forward_first(x_TD, plan, self.first_row)
        return experts(x_TD, plan)

    def _within_capacity(self, plan: RoutingPlan) -> RoutingPlan:
        if not self._has_capacity:
            return plan
        rule = self.capacity if self.training else self.eval_capacity
        dropped = torch.zeros((), dtype=torch.float64, device=plan.token_ids_N.device)
        if rule:
            active_C, experts = self.gate.active(), self.num_experts
            capacity = rule.capacity(
                num_pairs=plan.tokens_per_expert_E.sum(),
                num_tokens=plan.stats[st.TOKENS],
                num_experts=experts if active_C is None else active_C[:experts].sum().clamp(min=1),
            )
            plan, dropped_E = apply_capacity(plan, capacity, renormalize=rule.renormalize)
            dropped = dropped_E.sum().double()
        load_E = plan.tokens_per_expert_E.double()
        stats = {**plan.stats, st.LOAD_E: load_E, st.PAIRS: load_E.sum(), st.DROPPED: dropped}
        return dataclasses.replace(plan, stats=stats)

    @property
    def _has_capacity(self) -> bool:
        return bool(self.capacity or self.eval_capacity)


def _read_num_updates(layer: MoELayer, _incompatible_keys) -> None:
    layer._num_updates = int(layer.num_updates)


def _leave_experts_out(_layer: MoELayer, state: dict[str, Any], prefix: str, _metadata) -> None:
    """Leave sharded experts out: checkpoints gather them from all ranks."""
    for name in [name for name in state if name.startswith(f"{prefix}experts.")]:
        del state[name]


def _take_own_experts(layer: MoELayer, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep this rank's experts of a state dict that has all of them."""
    for name in layer.expert_names:
        key = f"{prefix}experts.{name}"
        if key in state and len(state[key]) == layer.num_experts:
            state[key] = state[key][layer.held_experts]


def build_layer(
    info: LayerInfo,
    options: ModelOptions,
    activation: Callable[[Tensor], Tensor],
    dropout: nn.Module | None = None,
) -> MoELayer:
    """Build the layer that the options describe.

    Args:
        info: the position of the layer.
        options: of the model and of the gate, checked.
        activation: of the experts.
        dropout: applied to their hidden units.
    """
    groups = expert_groups(options.moe_expert_parallel_size)
    meter = None if groups is None else Meter()
    ffn = partial(
        ExpertFFN,
        model_dim=info.model_dim,
        activation=activation,
        dropout=dropout,
        gated=has_gated_experts(options),
    )
    gate = gate_class(options.moe_gate)(info, options)
    shared = None
    if options.moe_shared_experts:
        shared = SharedExperts(ffn(options.moe_shared_experts, ffn_dim=shared_ffn_dim(options)))
    make: Callable[..., ExpertStack] = ffn
    if groups is not None and meter is not None:
        transport = TRANSPORT_DTYPES[options.moe_ep_wire_dtype]
        make = partial(
            ParallelExpertFFN,
            **ffn.keywords,
            groups=groups,
            chunks=options.moe_ep_chunks,
            exchange=partial(Exchange, groups.exchange, meter=meter, transport_dtype=transport),
        )
    trainable = parse_bool("moe_spawn_trainable_masked", options.moe_spawn_trainable_masked)
    capacity = partial(
        CapacityRule,
        minimum=options.moe_min_capacity or 0,
        renormalize=gate.renormalizes_after_drop(options),
    )
    return MoELayer(
        gate=gate,
        experts=make(info.num_experts, ffn_dim=expert_ffn_dim(options), freezes=not trainable),
        shared=shared,
        capacity=capacity(options.moe_capacity_factor or 0.0),
        eval_capacity=capacity(
            options.moe_eval_capacity_factor or 0.0,
            max(options.moe_eval_capacity_token_fraction, 0.0),
        ),
        spawn_updates=options.moe_spawn_updates or 0,
        groups=groups,
        meter=meter,
    )
