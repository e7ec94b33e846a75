"""Route a sample of text through a checkpoint, and count where its tokens go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import tasks
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.perplexity import check_split
from evomoe_plugin.generation.loading import TrainedModel
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.report.token_kinds import KINDS, kinds_of
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.plan import RoutingPlan
from evomoe_plugin.routing.stability import purity, token_routing

COMMONEST = 6
"""Token ids listed for each expert."""


@dataclass(frozen=True)
class LayerRouting:
    """Where the sample's tokens go in one MoE layer. Shares are between 0 and 1."""

    layer: int
    """Index among the decoder's layers."""
    tokens: int
    load_E: list[float]
    """Share of the routed pairs."""
    weight_E: list[float]
    """Mean combine weight of the expert's pairs; NaN without any."""
    experts_per_token: float
    entropy: float
    """Of the gate's probabilities, in nats, mean over tokens."""
    null_per_token: float | None
    """Pairs of null experts per token; None if the layer has none."""
    purity: float | None
    """`routing.stability.purity`; None if no token id is repeated."""
    kinds_KE: list[list[float]]
    """Of the pairs of each kind of token, the share that each expert has; NaN without pairs."""
    together_EE: list[list[float]]
    """Of the tokens of an expert (row), the share that another one (column) has as well."""
    similarity_EE: list[list[float]]
    """Cosine of the experts' weights, all matrices and biases of an expert as one vector."""
    commonest: list[list[tuple[str, float]]]
    """Of each expert: its commonest tokens, and the share of its pairs that each has."""

    @property
    def width(self) -> int:
        """E."""
        return len(self.load_E)

    @property
    def label(self) -> str:
        return f"layer {self.layer}"

    @property
    def expert_names(self) -> list[str]:
        return [f"expert {e}" for e in range(self.width)]


@dataclass(frozen=True)
class RoutedSample:
    """The routing of one checkpoint."""

    name: str
    num_updates: int
    tokens: int
    subset: str
    kinds: list[tuple[str, float]]
    """Kinds of tokens and their shares of the sample."""
    layers: list[LayerRouting]

    @property
    def kind_names(self) -> list[str]:
        """With their shares."""
        return [f"{name} ({100 * share:.0f} %)" for name, share in self.kinds]


def route_sample(trained: TrainedModel, name: str, subset: str, tokens: int) -> RoutedSample:
    """Route the first tokens of a split, in evaluation mode.

    Args:
        name: of the checkpoint, for the page.
        tokens: at most so many, at least one row.
    Raises:
        OptionError: the checkpoint has no MoE layer or another task, or the split is missing.
    """
    layers = [
        (n, layer.moe)
        for n, layer in enumerate(trained.model.decoder.layers)
        if isinstance(getattr(layer, "moe", None), MoELayer)
    ]
    if not layers:
        raise OptionError("checkpoint", name, "has no MoE layer: give one of an MoE model")
    plans: list[list[RoutingPlan]] = [[] for _ in layers]
    hooks = [
        moe.experts.register_forward_pre_hook(_keep_plan(kept))
        for (_, moe), kept in zip(layers, plans, strict=True)
    ]
    ids = []
    try:
        with torch.no_grad():
            for row_T in _rows(trained, subset, tokens):
                # One at a time: tokens are in the same order in every layer.
                trained.model(row_T.unsqueeze(0))
                ids.append(row_T)
    finally:
        for hook in hooks:
            hook.remove()
    ids_T = torch.cat(ids)
    kinds = kinds_of(trained.codec, ids_T.unique().tolist())
    kinds_T = torch.tensor([kinds[token] for token in ids_T.tolist()])
    shares = torch.bincount(kinds_T, minlength=len(KINDS)) / len(ids_T)
    return RoutedSample(
        name=name,
        num_updates=trained.num_updates,
        tokens=len(ids_T),
        subset=subset,
        kinds=list(zip(KINDS, shares.tolist(), strict=True)),
        layers=[
            _counted(n, moe, kept, ids_T, kinds_T, trained)
            for (n, moe), kept in zip(layers, plans, strict=True)
        ],
    )


def _keep_plan(kept: list[RoutingPlan]) -> Any:
    def hook(_experts: nn.Module, inputs: tuple[Tensor, RoutingPlan]) -> None:
        kept.append(inputs[1])

    return hook


def _rows(trained: TrainedModel, subset: str, tokens: int) -> Iterable[Tensor]:
    """The model's inputs, as it was trained."""
    cfg = trained.cfg.task
    name = getattr(cfg, "_name", None)
    if name != "language_modeling":
        raise OptionError(
            "checkpoint", f"of the task {name}", "give one that was trained with language_modeling"
        )
    check_split(str(trained.folder), subset)
    task = tasks.setup_task(cfg)
    task.load_dataset(subset)
    rows, found, n = task.dataset(subset), 0, 0
    while n < len(rows) and (n == 0 or found + len(rows[n]["source"]) <= tokens):
        source_T = rows[n]["source"]
        found, n = found + len(source_T), n + 1
        yield source_T


def _counted(
    n: int,
    moe: MoELayer,
    plans: Sequence[RoutingPlan],
    ids_T: Tensor,
    kinds_T: Tensor,
    trained: TrainedModel,
) -> LayerRouting:
    T, E = len(ids_T), moe.num_experts
    starts = torch.tensor([0, *(plan.num_tokens for plan in plans)]).cumsum(0).tolist()
    token_N = torch.cat(
        [plan.token_ids_N + start for plan, start in zip(plans, starts, strict=False)]
    )
    expert_N = torch.cat([plan.expert_ids_N for plan in plans])
    weight_N = torch.cat([plan.weights_N.double() for plan in plans])
    mask_TE = torch.zeros(T, E, dtype=torch.float64)
    mask_TE[token_N, expert_N] = 1
    pairs_E = mask_TE.sum(0)
    kinds_KE = torch.zeros(len(KINDS), E, dtype=torch.float64).index_add_(0, kinds_T, mask_TE)
    stats = {
        name: sum(float(plan.stats[name]) for plan in plans)
        for name in (st.TOKENS, st.ENTROPY, st.NULL_PAIRS)
        if name in plans[0].stats
    }
    first_T = torch.cat([token_routing(plan)[st.FIRST_EXPERT_T] for plan in plans])
    pure = purity(ids_T, first_T.unsqueeze(0))
    null = stats.get(st.NULL_PAIRS)
    return LayerRouting(
        layer=n,
        tokens=T,
        load_E=(pairs_E / pairs_E.sum()).tolist(),
        weight_E=(torch.zeros(E).double().index_add_(0, expert_N, weight_N) / pairs_E).tolist(),
        experts_per_token=float(pairs_E.sum()) / T,
        entropy=stats[st.ENTROPY] / T,
        null_per_token=None if null is None else null / T,
        purity=None if pure is None else float(pure),
        kinds_KE=(kinds_KE / kinds_KE.sum(1, keepdim=True)).tolist(),
        together_EE=(mask_TE.t() @ mask_TE / pairs_E.unsqueeze(1)).tolist(),
        similarity_EE=similarity(moe.experts).tolist(),
        commonest=[_commonest(ids_T[mask_TE[:, e] > 0], trained) for e in range(E)],
    )


def similarity(experts: nn.Module) -> Tensor:
    """Cosines of the experts' weights, fp64 [E, E]."""
    parts = [p.detach().double().flatten(1) for p in experts.parameters()]
    products_EE = torch.stack([part @ part.t() for part in parts]).sum(0)
    norm_E = products_EE.diagonal().sqrt().clamp(min=1e-300)
    return products_EE / (norm_E.unsqueeze(1) * norm_E)


def _commonest(ids_N: Tensor, trained: TrainedModel) -> list[tuple[str, float]]:
    ids, counts = ids_N.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:COMMONEST].tolist()
    return [(trained.codec.name(int(ids[i])), float(counts[i]) / len(ids_N)) for i in order]
