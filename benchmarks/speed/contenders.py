"""Alternative implementations of one MoE layer, with the weights and routing of a case.

The contenders defined here route with `speed.routes`, and compute neither losses nor statistics.
Experts are GELU FFNs (ours, the loop and the dense FFN with biases); those of Hugging Face are
SwiGLU FFNs of about the same FLOPs.
"""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe_plugin.experts.kernels import cuda
from evomoe_plugin.experts.kernels.cuda import grouped_mm
from speed import ours
from speed.bare import activated_flops
from speed.inputs import Inputs


class Refused(Exception):
    """A contender does not support a case."""


class Contender(nn.Module):
    """A layer with a step: forward and backward, gradients discarded.

    A subclass creates parameters in `__init__` and defines `forward`, which returns y_TD and a list
    of losses.
    """

    label: str
    """Name in tables."""
    ALONE = False
    """Whether it needs so much memory that it runs in a separate process, with the limit only."""
    MATRICES = 2
    """Matrices per expert."""
    DEVICES: tuple[str, ...] = ("cpu", "cuda")
    """Where it runs."""

    def __init__(self, inputs: Inputs):
        super().__init__()
        self.inputs = inputs
        self.x = inputs.x_TD.clone().requires_grad_()
        self.dy = inputs.dy_TD

    @property
    def flops(self) -> int:
        """FLOPs of routed pairs in a step, without gate and dispatch."""
        case = self.inputs.case
        ffn_dim = case.ffn_dim if self.MATRICES == 2 else case.gated_ffn_dim
        return activated_flops(self.inputs.pairs, case.width, ffn_dim, self.MATRICES)

    @classmethod
    def gibibytes(cls, inputs: Inputs) -> float:
        """Rough estimate of the memory of a step, for contenders that may exceed it."""
        return 0.0

    def gradients(self) -> None:
        """Forward and backward."""
        y_TD, losses = self(self.x)
        torch.autograd.backward(
            [y_TD, *losses], [self.dy, *(torch.ones_like(loss) for loss in losses)]
        )

    def step(self) -> None:
        """Forward and backward; gradients are discarded as by an optimizer."""
        self.gradients()
        self.drop()

    def drop(self) -> None:
        """Discard gradients."""
        self.zero_grad()
        self.x.grad = None

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Selected experts and weights of the tokens, [T, E] each."""
        return self.inputs.route(x_TD, self.gate)

    def add(self, name: str, tensor: Tensor) -> None:
        """Register a copy as parameter."""
        self.register_parameter(name, nn.Parameter(tensor.clone()))


class Ours(Contender):
    """This package's layer: with biases, losses and statistics."""

    label = "ours"
    GATED = False

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        self.layer = ours.build(inputs, self.GATED)

    def forward(self, x_TD):
        y_TD, losses_A, _ = self.layer(x_TD)
        return y_TD, [losses_A] if losses_A.numel() else []


class OursGated(Ours):
    """Ours with SwiGLU experts, for comparison with Hugging Face's."""

    label = "ours, SwiGLU"
    GATED = True
    MATRICES = 3


class OursGroupedMM(Ours):
    """Ours with torch's `grouped_mm` and separate passes in place of the Triton kernels."""

    label = "ours, on grouped_mm"
    DEVICES = ("cuda",)

    def __init__(self, inputs: Inputs):
        case = inputs.case
        where = torch.device(inputs.device), inputs.dtype
        if reason := grouped_mm.why_not(*where, case.width, case.ffn_dim):
            raise Refused(reason)
        super().__init__(inputs)

    def forward(self, x_TD):
        with mock.patch.object(cuda, "function_for", lambda *_: grouped_mm.GroupedMMFFN):
            return super().forward(x_TD)


class Routing(Contender):
    """Ours without experts: gate, plan, sort, losses; forward and backward."""

    label = "our routing alone"
    flops = 0

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        self.layer = ours.build(inputs)
        with torch.no_grad():
            self.dw = [torch.randn_like(out) for out in ours.routing(self.layer, self.x)]

    def gradients(self):
        torch.autograd.backward(ours.routing(self.layer, self.x), self.dw)


class Dense(Contender):
    """The same number of rows through one FFN with biases, as in fairseq: no routing."""

    label = "dense FFN of equal FLOPs"

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        case = inputs.case
        given = {"device": inputs.device, "dtype": inputs.dtype}
        self.fc1 = nn.Linear(case.width, case.ffn_dim, **given)
        self.fc2 = nn.Linear(case.ffn_dim, case.width, **given)
        self.x = torch.randn(inputs.pairs, case.width, **given).requires_grad_()
        self.dy = torch.randn(inputs.pairs, case.width, **given)

    def forward(self, x_ND):
        return self.fc2(F.gelu(self.fc1(x_ND))), []


class Loop(Contender):
    """For each expert, two linear layers: gather its tokens, apply it, add its output; backward by
    autograd."""

    label = "loop over experts"

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        self.add("gate", inputs.gate_CD)
        # Separate parameters: gradients of slices of a stack would have the size of the stack.
        self.fc1, self.fc2 = (
            nn.ModuleList(_linear(w) for w in w_E)
            for w_E in (inputs.plain[0], inputs.plain[1].transpose(1, 2))
        )

    def forward(self, x_TD):
        mask_TE, weights_TE = self.route(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for e, (fc1, fc2) in enumerate(zip(self.fc1, self.fc2, strict=True)):
            tokens = mask_TE[:, e].nonzero().squeeze(1)
            if not tokens.numel():
                continue
            rows = fc2(F.gelu(fc1(x_TD[tokens])))
            rows = rows * weights_TE[tokens, e].unsqueeze(1).to(rows.dtype)
            y_TD = y_TD.index_add(0, tokens, rows)
        return y_TD, []


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer with this weight, and bias 0."""
    linear = nn.Linear(weight.size(1), weight.size(0), device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    linear.bias = nn.Parameter(weight.new_zeros(weight.size(0)))
    return linear


class GroupedMM(Contender):
    """Sort by expert, then torch's grouped matmul."""

    label = "sort + grouped_mm"

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        self.add("gate", inputs.gate_CD)
        self.add("w1", inputs.plain[0])
        self.add("w2", inputs.plain[1])

    def forward(self, x_TD):
        mask_TE, weights_TE = self.route(x_TD)
        experts_N, tokens_N = mask_TE.t().nonzero(as_tuple=True)
        ends_E = mask_TE.sum(0).cumsum(0, dtype=torch.int32)
        hidden = F.gelu(F.grouped_mm(x_TD[tokens_N], self.w1.transpose(1, 2), offs=ends_E))
        rows = F.grouped_mm(hidden, self.w2, offs=ends_E)
        rows = rows * weights_TE[tokens_N, experts_N].unsqueeze(1).to(rows.dtype)
        return torch.zeros_like(x_TD).index_add(0, tokens_N, rows), []


class AllMasked(Contender):
    """Every expert on every token, with combine weights that are mostly 0: dense training."""

    label = "all experts, masked"
    ALONE = True

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        times = inputs.case.experts * inputs.case.tokens / inputs.pairs
        if times > 16.5:
            raise Refused(f"would compute {times:.0f} times the routed pairs")
        self.add("gate", inputs.gate_CD)
        self.add("w1", inputs.plain[0])
        self.add("w2", inputs.plain[1])

    @classmethod
    def gibibytes(cls, inputs):
        case = inputs.case
        rows = case.experts * case.tokens * inputs.dtype.itemsize
        return rows * 4 * (case.ffn_dim + case.width) / 2**30

    def forward(self, x_TD):
        mask_TE, weights_TE = self.route(x_TD)
        experts = self.w1.size(0)
        hidden_ETF = F.gelu(torch.bmm(x_TD.expand(experts, -1, -1), self.w1.transpose(1, 2)))
        rows_ETD = torch.bmm(hidden_ETF, self.w2)
        weights_TE = (weights_TE * mask_TE).to(rows_ETD.dtype)
        return torch.einsum("te,etd->td", weights_TE, rows_ETD), []


class OneHot(Contender):
    """Dispatch by matmuls with a one-hot mask T×E×C (GShard, arXiv 2006.16668).

    C is the largest load, so no pair is dropped.
    """

    label = "one-hot dispatch T×E×C"
    ALONE = True

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        self.add("gate", inputs.gate_CD)
        self.add("w1", inputs.plain[0])
        self.add("w2", inputs.plain[1])

    @classmethod
    def gibibytes(cls, inputs):
        case, most = inputs.case, max(inputs.counts)
        masks = case.tokens * case.experts * most * (4 + 2 * inputs.dtype.itemsize + 8)
        rows = case.experts * most * 4 * (case.ffn_dim + case.width) * inputs.dtype.itemsize
        return (masks + rows) / 2**30

    def forward(self, x_TD):
        mask_TE, weights_TE = self.route(x_TD)
        place_TE = (mask_TE.cumsum(0) - 1).masked_fill(~mask_TE, -1)
        slots_C = torch.arange(int(place_TE.max()) + 1, device=x_TD.device)
        dispatch_TEC = (place_TE.unsqueeze(2) == slots_C).to(x_TD.dtype)
        rows_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, x_TD)
        hidden_ECF = F.gelu(torch.bmm(rows_ECD, self.w1.transpose(1, 2)))
        rows_ECD = torch.bmm(hidden_ECF, self.w2)
        combine_TEC = dispatch_TEC * weights_TE.unsqueeze(2).to(x_TD.dtype)
        return torch.einsum("tec,ecd->td", combine_TEC, rows_ECD), []
