"""Shapes of the measured layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One MoE layer and its routing; F is four times D unless given."""

    group: str
    tokens: int
    width: int
    experts: int
    top_k: int = 0
    """Of the gate `top_k`."""
    wanted: float = 0
    """Mean experts per token of the gate `dense_to_sparse`, set by its temperature."""
    null_share: float | None = None
    """Of the gate `top_p`: share of pairs routed to null experts."""
    skew: float = 0.1
    """Norm of the common part of tokens over that of their own part; it makes loads uneven."""
    memory: bool = False
    """Whether peak memory is measured too."""
    ffn: int = 0

    @property
    def name(self) -> str:
        """Name in tables and for `--cases`."""
        sizes = f"{self.tokens}/{self.width}/{self.experts}"
        if self.gate == "top_k":
            return f"{self.group} {sizes}/{self.top_k}"
        if self.gate == "dense_to_sparse":
            return f"{self.group} {sizes} at {self.wanted:g}"
        return f"{self.group} {sizes} null {self.null_share:g}"

    @property
    def gate(self) -> str:
        """The gate, as in `--moe-gate`."""
        if self.null_share is not None:
            return "top_p"
        return "dense_to_sparse" if self.wanted else "top_k"

    @property
    def ffn_dim(self) -> int:
        """F."""
        return self.ffn or 4 * self.width

    @property
    def gated_ffn_dim(self) -> int:
        """F of SwiGLU experts, whose three matrices have the FLOPs of two with F: 2/3 of F, rounded
        to a multiple of 64 (of 8 for small F) for fast matmuls."""
        step = 64 if self.ffn_dim >= 256 else 8
        return max(step, round(self.ffn_dim * 2 / 3 / step) * step)

    @property
    def null_experts(self) -> int:
        """Null experts beside the E."""
        return self.experts if self.null_share else 0


# T, D, E, k: from 1,000 rows per expert down to 32.
TABLE = tuple(
    Case("table", tokens, width, experts, top_k, memory=memory)
    for tokens, width, experts, top_k, memory in (
        (4096, 512, 8, 2, False),
        (4096, 512, 16, 1, False),
        (4096, 512, 16, 2, True),
        (1024, 512, 16, 2, False),
        (1024, 1024, 8, 2, False),
        (2048, 256, 32, 4, True),
        (4096, 512, 64, 2, True),
        (1024, 256, 64, 2, False),
        (2048, 256, 128, 2, False),
    )
)
ANNEALING = tuple(
    Case("annealing", 2048, 256, 16, wanted=wanted, skew=0.5, memory=wanted in (16, 2))
    for wanted in (16, 8, 4, 2, 1)
)
NULLS = tuple(
    Case("nulls", 2048, 512, 16, null_share=share, skew=0.3) for share in (0, 0.25, 0.5, 0.75)
)
TOKENS = tuple(Case("tokens", tokens, 256, 16, 2) for tokens in (256, 1024, 4096, 16384))
CASES = (*TABLE, *ANNEALING, *NULLS, *TOKENS)
# On GPUs also, for which the others are small. SKEWED has half of all rows, or 2/5, at one expert.
LARGE = (
    Case("large", 16384, 1024, 16, 2, memory=True),
    Case("large", 16384, 1024, 64, 2, memory=True),
    Case("large", 16384, 2048, 8, 2),
    Case("large", 16384, 4096, 8, 2, ffn=2048),
    *(Case("large annealing", 16384, 1024, 16, wanted=wanted, skew=0.5) for wanted in (8, 4, 2, 1)),
)
SKEWED = (
    Case("skewed", 16384, 1024, 16, 2, skew=2.0),
    Case("skewed", 16384, 1024, 64, 2, skew=2.0),
)
# Takes minutes: one case per segment length, and the ends of annealing and null shares.
QUICK = (
    Case("table", 1024, 256, 4, 2),
    Case("table", 1024, 256, 16, 2, memory=True),
    Case("table", 1024, 256, 64, 2),
    *(Case("annealing", 1024, 256, 16, wanted=wanted, skew=0.5) for wanted in (16, 2, 1)),
    *(Case("nulls", 1024, 256, 16, null_share=share, skew=0.3) for share in (0, 0.5)),
)


def chosen(names: list[str] | None, quick: bool, device: str = "cpu") -> list[Case]:
    """The cases whose names contain one of `names`.

    Raises:
        SystemExit: a name matches none.
    """
    cases: tuple[Case, ...] = QUICK if quick else CASES
    if device == "cuda" and not quick:
        cases = (*LARGE, *SKEWED, *cases)
    if not names:
        return list(cases)
    for name in names:
        if not any(name in case.name for case in cases):
            known = "; ".join(case.name for case in cases)
            raise SystemExit(f"error: --cases {name} fits no case; give a part of a name: {known}")
    return [case for case in cases if any(name in case.name for name in names)]
