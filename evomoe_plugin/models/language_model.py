"""The MoE language model."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from fairseq.models.transformer_lm import DEFAULT_MAX_TARGET_POSITIONS, TransformerLanguageModel
from omegaconf import open_dict

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.hf_config import resolve_hf_config
from evomoe_plugin.config.options import ModelOptions, expert_counts, expert_slots
from evomoe_plugin.models.accounting import ForwardFlops, count_flops, count_parameters
from evomoe_plugin.models.decoder import MoEDecoder
from evomoe_plugin.models.mixed_precision import warn_if_emulated

logger = logging.getLogger(__name__)


class MoELanguageModel(TransformerLanguageModel):
    """A GPT with MoE layers in place of FFNs at the positions in the options.

    Attributes:
        gives_losses: whether the forward pass accepts `targets` (`MoEDecoder.forward`).
    """

    gives_losses = True
    decoder_class: ClassVar[type[MoEDecoder]] = MoEDecoder

    def __init__(self, decoder: MoEDecoder, forward_flops: ForwardFlops):
        super().__init__(decoder)
        self._forward_flops = forward_flops

    @property
    def forward_flops(self) -> ForwardFlops:
        """FLOPs of a forward pass in the current phase."""
        flops = self._forward_flops
        return flops.without_gates if self.decoder.in_dense_phase else flops

    @property
    def num_gated_layers(self) -> int:
        """L, of the layers whose `moe_token_routing` the forward pass gives if asked to; 0 in the
        dense phase."""
        return 0 if self.decoder.in_dense_phase else len(self.decoder.moe_layers)

    def not_recording(self) -> AbstractContextManager[None]:
        """For batches in training mode that are not part of an update."""
        return self.decoder.not_recording()

    def finish_update(self, num_updates: int, group: Any = None) -> None:
        """Called after each update, on every rank (`MoEDecoder.finish_update`)."""
        self.decoder.finish_update(num_updates, group)

    def discard_update(self) -> None:
        """Called if an update was skipped after its forward passes."""
        self.decoder.discard_update()

    def begin_record_routing(self) -> None:
        """Start recording for DynMoE's adaptive process (`MoEDecoder.begin_record_routing`)."""
        self.decoder.begin_record_routing()

    def end_record_routing(self) -> None:
        """Stop recording and adapt the experts (`MoEDecoder.end_record_routing`)."""
        self.decoder.end_record_routing()

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """No weights are published."""
        return {}

    @classmethod
    def complete(cls, args: Any) -> None:
        """Check the options, and set those that follow from others.

        Raises:
            OptionError: as `build_model`.
        """
        resolve_hf_config(args)
        validate(args, warn=False)  # logged before the run, once for all ranks
        with open_dict(args):
            for dim in ("decoder_input_dim", "decoder_output_dim"):
                args[dim] = args[dim] or args.decoder_embed_dim
            # Post-norm decoders of this depth do not train from scratch; most of fairseq's own
            # architectures force it too.
            args.decoder_normalize_before = not args.moe_post_norm
            args.checkpoint_activations |= args.offload_activations
            if args.max_target_positions is None:
                args.max_target_positions = args.tokens_per_sample or DEFAULT_MAX_TARGET_POSITIONS

    @classmethod
    def build_model(cls, args: Any, task: Any) -> MoELanguageModel:
        """Build the model that the options describe.

        Args:
            args: the fields of `MoELanguageModelConfig`, resolved.
            task: with the dictionaries.
        Raises:
            OptionError: an option is invalid, or not supported with MoE layers.
        """
        cls.complete(args)
        vocabulary = len(task.source_dictionary)
        embed_tokens = cls.build_embedding(args, task.source_dictionary, args.decoder_input_dim)
        decoder = cls.decoder_class(args, task.target_dictionary, embed_tokens)
        _log_sizes(args, vocabulary)
        warn_if_emulated(args.moe_matmul_dtype)
        return cls(decoder, count_flops(args, vocabulary))

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuse a checkpoint of another dictionary; otherwise as in fairseq.

        Raises:
            OptionError: the sizes of the vocabularies differ.
        """
        prefix = f"{name}." if name else ""
        saved = state_dict.get(f"{prefix}decoder.embed_tokens.weight")
        vocabulary = self.decoder.embed_tokens.num_embeddings
        if saved is not None and saved.size(0) != vocabulary:
            raise OptionError(
                "DATA",
                "dict.txt",
                f"has {vocabulary} token ids, the checkpoint has "
                f"{saved.size(0)}: give the data of the checkpoint",
            )
        super().upgrade_state_dict_named(state_dict, name)


def _log_sizes(args: ModelOptions, vocabulary: int) -> None:
    counts, slots = expert_counts(args), expert_slots(args)
    sizes = count_parameters(args, vocabulary)
    if not counts:
        logger.info("no MoE layer; parameters: %s", f"{sizes.total:,}")
        return
    logger.info(
        "MoE: %d of %d layers, gate %s, experts per layer %s%s",
        len(counts),
        args.decoder_layers,
        args.moe_gate,
        counts[0] if len(set(counts)) == 1 else counts,
        "" if slots == counts else f", {max(slots)} slots",
    )
    logger.info(
        "parameters: %s in total, %s of them in experts; %s active with one expert per layer",
        *(f"{n:,}" for n in (sizes.total, sizes.experts, sizes.active_top1)),
    )
