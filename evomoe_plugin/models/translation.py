"""The Transformer for translation with MoE layers."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from omegaconf import open_dict
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.stacks import stacks
from evomoe_plugin.models.accounting import ForwardFlops, count_flops
from evomoe_plugin.models.decoder import MoEDecoder
from evomoe_plugin.models.encoder import MoEEncoder
from evomoe_plugin.models.moe_model import (
    MoEModel,
    check_format,
    check_rows,
    complete_options,
    log_model,
    other_model,
)
from evomoe_plugin.models.moe_stack import MoEStack


class TransformerMoE(MoEModel, TransformerModelBase):
    """fairseq's Transformer with MoE layers in place of FFNs at the positions in the options of
    encoder and decoder."""

    gives_losses = True

    def __init__(
        self,
        args: Any,
        encoder: MoEEncoder,
        decoder: MoEDecoder,
        forward_flops: dict[str, ForwardFlops],
    ):
        super().__init__(encoder.cfg, encoder, decoder)
        self.args = args
        self.forward_flops_by_stack = forward_flops

    @property
    def moe_stacks(self) -> dict[str, MoEStack]:
        """Encoder and decoder."""
        return {"encoder_": self.encoder, "decoder_": self.decoder}

    @classmethod
    def build_model(cls, args: Any, task: Any) -> TransformerMoE:
        """Build the model that the options describe.

        Args:
            args: the fields of `TransformerMoEConfig`, resolved.
            task: with the dictionaries.
        Raises:
            OptionError: an option is invalid, or not supported with MoE layers.
        """
        complete_options(args)
        source, target = task.source_dictionary, task.target_dictionary
        with open_dict(args):
            args.share_decoder_input_output_embed |= args.share_all_embeddings
            for dim in ("decoder_input_dim", "decoder_output_dim"):
                args[dim] = args[dim] or args.decoder_embed_dim
        _check_embeddings(args, source == target)
        of_encoder, of_decoder = stacks(args)
        cfg = TransformerConfig.from_namespace(args)
        read = cls.build_embedding(cfg, source, args.encoder_embed_dim, args.encoder_embed_path)
        encoder = MoEEncoder(cfg, of_encoder, source, read)
        written = read
        if not args.share_all_embeddings:
            written = cls.build_embedding(
                cfg, target, args.decoder_input_dim, args.decoder_embed_path
            )
        decoder = MoEDecoder(args, target, written, of_decoder, len(encoder.moe_layers))
        log_model(args, len(source), len(target))
        flops = {
            "encoder_": count_flops(of_encoder, len(source)),
            "decoder_": count_flops(of_decoder, len(target)),
        }
        model = cls(args, encoder, decoder, flops)
        model.freeze()
        return model

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None,
        prev_output_tokens: Tensor,
        return_all_hiddens: bool = False,
        with_token_routing: bool = False,
        **of_decoder: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """As fairseq's Transformer; other arguments as in `MoEDecoder.forward`.

        `moe_aux`, `moe_aux_coefficients`, `moe_stats` and, `with_token_routing`,
        `moe_token_routing` of encoder and decoder have names with the prefixes `encoder_` and
        `decoder_`.
        """
        encoder_out = self.encoder(
            src_tokens,
            src_lengths=src_lengths,
            return_all_hiddens=return_all_hiddens,
            with_token_routing=with_token_routing,
        )
        x, extra = self.decoder(
            prev_output_tokens,
            encoder_out=encoder_out,
            src_lengths=src_lengths,
            with_token_routing=with_token_routing,
            **of_decoder,
        )
        outputs_of_layers = ["moe_aux", "moe_aux_coefficients", "moe_stats"]
        if with_token_routing:
            outputs_of_layers.append("moe_token_routing")
        for name in outputs_of_layers:
            outputs = {"encoder_": encoder_out["moe"], "decoder_": extra}
            extra[name] = {
                prefix + key: value
                for prefix, output in outputs.items()
                for key, value in output.get(name, {}).items()
            }
        return x, extra

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuse a checkpoint of another kind of model or dictionary; otherwise as in fairseq.

        Raises:
            OptionError: it is a language model's, or the sizes of the vocabularies differ.
        """
        prefix = f"{name}." if name else ""
        for stack in ("encoder", "decoder"):
            if f"{prefix}{stack}.embed_tokens.weight" not in state_dict:
                raise other_model(self.args._name, "a translation model")
            check_rows(
                state_dict,
                f"{prefix}{stack}.embed_tokens.weight",
                getattr(self, stack).embed_tokens,
            )
            check_format(state_dict, f"{prefix}{stack}")
        super().upgrade_state_dict_named(state_dict, name)


def _check_embeddings(args: Any, one_dictionary: bool) -> None:
    """Raise `OptionError` if embeddings cannot be shared as asked for."""
    shares_all = args.share_all_embeddings
    if shares_all and not one_dictionary:
        raise OptionError(
            "share_all_embeddings",
            True,
            "source and target have different dictionaries: prepare the data with a joint one "
            "(--joined-dictionary), or leave it out",
        )
    if shares_all and args.encoder_embed_dim != args.decoder_input_dim:
        raise OptionError(
            "share_all_embeddings",
            True,
            f"--encoder-embed-dim {args.encoder_embed_dim} is not --decoder-embed-dim "
            f"{args.decoder_input_dim}: give equal ones",
        )
    if shares_all and args.decoder_embed_path not in (None, args.encoder_embed_path):
        raise OptionError(
            "decoder_embed_path",
            args.decoder_embed_path,
            "--share-all-embeddings takes those of --encoder-embed-path: leave it out",
        )
    if args.share_decoder_input_output_embed and (
        args.decoder_input_dim != args.decoder_output_dim
    ):
        raise OptionError(
            "decoder_output_dim",
            args.decoder_output_dim,
            f"with shared embeddings it must be {args.decoder_input_dim}, the decoder's input "
            "dimension",
        )
