"""Sizes and routing of an exported model."""

from transformers import PretrainedConfig


class EvoMoEConfig(PretrainedConfig):
    """Sizes; `routing` configures the gates."""

    model_type = "evomoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # a list: Trainer adds to it

    vocab_size = hidden_size = input_dim = output_dim = intermediate_size = 8
    num_hidden_layers = num_attention_heads = num_key_value_heads = 1
    head_dim = 8
    max_position_embeddings = 8
    activation = "gelu"
    position_embedding = "sinusoidal"  # or learned, rotary, none
    first_position = 2  # of sinusoidal ones: fairseq's come after that of padding
    scale_embedding = True
    norm = "layer"  # or rms
    norm_eps = 1e-5
    qk_norm = "none"  # or shared, separate, joint
    qkv_bias = out_bias = ffn_bias = True
    ffn_gated = False
    parallel = False  # attention and FFN on the output of one norm
    logits_bias = False
    layernorm_embedding = False
    post_norm = False  # norms after attention and FFN, instead of before
    final_norm = True
    num_experts = (0,)  # of each layer; 0: dense FFN
    expert_ffn_dim = shared_ffn_dim = 8
    expert_gated = False
    num_null_experts = num_shared_experts = 0
    shared_combine = "add"  # or softmax, mix, sigmoid
    routing = None
    tie_word_embeddings = True
