"""The MoE language model."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

from fairseq.models.transformer_lm import (
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerLanguageModel,
)
from omegaconf import open_dict

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import (
    ModelOptions,
    expert_counts,
    expert_slots,
    moe_layer_indices,
)
from evomoe_plugin.models.accounting import ForwardFlops, count_flops, count_parameters
from evomoe_plugin.models.decoder import MoEDecoder
from evomoe_plugin.models.mixed_precision import warn_if_emulated

logger = logging.getLogger(__name__)

class MoELanguageModel(TransformerLanguageModel):
    """A GPT whose feed-forward networks are MoE layers where the options put them.

    Attributes:
        gives_losses: its forward pass takes `targets` (`MoEDecoder.forward`).
    """

    gives_losses = True

    def __init__(self, decoder: MoEDecoder, forward_flops: ForwardFlops):
        super().__init__(decoder)
        self._forward_flops = forward_flops

    @property
    def forward_flops(self) -> ForwardFlops:
        """What a forward pass costs now."""
        flops = self._forward_flops
        return flops.without_gates if self.decoder.in_dense_phase else flops

    def not_recording(self) -> AbstractContextManager[None]:
        """For batches that are no part of an update, though in training mode."""
        return self.decoder.not_recording()

    def finish_update(self, num_updates: int, group: Any = None) -> None:
        """Called after each update, on every rank (`MoEDecoder.finish_update`)."""
        self.decoder.finish_update(num_updates, group)

    def discard_update(self) -> None:
        """Called where an update was begun but not made."""
        self.decoder.discard_update()

    def begin_record_routing(self) -> None:
        """Begin to record for DynMoE's adaptive process (`MoEDecoder.begin_record_routing`)."""
        self.decoder.begin_record_routing()

    def end_record_routing(self) -> None:
        """Record no more, and adapt the experts (`MoEDecoder.end_record_routing`)."""
        self.decoder.end_record_routing()

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """No weights are published."""
        return {}

    @classmethod
    def build_model(cls, args: ModelOptions, task: Any) -> MoELanguageModel:
        """Build the model that the options describe.

        Args:
            args: the fields of `MoELanguageModelConfig`, resolved.
            task: gives the dictionaries.
        Raises:
            OptionError: an option cannot work, or does not go with MoE layers.
        """
        validate(args, warn=False)  # said before the run, once for all ranks
        with open_dict(args):
            for dim in ("decoder_input_dim", "decoder_output_dim"):
                args[dim] = args[dim] or args.decoder_embed_dim
            # Post-norm decoders of this depth do not train from scratch; most of fairseq's own
            # architectures force it too.
            args.decoder_normalize_before = not args.moe_post_norm
            args.checkpoint_activations |= args.offload_activations
            if args.max_target_positions is None:
                args.max_target_positions = args.tokens_per_sample or DEFAULT_MAX_TARGET_POSITIONS
        vocabulary = len(task.source_dictionary)
        embed_tokens = cls.build_embedding(args, task.source_dictionary, args.decoder_input_dim)
        decoder = MoEDecoder(args, task.target_dictionary, embed_tokens)
        _log_sizes(args, vocabulary)
        warn_if_emulated(args.moe_matmul_dtype)
        return cls(decoder, count_flops(args, vocabulary))

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuse a checkpoint that another dictionary was used for; otherwise as fairseq does.

        Raises:
            OptionError: the sizes of the vocabularies differ.
        """
        prefix = f"{name}." if name else ""
        saved = state_dict.get(f"{prefix}decoder.embed_tokens.weight")
        vocabulary = self.decoder.embed_tokens.num_embeddings
        if saved is not None and saved.size(0) != vocabulary:
            raise OptionError("DATA", "dict.txt",
                              f"has {vocabulary} symbols, the checkpoint was trained with "
                              f"{saved.size(0)}: give the data that belongs to the checkpoint")
        super().upgrade_state_dict_named(state_dict, name)


def _log_sizes(args: ModelOptions, vocabulary: int) -> None:
    layers = moe_layer_indices(args, args.decoder_layers)
    counts, slots = expert_counts(args, len(layers)), expert_slots(args, len(layers))
    sizes = count_parameters(args, vocabulary)
    logger.info(
        "MoE: %d of %d layers, gate %s, experts a layer %s%s", len(layers), args.decoder_layers,
        args.moe_gate, counts[0] if len(set(counts)) == 1 else counts,
        "" if slots == counts else f", room for {args.moe_max_experts}",
    )
    logger.info(
        "parameters: %s in total, %s of them in experts; %s work on a token at one expert a layer",
        *(f"{n:,}" for n in (sizes.total, sizes.experts, sizes.active_top1)),
    )
