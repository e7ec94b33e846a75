"""What encoders and decoders with MoE layers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.distributed import fsdp_wrap
from fairseq.distributed.utils import all_reduce_dict
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.config.moe_layers import expert_counts, expert_slots, moe_layer_indices
from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.gates import LayerInfo, gate_class
from evomoe_plugin.gates.top_any import TopAnyGate
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models.fsdp import built_unwrapped, wrap_experts
from evomoe_plugin.models.mixed_precision import matmul_dtype
from evomoe_plugin.routing import stats as st


class NonFiniteError(RunFailed):
    """NaN/Inf in the forward pass; ends the run with one line."""


class MoEStack:
    """Encoders and decoders inherit this beside fairseq's class, call `begin_stack` before its
    constructor, inside of `building`, and `finish_stack` after it.

    Attributes:
        options: of this stack, under the names of a decoder (`config.stacks`).
        moe_layers: in order; also those in wrapped layers.
    """

    # Of fairseq's class.
    layers: nn.ModuleList
    embed_tokens: nn.Module
    layer_norm: nn.Module | None
    modules: Callable[[], Iterator[nn.Module]]

    options: ModelOptions
    moe_layers: tuple[MoELayer, ...]

    def begin_stack(
        self, options: ModelOptions, dictionary: Dictionary, path: str, first_layer_id: int = 0
    ) -> None:
        """Read the positions of MoE layers.

        Args:
            options: of this stack.
            dictionary: of the tokens that it reads.
            path: its name in the model.
            first_layer_id: number of MoE layers in stacks before it.
        """
        self.options = options
        self._path = path
        moe_layers = moe_layer_indices(options, options.decoder_layers)
        self._expert_count = dict(zip(moe_layers, expert_slots(options), strict=True))
        self._start_experts = expert_counts(options)
        self._first_layer_id = first_layer_id
        self._layers_built = 0
        self._token_counts = tuple(getattr(dictionary, "count", ()))
        self._aux_coefficients = gate_class(options.moe_gate).aux_coefficients(options)
        self._recording = True
        self._are_finite: list[Tensor] | None = None
        self._update_totals: dict[int, dict[str, Tensor]] = {}

    def building(self) -> AbstractContextManager[None]:
        """The context in which fairseq's constructor builds the layers."""
        return built_unwrapped(self.options.moe_train_only is not None)

    def finish_stack(self) -> None:
        """Find the MoE layers."""
        # A tuple, so that they are not registered as submodules again.
        self.moe_layers = tuple(
            module for module in self.layers.modules() if isinstance(module, MoELayer)
        )
        self._find_layers()

    def _find_layers(self) -> None:
        self._moe_ids = {id(self.layers[i]): n for n, i in enumerate(self._expert_count)}

    def wrap_layers(self) -> None:
        """Wrap layers that were built inside of `building` for FSDP."""
        options: Any = self.options
        least = 0 if options.checkpoint_activations else options.min_params_to_wrap
        for i, wrapped in enumerate(self.layers):
            self.layers[i] = fsdp_wrap(wrapped, min_num_params=least)
        self._find_layers()

    def build_next_layer(
        self, cfg: TransformerConfig, build: Callable[[LayerInfo | None], nn.Module]
    ) -> nn.Module:
        """Build the next layer, wrapped as in fairseq for checkpointing and FSDP.

        Args:
            cfg: the options in fairseq's form.
            build: makes the layer; given None, one with a dense FFN.
        """
        index, self._layers_built = self._layers_built, self._layers_built + 1
        info = None
        if index in self._expert_count:
            n = list(self._expert_count).index(index)
            info = LayerInfo(
                model_dim=self.options.decoder_embed_dim,
                num_experts=self._expert_count[index],
                start_experts=self._start_experts[n],
                num_null=self.options.moe_null_experts,
                layer_id=self._first_layer_id + n,
                seed=self.options.seed,
                token_counts_V=self._token_counts,
            )
        layer = build(info)
        if info is not None:
            wrap_experts(layer.moe)
        if cfg.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        return fsdp_wrap(
            layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
        )

    @property
    def in_dense_phase(self) -> bool:
        """Whether MoE layers use only expert 0 (`MoELayer.in_dense_phase`)."""
        return any(layer.in_dense_phase for layer in self.moe_layers[:1])

    def layer_name(self, moe_layer: int) -> str:
        """Name of the n-th MoE layer in the checkpoint."""
        return f"{self._path}.layers.{list(self._expert_count)[moe_layer]}.moe"

    def matmul_dtype(self) -> AbstractContextManager[None]:
        """Compute matmuls inside in the dtype of `--moe-matmul-dtype`."""
        return matmul_dtype(self.options.moe_matmul_dtype, self._device.type)

    @property
    def _device(self) -> torch.device:
        weight = self.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return weight.device

    # What layers return, gathered.

    def moe_outputs(self, aux: Sequence[Tensor], moe_stats: dict[str, Tensor]) -> dict[str, Any]:
        """What the criterion needs of a forward pass.

        Args:
            aux: losses of each MoE layer that was computed, [A].
            moe_stats: from `stack_stats`.
        Returns:
            `moe_aux` (name -> [L]), `moe_aux_coefficients` (name -> float), `moe_stats`; empty
            without MoE layers.
        """
        if not self.moe_layers:
            return {}
        moe_aux = {}
        if self._aux_coefficients and aux:
            moe_aux = dict(
                zip(self._aux_coefficients, torch.stack(list(aux)).unbind(1), strict=True)
            )
        return {
            "moe_aux": moe_aux,
            "moe_stats": moe_stats,
            "moe_aux_coefficients": dict(self._aux_coefficients),
        }

    def stack_stats(self, stats: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """name -> [L] or [L, E], NaN where a layer has fewer experts, 0 for dropped layers."""
        if not self.moe_layers:
            return {}
        most = max(layer.num_experts for layer in self.moe_layers)
        rows = []
        for n, layer in enumerate(self.moe_layers):
            row = dict(stats[n] if n in stats else layer.zero_stats())
            fill = (0, most - layer.num_experts)
            for name in st.PER_EXPERT:
                if name in row:
                    row[name] = nn.functional.pad(row[name], fill, value=float("nan"))
            rows.append(row)
        return {
            name: torch.stack([row[name] for row in rows])
            for name, value in rows[0].items()
            if st.is_logged(name, value)
        }

    def check_routes(self) -> None:
        """Raise `ValueError` unless gates route as in evaluation."""
        assert isinstance(self, nn.Module)
        if self.training or self.in_dense_phase:
            raise ValueError("token routing is that of gates in evaluation mode")

    def token_routing(
        self, stats: Mapping[int, Mapping[str, Tensor]], x: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        """`moe_token_routing`, name -> [L, batch, length], of `routing.stability.token_routing`;
        empty without MoE layers.

        Args:
            stats: of each MoE layer.
            x: [length, batch, D].
        """
        if not self.moe_layers:
            return {}
        rows = [
            {name: row[name].view(x.shape[:2]).t() for name in st.OF_TOKENS}
            for row in stats.values()
        ]
        return {
            "moe_token_routing": {
                name: torch.stack([row[name] for row in rows]) for name in st.OF_TOKENS
            }
        }

    # Statistics of an update, from which gates learn. They are summed here and not in the layers,
    # whose forward pass activation checkpointing runs twice.

    def add_to_update(self, stats: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the statistics of a forward pass, by the number of the MoE layer."""
        if (
            self.in_dense_phase
            or not self._recording
            or not any(layer.gate.changes_after_updates for layer in self.moe_layers)
        ):
            return
        for n, row in stats.items():
            known = self._update_totals.get(n, {})
            self._update_totals[n] = {k: value + known.get(k, 0) for k, value in row.items()}

    @contextmanager
    def not_recording(self) -> Iterator[None]:
        """For batches that are not part of the update."""
        self._recording = False
        try:
            yield
        finally:
            self._recording = True

    def discard_update(self) -> None:
        """Clear the statistics since the last update: its optimizer step was skipped."""
        self._update_totals.clear()

    def finish_update(self, num_updates: int, group: Any = None) -> None:
        """Update buffers of gates from the routing of all ranks in the completed update.

        Args:
            num_updates: completed updates, this one included.
            group: the data-parallel process group; None if there is none.
        """
        totals, self._update_totals = self._update_totals, {}
        if num_updates <= (self.options.moe_spawn_updates or 0):  # it was in the dense phase
            return
        if not any(layer.gate.changes_after_updates for layer in self.moe_layers):
            return
        rows = [totals.get(n) or layer.zero_stats() for n, layer in enumerate(self.moe_layers)]
        if group is not None:
            # In the same order on all ranks.
            flat = {(n, name): row[name] for n, row in enumerate(rows) for name in sorted(row)}
            for (n, name), total in all_reduce_dict(flat, self._device, group).items():
                rows[n][name] = total
        layers = self.stack_stats(dict(enumerate(rows)))
        for layer, row in zip(self.moe_layers, rows, strict=True):
            layer.gate.finish_update(layer.gate_updates(num_updates), row, layers)

    def begin_record_routing(self) -> None:
        """Start recording for DynMoE's adaptive process; call it on all ranks.

        Earlier batches of the current update are not recorded.

        Raises:
            OptionError: the gate does not adapt, or adapts at fixed intervals.
        """
        for gate in self._manual_gates():
            gate.record.begin()
        self._update_totals.clear()

    def end_record_routing(self) -> None:
        """Stop recording; experts are removed and added at the end of the current update, or else
        of the next one. Call it on all ranks.

        Raises:
            OptionError: the gate does not adapt, or adapts at fixed intervals.
            RuntimeError: recording is not on.
        """
        for gate in self._manual_gates():
            gate.record.end()

    def _manual_gates(self) -> list[TopAnyGate]:
        gates = [layer.gate for layer in self.moe_layers if isinstance(layer.gate, TopAnyGate)]
        if len(gates) < len(self.moe_layers):
            raise OptionError(
                "moe_gate",
                self.options.moe_gate,
                "its number of experts is fixed: give top_any to record routing",
            )
        interval = getattr(self.options, "moe_adapt_record_interval", 0)
        if interval:
            raise OptionError(
                "moe_adapt_record_interval",
                interval,
                "it sets what is recorded: give 0 to start and end by calls",
            )
        return gates

    @contextmanager
    def checking_later(self, are_finite: list[Tensor]) -> Iterator[None]:
        """Inside, `check_finite` waits for nothing and adds a bool to the list."""
        self._are_finite = are_finite
        try:
            yield
        finally:
            self._are_finite = None

    def check_finite(
        self, x: Tensor, inner_states: Sequence[Tensor], moe_stats: Mapping[str, Tensor]
    ) -> None:
        """Stop before the optimizer spreads NaN through the weights; inside of `checking_later`,
        leave that to the caller.

        Raises:
            NonFiniteError: names the first layer whose output is NaN/Inf.
        """
        bad_gates_L = moe_stats.get(st.NONFINITE, x.new_zeros(1))
        is_finite = torch.isfinite(x).all() & ~bad_gates_L.any()
        if self._are_finite is not None:
            self._are_finite.append(is_finite)
            return
        if is_finite:  # one synchronisation with the device
            return
        advice = "stopped before the optimizer step; lower --lr or --clip-norm, or look at the data"
        if bad_gates_L.any():
            n = int(bad_gates_L.nonzero()[0])
            raise NonFiniteError(
                f"{self.layer_name(n)}: gate logits are NaN/Inf for {int(bad_gates_L[n])} "
                f"tokens after {int(self.moe_layers[n].num_updates)} updates; {advice}"
            )
        finite = [bool(torch.isfinite(state).all()) for state in inner_states]
        if all(finite):
            where = f"the output of {self._path}.layer_norm"
        else:
            first = finite.index(False)
            layer = f"{self._path}.layers.{first - 1}"
            where = f"the output of {layer}" if first else "the embedded input"
        raise NonFiniteError(f"{where} is NaN/Inf; {advice}")
