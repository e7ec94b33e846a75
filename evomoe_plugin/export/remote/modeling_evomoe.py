"""Decoders with mixture-of-experts layers for transformers, trained by fairseq with evomoe_plugin:
GPTs, and those with rotary positions, as in Llama.

Needs only torch and transformers, 5 or newer. Outputs equal those of the trained model in
evaluation mode; there is no dropout, routing noise or auxiliary losses.

Shape suffixes, here and in the files beside it: B batch, L new positions, M all positions, T
tokens, D model width, F hidden width, E routed experts, C candidates of a gate (the E experts, then
null experts), N routed (token, expert) pairs, S shared experts, K experts per token or selectors, R
rotated width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_evomoe import Attention, build_norm
from .configuration_evomoe import EvoMoEConfig
from .experts_evomoe import ACTIVATIONS, Experts
from .gate_evomoe import Gate
from .positions_evomoe import Rotary, sinusoids


class MoE(nn.Module):
    """MoE layer; only routed pairs are computed."""

    def __init__(self, config, num_experts):
        super().__init__()
        self.gate = Gate(config, num_experts)
        self.experts = Experts(config, num_experts, config.expert_ffn_dim)
        self.shared = None
        if config.num_shared_experts:
            self.shared = Experts(config, config.num_shared_experts, config.shared_ffn_dim)

    def forward(self, x_TD, ids_T, keep_T):
        mask_TC, weights_TC, shared_TS = self.gate(x_TD, ids_T)
        mask_TE = mask_TC[:, : self.gate.num_experts] & keep_T.unsqueeze(1)
        expert_N, token_N = mask_TE.t().nonzero(as_tuple=True)
        rows_ND = self.experts(x_TD[token_N], mask_TE.sum(0).tolist())
        weights_N1 = weights_TC[token_N, expert_N].unsqueeze(1).to(rows_ND.dtype)
        y_TD = torch.zeros_like(x_TD).index_add(0, token_N, rows_ND * weights_N1)
        if self.shared is None:
            return y_TD
        S = self.shared.fc1_weight.size(0)
        rows = self.shared(x_TD.repeat(S, 1), [x_TD.size(0)] * S).view(S, *x_TD.shape)
        if shared_TS is not None:
            rows = rows * shared_TS.t().unsqueeze(2).to(rows.dtype)
        return y_TD + rows.sum(0)


class Block(nn.Module):
    """Attention, then an FFN or an MoE layer: pre-norm, post-norm or side by side."""

    def __init__(self, config, layer):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.self_attn_layer_norm = build_norm(config, D)
        self.final_layer_norm = None if config.parallel else build_norm(config, D)
        self.self_attn, self.post_norm = Attention(config, layer), config.post_norm
        self.moe = None
        if config.num_experts[layer]:
            self.moe = MoE(config, config.num_experts[layer])
        else:
            self.activation = ACTIVATIONS[config.activation]
            self.fc1 = nn.Linear(D, F_, bias=config.ffn_bias)
            self.fc2 = nn.Linear(F_, D, bias=config.ffn_bias)
            self.fc3 = nn.Linear(D, F_, bias=config.ffn_bias) if config.ffn_gated else None

    def forward(self, x_BLD, ids_BL, keep_BL, **attention):
        """The output, and attention's weights or None."""
        if self.post_norm:
            y_BLD, weights = self.self_attn(x_BLD, **attention)
            x_BLD = self.self_attn_layer_norm(x_BLD + y_BLD)
            return self.final_layer_norm(x_BLD + self._ffn(x_BLD, ids_BL, keep_BL)), weights
        normed_BLD = self.self_attn_layer_norm(x_BLD)
        y_BLD, weights = self.self_attn(normed_BLD, **attention)
        x_BLD = x_BLD + y_BLD
        if self.final_layer_norm is not None:
            normed_BLD = self.final_layer_norm(x_BLD)
        return x_BLD + self._ffn(normed_BLD, ids_BL, keep_BL), weights

    def _ffn(self, x_BLD, ids_BL, keep_BL):
        if self.moe is None:
            hidden = self.activation(self.fc1(x_BLD))
            return self.fc2(hidden if self.fc3 is None else hidden * self.fc3(x_BLD))
        y_TD = self.moe(x_BLD.flatten(0, 1), ids_BL.flatten(), keep_BL.flatten())
        return y_TD.view_as(x_BLD)


class EvoMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Positions count from the first non-padding token."""

    config_class = EvoMoEConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True
    _tied_weights_keys = {"output_projection.weight": "embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        D, V = config.hidden_size, config.vocab_size
        self.embed_tokens = nn.Embedding(V, config.input_dim, config.pad_token_id)
        self.project_in_dim = self.project_out_dim = nn.Identity()
        if config.input_dim != D:
            self.project_in_dim = nn.Linear(config.input_dim, D, bias=False)
        if config.output_dim != D:
            self.project_out_dim = nn.Linear(D, config.output_dim, bias=False)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, D)
        self.rotary = Rotary(config) if config.position_embedding == "rotary" else None
        self.layernorm_embedding = nn.LayerNorm(D) if config.layernorm_embedding else nn.Identity()
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.layer_norm = build_norm(config, D) if config.final_norm else nn.Identity()
        self.output_projection = nn.Linear(config.output_dim, V, bias=config.logits_bias)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def get_output_embeddings(self):
        return self.output_projection

    def set_output_embeddings(self, value):
        self.output_projection = value

    def resize_token_embeddings(self, *args, **kwargs):
        """As transformers does it, and the gates' tables of token ids with it."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for block in self.layers:
            if block.moe is not None:
                block.moe.gate.resize(self.config.vocab_size)
        return embeddings

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits [B, L, V] of the next tokens.

        Args:
            input_ids: [B, L], tokens not in the cache.
            attention_mask: [B, M], 0 for padding, on either side; or what
                `create_masks_for_generate` makes of it.
            labels: [B, L], -100 is ignored.
            logits_to_keep: number of last positions to return; 0: all.
            output_hidden_states: also return the embeddings, the output of each layer but the last,
                and the output of the last after the final norm.
            output_attentions: also return attention's weights; of attn_implementation="eager" only.
            return_dict: False returns a tuple of what is not None.
            num_items_in_batch: number of labels of all batches of an update, by which the sum of
                losses is divided, as Trainer asks for; None: their number in this batch.
        """
        config = self.config
        output_attentions = _given(output_attentions, config.output_attentions)
        output_hidden_states = _given(output_hidden_states, config.output_hidden_states)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        (B, L), past, device = input_ids.shape, 0, input_ids.device
        if past_key_values is not None:
            past = int(past_key_values.get_seq_length())
        keep_BL = torch.ones(B, L, dtype=torch.bool, device=device)
        positions_BL = torch.arange(past, past + L, device=device).expand(B, L)
        if torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
            keep_BM, new = attention_mask.bool(), slice(past, past + L)
            keep_BL = keep_BM[:, new]
            positions_BL = (keep_BM.long().cumsum(1) - 1).clamp(min=0)[:, new]
        if position_ids is not None:
            positions_BL = position_ids
        x_BLD = self._embed(input_ids, positions_BL)
        attention = {
            "mask": create_causal_mask(
                config=config,
                inputs_embeds=x_BLD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "rotary": None if self.rotary is None else self.rotary(positions_BL, x_BLD.dtype),
            "cache": past_key_values,
        }
        states, attentions = (), ()
        for block in self.layers:
            if output_hidden_states:
                states += (x_BLD,)
            x_BLD, weights = block(x_BLD, input_ids, keep_BL, **attention)
            if output_attentions:
                attentions += (weights,)
        x_BLD = self.layer_norm(x_BLD)
        logits = self.output_projection(self.project_out_dim(x_BLD[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                labels[:, 1:].flatten(),
                ignore_index=-100,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(*states, x_BLD) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return output if _given(return_dict, config.return_dict) else output.to_tuple()

    def _embed(self, ids_BL, positions_BL):
        D = self.config.hidden_size
        x_BLD = self.embed_tokens(ids_BL)
        if self.config.scale_embedding:
            x_BLD = math.sqrt(D) * x_BLD
        x_BLD = self.project_in_dim(x_BLD)
        if self.config.position_embedding == "learned":
            longest = int(positions_BL.max()) + 1 if positions_BL.numel() else 0
            if longest > self.config.max_position_embeddings:
                raise ValueError(
                    f"{longest} tokens: the model has "
                    f"{self.config.max_position_embeddings} positions"
                )
            x_BLD = x_BLD + self.embed_positions(positions_BL)
        elif self.config.position_embedding == "sinusoidal":
            waves = sinusoids(positions_BL + self.config.first_position, D)
            x_BLD = x_BLD + waves.to(x_BLD.dtype)
        return self.layernorm_embedding(x_BLD)


def _given(argument, default):
    return default if argument is None else argument
