"""What models of every kind do with their MoE layers: updates, records, FLOPs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from fairseq.distributed import fsdp_wrap
from fairseq.models import BaseFairseqModel
from omegaconf import open_dict
from torch import Tensor, nn

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.moe_layers import expert_counts, expert_slots
from evomoe_plugin.config.options import ModelOptions, stack_kind
from evomoe_plugin.config.stacks import stacks
from evomoe_plugin.models.accounting import ForwardFlops, count_parameters
from evomoe_plugin.models.freeze import freeze, give_gradients, wrap_apart
from evomoe_plugin.models.fsdp import is_wrapping, wrap_experts
from evomoe_plugin.models.mixed_precision import warn_if_emulated
from evomoe_plugin.models.moe_stack import MoEStack

logger = logging.getLogger(__name__)


class MoEModel:
    """Models inherit this beside fairseq's class.

    Attributes:
        gives_losses: whether the forward pass accepts `targets` (`MoEDecoder.forward`).
        forward_flops_by_stack: FLOPs of a forward pass with gates, by the prefix that the criterion
            gives the statistics of a stack; set by the constructor.
    """

    gives_losses = False
    forward_flops_by_stack: dict[str, ForwardFlops]

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """No weights are published."""
        return {}

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """The options of the dataclass, in place of the model's own."""
        BaseFairseqModel.add_args.__func__(cls, parser)

    @property
    def moe_stacks(self) -> dict[str, MoEStack]:
        """Encoder and decoder, by the prefix of the names of their statistics."""
        raise NotImplementedError

    @property
    def options(self) -> Any:
        """Of the model, completed."""
        return self.args  # type: ignore[attr-defined]

    @property
    def forward_flops(self) -> dict[str, ForwardFlops]:
        """FLOPs of a forward pass in the current phase, by the prefix of the stack."""
        return {
            prefix: flops.without_gates if self.moe_stacks[prefix].in_dense_phase else flops
            for prefix, flops in self.forward_flops_by_stack.items()
        }

    @property
    def gated_layers(self) -> dict[str, int]:
        """L, of the layers whose `moe_token_routing` the forward pass gives if asked to, by the
        prefix of the stack, without stacks that have none; empty in the dense phase."""
        return {
            prefix: len(stack.moe_layers)
            for prefix, stack in self.moe_stacks.items()
            if stack.moe_layers and not stack.in_dense_phase
        }

    def freeze(self) -> None:
        """Apply `--moe-train-only`, and wrap for FSDP what it left unwrapped; `build_model` calls
        it last.

        Raises:
            OptionError: the option matches nothing, or what cannot be frozen or wrapped.
        """
        train_only = self.options.moe_train_only
        if train_only is None:
            return
        assert isinstance(self, nn.Module)
        freeze(self, self.options)
        stacks = self.moe_stacks.values()
        if self.options.checkpoint_activations:
            for stack in stacks:
                give_gradients(stack.layers)
        if is_wrapping():
            for layer in [layer for stack in stacks for layer in stack.moe_layers]:
                wrap_experts(layer)
            wrap_apart(self, train_only, fsdp_wrap)
            for stack in stacks:
                stack.wrap_layers()

    @contextmanager
    def not_recording(self) -> Iterator[None]:
        """For batches in training mode that are not part of an update."""
        with ExitStack() as contexts:
            for stack in self.moe_stacks.values():
                contexts.enter_context(stack.not_recording())
            yield

    @contextmanager
    def checking_later(self) -> Iterator[list[Tensor]]:
        """Inside, NaN does not stop a forward pass; the list gets whether there was none."""
        are_finite: list[Tensor] = []
        with ExitStack() as contexts:
            for stack in self.moe_stacks.values():
                contexts.enter_context(stack.checking_later(are_finite))
            yield are_finite

    def finish_update(self, num_updates: int, group: Any = None) -> None:
        """Called after each update, on every rank (`MoEStack.finish_update`)."""
        for stack in self.moe_stacks.values():
            stack.finish_update(num_updates, group)

    def discard_update(self) -> None:
        """Called if an update was skipped after its forward passes."""
        for stack in self.moe_stacks.values():
            stack.discard_update()

    def begin_record_routing(self) -> None:
        """Start recording for DynMoE's adaptive process (`MoEStack.begin_record_routing`)."""
        for stack in self.moe_stacks.values():
            stack.begin_record_routing()

    def end_record_routing(self) -> None:
        """Stop recording and adapt the experts (`MoEStack.end_record_routing`)."""
        for stack in self.moe_stacks.values():
            stack.end_record_routing()


def complete_options(args: Any) -> None:
    """Check the options of a model, and set those that follow from others in every model.

    Raises:
        OptionError: an option is invalid, or not supported with MoE layers.
    """
    validate(args, warn=False)  # logged before the run, once for all ranks
    with open_dict(args):
        args.checkpoint_activations |= args.offload_activations


def log_model(options: ModelOptions, vocabulary: int, target_vocabulary: int | None = None) -> None:
    """Log the MoE layers of each stack, the number of parameters (`count_parameters`), and whether
    the matmul dtype is emulated."""
    warn_if_emulated(options.moe_matmul_dtype)
    sizes = count_parameters(options, vocabulary, target_vocabulary)
    parts = stacks(options)
    for part in parts:
        counts, slots = expert_counts(part), expert_slots(part)
        if not counts:
            continue
        logger.info(
            "MoE: %d of %d %slayers, gate %s, experts per layer %s%s",
            len(counts),
            part.decoder_layers,
            f"{stack_kind(part)} " if len(parts) > 1 else "",
            part.moe_gate,
            counts[0] if len(set(counts)) == 1 else counts,
            "" if slots == counts else f", {max(slots)} slots",
        )
    if not sizes.experts:
        logger.info("no MoE layer; parameters: %s", f"{sizes.total:,}")
        return
    logger.info(
        "parameters: %s in total, %s of them in experts; %s active with one expert per layer",
        *(f"{n:,}" for n in (sizes.total, sizes.experts, sizes.active_top1)),
    )


def other_model(arch: str, kind: str) -> OptionError:
    """An error for a checkpoint of a model that is not `kind`."""
    return OptionError(
        "arch", arch, f"the checkpoint is not of {kind}: give the architecture it was trained with"
    )


def check_format(weights: Mapping[str, Any], stack: str) -> None:
    """Raise `OptionError` if the number of the format of a stack's weights is missing: fairseq
    would take it for its first, and leave out the last norm."""
    if f"{stack}.version" not in weights:
        raise OptionError(
            "checkpoint", f"has no {stack}.version", "is not of this kind of model: take another"
        )


def check_rows(state: Mapping[str, Any], name: str, embedding: nn.Embedding) -> None:
    """Refuse the weights of another dictionary.

    Args:
        state: of the checkpoint.
        name: of the embedding in it.
        embedding: of the model.
    Raises:
        OptionError: the sizes of the vocabularies differ.
    """
    saved = state.get(name)
    if saved is not None and saved.size(0) != embedding.num_embeddings:
        raise OptionError(
            "DATA",
            "dict.txt",
            f"has {embedding.num_embeddings} token ids, the checkpoint has "
            f"{saved.size(0)}: give the data of the checkpoint",
        )
