"""The MoE language model."""

from __future__ import annotations

from typing import Any, ClassVar

from fairseq.models.transformer_lm import DEFAULT_MAX_TARGET_POSITIONS, TransformerLanguageModel
from omegaconf import open_dict

from evomoe_plugin.config.hf_config import resolve_hf_config
from evomoe_plugin.models.accounting import ForwardFlops, count_flops
from evomoe_plugin.models.decoder import MoEDecoder
from evomoe_plugin.models.moe_model import (
    MoEModel,
    check_format,
    check_rows,
    complete_options,
    log_model,
)
from evomoe_plugin.models.moe_stack import MoEStack


class MoELanguageModel(MoEModel, TransformerLanguageModel):
    """A GPT with MoE layers in place of FFNs at the positions in the options."""

    gives_losses = True
    decoder_class: ClassVar[type[MoEDecoder]] = MoEDecoder

    def __init__(self, decoder: MoEDecoder, forward_flops: ForwardFlops):
        super().__init__(decoder)
        self.forward_flops_by_stack = {"": forward_flops}

    @property
    def options(self) -> Any:
        """Of the model, completed."""
        return self.decoder.args

    @property
    def moe_stacks(self) -> dict[str, MoEStack]:
        """The decoder."""
        return {"": self.decoder}

    @classmethod
    def complete(cls, args: Any) -> None:
        """Check the options, and set those that follow from others.

        Raises:
            OptionError: as `build_model`.
        """
        resolve_hf_config(args)
        complete_options(args)
        with open_dict(args):
            for dim in ("decoder_input_dim", "decoder_output_dim"):
                args[dim] = args[dim] or args.decoder_embed_dim
            # Post-norm decoders of this depth do not train from scratch; most of fairseq's own
            # architectures force it too.
            args.decoder_normalize_before = not args.moe_post_norm
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
        log_model(args, vocabulary)
        model = cls(decoder, count_flops(args, vocabulary))
        model.freeze()
        return model

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuse a checkpoint of another dictionary, or without the number of its format, for which
        fairseq would leave out the last norm; otherwise as in fairseq.

        Raises:
            OptionError: the sizes of the vocabularies differ, or the number is missing.
        """
        prefix = f"{name}." if name else ""
        check_format(state_dict, f"{prefix}decoder")
        check_rows(state_dict, f"{prefix}decoder.embed_tokens.weight", self.decoder.embed_tokens)
        super().upgrade_state_dict_named(state_dict, name)
