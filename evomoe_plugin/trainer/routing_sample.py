"""The routing of a fixed sample of validation tokens, from one validation to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from fairseq.data import FairseqDataset
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from torch import Tensor

from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.stability import purity, stability


class SampleTokens(NamedTuple):
    """The tokens of a batch that are in the sample."""

    rows_T: Tensor  # int64, as all: their rows in the batch
    columns_T: Tensor
    indices_T: Tensor  # Their indices in the sample
    token_ids_T: Tensor


class RoutingSample:
    """The first tokens of a validation set, and where they were routed in the last validation.

    A token is identified by its index in the order of the data set, so that the sample does not
    depend on batches, padding and ranks. On each rank it is one table with a column per token; at
    the end of a validation the tables of all ranks are summed, each token being in the batches of
    one of them. The state is therefore the same on all ranks. It is not in checkpoints.

    Args:
        dataset: whose batches have the index of each row as `id`.
        num_tokens: size of the sample; fewer if the data set is smaller.
        padding: token id of padding.
        stack: whose tokens they are, one of `routing.stats.STACKS`; prefix of the names.
    """

    def __init__(self, dataset: FairseqDataset, num_tokens: int, padding: int, stack: str = ""):
        self._padding, self._stack = padding, stack
        bounds = [0]  # of the rows in the sample
        while bounds[-1] < num_tokens and len(bounds) <= len(dataset):
            bounds.append(bounds[-1] + self._length(dataset, len(bounds) - 1))
        self._bounds = torch.tensor(bounds).clamp(max=num_tokens)
        self._steps_left = 0
        self._table = torch.empty(0)
        self._earlier: Tensor | None = None  # the table of the last validation

    def _length(self, dataset: FairseqDataset, index: int) -> int:
        """Tokens of a row; of a pair, those of the stack's side."""
        if not self._stack:
            return int(dataset.num_tokens(index))
        size = dataset.size(index)
        return int(size[self._stack == "decoder_"] if isinstance(size, tuple) else size)

    def begin(self, num_layers: int, num_steps: int, device: torch.device) -> None:
        """Begin a validation; one that was not finished is forgotten.

        Args:
            num_layers: L.
            num_steps: calls of `finish_step` to come, the same number on all ranks.
        """
        self._steps_left = num_steps
        # Token ids plus 1, 0 for tokens not seen; first experts [L]; combine weights [L].
        self._table = torch.zeros(
            1 + 2 * num_layers, int(self._bounds[-1]), dtype=torch.float64, device=device
        )

    def tokens_of(self, batch: Mapping[str, Any]) -> SampleTokens | None:
        """The sample's tokens in a batch; None if there are none."""
        last = len(self._bounds) - 1
        found = [(b, row) for b, row in enumerate(batch["id"].tolist()) if row < last]
        if not found:
            return None
        rows_B, ids_B = torch.tensor(found).unbind(1)
        name = "prev_output_tokens" if self._stack == "decoder_" else "src_tokens"
        tokens_BT = batch["net_input"][name].cpu()[rows_B]
        is_token_BT = tokens_BT != self._padding
        indices_BT = self._bounds[ids_B].unsqueeze(1) + is_token_BT.cumsum(1) - 1
        in_sample_BT = is_token_BT & (indices_BT < self._bounds[ids_B + 1].unsqueeze(1))
        b_T, columns_T = in_sample_BT.nonzero(as_tuple=True)
        return SampleTokens(
            rows_B[b_T], columns_T, indices_BT[in_sample_BT], tokens_BT[in_sample_BT]
        )

    def add(self, tokens: SampleTokens, routing: Mapping[str, Tensor]) -> None:
        """Add where tokens of a batch were routed.

        Args:
            routing: of the whole batch, name with the stack's prefix -> [L, B, length]
                (`routing.stability`).
        """
        device = self._table.device
        rows_T, columns_T, indices_T, token_ids_T = (part.to(device) for part in tokens)
        columns = [(token_ids_T + 1).unsqueeze(0)]
        for name in st.OF_TOKENS:
            columns.append(routing[self._stack + name][:, rows_T, columns_T])
        self._table[:, indices_T] = torch.cat([column.double() for column in columns])

    def finish_step(self, group: Any) -> None:
        """Count a batch; after the last one sum over ranks and log.

        Args:
            group: the data-parallel process group; None if there is none.
        """
        self._steps_left -= 1
        if self._steps_left:
            return
        if group is not None:
            distributed_utils.all_reduce(self._table, group)
        for name, value_L in self._numbers().items():
            metrics.log_scalar(self._stack + name, float(value_L.mean()), round=4)
            for n, value in enumerate(value_L.tolist()):
                metrics.log_scalar(f"{self._stack}{name}_{n}", value, round=4)

    def _numbers(self) -> dict[str, Tensor]:
        """name -> [L] of this validation, which is now the last one."""
        table, earlier = self._table.cpu(), self._earlier
        self._earlier = table
        seen_T = table[0] > 0
        if not seen_T.any():
            return {}
        ids_T, first_LT, weight_LT = _parts(table[:, seen_T])
        numbers = {"combine_weight": weight_LT.mean(1)}
        purity_L = purity(ids_T, first_LT)
        if purity_L is not None:
            numbers["purity"] = purity_L
        # Every validation has the same batches, and so the same tokens.
        if earlier is not None:
            numbers["stability"] = stability(first_LT, _parts(earlier[:, seen_T])[1])
        return numbers


def _parts(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [T], first experts [L, T] and combine weights [L, T]."""
    first_LT, weight_LT = table[1:].chunk(2)
    return table[0].long() - 1, first_LT.long(), weight_LT
