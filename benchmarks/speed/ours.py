"""Our layer, as in a model."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.gates.context import GateContext
from evomoe_plugin.gates.registry import option_fields
from evomoe_plugin.layer import MoELayer, build_layer
from speed.inputs import Inputs


def options(**given: Any) -> types.SimpleNamespace:
    """The defaults of all layer options, updated with `given`."""
    return types.SimpleNamespace(
        **{
            **vars(MoEOptions()),
            **{name: option.default for name, option in option_fields().items()},
            "max_update": None,
            **given,
        }
    )


def build(inputs: Inputs, gated: bool = False) -> MoELayer:
    """A layer with the weights and routing of `inputs`, biases 0."""
    case = inputs.case
    given: dict[str, Any] = {
        "moe_gate": case.gate,
        "moe_expert_gated": gated,
        "moe_expert_ffn_dim": case.gated_ffn_dim if gated else case.ffn_dim,
    }
    if case.gate == "top_k":
        given |= {"moe_top_k": case.top_k, "moe_top_k_weights": "renormalized"}
    elif case.gate == "dense_to_sparse":
        given |= {
            "moe_temperature_schedule": "constant",
            "moe_gate_noise": "none",
            "moe_temperature_start": inputs.temperature,
        }
        if case.wanted == 1:
            given["moe_hard_updates"] = 0
    info = LayerInfo(case.width, case.experts, num_null=case.null_experts)
    layer = build_layer(info, options(**given), nn.functional.silu if gated else nn.functional.gelu)
    layer.to(inputs.device, inputs.dtype)
    with torch.no_grad():
        layer.gate.scorer.weight.copy_(inputs.gate_CD)
        names = (
            ("fc1_weight", "fc3_weight", "fc2_weight") if gated else ("fc1_weight", "fc2_weight")
        )
        for name, w_EFD in zip(names, inputs.gated if gated else inputs.plain, strict=True):
            getattr(layer.experts, name).copy_(w_EFD)
        for name, parameter in layer.experts.named_parameters():
            if name.endswith("_bias"):
                parameter.zero_()
    return layer


def routing(layer: MoELayer, x_TD: Tensor) -> list[Tensor]:
    """Only gate, plan, sort, losses and statistics: their differentiable outputs."""
    plan = layer.gate(x_TD, GateContext())
    plan.tokens_per_expert_E.tolist()
    return [plan.weights_N, *plan.aux.values()]
