"""The hash gate: a token's id determines its expert."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, check_choice, flag
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.gate import Gate, GateContext, LayerInfo, register_gate
from evomoe_plugin.routing import noise
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


def random_table(vocabulary: int, num_experts: int, layer_id: int, seed: int) -> Tensor:
    """The expert of each token id, int64 [V], by a hash of id, layer and seed."""
    key = torch.tensor(_HASH_STREAM)
    for part in (seed, layer_id):
        key = noise.fold(key, part)
    return noise.fold(key, torch.arange(vocabulary)).remainder(num_experts)


def balanced_table(counts_V: Sequence[int], num_experts: int) -> Tensor:
    """Assign token ids by falling frequency, each to the expert with the least mass so far.

    Args:
        counts_V: how often each token id occurs. 0 counts as half a token, so that such ids are
            spread too.
    Returns:
        int64 [V]; the same in every layer.
    """
    masses = [(0.0, 0, expert) for expert in range(num_experts)]  # tokens, ids, expert
    table = [0] * len(counts_V)
    for token_id in _by_falling_frequency(counts_V):
        mass, ids, expert = masses[0]
        table[token_id] = expert
        heapq.heapreplace(masses, (mass + _mass(counts_V[token_id]), ids + 1, expert))
    return torch.tensor(table, dtype=torch.int64)


def clustered_table(counts_V: Sequence[int], num_experts: int) -> Tensor:
    """Token ids by falling frequency, cut into runs of nearly equal mass.

    A run ends where it is nearest to an equal share of the remaining mass. Every expert has a token
    id if there are at least as many ids as experts.

    Returns:
        int64 [V]; the same in every layer.
    """
    order = _by_falling_frequency(counts_V)
    left = sum(map(_mass, counts_V))
    table, expert, mass = [0] * len(order), 0, 0.0
    for place, token_id in enumerate(order):
        more, after = _mass(counts_V[token_id]), num_experts - expert - 1
        overshoots = 2 * mass + more > 2 * left / (after + 1)
        if after and mass and (overshoots or len(order) - place <= after):
            left, mass, expert = left - mass, 0.0, expert + 1
        table[token_id] = expert
        mass += more
    return torch.tensor(table, dtype=torch.int64)


def _by_falling_frequency(counts_V: Sequence[int]) -> list[int]:
    return sorted(range(len(counts_V)), key=lambda token_id: -counts_V[token_id])


def _mass(count: int) -> float:
    return max(count, 0.5)


_HASH_STREAM = 0x4A54  # separates these random numbers from the noise of gates


@register_gate("hash")
class HashGate(Gate[HashOptions]):
    """y = E_e(x) with e = table[token id]; the table is fixed before training.

    Source: Hash layers (arXiv 2106.04426), whose hashes `--moe-hash` selects.
    """

    Options = HashOptions
    capabilities = Capabilities(
        default_aux="none", logits=False, null_experts=False, gate_init=False, fixed_k=True
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
        chosen_TE = F.one_hot(self.table_V[context.token_ids_T], self.num_experts)
        probs_TE = chosen_TE.to(x_TD.dtype)
        return Choice(chosen_TE.bool(), probs_TE, probs_TE)
