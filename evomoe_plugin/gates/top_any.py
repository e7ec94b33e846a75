"""The top-any gate: each token goes to all experts whose threshold its score exceeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, flag
from evomoe_plugin.config.values import check_choice, check_number
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.record import RoutingRecord
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.topk_common import best
from evomoe_plugin.routing import losses
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.choice import Choice


@dataclass
class TopAnyOptions(ModelOptions):
    """Options of the top-any gate and of the adaptive process that adds and removes experts."""

    moe_top_any_ste: str = flag(
        "full",
        "straight-through gradients of scores and thresholds: full (of all experts, also through "
        "the number k of a token's experts) or active (of selected experts only, with k a "
        "constant, as published)",
    )
    moe_top_any_weights: str = flag(
        "uniform", "weights of a token's k experts: uniform (1/k) or score (normalised scores)"
    )
    moe_top_any_scale: float = flag(1.0, "scale of cosines and thresholds before the sigmoid")
    moe_top_any_learned_scale: bool = flag(
        False, "learn the scale, starting at --moe-top-any-scale"
    )
    moe_max_experts: int = flag(
        0,
        "expert slots of an MoE layer, which starts with --moe-expert-count experts (0: no "
        "further slots)",
    )
    moe_adapt_record_interval: int = flag(
        0,
        "interval in updates at which experts without tokens are removed and one is added for "
        "tokens without experts (0: never)",
    )
    moe_adapt_window: int = flag(
        0,
        "experts are added and removed by the routing of the last so many updates of each "
        "interval (0: the whole interval)",
    )
    moe_adapt_source: str = flag(
        "most_used",
        "weights of an added expert: most_used (a copy of the most used expert, with noise) or "
        "keep (the present weights of its slot)",
    )
    moe_adapt_noise: float = flag(
        0.01, "standard deviation of that noise, relative to that of the weights"
    )


@register_gate("top_any")
class TopAnyGate(Gate[TopAnyOptions]):
    """y = 1/k Σ E_e(x) over the k experts with sigmoid(a cos(x, w_e)) > sigmoid(a g_e).

    w_e, g_e and optionally the scale a (at most 100) are learned. A token that reaches no threshold
    has no expert in training and its best expert in evaluation. Only active experts can be
    selected: a mask in the checkpoint, which `evolve.adapt` changes.

    Straight-through gradients: the indicator g_e of an expert has the gradient of score -
    threshold. `full`: for every active expert, also through k = Σ g_e. `active`: for selected ones,
    and k is a constant. Scores as weights are normalised by Σ g_e s_e, which has its gradient in
    both, as has k in the loss `balance`.

    Source: DynMoE (arXiv 2405.14297); `active` is its DeepSpeed code (`topanygating_opt`). Its
    Tutel code, also for selected experts only, differentiates k.
    """

    Options = TopAnyOptions
    # No logits: scores are compared with thresholds, not with each other. No null experts: a token
    # may have no expert anyway.
    capabilities = Capabilities(
        losses=("efficiency",),
        default_aux="diversity=1,simplicity=1",
        logits=False,
        null_experts=False,
        zero_init=False,
        vectors=True,
        unit_weights=True,
    )

    active_E: Tensor
    record: RoutingRecord

    def __init__(self, info: LayerInfo, options: TopAnyOptions):
        super().__init__(info, options)
        E, D = info.num_experts, info.model_dim
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(E, D)))
        self.threshold = nn.Parameter(torch.zeros(E))
        self.scale = options.moe_top_any_scale
        self.log_scale: nn.Parameter | None = None
        if options.moe_top_any_learned_scale:
            self.log_scale = nn.Parameter(torch.full((1,), math.log(self.scale)))
        self.ste = options.moe_top_any_ste
        self.weighted_by_score = options.moe_top_any_weights == "score"
        self.adapt_source = options.moe_adapt_source
        self.adapt_noise = options.moe_adapt_noise
        self.register_buffer("active_E", torch.arange(E) < (info.start_experts or E))
        interval = options.moe_adapt_record_interval
        self.record = RoutingRecord(E, D, interval, options.moe_adapt_window or interval)

    @classmethod
    def validate(cls, options: TopAnyOptions, expert_counts: Sequence[int]) -> list[str]:
        check_choice(options, "moe_top_any_ste", ("full", "active"))
        check_choice(options, "moe_top_any_weights", ("uniform", "score"))
        check_number(
            options, "moe_top_any_scale", "(0, 100]", "give a number above 0 and at most 100"
        )
        start, most = max(expert_counts), options.moe_max_experts
        check_number(options, "moe_max_experts", "[0, inf)", "give 0 or more")
        if 0 < most < start:
            raise OptionError(
                "moe_max_experts",
                most,
                f"a layer starts with {start} experts: give at least that, or a "
                "smaller --moe-expert-count",
            )
        return cls._validate_adaptation(options, min(expert_counts))

    @classmethod
    def _validate_adaptation(cls, options: TopAnyOptions, start: int) -> list[str]:
        interval = options.moe_adapt_record_interval
        for option in ("moe_adapt_record_interval", "moe_adapt_window"):
            check_number(options, option, "[0, inf)", "give a number of updates, 0 or more")
        window = options.moe_adapt_window
        if window and not interval:
            raise OptionError(
                "moe_adapt_window",
                window,
                "routing is not recorded: leave it out, or give --moe-adapt-record-interval",
            )
        if window > interval:
            raise OptionError(
                "moe_adapt_window", window, f"give at most --moe-adapt-record-interval ({interval})"
            )
        if interval and options.moe_max_experts <= start:
            raise OptionError(
                "moe_adapt_record_interval",
                interval,
                "there is no slot for another expert: give --moe-max-experts above "
                f"{start}, or a smaller --moe-expert-count",
            )
        check_choice(options, "moe_adapt_source", ("most_used", "keep"))
        check_number(options, "moe_adapt_noise", "[0, inf)", "give 0 or more")
        if options.moe_adapt_source == "keep" and (
            options.moe_adapt_noise != TopAnyOptions.moe_adapt_noise
        ):
            raise OptionError(
                "moe_adapt_noise",
                options.moe_adapt_noise,
                "--moe-adapt-source keep copies nothing: leave it out, or give most_used",
            )
        if options.moe_max_experts <= start or interval:
            return []
        return [
            f"--moe-max-experts {options.moe_max_experts} without --moe-adapt-record-interval: "
            "experts are added only if the model's begin_record_routing() and "
            "end_record_routing() are called"
        ]

    def vectors(self) -> Tensor:
        return self.weight

    def active(self) -> Tensor:
        return self.active_E

    def _scale(self, dtype: torch.dtype) -> Tensor | float:
        if self.log_scale is None:
            return self.scale
        return self.log_scale.to(dtype).clamp(max=math.log(100)).exp()

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        dtype, scale = x_TD.dtype, self._scale(x_TD.dtype)
        directions_ED = F.normalize(self.weight.to(dtype), dim=1)
        logits_TE = scale * F.linear(F.normalize(x_TD, dim=1), directions_ED)
        threshold_E = scale * self.threshold.to(dtype)
        # Not the sigmoids, which saturate.
        mask_TE = (logits_TE > threshold_E) & self.active_E
        stats = dict(self.record.measure(x_TD, mask_TE, context.token_mask_T, context.num_updates))
        if not self.training:
            mask_TE = mask_TE | self._best_of_unrouted(logits_TE, mask_TE)

        scores_TE = torch.sigmoid(logits_TE)
        reached_TE = self._indicator(scores_TE - torch.sigmoid(threshold_E), mask_TE)
        routed_T1 = mask_TE.any(1, keepdim=True)
        share_TE = _shares(reached_TE, routed_T1)
        weights_TE = share_TE
        if self.weighted_by_score:
            weights_TE = _shares(reached_TE * scores_TE, routed_T1)
        elif self.ste == "active":
            weights_TE = reached_TE / mask_TE.sum(1, keepdim=True).clamp(min=1)
        stats[st.EXPERTS] = self.active_E.sum().double() * context.num_tokens(x_TD)
        return Choice(
            mask_TE,
            weights_TE,
            share_TE,
            logits_TE,
            aux=self._losses(reached_TE, share_TE, mask_TE, context.loss_weights_T),
            stats=stats,
        )

    def _best_of_unrouted(self, logits_TE: Tensor, mask_TE: Tensor) -> Tensor:
        """bool: the best active expert of each token that has none."""
        best_TE = best(logits_TE.masked_fill(~self.active_E, float("-inf")))
        return best_TE & ~mask_TE.any(1, keepdim=True)

    def _indicator(self, margin_TE: Tensor, mask_TE: Tensor) -> Tensor:
        """`mask_TE` as 0 and 1, with straight-through gradients of the margin."""
        learns_TE = mask_TE if self.ste == "active" else self.active_E
        margin_TE = margin_TE.masked_fill(~learns_TE, 0.0)
        return mask_TE.to(margin_TE.dtype) + (margin_TE - margin_TE.detach())

    def _losses(
        self, reached_TE: Tensor, share_TE: Tensor, mask_TE: Tensor, weight_T: Tensor | None
    ) -> Mapping[str, Tensor]:
        aux = {}
        num_active = self.active_E.sum()
        if "efficiency" in self.aux_names:
            # Inactive experts are never selected: the sum is over active ones.
            aux["efficiency"] = losses.weighted_mean(reached_TE, weight_T).sum() / num_active
        if "balance" in self.aux_names:
            # As published, over active experts and tokens with an expert.
            routed_T = mask_TE.any(1).to(share_TE.dtype)
            if weight_T is not None:
                routed_T = routed_T * weight_T
            balance = losses.balance_loss(probs_TC=share_TE, mask_TC=mask_TE, weight_T=routed_T)
            aux["balance"] = balance * num_active / mask_TE.size(1)
        return aux

    def zero_stats(self, device: torch.device) -> dict[str, Tensor]:
        return super().zero_stats(device) | self.record.zeros(device)

    @property
    def learns_after_updates(self) -> bool:
        return self.record.is_wanted

    def after_update(
        self, num_updates: int, own: Mapping[str, Tensor], layers: Mapping[str, Tensor]
    ) -> None:
        self.record.add(own, num_updates)


def _shares(values_TE: Tensor, routed_T1: Tensor) -> Tensor:
    """Rows scaled to sum 1; rows without an expert, whose sum is 0, stay 0."""
    total_T1 = torch.where(routed_T1, values_TE.sum(1, keepdim=True), 1.0)
    return values_TE / total_T1.clamp(min=torch.finfo(values_TE.dtype).tiny)
