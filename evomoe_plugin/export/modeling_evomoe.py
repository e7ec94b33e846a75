"""GPT with mixture-of-experts layers for transformers, trained by fairseq with evomoe_plugin.

It needs only torch and transformers. Its outputs equal those of the trained model in evaluation
mode; it has no dropout, routing noise or auxiliary losses.

Shape suffixes: B batch, L new positions, M all positions, T tokens, D model width, F hidden width,
E routed experts, C candidates of a gate (the E experts, then null experts), N routed (token,
expert) pairs, S shared experts, K experts per token or selectors.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class EvoMoEConfig(PretrainedConfig):
    """Sizes; `routing` configures the gates."""

    model_type = "evomoe"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size = hidden_size = input_dim = output_dim = intermediate_size = 8
    num_hidden_layers = num_attention_heads = 1
    max_position_embeddings = 8
    activation = "gelu"
    position_embedding = "sinusoidal"  # or learned, none
    scale_embedding = True
    layernorm_embedding = False
    post_norm = False  # norms after attention and FFN, instead of before
    final_norm = True
    num_experts = (0,)  # of each layer; 0: dense FFN
    expert_ffn_dim = shared_ffn_dim = 8
    expert_gated = False
    num_null_experts = num_shared_experts = 0
    shared_combine = "add"  # or softmax, mix
    routing = None
    tie_word_embeddings = True


def _gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": F.relu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "swish": F.silu,
}


def _parameter(*shape):
    return nn.Parameter(torch.empty(*shape).normal_(std=0.02))


class Gate(nn.Module):
    """Selects candidates and combine weights for each token."""

    def __init__(self, config, num_experts):
        super().__init__()
        self.routing = routing = config.routing
        self.num_experts = num_experts
        D, C = config.hidden_size, num_experts + config.num_null_experts
        scorer = routing["scorer"]
        if scorer == "mlp":
            self.hidden_weight = _parameter(routing["scorer_dim"], D)
            self.hidden_bias = _parameter(routing["scorer_dim"])
            self.weight = _parameter(C, routing["scorer_dim"])
        elif scorer == "gmm":
            self.projection = _parameter(routing["scorer_dim"], D)
            self.weight = _parameter(C, routing["scorer_dim"])
        elif scorer == "bits":
            self.bits = (num_experts - 1).bit_length()
            self.weight = _parameter(routing["top_k"] * (1 + self.bits), D)
        elif scorer != "none":
            self.weight = _parameter(C, D)
        if scorer in ("cosine", "gmm"):
            self.scale = nn.Parameter(torch.ones(1))
        if routing["select"] == "top_any":
            self.threshold = nn.Parameter(torch.zeros(num_experts))
        if routing["select"] == "table":
            self.register_buffer("table", torch.zeros(config.vocab_size, dtype=torch.int64))
        if routing.get("lexical"):
            self.lexical_logits = _parameter(config.vocab_size, C)
        if routing.get("centred"):
            self.input_mean = nn.Parameter(torch.zeros(D))
        if routing.get("gains"):
            self.gain = nn.Parameter(torch.ones(C))
        # fp64 bits: float buffers may be cast
        if routing.get("bias") or routing.get("logit_bias"):
            self.register_buffer("bias_bits", torch.zeros(C, dtype=torch.int64))
        self.shared = config.num_shared_experts
        self.shared_combine = config.shared_combine
        if self.shared and self.shared_combine != "add":
            self.shared_weight = _parameter(
                self.shared if self.shared_combine == "softmax" else 2, D
            )

    def forward(self, x_TD, ids_T):
        """Selection (bool) and weights [T, C]; weights of shared experts [T, S], or None for 1."""
        if self.routing["fp32"] and x_TD.dtype != torch.float64:
            x_TD = x_TD.float()
        centred_TD = x_TD
        if self.routing.get("centred"):
            centred_TD = x_TD - self.input_mean.to(x_TD.dtype)
        logits_TC = self._logits(centred_TD)
        if self.routing.get("lexical"):
            logits_TC = logits_TC + F.embedding(ids_T, self.lexical_logits).to(x_TD.dtype)
        if self.routing.get("standardized"):
            std_T1 = logits_TC.std(1, correction=0, keepdim=True)
            logits_TC = logits_TC / torch.where(std_T1 > 0, std_T1, 1.0)
        mask_TC, weights_TC = getattr(self, "_" + self.routing["select"])(logits_TC, ids_T)
        if self.routing.get("unit_weights"):
            total_T1 = weights_TC.masked_fill(~mask_TC, 0.0).sum(1, keepdim=True)
            weights_TC = weights_TC / torch.where(total_T1 > 0, total_T1, 1.0)
        if self.routing.get("gains"):
            weights_TC = weights_TC * self.gain.to(weights_TC.dtype)
        if not self.shared or self.shared_combine == "add":
            return mask_TC, weights_TC, None
        logits = F.linear(x_TD, self.shared_weight.to(x_TD.dtype))
        if self.shared_combine == "mix":
            routed_T, shared_T = torch.softmax(logits, dim=1).unbind(1)
            shared_TS = shared_T.unsqueeze(1).expand(-1, self.shared)
        else:
            chosen_TC = logits_TC.masked_fill(~mask_TC, float("-inf"))
            all_of_them = torch.softmax(torch.cat([chosen_TC, logits], dim=1), dim=1)
            routed_T = all_of_them[:, : chosen_TC.size(1)].sum(1)
            shared_TS = all_of_them[:, chosen_TC.size(1) :]
        return mask_TC, weights_TC * routed_T.unsqueeze(1), shared_TS

    def _logits(self, x_TD):
        scorer, dtype = self.routing["scorer"], x_TD.dtype
        if scorer == "none":
            return None
        weight = self.weight.to(dtype)
        if scorer == "mlp":
            x_TD = F.gelu(F.linear(x_TD, self.hidden_weight.to(dtype), self.hidden_bias.to(dtype)))
        if scorer == "gmm":
            x_TD = F.linear(x_TD, self.projection.to(dtype))
        if scorer in ("cosine", "gmm"):
            cosines = F.linear(F.normalize(x_TD, dim=1), F.normalize(weight, dim=1))
            return self.scale.to(dtype) * cosines
        return F.linear(x_TD, weight)

    def _scores(self, logits_TC, temperature=1.0):
        if self.routing["scores"] == "sigmoid":
            return torch.sigmoid(logits_TC)
        return torch.softmax(logits_TC / temperature, dim=1)

    def _biased(self, logits_TC):
        """Logits to select by."""
        if not self.routing.get("logit_bias"):
            return logits_TC
        return logits_TC + self.bias_bits.view(torch.float64).to(logits_TC.dtype)

    def _top_k(self, logits_TC, ids_T):
        """The k candidates with the largest scores."""
        ranked_TC = self._biased(logits_TC)
        if self.routing["rank"] == "scores":
            ranked_TC = self._scores(ranked_TC.double(), self.routing.get("temperature", 1.0))
        if self.routing.get("bias"):
            ranked_TC = ranked_TC + self.bias_bits.view(torch.float64)
        experts_TK = ranked_TC.topk(self.routing["top_k"], dim=1).indices
        mask_TC = _where(experts_TK, ranked_TC)
        temperature = self.routing.get("weight_temperature", 1.0)
        if not self.routing["normalized"]:
            return mask_TC, self._scores(logits_TC, temperature)
        # From log-scores: scores of very unlikely candidates underflow to 0.
        sigmoid = self.routing["scores"] == "sigmoid"
        logs_TC = F.logsigmoid(logits_TC) if sigmoid else logits_TC / temperature
        return mask_TC, torch.softmax(logs_TC.masked_fill(~mask_TC, float("-inf")), dim=1)

    def _threshold(self, logits_TC, ids_T):
        """All candidates above a threshold, and the best."""
        gates_TC = self._scores(self._biased(logits_TC), self.routing["temperature"])
        mask_TC = _where(gates_TC.argmax(1, keepdim=True), gates_TC)
        mask_TC = mask_TC | (gates_TC > self.routing["threshold"])
        return mask_TC, self._scores(logits_TC, self.routing["weight_temperature"])

    def _top_p(self, logits_TC, ids_T):
        """The smallest set with total probability p."""
        probs_TC = torch.softmax(logits_TC, dim=1)
        order_TC = logits_TC.argsort(dim=1, descending=True, stable=True)
        sorted_TC, top_p = probs_TC.gather(1, order_TC), self.routing["top_p"]
        if top_p == 0 or top_p >= 1:
            count = sorted_TC.size(1) if top_p else self.routing["top_k"]
            count_T1 = torch.full_like(sorted_TC[:, :1], count, dtype=torch.int64)
        else:
            count_T1 = 1 + (sorted_TC.cumsum(1)[:, :-1] < top_p).sum(1, keepdim=True)
        if self.routing["weights"] == "sparsemixer":
            mask_TC, values_TC = _sparsemixer(logits_TC, count_T1, self.routing["near_tie"])
        else:
            rank_C = torch.arange(logits_TC.size(1), device=logits_TC.device)
            mask_TC = torch.zeros_like(logits_TC, dtype=torch.bool)
            mask_TC = mask_TC.scatter(1, order_TC, rank_C < count_T1)
            uniform = self.routing["weights"] == "uniform"
            values_TC = torch.ones_like(probs_TC) if uniform else probs_TC
        return mask_TC, _normalized(values_TC, mask_TC)

    def _positive(self, logits_TC, ids_T):
        """All candidates with a positive logit."""
        weights_TC = torch.relu(logits_TC)
        return weights_TC > 0, weights_TC

    def _table(self, logits_TC, ids_T):
        """The fixed expert of each token id."""
        mask_TC = F.one_hot(self.table[ids_T], self.num_experts).bool()
        return mask_TC, mask_TC.float() if logits_TC is None else torch.sigmoid(logits_TC)

    def _first(self, logits_TC, ids_T):
        """The only expert."""
        return torch.ones(ids_T.size(0), 1, dtype=torch.bool, device=ids_T.device), torch.ones(
            ids_T.size(0), 1, device=ids_T.device
        )

    def _top_any(self, logits_TC, ids_T):
        """All candidates above their thresholds, or the best one."""
        mask_TC = logits_TC > self.scale.to(logits_TC.dtype) * self.threshold.to(logits_TC.dtype)
        best_TC = _where(logits_TC.argmax(1, keepdim=True), logits_TC)
        mask_TC = mask_TC | (best_TC & ~mask_TC.any(1, keepdim=True))
        values_TC = mask_TC.to(logits_TC.dtype)
        if self.routing["weights"] == "score":
            values_TC = values_TC * torch.sigmoid(logits_TC)
        return mask_TC, _normalized(values_TC, mask_TC)

    def _bits(self, logits, ids_T):
        """K selectors encode an expert index in soft bits (DSelect-k)."""
        E, K = self.num_experts, self.routing["top_k"]
        alpha_TK = torch.softmax(logits[:, :K], dim=1)
        share = (logits[:, K:].unflatten(1, (K, self.bits)) / self.routing["width"]).clamp(
            -0.5, 0.5
        )
        codes = share.new_ones(*share.shape[:2], 1)
        for one in ((1.5 - 2 * share * share) * share + 0.5).split(1, 2) if self.bits else ():
            codes = torch.cat([codes * (1 - one), codes * one], dim=2)
        chosen_TKE, spare = codes[..., :E], codes[..., E:]
        if spare.size(-1):  # codes from E on map to those without their highest bit
            first = E - codes.size(-1) // 2
            chosen_TKE = chosen_TKE + F.pad(spare, (first, E - first - spare.size(-1)))
        weights_TE = (alpha_TK.unsqueeze(2) * chosen_TKE).sum(1)
        return weights_TE > 0, weights_TE


def _where(experts_TK, like_TC):
    return torch.zeros_like(like_TC, dtype=torch.bool).scatter(1, experts_TK, True)


def _normalized(values_TC, mask_TC):
    total_T1 = (values_TC * mask_TC).sum(1, keepdim=True)
    return values_TC / total_T1.clamp(min=torch.finfo(values_TC.dtype).tiny)


def _sparsemixer(logits_TC, count_T1, near_tie):
    """Select one candidate at a time, weighted by a softmax over its near ties."""
    left_TC = torch.ones_like(logits_TC, dtype=torch.bool)
    mask_TC, values_TC = torch.zeros_like(left_TC), torch.zeros_like(logits_TC)
    for r in range(int(count_T1.max()) if count_T1.numel() else 0):
        largest_T1 = logits_TC.masked_fill(~left_TC, float("-inf")).amax(1, keepdim=True)
        scale_TC = torch.maximum(largest_T1.abs(), logits_TC.abs())
        near_TC = left_TC & (largest_T1 - logits_TC <= near_tie * scale_TC)
        near_logits_TC = logits_TC.masked_fill(~near_TC, float("-inf"))
        best_T1 = near_logits_TC.argmax(1, keepdim=True)
        best_TC = _where(best_T1, logits_TC)
        left_TC = left_TC & ~best_TC
        best_TC = best_TC & (r < count_T1)
        mask_TC = mask_TC | best_TC
        value_T1 = torch.softmax(near_logits_TC, dim=1).gather(1, best_T1)
        values_TC = torch.where(best_TC, value_T1, values_TC)
    return mask_TC, values_TC


class Experts(nn.Module):
    """Stacked FFNs, applied to rows sorted by expert."""

    def __init__(self, config, count, ffn_dim):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.expert_gated
        self.fc1_weight = _parameter(count, ffn_dim, config.hidden_size)
        self.fc2_weight = _parameter(count, ffn_dim, config.hidden_size)
        if self.gated:
            self.fc3_weight = _parameter(count, ffn_dim, config.hidden_size)
        else:
            self.fc1_bias = _parameter(count, ffn_dim)
            self.fc2_bias = _parameter(count, config.hidden_size)

    def forward(self, rows_ND, counts):
        return torch.cat(
            [self._one(e, rows) for e, rows in enumerate(rows_ND.split(counts)) if rows.size(0)]
            or [rows_ND]
        )

    def _one(self, e, rows):
        if self.gated:
            hidden = self.activation(rows @ self.fc1_weight[e].t()) * (
                rows @ self.fc3_weight[e].t()
            )
            return hidden @ self.fc2_weight[e]
        hidden = self.activation(F.linear(rows, self.fc1_weight[e], self.fc1_bias[e]))
        return torch.addmm(self.fc2_bias[e], hidden, self.fc2_weight[e])


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


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.heads, D = layer, config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x_BLD, allowed, cache):
        q, k, v = (
            project(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an FFN or an MoE layer; pre-norm or post-norm."""

    def __init__(self, config, layer):
        super().__init__()
        D = config.hidden_size
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_attn, self.post_norm = Attention(config, layer), config.post_norm
        self.moe = None
        if config.num_experts[layer]:
            self.moe = MoE(config, config.num_experts[layer])
        else:
            self.activation = ACTIVATIONS[config.activation]
            self.fc1 = nn.Linear(D, config.intermediate_size)
            self.fc2 = nn.Linear(config.intermediate_size, D)

    def forward(self, x_BLD, ids_BL, keep_BL, allowed, cache):
        if self.post_norm:
            x_BLD = self.self_attn_layer_norm(x_BLD + self.self_attn(x_BLD, allowed, cache))
            return self.final_layer_norm(x_BLD + self._ffn(x_BLD, ids_BL, keep_BL))
        x_BLD = x_BLD + self.self_attn(self.self_attn_layer_norm(x_BLD), allowed, cache)
        return x_BLD + self._ffn(self.final_layer_norm(x_BLD), ids_BL, keep_BL)

    def _ffn(self, x_BLD, ids_BL, keep_BL):
        if self.moe is None:
            return self.fc2(self.activation(self.fc1(x_BLD)))
        y_TD = self.moe(x_BLD.flatten(0, 1), ids_BL.flatten(), keep_BL.flatten())
        return y_TD.view_as(x_BLD)


class EvoMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Positions count from the first non-padding token."""

    config_class = EvoMoEConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True

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
        self.layernorm_embedding = nn.LayerNorm(D) if config.layernorm_embedding else nn.Identity()
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(D) if config.final_norm else nn.Identity()
        self.output_projection = None
        if not config.tie_word_embeddings:
            self.output_projection = nn.Linear(config.output_dim, V, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [B, L, V] of the next tokens.

        Args:
            input_ids: [B, L], tokens not in the cache.
            attention_mask: [B, M], 0 for padding, on either side.
            labels: [B, L], -100 is ignored.
            logits_to_keep: number of last positions to return; 0: all.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        (B, L), past = input_ids.shape, 0
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
        device, M = input_ids.device, past + L
        positions_M = torch.arange(M, device=device)
        positions_L = positions_M[past:]
        allowed = (positions_M <= positions_L.unsqueeze(1))[None, None]
        if attention_mask is None:
            keep_BM = torch.ones(B, M, dtype=torch.bool, device=device)
        else:
            keep_BM = attention_mask.bool()
            # Padding attends to itself: a fully masked row would be NaN.
            itself = (positions_M == positions_L.unsqueeze(1))[None, None]
            allowed = allowed & (keep_BM[:, None, None, :] | itself)
        if position_ids is None:
            position_ids = (keep_BM.long().cumsum(1) - 1).clamp(min=0)[:, past:]

        x_BLD = self._embed(input_ids, position_ids)
        for block in self.layers:
            x_BLD = block(x_BLD, input_ids, keep_BM[:, past:], allowed, past_key_values)
        x_BLD = self.project_out_dim(self.layer_norm(x_BLD[:, -logits_to_keep:]))
        logits = F.linear(x_BLD, (self.output_projection or self.embed_tokens).weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

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
            half = D // 2
            step = -math.log(10000) / (half - 1)
            rates = torch.exp(torch.arange(half, dtype=torch.float, device=ids_BL.device) * step)
            # fairseq's positions start after the padding index.
            indices = positions_BL + self.config.pad_token_id + 1
            angles = indices.float().unsqueeze(-1) * rates
            waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
            x_BLD = x_BLD + F.pad(waves, (0, D % 2)).to(x_BLD.dtype)
        return self.layernorm_embedding(x_BLD)
