"""What a trainer asks of the way in which the ranks hold its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from evomoe_plugin.checkpoint.optimizer_layout import OptimizerLayout
from evomoe_plugin.checkpoint.parameter_storage import Storage, trained_parameters


class Layout:
    """How the ranks hold parameters, gradients and the optimizer's state: of a `--ddp-backend`.

    `trainer.layout` is the one of a run (`layouts.layout_of`). Its methods are given the trainer.
    """

    is_fully_sharded: ClassVar[bool]
    """Whether each rank has a part of every parameter."""
    is_wrapped: ClassVar[bool] = True
    """Whether fairseq wraps the model, where there are several ranks."""
    hidden_flags: ClassVar[tuple[str, ...]] = ()
    """Of fairseq's `common`: for these its trainer would cast the weights."""
    has_fsdp_metadata: ClassVar[bool] = False
    """Whether checkpoints describe the optimizer's entries by fairscale's `fsdp_metadata`."""
    reads_own_shard: bool = False
    """Whether each rank saves and loads a file of its own (`--use-sharded-state`)."""
    gathers_state: bool = False
    """Whether `state_dict` is a collective."""

    @contextlib.contextmanager
    def flags_hidden(self, cfg: Any) -> Iterator[None]:
        """Inside, `hidden_flags` are False: around fairseq's own code."""
        given = {name: getattr(cfg.common, name) for name in self.hidden_flags}
        try:
            for name in given:
                setattr(cfg.common, name, False)
            yield
        finally:
            for name, value in given.items():
                setattr(cfg.common, name, value)

    def prepare(self, cfg: Any, model: nn.Module, criterion: nn.Module) -> None:
        """Change the model in place before fairseq's trainer gets it.

        Raises:
            OptionError: the options cannot work with this layout.
        """

    # --- updates

    def free_gathered(self, trainer: Any) -> None:
        """Free what forward passes gathered, so that the model has the parameters to train."""

    def abandon_pass(self, trainer: Any) -> None:
        """After an error in a pass of one process: let the state be saved."""

    def build_optimizer(self, trainer: Any, build: Callable[[], None]) -> None:
        """Build the trainer's optimizer and schedule of the learning rate.

        Args:
            build: as fairseq does.
        """
        with self.flags_hidden(trainer.cfg):
            build()

    def zero_grad(self) -> None:
        """Clear gradients that the optimizer does not see."""

    def reducing(self, trainer: Any) -> contextlib.AbstractContextManager[Any]:
        """Around the last micro-batch of an update: gradients may be reduced as they are made."""
        return contextlib.nullcontext()

    def all_reduce_grads(self, trainer: Any) -> None:
        """Average the optimizer's gradients of the model over ranks. A collective."""
        raise NotImplementedError

    def norm_over_ranks(self, trainer: Any) -> Callable[[Tensor], Tensor] | None:
        """The norm of the whole model's gradients from that of this rank's, a collective; None if
        they are the same."""
        raise NotImplementedError

    # --- where parameters are stored

    def storages(self, trainer: Any) -> Iterator[Storage]:
        """All storages of what is trained, fully sharded also of what is frozen; in the same order
        on all ranks."""
        raise NotImplementedError

    def fp32_masters(self, trainer: Any) -> dict[str, Tensor]:
        """The fp32 masters of parameters in half precision, by their names in the checkpoint;
        views. Empty where this rank's own shards are in fp32."""
        return {}

    def optimizer_layout(self, trainer: Any) -> OptimizerLayout:
        """Of the optimizer that the trainer builds."""
        parameters = trained_parameters(trainer)
        return OptimizerLayout(
            tuple(name for name, _ in parameters), tuple(p.shape for _, p in parameters)
        )

    def parameter_names(self, trainer: Any) -> list[str]:
        """Of the model, frozen ones included, as in the checkpoint."""
        return [name for name, _ in trainer.get_model().named_parameters()]

    # --- checkpoints

    def model_state(self, trainer: Any, state: dict[str, Any]) -> dict[str, Any]:
        """The state dict of the model as a checkpoint has it.

        Args:
            state: as the model gives it.
        """
        return state

    def consolidate_optimizer(self, trainer: Any, consolidate: Callable[[], None]) -> None:
        """Gather the optimizer's state for the next `state_dict`. A collective.

        Args:
            consolidate: as fairseq does.
        """
        consolidate()

    def load_model(self, trainer: Any, weights: dict[str, Any]) -> None:
        """Load a state dict: whole, or this rank's where `reads_own_shard`."""
        trainer.model.load_state_dict(weights, strict=True, model_cfg=trainer.cfg.model)

    def own_optimizer_state(self, trainer: Any, state: Any) -> Any:
        """This rank's part of an optimizer's state as `run_state` has read it."""
        return state


def is_checkpointed(model: nn.Module) -> bool:
    """Whether a layer's backward pass is one of its own, after another forward pass: with fairseq's
    `--checkpoint-activations` or `--offload-activations`."""
    return any(hasattr(module, "precheckpoint_forward") for module in model.modules())
