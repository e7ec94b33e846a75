"""Gates in evaluation: which experts compute a token, and with which weights."""

import torch
import torch.nn.functional as F
from torch import nn

from .experts_evomoe import parameter


class Gate(nn.Module):
    """Selects candidates and combine weights for each token."""

    def __init__(self, config, num_experts):
        super().__init__()
        self.routing = routing = config.routing
        self.num_experts = num_experts
        D, C = config.hidden_size, num_experts + config.num_null_experts
        scorer = routing["scorer"]
        if scorer == "mlp":
            self.hidden_weight = parameter(routing["scorer_dim"], D)
            self.hidden_bias = parameter(routing["scorer_dim"])
            self.weight = parameter(C, routing["scorer_dim"])
        elif scorer == "gmm":
            self.projection = parameter(routing["scorer_dim"], D)
            self.weight = parameter(C, routing["scorer_dim"])
        elif scorer == "bits":
            self.bits = (num_experts - 1).bit_length()
            self.weight = parameter(routing["top_k"] * (1 + self.bits), D)
        elif scorer != "none":
            self.weight = parameter(C, D)
        if scorer in ("cosine", "gmm"):
            self.scale = nn.Parameter(torch.ones(1))
        if routing["select"] == "top_any":
            self.threshold = nn.Parameter(torch.zeros(num_experts))
        if routing["select"] == "table":
            self.register_buffer("table", torch.zeros(config.vocab_size, dtype=torch.int64))
        if routing.get("lexical"):
            self.lexical_logits = parameter(config.vocab_size, C)
        if routing.get("centred"):
            self.input_mean = nn.Parameter(torch.zeros(D))
        if routing.get("gains"):
            self.gain = nn.Parameter(torch.ones(C))
        biased = routing.get("bias") or routing.get("logit_bias")
        bias_C = torch.zeros(C, dtype=torch.float64) if biased else None
        self.register_buffer("selection_bias", bias_C)
        self.shared = config.num_shared_experts
        self.shared_combine = config.shared_combine
        if self.shared and self.shared_combine != "add":
            self.shared_weight = parameter(2 if self.shared_combine == "mix" else self.shared, D)

    def _apply(self, fn, recurse=True):
        """Of `to`, `half` and others: the bias stays in fp64, in which small differences count."""
        bias_C = self.selection_bias
        super()._apply(fn, recurse)
        if bias_C is not None and self.selection_bias.dtype != bias_C.dtype:
            self.selection_bias = bias_C.to(self.selection_bias.device)
        return self

    def resize(self, vocab_size):
        """Rows for new token ids: experts in turn, and no lexical logits."""
        if self.routing["select"] == "table":
            new = torch.arange(len(self.table), vocab_size, device=self.table.device)
            self.table = torch.cat([self.table, new % self.num_experts])[:vocab_size]
        if self.routing.get("lexical"):
            logits = self.lexical_logits.detach()
            new = logits.new_zeros(max(vocab_size - len(logits), 0), logits.size(1))
            self.lexical_logits = nn.Parameter(torch.cat([logits, new])[:vocab_size])

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
            total_T1 = torch.where(total_T1 > 0, total_T1, 1.0)
            weights_TC = weights_TC * (self.routing["weight_total"] / total_T1)
        if self.routing.get("gains"):
            weights_TC = weights_TC * self.gain.to(weights_TC.dtype)
        if not self.shared or self.shared_combine == "add":
            return mask_TC, weights_TC, None
        logits = F.linear(x_TD, self.shared_weight.to(x_TD.dtype))
        if self.shared_combine == "sigmoid":
            return mask_TC, weights_TC, logits.sigmoid()
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
        return logits_TC + self.selection_bias.to(logits_TC.dtype)

    def _top_k(self, logits_TC, ids_T):
        """The k candidates with the largest scores."""
        ranked_TC = self._biased(logits_TC)
        if self.routing["rank"] == "scores":
            ranked_TC = self._scores(ranked_TC.double(), self.routing.get("temperature", 1.0))
        if self.routing.get("bias"):
            ranked_TC = ranked_TC + self.selection_bias
        mask_TC = _where(_best(ranked_TC, self.routing["top_k"]), ranked_TC)
        temperature = self.routing.get("weight_temperature", 1.0)
        if not self.routing["normalized"]:
            return mask_TC, self._scores(logits_TC, temperature)
        # From log-scores: scores of very unlikely candidates underflow to 0.
        sigmoid = self.routing["scores"] == "sigmoid"
        logs_TC = F.logsigmoid(logits_TC) if sigmoid else logits_TC / temperature
        return mask_TC, torch.softmax(logs_TC.masked_fill(~mask_TC, float("-inf")), dim=1)

    def _threshold(self, logits_TC, ids_T):
        """All candidates above a threshold, and the k best."""
        gates_TC = self._scores(self._biased(logits_TC), self.routing["temperature"])
        mask_TC = _where(_best(gates_TC, self.routing["top_k"]), gates_TC)
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


def _best(scores_TC, k):
    """The k candidates with the largest scores; the first on ties, of which topk takes any."""
    if scores_TC.device.type != "cpu" or torch.compiler.is_compiling():  # a look would wait
        return scores_TC.argsort(dim=1, descending=True, stable=True)[:, :k]
    values, ids = scores_TC.topk(min(k + 1, scores_TC.size(1)), dim=1)
    ids = ids[:, :k]
    is_clear = values[:, k - 1 : -1] > values[:, k:]
    if not is_clear.all():
        is_tied = ~is_clear.squeeze(1)
        ids[is_tied] = scores_TC[is_tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return ids


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
