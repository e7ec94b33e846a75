"""Expert feed-forward networks."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def _gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).pow(2),
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "swish": F.silu,
}


def parameter(*shape):
    """A weight of this shape."""
    return nn.Parameter(torch.empty(*shape).normal_(std=0.02))


class Experts(nn.Module):
    """Stacked FFNs, applied to rows sorted by expert."""

    def __init__(self, config, count, ffn_dim):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.expert_gated
        self.fc1_weight = parameter(count, ffn_dim, config.hidden_size)
        self.fc2_weight = parameter(count, ffn_dim, config.hidden_size)
        if self.gated:
            self.fc3_weight = parameter(count, ffn_dim, config.hidden_size)
        else:
            self.fc1_bias = parameter(count, ffn_dim)
            self.fc2_bias = parameter(count, config.hidden_size)

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
