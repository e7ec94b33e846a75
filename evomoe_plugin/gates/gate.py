"""The abstract gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.config.values import parse_bool
from evomoe_plugin.gates import auxiliary
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.centred_input import CentredInput
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.lexical import LexicalPrior, initial_table
from evomoe_plugin.gates.logit_options import lexical_init
from evomoe_plugin.gates.scorers import SCORERS, Scorer, ScorerOptions
from evomoe_plugin.gates.shared_weights import SharedWeights
from evomoe_plugin.gates.weight_scale import WeightScale, sum_of_weights
from evomoe_plugin.routing import noise
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.plan import RoutingPlan, plan_from_mask
from evomoe_plugin.routing.stats import routing_stats

OptionsT = TypeVar("OptionsT", bound=ModelOptions)


class Gate(nn.Module, Generic[OptionsT]):
    """A gate for one MoE layer.

    A subclass is registered with `@register_gate(name)` and implements `route`. The fields of
    `Options` become flags and Hydra fields; their names start with `moe_`. A scorer is built if
    `Options` inherits from `ScorerOptions`.
    """

    Options: ClassVar[type] = ModelOptions
    """The dataclass of its options."""
    capabilities: ClassVar[Capabilities] = Capabilities()
    """What it can be combined with."""
    scorer: Scorer
    """Of gates whose `Options` inherit from `ScorerOptions`; others may set one of their own."""

    def __init__(self, info: LayerInfo, options: OptionsT):
        super().__init__()
        self.info = info
        self.use_fp32 = parse_bool("moe_gating_use_fp32", options.moe_gating_use_fp32)
        self.logit_factor, self.logit_warmup = 1.0, 0
        self.lexical: LexicalPrior | None = None
        self.centred_input: CentredInput | None = None
        if hasattr(self.Options, "moe_scorer"):
            self._make_scorer(cast(ScorerOptions, options))
        self.weight_scale: WeightScale | None = None
        if options.moe_weight_scale != "none":
            self.weight_scale = WeightScale(
                options.moe_weight_scale, info.num_candidates, options.moe_weight_total
            )
        self.shared_weights: SharedWeights | None = None
        if options.moe_shared_experts and options.moe_shared_combine != "add":
            self.shared_weights = SharedWeights(
                info.model_dim, options.moe_shared_experts, options.moe_shared_combine
            )
        self.aux_names = tuple(self.aux_coefficients(options))
        self.null_rate_target = options.moe_null_rate_target
        self.drop_policy = options.moe_drop_policy or "position"

    def _make_scorer(self, options: ScorerOptions) -> None:
        info = self.info
        self.scorer = SCORERS[options.moe_scorer](info.model_dim, info.num_candidates, options)
        self.logit_factor = options.moe_gate_lr_factor
        self.logit_warmup = options.moe_gate_warmup_updates
        scale = options.moe_gate_init_scale / self.logit_factor
        if scale != 1.0:
            with torch.no_grad():
                for parameter in self.scorer.parameters():
                    parameter.mul_(scale)
        if lexical_init(options)[0] != "none":
            table_VC = initial_table(
                options,
                vocabulary=len(info.token_counts_V),
                num_experts=info.num_experts,
                num_candidates=info.num_candidates,
                layer_id=info.layer_id,
                seed=info.seed,
            )
            self.lexical = LexicalPrior(table_VC, options)
        if options.moe_gate_centre:
            self.centred_input = CentredInput(info.model_dim, options.moe_gate_centre)

    @classmethod
    def validate(cls, options: OptionsT, expert_counts: Sequence[int]) -> list[str]:
        """Check the gate's own options; the options that all gates share have been checked.

        Returns:
            warnings.
        Raises:
            OptionError: the options cannot work.
        """
        return []

    @classmethod
    def has_fixed_k(cls, options: OptionsT) -> bool:
        """Whether every token goes to the same number of candidates, so that a capacity depends
        only on the number of tokens and not on later tokens."""
        return cls.capabilities.fixed_k

    @classmethod
    def weights_sum_to_one(cls, options: OptionsT) -> bool:
        """Whether the weights of every token with a selected candidate sum to 1."""
        return cls.capabilities.unit_weights

    @classmethod
    def aux_coefficients(cls, options: OptionsT) -> Mapping[str, float]:
        """The auxiliary losses that `options` select and their coefficients, in that order.

        Raises:
            OptionError: as `gates.auxiliary.coefficients`.
        """
        has_vectors = cls.capabilities.vectors or (
            hasattr(cls.Options, "moe_scorer")
            and SCORERS[cast(ScorerOptions, options).moe_scorer].HAS_VECTORS
        )
        return auxiliary.coefficients(options, cls.capabilities, has_vectors)

    @classmethod
    def renormalizes_after_drop(cls, options: OptionsT) -> bool:
        """Whether the weights a capacity leaves are scaled to the sum before dropping."""
        return options.moe_renormalize_after_drop

    @property
    def num_experts(self) -> int:
        """E."""
        return self.info.num_experts

    def vectors(self) -> Tensor:
        """A vector for each candidate, [C, any]."""
        return self.logit_factor * self.scorer.vectors()

    def active(self) -> Tensor | None:
        """bool [C]: candidates that can be selected now; None: always all."""
        return None

    def zero_stats(self, device: torch.device) -> dict[str, Tensor]:
        """The statistics of the gate's choices for an empty batch: scalars, which are logged, and
        vectors for `finish_update`."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        stats = {
            **dict.fromkeys(self.capabilities.stats, zero),
            st.REQUESTED_C: zero.expand(self.info.num_candidates),
        }
        if self.centred_input is not None:
            stats[st.GATE_INPUT_D] = zero.expand(self.info.model_dim)
        if self._follows_weights:
            stats[st.WEIGHTS_2] = zero.expand(2)
        return stats

    @property
    def _follows_weights(self) -> bool:
        return self.weight_scale is not None and self.weight_scale.kind == "mean"

    @property
    def changes_after_updates(self) -> bool:
        """Whether `finish_update` must be called."""
        return self.learns_after_updates or self.centred_input is not None or self._follows_weights

    def finish_update(
        self, num_updates: int, own: Mapping[str, Tensor], layers: Mapping[str, Tensor]
    ) -> None:
        """Change the buffers of running means, and call `after_update` if the gate has one."""
        if self.centred_input is not None:
            self.centred_input.update(own[st.GATE_INPUT_D], own[st.TOKENS])
        if self.weight_scale is not None and self._follows_weights:
            self.weight_scale.update(*own[st.WEIGHTS_2])
        if self.learns_after_updates:
            self.after_update(num_updates, own, layers)

    @property
    def learns_after_updates(self) -> bool:
        """Whether `after_update` must be called."""
        return type(self).after_update is not Gate.after_update

    def after_update(
        self, num_updates: int, own: Mapping[str, Tensor], layers: Mapping[str, Tensor]
    ) -> None:
        """Change buffers after an update, by its routing on all ranks.

        Args:
            num_updates: completed updates, this one included.
            own: this layer's statistics, summed over the update.
            layers: the statistics of all layers, name -> [L] or [L, E].
        """

    def flops_per_token(self) -> int:
        """FLOPs of the matmuls for one token."""
        return sum(
            2 * parameter.numel()
            for name, parameter in self.named_parameters()
            if parameter.dim() == 2 and not name.startswith("lexical.")  # a lookup
        )

    def score(self, x_TD: Tensor, context: GateContext | None = None) -> Tensor:
        """The scorer's logits with what `LogitOptions` add, [T, C].

        Args:
            context: as given to `route`.
        Raises:
            ValueError: the options need a context, and there is none.
        """
        if self.centred_input is not None:
            x_TD = self.centred_input(x_TD)
        logits_TC = self.scorer(x_TD)
        if self.lexical is None:
            return logits_TC if self.logit_factor == 1.0 else self.logit_factor * logits_TC
        if context is None:
            raise ValueError("--moe-lexical: the gate must call self.score(x_TD, context)")
        n = context.num_updates
        prior_TC = self.lexical(context.token_ids_T, logits_TC.dtype)
        return self.scorer_factor(n) * logits_TC + self.lexical.strength(n) * prior_TC

    def scorer_factor(self, num_updates: int) -> float:
        """What the scorer's logits are multiplied by after `num_updates` updates."""
        if not self.logit_warmup:
            return self.logit_factor
        return self.logit_factor * min(1.0, (num_updates + 1) / self.logit_warmup)

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        """Select candidates for tokens, in training or evaluation mode (`training`).

        Args:
            x_TD: tokens including padding, in fp32 unless `--moe-gating-use-fp32 false`.
        """
        raise NotImplementedError

    def forward(self, x_TD: Tensor, context: GateContext) -> RoutingPlan:
        """Route tokens `x_TD`.

        The plan's `aux` holds the losses of `aux_names`, in that order.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.use_fp32 and x_TD.dtype != torch.float64:
                x_TD = x_TD.float()
            choice = self.route(x_TD, context)
            if context.token_mask_T is not None:
                mask_TC = choice.mask_TC & context.token_mask_T.unsqueeze(1)
                choice = dataclasses.replace(choice, mask_TC=mask_TC)
            aux = self._aux(choice, context)
            weights_TC, shared_weights_TS = choice.weights_TC, None
            if self.weight_scale is not None:
                weights_TC = self.weight_scale(weights_TC, choice.mask_TC)
            if self.shared_weights is not None:
                routed_T, shared_weights_TS = self.shared_weights(x_TD, choice)
                weights_TC = weights_TC * routed_T.unsqueeze(1)
            with torch.no_grad():
                stats = routing_stats(choice, context.token_mask_T, self.num_experts)
                if self.centred_input is not None:
                    stats[st.GATE_INPUT_D] = self.centred_input.sum_of(x_TD, context.token_mask_T)
                if self._follows_weights:
                    stats[st.WEIGHTS_2] = sum_of_weights(choice.weights_TC, choice.mask_TC)
            return self._plan(
                choice,
                weights_TC,
                context,
                aux=aux,
                stats=stats,
                shared_weights_TS=shared_weights_TS,
            )

    def _aux(self, choice: Choice, context: GateContext) -> dict[str, Tensor]:
        vectors_CD, prior_TC = None, None
        if any(auxiliary.takes(name, "vectors_CD") for name in self.aux_names):
            # As precise as the gate computes, whatever the dtype of the parameters.
            vectors_CD = self.vectors().to(choice.probs_TC.dtype)
        if self.lexical is not None and "consistency" in self.aux_names:
            prior_TC = self.lexical(context.token_ids_T, choice.probs_TC.dtype)
        given = {
            **vars(choice),
            "prior_TC": prior_TC,
            "weight_T": context.loss_weights_T,
            "active_C": self.active(),
            "vectors_CD": vectors_CD,
            "num_null": self.info.num_null,
            "target": self.null_rate_target,
        }
        return {
            name: choice.aux[name] if name in choice.aux else auxiliary.compute(name, given)
            for name in self.aux_names
        }

    def _plan(
        self, choice: Choice, weights_TC: Tensor, context: GateContext, **fields: Any
    ) -> RoutingPlan:
        E = self.num_experts
        mask_TC = choice.mask_TC
        if self.info.num_null:
            null_TC = weights_TC.detach()[:, E:].masked_fill(~mask_TC[:, E:], 0.0)
            null_mass_T = null_TC.sum(1)
            fields["null_mass_T"] = null_mass_T
            fields["stats"][st.NULL_MASS] = null_mass_T.sum(dtype=torch.float64)
        plan = plan_from_mask(mask_TC[:, :E], weights_TC[:, :E], choice.most_pairs, **fields)
        priority_TC = self._priority(choice, context)
        if priority_TC is None:
            return plan
        priority_N = priority_TC.detach()[plan.token_ids_N, plan.expert_ids_N]
        return dataclasses.replace(plan, priority_N=priority_N)

    def _priority(self, choice: Choice, context: GateContext) -> Tensor | None:
        """Priorities under a capacity, by `--moe-drop-policy`."""
        if self.drop_policy == "probs":
            return choice.probs_TC
        if self.drop_policy == "random":
            keys_T = context.noise_keys_T
            if keys_T is None:  # evaluation: an arbitrary but fixed order
                keys_T = torch.arange(choice.mask_TC.size(0), device=choice.mask_TC.device)
            return noise.uniform(noise.fold(keys_T, _DROP_STREAM), choice.mask_TC.size(1))
        return choice.priority_TC


_DROP_STREAM = 0xD809  # separates these random numbers from those of gates
