"""`--optimizer muon`: orthogonalised momentum for matrices, AdamW for all else."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from fairseq.optim import register_optimizer
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from torch import Tensor, nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, muon

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag
from evomoe_plugin.config.values import check_number
from evomoe_plugin.experts import ExpertStack
from evomoe_plugin.gates import Gate
from evomoe_plugin.models.decoder_block import DecoderBlock
from evomoe_plugin.optim.fused_adam import FusedAdam
from evomoe_plugin.optim.fused_adamw import FusedAdamW, FusedAdamWConfig

_LAYERS = (TransformerDecoderLayerBase, TransformerEncoderLayerBase, DecoderBlock)


def mark_matrices(model: nn.Module) -> None:
    """Mark the parameters of a model that are matrices, or stacks of one for each expert.

    Those map hidden states to hidden states: the weights of linear maps and of experts in the
    layers of encoder and decoder, but not those of gates. Embeddings, projections to and from
    them, norms and biases are none.
    """
    for parameter in model.parameters():
        parameter.is_matrix = False  # type: ignore[attr-defined]
    for layer in model.modules():
        if isinstance(layer, _LAYERS):
            _mark_below(layer)


def _mark_below(module: nn.Module) -> None:
    for child in module.children():
        if isinstance(child, nn.Linear):
            child.weight.is_matrix = True  # type: ignore[attr-defined]
        elif isinstance(child, ExpertStack):
            for name in child.matrix_names:
                getattr(child, name).is_matrix = True
        elif not isinstance(child, Gate):
            _mark_below(child)


@dataclass
class MuonConfig(FusedAdamWConfig):
    """Options of Muon; those of AdamW are of the other parameters."""

    muon_momentum: float = flag(0.95, "momentum of matrices, in Nesterov's form")
    muon_steps: int = flag(5, "steps of the Newton-Schulz iteration that orthogonalises")


class MuonAdam(FusedAdam):
    """torch's Muon for marked parameters, an expert's matrix at a time; `FusedAdam` for the others.

    Muon (Jordan et al., 2024) with the scale of arXiv 2502.16982: updates have the size of AdamW's,
    so that learning rate and weight decay are shared.

    Args:
        params: with the marks of `mark_matrices`. Of a parameter that is this rank's rows of a
            whole, `all_rows` makes the whole of all ranks' rows, and `own_rows` takes its own.
        momentum: of matrices.
        steps: of the orthogonalisation.
        given: of `FusedAdam`.
    """

    def __init__(self, params: Iterable[nn.Parameter], momentum: float, steps: int, **given: Any):
        super().__init__(params, **given)
        self._momentum, self._steps = momentum, steps

    def _update(
        self, parameters: list[nn.Parameter], group: dict[str, Any], factor: float | Tensor
    ) -> None:
        others = [p for p in parameters if not is_matrix(p)]
        if others:
            super()._update(others, group, factor)
        matrices: list[Any] = [p for p in parameters if is_matrix(p)]
        for p in matrices:
            state, grad = self.state[p], p.grad
            assert grad is not None  # `FusedAdam.step` leaves others out
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            grad, momentum = torch.mul(grad, factor), state["momentum_buffer"]
            if p.dim() == 2 and hasattr(p, "all_rows"):
                # Rows of a matrix: the momentum in them, the whole matrix's step, its rows.
                momentum.lerp_(grad, 1 - self._momentum)
                update = p.all_rows(grad.lerp_(momentum, self._momentum))
                step = torch.zeros_like(update)
                self._orthogonal_step(step, update, torch.zeros_like(update), group, 0.0)
                p.data.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.own_rows(step))
            else:
                self._orthogonal_step(p.data, grad, momentum, group, self._momentum)
            state["step"] += 1

    def _orthogonal_step(
        self, weight: Tensor, grad: Tensor, buffer: Tensor, group: dict[str, Any], momentum: float
    ) -> None:
        muon(
            _matrices(weight),
            _matrices(grad),
            _matrices(buffer),
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=momentum,
            nesterov=True,
            ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
            ns_steps=self._steps,
            eps=EPS,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )


def is_matrix(p: nn.Parameter) -> bool:
    """Whether `mark_matrices` found it to be one."""
    return getattr(p, "is_matrix", False)


def _matrices(stack: Tensor) -> list[Tensor]:
    return [stack] if stack.dim() == 2 else list(stack.unbind())


@register_optimizer("muon", dataclass=MuonConfig)
class Muon(FusedAdamW):
    """`MuonAdam` in fairseq.

    Args:
        cfg: the fields of `MuonConfig`.
        params: the trained parameters, marked.
    Raises:
        OptionError: an option is invalid, or no parameter is a matrix: fairscale's FSDP and
            fairseq's half precision train flat copies.
    """

    def __init__(self, cfg: MuonConfig, params: Iterable[nn.Parameter]):
        FairseqOptimizer.__init__(self, cfg)
        check_number(cfg, "muon_momentum", "[0, 1)", "give 0 or more and less than 1")
        check_number(cfg, "muon_steps", "[1, 99]", "give 1 to 99")
        params = list(params)
        if not any(map(is_matrix, params)):
            raise OptionError(
                "optimizer",
                "muon",
                "there is no matrix to train: leave out --ddp-backend fully_sharded (fsdp2 has "
                "them), --fp16 and --bf16 (--moe-matmul-dtype bf16 computes in bf16), or give "
                "fused_adamw",
            )
        self._optimizer = MuonAdam(
            params, cfg.muon_momentum, cfg.muon_steps, **self.optimizer_config
        )

    @property
    def supports_flat_params(self) -> bool:
        """A flat parameter has no matrices."""
        return False

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """Its weights are fp32."""
        return False
