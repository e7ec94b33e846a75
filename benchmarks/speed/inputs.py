"""Tokens, weights and routing of a case, shared by all contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from speed import routes
from speed.cases import Case


@dataclass
class Inputs:
    """Inputs of a case. Contenders copy the weights."""

    case: Case
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self):
        case, generator = self.case, torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        common_D = normal(case.width)
        x_TD = normal(case.tokens, case.width) + case.skew * common_D
        # Logits have standard deviation 1, or 2 for the top-p gate, to keep its sets small.
        scale = (2.0 if case.gate == "top_p" else 1.0) / case.width**0.5
        gate_CD = scale * normal(case.experts + case.null_experts, case.width)
        # The shift of null experts' logits along common_D sets how often they are selected.
        self._null_D = torch.cat(
            [
                torch.zeros(case.experts, case.width),
                (common_D / common_D.square().sum()).expand(case.null_experts, -1),
            ]
        )
        self._generator = generator
        self.x_TD = x_TD.to(self.device, self.dtype)
        self.dy_TD = normal(case.tokens, case.width).to(self.device, self.dtype)
        self.gate_CD = gate_CD.to(self.device, self.dtype)
        self.temperature = 1.0
        self._calibrate()
        with torch.no_grad():
            mask_TE, _ = self.route(self.x_TD, self.gate_CD)
        self.counts = mask_TE.sum(0).tolist()

    @property
    def pairs(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def load_max(self) -> float:
        """Largest load of an expert over the mean."""
        return max(self.counts) * len(self.counts) / self.pairs

    def route(self, x_TD: Tensor, gate_CD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token, bool [T, E], and weights, [T, E]."""
        logits_TC = routes.logits(x_TD, gate_CD)
        if self.case.gate == "top_k":
            return routes.top_k(logits_TC, self.case.top_k)
        if self.case.gate == "top_p":
            return routes.top_p(logits_TC, self.case.experts)
        if self.case.wanted == 1:
            return routes.top_1(logits_TC, self.temperature)
        return routes.dense_to_sparse(logits_TC, self.temperature)

    def _calibrate(self) -> None:
        if self.case.gate == "dense_to_sparse" and self.case.wanted > 1:
            self.temperature = 10 ** _bisect(
                lambda log: self._pairs_at(temperature=10**log),
                self.case.wanted * self.case.tokens,
                -3,
                3,
            )
        if self.case.null_share:
            most = self._pairs_at(shift=-1e4)  # null experts are never selected
            bare_CD = self.gate_CD
            shift = -_bisect(
                lambda shift: self._pairs_at(shift=-shift),
                (1 - self.case.null_share) * most,
                -1e3,
                1e3,
            )
            self.gate_CD = self._shifted(bare_CD, shift)

    def _shifted(self, gate_CD: Tensor, shift: float) -> Tensor:
        return gate_CD + shift * self._null_D.to(gate_CD)

    @torch.no_grad()
    def _pairs_at(self, temperature: float = 1.0, shift: float = 0.0) -> int:
        self.temperature = temperature
        gate_CD = self._shifted(self.gate_CD, shift) if shift else self.gate_CD
        return int(self.route(self.x_TD, gate_CD)[0].sum())

    @cached_property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Weights of GELU experts: first and second layer, [E, F, D] each."""
        case = self.case
        w1, w2 = self._matrices(2, case.ffn_dim)
        return w1, w2

    @cached_property
    def gated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of SwiGLU experts: gate, up and down, each [E, F, D]."""
        w1, w3, w2 = self._matrices(3, self.case.gated_ffn_dim)
        return w1, w3, w2

    def _matrices(self, number: int, ffn_dim: int) -> list[Tensor]:
        shape = (self.case.experts, ffn_dim, self.case.width)
        drawn = [
            torch.randn(shape, generator=self._generator).mul_(self.case.width**-0.5)
            for _ in range(number)
        ]
        drawn[-1].mul_((self.case.width / ffn_dim) ** 0.5)
        return [w.to(self.device, self.dtype) for w in drawn]


def _bisect(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Solve `rising(x) = wanted`."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > wanted else (middle, high)
    return high
