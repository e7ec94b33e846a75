"""The hash gate: a token's id determines its expert."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, flag
from evomoe_plugin.config.values import check_choice
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.hash_tables import balanced_table, clustered_table, random_table
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.topk_common import selection_mask
from evomoe_plugin.routing.choice import Choice

HASHES = ("balanced", "random", "clustered")


@dataclass
class HashOptions(ModelOptions):
    """Options of the hash gate."""

    moe_hash: str = flag(
        "balanced",
        "how token ids are assigned to experts: balanced (equal numbers of training tokens), "
        "random, or clustered (balanced, with ids of similar frequency together)",
    )


@register_gate("hash")
class HashGate(Gate[HashOptions]):
    """y = E_e(x) with e = table[token id]; the table is fixed before training.

    Source: Hash layers (arXiv 2106.04426), whose hashes `--moe-hash` selects.
    """

    Options = HashOptions
    capabilities = Capabilities(
        default_aux="none",
        logits=False,
        null_experts=False,
        gate_init=False,
        fixed_k=True,
        unit_weights=True,
    )

    table_V: Tensor

    def __init__(self, info: LayerInfo, options: HashOptions):
        super().__init__(info, options)
        counts_V, E = info.token_counts_V, info.num_experts
        if not counts_V:
            raise OptionError(
                "moe_gate",
                "hash",
                "it assigns an expert to each token id, and no vocabulary is known here",
            )
        if options.moe_hash == "random":
            table_V = random_table(len(counts_V), E, info.layer_id, info.seed)
        elif options.moe_hash == "balanced":
            table_V = balanced_table(counts_V, E)
        else:
            table_V = clustered_table(counts_V, E)
        # In the checkpoint: another dictionary's counts must not change it.
        self.register_buffer("table_V", table_V)

    @classmethod
    def validate(cls, options: HashOptions, expert_counts: Sequence[int]) -> list[str]:
        check_choice(options, "moe_hash", HASHES)
        return []

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        if context.token_ids_T is None:
            raise ValueError("the gate hash routes by token ids: give token_ids_T")
        ids_T1 = self.table_V[context.token_ids_T].unsqueeze(1)
        mask_TE = selection_mask(ids_T1, self.num_experts)
        probs_TE = mask_TE.to(x_TD.dtype)
        return Choice(mask_TE, probs_TE, probs_TE, most_pairs=len(x_TD))
