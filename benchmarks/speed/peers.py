"""MoE layers of other packages."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from speed.contenders import Contender, Refused
from speed.inputs import Inputs


def from_transformers(name: str, module: str = "") -> Any:
    """Import a name from transformers.

    Raises:
        Refused: it is not installed.
    """
    try:
        return getattr(importlib.import_module(f"transformers.{module}".strip(".")), name)
    except ModuleNotFoundError as error:
        raise Refused(f"not installed: {error}") from None


def load() -> None:
    """Import the peers' packages before forking."""
    for name, module in (
        ("MixtralSparseMoeBlock", "models.mixtral.modeling_mixtral"),
        ("OlmoeSparseMoeBlock", "models.olmoe.modeling_olmoe"),
        ("MixtralConfig", ""),
        ("OlmoeConfig", ""),
    ):
        with contextlib.suppress(Refused):
            from_transformers(name, module)


class FairscaleExpert(nn.Module):
    """An expert for fairscale's layer, GELU without biases."""

    def __init__(self, w1_FD, w2_FD):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(w1_FD.clone()), nn.Parameter(w2_FD.clone())

    def forward(self, rows):
        return F.gelu(rows @ self.w1.t()) @ self.w2


class Fairscale(Contender):
    """fairscale's `MOELayer` with its `Top2Gate`: the second expert is sampled, and tokens beyond
    an expert's capacity of 2T/E are dropped, so its output differs and it computes less."""

    label = "fairscale MOELayer"
    ALONE = True

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        case = inputs.case
        if case.gate != "top_k" or case.top_k != 2:
            raise Refused("its gate supports only top-2")
        from fairscale.nn.moe import MOELayer, Top2Gate
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group(
                "nccl" if inputs.device == "cuda" else "gloo",
                store=distributed.HashStore(),
                rank=0,
                world_size=1,
            )
        gate = Top2Gate(case.width, case.experts)
        experts = nn.ModuleList(map(FairscaleExpert, *inputs.plain))
        self.layer = MOELayer(gate, experts).to(inputs.device, inputs.dtype)
        with torch.no_grad():
            gate.wg.weight.copy_(inputs.gate_CD)

    @classmethod
    def gibibytes(cls, inputs):
        case = inputs.case
        return 10 * 4 * case.tokens * 2 * case.tokens / 2**30

    def forward(self, x_TD):
        # Its number of sequences must be a multiple of the number of experts.
        experts = self.inputs.case.experts
        y = self.layer(x_TD.view(experts, -1, x_TD.size(1)))
        return y.view_as(x_TD), [self.layer.l_aux]


class HuggingFace(Contender):
    """A sparse MoE block of transformers: SwiGLU experts, top-k, no dropping."""

    MATRICES = 3
    IMPLEMENTATION: str
    """Value of `experts_implementation`."""

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        case = inputs.case
        if case.gate != "top_k":
            raise Refused("its gate supports only top-k")
        self.block = self._block(
            dict(
                hidden_size=case.width,
                intermediate_size=case.gated_ffn_dim,
                num_experts_per_tok=case.top_k,
                hidden_act="silu",
                experts_implementation=self.IMPLEMENTATION,
            )
        )
        self.block.to(inputs.device, inputs.dtype)
        w1_EFD, w3_EFD, w2_EFD = inputs.gated
        with torch.no_grad():
            self.block.gate.weight.copy_(inputs.gate_CD)
            self.block.experts.gate_up_proj.copy_(torch.cat([w1_EFD, w3_EFD], 1))
            self.block.experts.down_proj.copy_(w2_EFD.transpose(1, 2))

    def _block(self, sizes):
        raise NotImplementedError

    def forward(self, x_TD):
        return self.block(x_TD.unsqueeze(0)).squeeze(0), []


class Mixtral(HuggingFace):
    """Mixtral's."""

    def _block(self, sizes):
        config = from_transformers("MixtralConfig")(
            num_local_experts=self.inputs.case.experts, **sizes
        )
        block = from_transformers("MixtralSparseMoeBlock", "models.mixtral.modeling_mixtral")
        return block(config)


class Olmoe(HuggingFace):
    """OLMoE's block, also with renormalized weights."""

    def _block(self, sizes):
        config = from_transformers("OlmoeConfig")(
            num_experts=self.inputs.case.experts, norm_topk_prob=True, **sizes
        )
        block = from_transformers("OlmoeSparseMoeBlock", "models.olmoe.modeling_olmoe")
        return block(config)


def refuse_eager(inputs: Inputs) -> None:
    """Skip cases that take minutes per step: autograd creates a gradient of the whole stack for
    each expert."""
    gibibytes = sum(w.nbytes for w in inputs.gated) * inputs.case.experts / 2**30
    if gibibytes > 16:
        raise Refused(
            f"writes {gibibytes:.0f} GiB of gradients per step, the whole stack for each expert"
        )


class MixtralGrouped(Mixtral):
    label, IMPLEMENTATION = "HF Mixtral, grouped_mm", "grouped_mm"


class MixtralEager(Mixtral):
    """The default where grouped_mm is not available."""

    label, IMPLEMENTATION = "HF Mixtral, eager", "eager"
    ALONE = True

    def __init__(self, inputs: Inputs):
        refuse_eager(inputs)
        super().__init__(inputs)


class OlmoeGrouped(Olmoe):
    label, IMPLEMENTATION = "HF OLMoE, grouped_mm", "grouped_mm"


class OlmoeEager(Olmoe):
    label, IMPLEMENTATION = "HF OLMoE, eager", "eager"
    ALONE = True

    def __init__(self, inputs: Inputs):
        refuse_eager(inputs)
        super().__init__(inputs)
