"""Route a sample of text through a checkpoint, and count where its tokens go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq import tasks
from fairseq.data import LanguagePairDataset, MaskTokensDataset, TokenBlockDataset
from torch import Tensor, nn

from evomoe_plugin.checkpoint.build_model import describe
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.perplexity import check_split
from evomoe_plugin.generation.loading import OF_TEXT, TRANSLATION, TrainedModel
from evomoe_plugin.generation.text import TextCodec
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
    """Among the layers of its encoder or decoder."""
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
    has_documents: bool
    """Whether rows are of documents, whose sources may be known."""
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


@dataclass(frozen=True)
class _Side:
    """An encoder or decoder with MoE layers, and what it reads."""

    name: str
    """Empty for that of a model with one."""
    inputs: str
    """Name of its tokens in a batch."""
    codec: TextCodec
    layers: list[tuple[int, MoELayer]]
    """With their numbers among all of its layers."""


def route_samples(trained: TrainedModel, name: str, subset: str, tokens: int) -> list[RoutedSample]:
    """Route rows at even distances over a split, in evaluation mode.

    Args:
        name: of the checkpoint, for the page.
        tokens: at most so many, of the longer side of pairs; at least one row.
    Returns:
        one; of a translation model, one of each side that has MoE layers.
    Raises:
        OptionError: the checkpoint has no MoE layer or another task, or the split is missing.
    """
    sides = _sides(trained)
    if not sides:
        raise OptionError("checkpoint", name, "has no MoE layer: give one of an MoE model")
    moes = [moe for side in sides for _, moe in side.layers]
    plans: list[list[RoutingPlan]] = [[] for _ in moes]
    hooks = [
        moe.experts.register_forward_pre_hook(_keep_plan(kept))
        for moe, kept in zip(moes, plans, strict=True)
    ]
    dataset = _dataset(trained, subset)
    blocks = _blocks(dataset)
    sources = None if blocks is None else TokenSources.of(trained.folder, subset, blocks.sizes)
    ids: list[list[Tensor]] = [[] for _ in sides]
    of_sources = []
    try:
        with torch.no_grad():
            for n, inputs in _rows(dataset, trained, tokens):
                # One at a time: tokens are in the same order in every layer.
                trained.model(**inputs)
                for side, rows in zip(sides, ids, strict=True):
                    rows.append(inputs[side.inputs][0])
                if blocks is not None and sources is not None:
                    of_sources.append(blocks.sources(sources, n, len(ids[0][-1])))
    finally:
        for hook in hooks:
            hook.remove()
    source_T = torch.cat(of_sources) if of_sources else None
    names = sources.names if sources is not None else []
    found, plans_left = [], iter(plans)
    for side, rows in zip(sides, ids, strict=True):
        ids_T = torch.cat(rows)
        kinds = kinds_of(side.codec, ids_T.unique().tolist())
        kinds_T = torch.tensor([kinds[token] for token in ids_T.tolist()])
        groups = [_Groups(kinds_T, KINDS)]
        if source_T is not None:
            groups.append(_Groups(source_T, names))
        found.append(
            RoutedSample(
                name=f"{name}, {side.name}" if side.name else name,
                num_updates=trained.num_updates,
                tokens=len(ids_T),
                subset=subset,
                kinds=groups[0].shares,
                sources=groups[1].shares if groups[1:] else [],
                has_documents=blocks is not None,
                layers=[
                    _counted(number, n, moe, next(plans_left), ids_T, groups, side.codec)
                    for number, (n, moe) in enumerate(side.layers)
                ],
            )
        )
    return found


def _sides(trained: TrainedModel) -> list[_Side]:
    found = []
    for prefix, stack in getattr(trained.model, "moe_stacks", {}).items():
        layers = [
            (n, layer.moe)
            for n, layer in enumerate(stack.layers)
            if isinstance(getattr(layer, "moe", None), MoELayer)
        ]
        is_target = prefix == "decoder_"
        inputs = "prev_output_tokens" if is_target else "src_tokens"
        codec = trained.target_codec if is_target else trained.codec
        if layers:
            found.append(_Side(prefix.removesuffix("_"), inputs, codec or trained.codec, layers))
    return found


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
    if name != "language_modeling" and name not in OF_TEXT:
        raise OptionError(
            "checkpoint",
            f"of the task {name}",
            f"give one that was trained with one of: {', '.join(('language_modeling', *OF_TEXT))}",
        )
    splits = [subset]
    if name == TRANSLATION:
        langs = cfg.source_lang, cfg.target_lang
        pairs = [f"{subset}.{'-'.join(pair)}" for pair in (langs, langs[::-1])]
        known = [pair for pair in pairs if list(trained.folder.glob(f"{pair}.*.idx"))]
        splits = [f"{(known or pairs)[0]}.{lang}" for lang in langs]
    for split in splits:
        check_split(str(trained.folder), split)
    task = tasks.setup_task(cfg)
    try:
        task.load_dataset(subset)
    except Exception as error:  # the sides of pairs do not fit each other, for example
        raise OptionError(
            "data", trained.folder, f"{subset} is no data of {name} ({describe(error)})"
        ) from error
    dataset = task.dataset(subset)
    dataset.set_epoch(1)  # masks are those of validations
    return dataset


@dataclass(frozen=True)
class _Blocks:
    """Rows that are blocks of a stream of tokens."""

    blocks: TokenBlockDataset
    reads_all: bool
    """Whether rows begin with <s> and have all tokens of the block; else the model reads the token
    before each of its targets."""

    @property
    def sizes(self) -> Any:
        """Of the documents of the stream."""
        return self.blocks.dataset.sizes

    def sources(self, sources: TokenSources, n: int, length: int) -> Tensor:
        """Where the tokens of a row are from; <s> counts as the first token."""
        start, end = map(int, self.blocks.slice_indices[n])
        if self.reads_all:
            return torch.cat([sources.between(start, start + 1), sources.between(start, end)])
        return sources.between(end - 1 - length, end - 1)


def _blocks(dataset: Any) -> _Blocks | None:
    """The blocks that rows are of; None for pairs of sentences."""
    if isinstance(dataset, LanguagePairDataset):
        return None
    reads_all = False
    while not isinstance(dataset, TokenBlockDataset):
        reads_all |= isinstance(dataset, MaskTokensDataset)
        fields = getattr(dataset, "defn", None)
        dataset = fields["net_input.src_tokens"] if fields else dataset.dataset
    return _Blocks(dataset, reads_all)


def _rows(
    dataset: Any, trained: TrainedModel, tokens: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Numbers of rows at even distances over a split, and the model's inputs; without pairs that it
    has not enough positions for.

    Raises:
        OptionError: there is no row.
    """
    rows = np.arange(len(dataset))
    if isinstance(dataset, LanguagePairDataset):
        most = trained.model.max_positions()
        rows, _ = dataset.filter_indices_by_size(rows, most)
        if not len(rows):
            raise OptionError("data", trained.folder, f"has no pair of at most {most} tokens")
    sizes = [int(dataset.num_tokens(n)) for n in rows]
    distance = math.ceil(sum(sizes) / tokens)
    found = 0
    for i in range(0, len(rows), distance):
        found += sizes[i]
        if i and found > tokens:
            return
        yield rows[i], dataset.collater([dataset[rows[i]]])["net_input"]


def _counted(
    number: int,
    n: int,
    moe: MoELayer,
    plans: Sequence[RoutingPlan],
    ids_T: Tensor,
    groups: Sequence[_Groups],
    codec: TextCodec,
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
        commonest=[_commonest(ids_T[mask_TE[:, e] > 0], codec) for e in range(E)],
    )


def similarity(experts: nn.Module) -> Tensor:
    """Cosines of the experts' weights, fp64 [E, E]."""
    parts = [p.detach().double().flatten(1) for p in experts.parameters()]
    products_EE = torch.stack([part @ part.t() for part in parts]).sum(0)
    norm_E = products_EE.diagonal().sqrt().clamp(min=1e-300)
    return products_EE / (norm_E.unsqueeze(1) * norm_E)


def _commonest(ids_N: Tensor, codec: TextCodec) -> list[tuple[str, float]]:
    ids, counts = ids_N.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:COMMONEST].tolist()
    return [(codec.name(int(ids[i])), float(counts[i]) / len(ids_N)) for i in order]
