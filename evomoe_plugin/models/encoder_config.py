"""The options of RoBERTa and of the Transformer for translation: fairseq's, ours and those of
gates."""

# No `from __future__ import annotations`: fairseq reads the types of these fields at run time.

from dataclasses import dataclass
from typing import Optional

from fairseq.dataclass import FairseqDataclass
from omegaconf import II

from evomoe_plugin.config.options import ACTIVATIONS, MoEOptions, flag
from evomoe_plugin.models.config import GateOptions

_ACTIVATION = "activation of the feed-forward networks: " + ", ".join(ACTIVATIONS)


@dataclass
class _Common(GateOptions, MoEOptions, FairseqDataclass):
    """What models with an encoder have."""

    activation_fn: str = flag("relu", _ACTIVATION)
    dropout: float = flag(0.1, "dropout probability")
    attention_dropout: float = flag(0.0, "dropout probability of attention weights")
    activation_dropout: float = flag(
        0.0, "dropout probability after the activation in FFNs", alias="--relu-dropout"
    )
    encoder_layers: int = flag(6, "encoder layers")
    encoder_embed_dim: int = flag(512, "width of the encoder")
    encoder_ffn_embed_dim: int = flag(2048, "hidden width of the encoder's FFNs")
    encoder_attention_heads: int = flag(8, "attention heads of the encoder")
    encoder_normalize_before: bool = flag(
        False, "pre-norm encoder layers (default: post-norm, as in fairseq)"
    )
    encoder_layerdrop: float = flag(0.0, "LayerDrop probability of the encoder")
    no_token_positional_embeddings: bool = flag(False, "no position embeddings")
    checkpoint_activations: bool = flag(
        False, "recompute each layer's activations in the backward pass"
    )
    offload_activations: bool = flag(
        False, "move checkpointed activations to the CPU; sets --checkpoint-activations"
    )
    min_params_to_wrap: int = flag(
        100_000_000, "parameters of a layer from which on FSDP wraps it by itself"
    )
    # Read by fairseq's classification heads.
    quant_noise_pq: float = flag(0.0, "quantization noise; MoE layers do not support it")
    quant_noise_pq_block_size: int = flag(8, "block size of quantization noise")
    seed: int = II("common.seed")
    max_update: Optional[int] = II("optimization.max_update")


@dataclass
class RobertaMoEConfig(_Common):
    """RoBERTa base: 12 layers, width 768, 12 heads (arXiv 1907.11692)."""

    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: str = flag("gelu", _ACTIVATION)
    attention_dropout: float = 0.1
    # A string, because fairseq makes a boolean whose default is True a flag that turns it off.
    layernorm_embedding: str = flag(
        "true", "norm of the embeddings (true|false)", argparse_const="true"
    )
    pooler_activation_fn: str = flag("tanh", "activation of classification heads")
    pooler_dropout: float = flag(0.0, "dropout probability in classification heads")
    max_positions: Optional[int] = flag(
        None, "most tokens of a sample (default: that of the task, --tokens-per-sample)"
    )
    load_checkpoint_heads: bool = flag(False, "load the checkpoint's classification heads too")
    untie_weights_roberta: bool = flag(
        False, "the head has an output projection of its own, not the embeddings"
    )
    spectral_norm_classification_head: bool = flag(
        False, "spectral norm of the output projection of classification heads"
    )


@dataclass
class RobertaLargeMoEConfig(RobertaMoEConfig):
    """24 layers, width 1024, 16 heads (EvoMoE's code)."""

    encoder_layers: int = 24
    encoder_embed_dim: int = 1024
    encoder_ffn_embed_dim: int = 4096
    encoder_attention_heads: int = 16


@dataclass
class RobertaTinyMoEConfig(RobertaMoEConfig):
    """For laptops: 4 layers, width 128, 4 heads."""

    encoder_layers: int = 4
    encoder_embed_dim: int = 128
    encoder_ffn_embed_dim: int = 512
    encoder_attention_heads: int = 4


@dataclass
class TransformerMoEConfig(_Common):
    """The Transformer: 6 + 6 layers, width 512, 8 heads (arXiv 1706.03762)."""

    encoder_moe_freq: Optional[int] = flag(None, "--moe-freq of the encoder; 0: a dense one")
    encoder_moe_start_layer: Optional[int] = flag(None, "--moe-start-layer of the encoder")
    encoder_moe_layers: Optional[str] = flag(None, "--moe-layers of the encoder; none: a dense one")
    decoder_moe_freq: Optional[int] = flag(None, "--moe-freq of the decoder; 0: a dense one")
    decoder_moe_start_layer: Optional[int] = flag(None, "--moe-start-layer of the decoder")
    decoder_moe_layers: Optional[str] = flag(None, "--moe-layers of the decoder; none: a dense one")
    encoder_embed_path: Optional[str] = flag(None, "file of the encoder's initial embeddings")
    encoder_learned_pos: bool = flag(False, "learned positions in the encoder")
    decoder_embed_path: Optional[str] = flag(None, "file of the decoder's initial embeddings")
    decoder_layers: int = flag(6, "decoder layers")
    decoder_embed_dim: int = flag(512, "width of the decoder")
    decoder_ffn_embed_dim: int = flag(2048, "hidden width of the decoder's FFNs")
    decoder_attention_heads: int = flag(8, "attention heads of the decoder")
    decoder_normalize_before: bool = flag(
        False, "pre-norm decoder layers (default: post-norm, as in fairseq)"
    )
    decoder_learned_pos: bool = flag(False, "learned positions in the decoder")
    decoder_layerdrop: float = flag(0.0, "LayerDrop probability of the decoder")
    decoder_input_dim: int = flag(0, "decoder input dimension; 0: --decoder-embed-dim")
    decoder_output_dim: int = flag(0, "decoder output dimension; 0: --decoder-embed-dim")
    no_decoder_final_norm: bool = flag(False, "no norm after the last decoder layer")
    share_decoder_input_output_embed: bool = flag(
        False, "the output projection is the decoder's embedding"
    )
    share_all_embeddings: bool = flag(
        False, "encoder and decoder have one embedding, which is the output projection too"
    )
    layernorm_embedding: bool = flag(False, "norm of the embeddings")
    no_scale_embedding: bool = flag(False, "do not scale embeddings by the root of the width")
    max_source_positions: int = flag(1024, "most tokens of a source sentence")
    max_target_positions: int = flag(1024, "most tokens of a target sentence")


@dataclass
class TransformerTinyMoEConfig(TransformerMoEConfig):
    """For laptops: 2 + 2 layers, width 128, 4 heads, an MoE layer in each."""

    encoder_layers: int = 2
    encoder_embed_dim: int = 128
    encoder_ffn_embed_dim: int = 256
    encoder_attention_heads: int = 4
    decoder_layers: int = 2
    decoder_embed_dim: int = 128
    decoder_ffn_embed_dim: int = 256
    decoder_attention_heads: int = 4


@dataclass
class TransformerIWSLTMoEConfig(TransformerMoEConfig):
    """6 + 6 layers, width 512, 4 heads (fairseq's transformer_iwslt_de_en)."""

    encoder_ffn_embed_dim: int = 1024
    encoder_attention_heads: int = 4
    decoder_ffn_embed_dim: int = 1024
    decoder_attention_heads: int = 4


@dataclass
class TransformerWMTBigMoEConfig(TransformerMoEConfig):
    """6 + 6 layers, width 1024, 16 heads (fairseq's transformer_wmt_en_de_big)."""

    encoder_embed_dim: int = 1024
    encoder_ffn_embed_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_embed_dim: int = 1024
    decoder_ffn_embed_dim: int = 4096
    decoder_attention_heads: int = 16
    dropout: float = 0.3
    attention_dropout: float = 0.1
