"""RoBERTa with MoE layers."""

from __future__ import annotations

from typing import Any

from fairseq.distributed import fsdp_wrap
from fairseq.models import FairseqEncoder
from fairseq.models.roberta.model import RobertaEncoder, RobertaLMHead, RobertaModel
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from omegaconf import open_dict
from torch import Tensor, nn

from evomoe_plugin.config.stacks import stacks
from evomoe_plugin.config.values import parse_bool
from evomoe_plugin.models.accounting import ForwardFlops, count_flops
from evomoe_plugin.models.encoder import MoEEncoder
from evomoe_plugin.models.freeze import freeze_part, wrap_apart
from evomoe_plugin.models.fsdp import is_wrapping
from evomoe_plugin.models.moe_model import (
    MoEModel,
    check_format,
    check_rows,
    complete_options,
    log_model,
    other_model,
)
from evomoe_plugin.models.moe_stack import MoEStack

DEFAULT_MAX_POSITIONS = 512
_BERT_DEVIATION = 0.02


class RobertaMoEEncoder(RobertaEncoder):
    """fairseq's RoBERTa encoder, a head on an `MoEEncoder`.

    Args:
        args: the options of the model, completed.
        dictionary: of its tokens.
    """

    def __init__(self, args: Any, dictionary):
        FairseqEncoder.__init__(self, dictionary)
        self.args = args
        embed_tokens = self.build_embedding(
            len(dictionary), args.encoder_embed_dim, dictionary.pad()
        )
        self.sentence_encoder = self.build_encoder(args, dictionary, embed_tokens)
        weight = None if args.untie_weights_roberta else self.sentence_encoder.embed_tokens.weight
        self.lm_head: RobertaLMHead = self.build_lm_head(
            args.encoder_embed_dim, len(dictionary), args.activation_fn, weight
        )

    def build_encoder(self, args: Any, dictionary, embed_tokens: nn.Module) -> MoEEncoder:
        """Called by the constructor."""
        cfg = TransformerConfig.from_namespace(args)
        cfg.encoder.learned_pos, cfg.no_scale_embedding = True, True
        cfg.layernorm_embedding = parse_bool("layernorm_embedding", args.layernorm_embedding)
        encoder = MoEEncoder(
            cfg,
            stacks(args)[0],
            dictionary,
            embed_tokens,
            path="encoder.sentence_encoder",
            expert_deviation=_BERT_DEVIATION,
        )
        encoder.apply(init_bert_params)
        return encoder

    def forward(
        self,
        src_tokens: Tensor,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        masked_tokens: Tensor | None = None,
        with_token_routing: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """As fairseq's; `with_token_routing` as in `MoEDecoder.extract_features`."""
        x, extra = self.extract_features(
            src_tokens, return_all_hiddens, with_token_routing=with_token_routing
        )
        return x if features_only else self.output_layer(x, masked_tokens), extra

    def extract_features(
        self, src_tokens: Tensor, return_all_hiddens: bool = False, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Features before the head.

        Returns:
            [batch, length, D], and a dict with `inner_states` and what `MoEEncoder` has in `moe`.
        """
        out = self.sentence_encoder(
            src_tokens,
            return_all_hiddens=return_all_hiddens,
            token_embeddings=kwargs.get("token_embeddings"),
            with_token_routing=kwargs.get("with_token_routing", False),
        )
        inner_states = out["encoder_states"] if return_all_hiddens else None
        return out["encoder_out"][0].transpose(0, 1), {"inner_states": inner_states, **out["moe"]}


class RobertaMoE(MoEModel, RobertaModel):
    """RoBERTa with MoE layers in place of FFNs at the positions in the options."""

    def __init__(self, args: Any, encoder: RobertaMoEEncoder, forward_flops: ForwardFlops):
        super().__init__(args, encoder)
        self.forward_flops_by_stack = {"": forward_flops}

    @property
    def moe_stacks(self) -> dict[str, MoEStack]:
        """The encoder."""
        return {"": self.encoder.sentence_encoder}

    @classmethod
    def build_model(cls, args: Any, task: Any) -> RobertaMoE:
        """Build the model that the options describe.

        Args:
            args: the fields of `RobertaMoEConfig`, resolved.
            task: with the dictionary.
        Raises:
            OptionError: an option is invalid, or not supported with MoE layers.
        """
        complete_options(args)
        with open_dict(args):
            args.max_positions = args.max_positions or _max_positions(task)
            args.max_source_positions = args.max_positions
        encoder = RobertaMoEEncoder(args, task.source_dictionary)
        vocabulary = len(task.source_dictionary)
        log_model(args, vocabulary)
        model = cls(args, encoder, count_flops(stacks(args)[0], vocabulary))
        model.freeze()
        return model

    def register_classification_head(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As in fairseq; tasks call it after `build_model`, and loading does."""
        super().register_classification_head(name, *args, **kwargs)
        if self.args.moe_train_only is not None:
            head, prefix = self.classification_heads[name], f"classification_heads.{name}."
            freeze_part(head, self.args.moe_train_only, prefix)
            if is_wrapping():
                wrap_apart(self, self.args.moe_train_only, fsdp_wrap)

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuse a checkpoint of another kind of model or dictionary; otherwise as in fairseq.

        Raises:
            OptionError: it is a language model's, or the sizes of the vocabularies differ.
        """
        prefix = f"{name}." if name else ""
        if not any("sentence_encoder." in key for key in state_dict):
            raise other_model(self.args._name, "a RoBERTa")
        check_rows(
            state_dict,
            f"{prefix}encoder.sentence_encoder.embed_tokens.weight",
            self.encoder.sentence_encoder.embed_tokens,
        )
        check_format(state_dict, f"{prefix}encoder.sentence_encoder")
        super().upgrade_state_dict_named(state_dict, name)


def _max_positions(task: Any) -> int:
    known = getattr(task, "max_positions", None)
    return (known() if known else None) or DEFAULT_MAX_POSITIONS
