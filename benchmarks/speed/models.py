"""Whole models for training steps: ours, those of Hugging Face, and bare matmuls.

All have the same number of layers and width, tied embeddings, no dropout, and torch's fused AdamW;
experts of Hugging Face are SwiGLU, three matrices of about two thirds of our width. A step is
forward, backward, optimizer, gradients discarded; no trainer, clipping or data loading. Ours also
computes balance losses and statistics of gates; those of Hugging Face by default do not.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from speed.bare import activated_flops
from speed.cases import Case
from speed.peers import from_transformers
from speed.training import Sizes, build, sample


class Model:
    """A model, its optimizer and a batch.

    Args:
        dtype: fp32 or bf16; bf16 weights, or autocast if `AUTOCAST`.
    """

    label: str
    AUTOCAST = False
    ALONE = False

    def __init__(self, sizes: Sizes, dtype: str, device: str):
        self.sizes, self.device = sizes, device
        self.autocast = dtype == "bf16" and self.AUTOCAST
        torch.manual_seed(0)
        self.model = self.make(dtype).to(device)
        if dtype == "bf16" and not self.AUTOCAST:
            self.model.to(torch.bfloat16)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.sample = sample(sizes, device)

    def make(self, dtype: str) -> torch.nn.Module:
        """The model, in fp32."""
        raise NotImplementedError

    def loss(self) -> torch.Tensor:
        """Mean over tokens."""
        raise NotImplementedError

    def step(self) -> None:
        """A training step."""
        context: Any = nullcontext()
        if self.autocast:
            context = torch.autocast(self.device, dtype=torch.bfloat16)
        with context:
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours(Model):
    """The plugin's model and criterion; for bf16, bf16 matmuls with fp32 weights."""

    label = "ours"
    AUTOCAST = True
    GIVEN: tuple[str, ...] = ()

    def make(self, dtype):
        given = [
            "--moe-gate",
            "top_k",
            "--moe-top-k",
            self.sizes.top_k,
            "--moe-top-k-weights",
            "renormalized",
            *self.GIVEN,
        ]
        if self.AUTOCAST and dtype == "bf16":
            given += ["--moe-matmul-dtype", "bf16"]
        run = build(self.sizes, given)
        self.autocast = False  # done by the model
        self.criterion = run.criterion.train()
        return run.model

    def loss(self):
        loss, sample_size, _ = self.criterion(self.model, self.sample)
        return loss / sample_size


class OursBf16Weights(Ours):
    """With bf16 weights, like Hugging Face's fastest."""

    label = "ours, weights in bf16"
    AUTOCAST = False


class OursGated(Ours):
    """With SwiGLU experts of the width of Hugging Face's."""

    label = "ours, SwiGLU"

    @property
    def GIVEN(self):
        return (
            "--moe-expert-gated",
            "--activation-fn",
            "swish",
            "--moe-expert-ffn-dim",
            _gated_ffn(self.sizes),
        )


class HuggingFace(Model):
    """A causal language model from a configuration, with random weights."""

    NAME: str
    IMPLEMENTATION: str

    def make(self, dtype):
        sizes = self.sizes
        config = from_transformers(f"{self.NAME}Config")(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=_gated_ffn(sizes),
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            num_experts_per_tok=sizes.top_k,
            max_position_embeddings=sizes.length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
            experts_implementation=self.IMPLEMENTATION,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **{self._experts_option: sizes.experts},
        )
        return from_transformers(f"{self.NAME}ForCausalLM")(config)

    @property
    def _experts_option(self) -> str:
        return "num_experts" if self.NAME == "Olmoe" else "num_local_experts"

    def loss(self):
        tokens = self.sample["net_input"]["src_tokens"]
        return self.model(input_ids=tokens, labels=tokens).loss


def _gated_ffn(sizes: Sizes) -> int:
    return Case("", sizes.tokens, sizes.width, sizes.experts, sizes.top_k).gated_ffn_dim


def _peer(name: str, shown: str, implementation: str, autocast: bool) -> type[HuggingFace]:
    label = f"HF {shown}, {implementation}"
    return type(
        f"{name}{implementation.title()}{'Autocast' * autocast}",
        (HuggingFace,),
        {
            "label": label + (", autocast" if autocast else ""),
            "NAME": name,
            "IMPLEMENTATION": implementation,
            "AUTOCAST": autocast,
            "ALONE": implementation == "eager",
        },
    )


PEERS = [
    _peer(name, shown, implementation, autocast)
    for implementation in ("grouped_mm", "eager")
    for name, shown in (("Mixtral", "Mixtral"), ("Olmoe", "OLMoE"))
    for autocast in (False, True)
]


def models(dtype: str) -> dict[str, type[Model]]:
    """The models for this precision, by label."""
    kinds = [Ours, OursGated, *PEERS]
    if dtype == "fp32":
        kinds = [kind for kind in kinds if kind in (Ours, OursGated) or not kind.AUTOCAST]
    else:
        kinds.insert(2, OursBf16Weights)
    return {kind.label: kind for kind in kinds}


class BareMatmuls:
    """The limit: only the matmuls of a step, into warm buffers."""

    label = "limit"

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str):
        tokens, pairs, width = sizes.tokens, sizes.tokens * sizes.top_k, sizes.width
        sequences = sizes.batch * sizes.heads
        per_layer = [
            (tokens, width, 3 * width),
            (tokens, width, width),
            (tokens, width, sizes.experts),
            (pairs, width, sizes.ffn),
            (pairs, sizes.ffn, width),
        ]
        shapes = per_layer * sizes.layers + [(tokens, width, sizes.vocabulary)]
        self._matmuls = [_Matmul(shape, dtype, device) for shape in dict.fromkeys(shapes)]
        self._times = [shapes.count(matmul.shape) for matmul in self._matmuls]
        # Queries and keys, and weights and values.
        head = width // sizes.heads
        self._attention = [
            _Matmul(shape, dtype, device, sequences)
            for shape in ((sizes.length, head, sizes.length), (sizes.length, sizes.length, head))
        ]
        self._layers = sizes.layers
        self.flops = sum(3 * 2 * a * b * c for a, b, c in shapes) + sizes.layers * sum(
            3 * 2 * sequences * a * b * c for a, b, c in (p.shape for p in self._attention)
        )

    def step(self) -> None:
        for matmul, times in zip(self._matmuls, self._times, strict=True):
            for _ in range(times):
                matmul.step()
        for _ in range(self._layers):
            for matmul in self._attention:
                matmul.step()


class _Matmul:
    """[a, b] times [b, c], and the gradients of both."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: str, sequences: int = 0
    ):
        self.shape = shape
        a, b, c = shape
        before = (sequences,) if sequences else ()

        def filled(*size: int) -> torch.Tensor:
            return torch.randn(*before, *size, device=device).to(dtype)

        self._x, self._w, self._y = filled(a, b), filled(c, b), filled(a, c)
        self._dx, self._dw, self._dy = filled(a, b), filled(c, b), filled(a, c)
        self._product = torch.bmm if sequences else torch.mm

    def step(self) -> None:
        self._product(self._x, self._w.transpose(-1, -2), out=self._y)
        self._product(self._dy, self._w, out=self._dx)
        self._product(self._dy.transpose(-1, -2), self._x, out=self._dw)


def expert_flops(sizes: Sizes) -> int:
    """FLOPs of the experts in a step."""
    pairs = sizes.tokens * sizes.top_k
    return sizes.layers * activated_flops(pairs, sizes.width, sizes.ffn)
