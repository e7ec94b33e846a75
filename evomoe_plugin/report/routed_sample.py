"""Route a sample of text through a checkpoint, and count where its tokens go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from evomoe_plugin.report.token_sources import TokenSources
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.plan import RoutingPlan
from evomoe_plugin.routing.stability import purity, token_routing

COMMONEST = 6
"""Token ids listed for each expert."""


@dataclass(frozen=True)
class LayerRouting:
    """Where the sample's tokens go in one MoE layer. Shares are between 0 and 1."""

    number: int
    """Among the MoE layers."""
    layer: int
    """Among the decoder's layers."""
    tokens: int
    experts: int
    """That can be selected."""
    load_E: list[float]
    """Share of the routed pairs; NaN for a slot without an expert."""
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
    sources_SE: list[list[float]]
    """Of the pairs of each source's tokens, the share that each expert has; empty if no sources are
    known."""
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
        return f"MoE layer {self.number} (layer {self.layer})"

    @property
    def load_max(self) -> float:
        """Largest load over the mean load."""
        return max(load for load in self.load_E if math.isfinite(load)) * self.experts

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
    sources: list[tuple[str, float]]
    """Inputs of `evomoe prepare` and their shares; empty if they are not known."""
    layers: list[LayerRouting]

    @property
    def kind_names(self) -> list[str]:
        """With their shares."""
        return _with_shares(self.kinds)

    @property
    def source_names(self) -> list[str]:
        """With their shares."""
        return _with_shares(self.sources)


def _with_shares(names: Sequence[tuple[str, float]]) -> list[str]:
    return [f"{name} ({100 * share:.0f} %)" for name, share in names]


def route_sample(trained: TrainedModel, name: str, subset: str, tokens: int) -> RoutedSample:
    """Route rows at even distances over a split, in evaluation mode.

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
    dataset = _dataset(trained, subset)
    sources = TokenSources.of(trained.folder, subset, dataset.dataset.dataset.sizes)
    ids, of_sources = [], []
    try:
        with torch.no_grad():
            for n, row_T in _rows(dataset, tokens):
                # One at a time: tokens are in the same order in every layer.
                trained.model(row_T.unsqueeze(0))
                ids.append(row_T)
                if sources is not None:
                    # The model reads the token before each target.
                    end = int(dataset.dataset.slice_indices[n][1]) - 1
                    of_sources.append(sources.between(end - len(row_T), end))
    finally:
        for hook in hooks:
            hook.remove()
    ids_T = torch.cat(ids)
    kinds = kinds_of(trained.codec, ids_T.unique().tolist())
    kinds_T = torch.tensor([kinds[token] for token in ids_T.tolist()])
    groups = [_Groups(kinds_T, KINDS)]
    if sources is not None:
        groups.append(_Groups(torch.cat(of_sources), sources.names))
    return RoutedSample(
        name=name,
        num_updates=trained.num_updates,
        tokens=len(ids_T),
        subset=subset,
        kinds=groups[0].shares,
        sources=groups[1].shares if groups[1:] else [],
        layers=[
            _counted(number, n, moe, kept, ids_T, groups, trained)
            for number, ((n, moe), kept) in enumerate(zip(layers, plans, strict=True))
        ],
    )


@dataclass(frozen=True)
class _Groups:
    """Groups that the sample's tokens are in."""

    group_T: Tensor
    names: Sequence[str]

    @property
    def shares(self) -> list[tuple[str, float]]:
        counts = torch.bincount(self.group_T, minlength=len(self.names))
        return list(zip(self.names, (counts / len(self.group_T)).tolist(), strict=True))

    def pairs(self, mask_TE: Tensor) -> list[list[float]]:
        """Of the pairs of each group, the share that each expert has; NaN without pairs."""
        pairs_GE = mask_TE.new_zeros(len(self.names), mask_TE.size(1))
        pairs_GE.index_add_(0, self.group_T, mask_TE)
        return (pairs_GE / pairs_GE.sum(1, keepdim=True)).tolist()


def _keep_plan(kept: list[RoutingPlan]) -> Any:
    def hook(_experts: nn.Module, inputs: tuple[Tensor, RoutingPlan]) -> None:
        kept.append(inputs[1])

    return hook


def _dataset(trained: TrainedModel, subset: str) -> Any:
    """A split, in rows as the model was trained."""
    cfg = trained.cfg.task
    name = getattr(cfg, "_name", None)
    if name != "language_modeling":
        raise OptionError(
            "checkpoint", f"of the task {name}", "give one that was trained with language_modeling"
        )
    check_split(str(trained.folder), subset)
    task = tasks.setup_task(cfg)
    task.load_dataset(subset)
    return task.dataset(subset)


def _rows(dataset: Any, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """Numbers of rows at even distances over a split, and the model's inputs."""
    distance = math.ceil(int(dataset.sizes.sum()) / tokens)
    found = 0
    for n in range(0, len(dataset), distance):
        source_T = dataset[n]["source"]
        found += len(source_T)
        if n and found > tokens:
            return
        yield n, source_T


def _counted(
    number: int,
    n: int,
    moe: MoELayer,
    plans: Sequence[RoutingPlan],
    ids_T: Tensor,
    groups: Sequence[_Groups],
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
    kinds_KE, *sources_SE = [group.pairs(mask_TE) for group in groups]
    active_C = moe.gate.active()
    is_active_E = torch.ones(E, dtype=torch.bool) if active_C is None else active_C[:E]
    stats = {
        name: sum(float(plan.stats[name]) for plan in plans)
        for name in (st.TOKENS, st.ENTROPY, st.NULL_PAIRS)
        if name in plans[0].stats
    }
    first_T = torch.cat([token_routing(plan)[st.FIRST_EXPERT_T] for plan in plans])
    pure = purity(ids_T, first_T.unsqueeze(0))
    null = stats.get(st.NULL_PAIRS)
    return LayerRouting(
        number=number,
        layer=n,
        tokens=T,
        experts=int(is_active_E.sum()),
        load_E=(pairs_E / pairs_E.sum()).masked_fill(~is_active_E, math.nan).tolist(),
        weight_E=(torch.zeros(E).double().index_add_(0, expert_N, weight_N) / pairs_E).tolist(),
        experts_per_token=float(pairs_E.sum()) / T,
        entropy=stats[st.ENTROPY] / T,
        null_per_token=None if null is None else null / T,
        purity=None if pure is None else float(pure),
        kinds_KE=kinds_KE,
        sources_SE=sources_SE[0] if sources_SE else [],
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
