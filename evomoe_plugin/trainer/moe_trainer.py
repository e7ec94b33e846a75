"""The trainer of all runs of this plugin: fairseq's, with its steps and checkpoints written out."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.data.iterators import EpochBatchIterating
from fairseq.distributed import utils as distributed_utils
from fairseq.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from fairseq.file_io import PathManager
from fairseq.logging import meters, metrics
from fairseq.optim.lr_scheduler import build_lr_scheduler
from fairseq.trainer import Trainer
from torch import Tensor
from torch.autograd.profiler import record_function

from evomoe_plugin.checkpoint import checkpoint_files, resume
from evomoe_plugin.checkpoint.build_model import describe
from evomoe_plugin.checkpoint.content import check_moments
from evomoe_plugin.checkpoint.load import check_finite, misfit
from evomoe_plugin.checkpoint.optimizer_layout import PARAMETER_NAMES
from evomoe_plugin.checkpoint.parameter_storage import fp32_masters, model_layout
from evomoe_plugin.checkpoint.row_shards import (
    free_whole,
    own_optimizer_state,
    whole_optimizer_state,
    whole_state,
)
from evomoe_plugin.checkpoint.save import TrainerState
from evomoe_plugin.checkpoint.sharded_experts import check_all_ranks_see
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.dispatch.sharded_layers import expert_groups_of, sharded_layers
from evomoe_plugin.optim.muon import mark_matrices
from evomoe_plugin.routing import waits
from evomoe_plugin.routing.padding import Padding
from evomoe_plugin.trainer import (
    data_wait,
    early_stopping,
    expert_log,
    failed_updates,
    fsdp2,
    hooks,
    host_padding,
    later_log,
    loss_scaler,
    run_end,
    sharded_gradients,
    speed_log,
    validation,
)
from evomoe_plugin.trainer.routing_sample import RoutingSample
from evomoe_plugin.trainer.speed_log import SpeedLog
from evomoe_plugin.trainer.step_times import StepTimes
from evomoe_plugin.trainer.transfers import on_device

logger = logging.getLogger(__name__)

# What `extra_state` holds beside fairseq's: updates since the last step of the moving average
# (--ema-update-freq), counters of the loss scaler, validations since the best.
_EMA_COUNTER, _SCALER, _EARLY_STOPPING = "ema_update_freq_counter", "loss_scaler", "early_stopping"


@dataclass
class _Accumulated:
    """What the micro-batches of an update gave."""

    logging_outputs: list[dict[str, Any]]
    sample_size: Any
    is_dummy: bool
    are_finite: Sequence[Tensor] = ()
    """Whether forward passes were, where that is not known to the host yet."""


class MoETrainer(Trainer):
    """fairseq's trainer with exact resuming, sharded experts, and hooks (`trainer.hooks`).

    It differs from fairseq's in this: checkpoints hold the fp32 masters of parameters in half
    precision and the names of the optimizer's entries; they resume under any parallelism; the
    model learns when an update ends and what its number is; gradients of sharded experts are
    reduced over the ranks that hold them; and nothing asks for CUDA on a CPU.

    On a GPU the host waits once in an update, before the optimizer's step, for the norm of the
    gradients (`_norm_on_host`); what is logged stays there until it is looked at (`later_log`).
    """

    _amp_retries: int  # set by fairseq with --amp
    _routing: Sequence[RoutingSample] = ()  # of the validation in progress
    _has_begun = False
    has_stepped = False
    """Whether a trainer of this process has begun a step; set on the class, by the last one."""
    is_fsdp2 = False  # --ddp-backend fsdp2; fairseq's `is_fsdp` is fairscale's
    _has_logged = False  # an update; its meters are timed from then on

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, *args: Any, **kwargs: Any):
        MoETrainer.has_stepped = False
        self.is_fsdp2 = cfg.distributed_training.ddp_backend == "fsdp2"
        if self.is_fsdp2:
            if utils.has_parameters(criterion):
                raise OptionError(
                    "criterion",
                    cfg.criterion._name,
                    "has parameters of its own, which --ddp-backend fsdp2 does not shard: give "
                    "legacy_ddp",
                )
            on_gpu = torch.cuda.is_available() and not cfg.common.cpu
            fsdp2.shard(model, cfg, "cuda" if on_gpu else "cpu")
        self.cfg = cfg
        with self._weights_in_fp32():
            super().__init__(cfg, task, model, criterion, *args, **kwargs)
        self._routing_samples: dict[tuple[str, str], RoutingSample] = {}

    @property
    def is_fully_sharded(self) -> bool:
        """Whether each rank has a part of every parameter, in whatever way."""
        return self.is_fsdp or self.is_fsdp2

    @contextlib.contextmanager
    def _weights_in_fp32(self) -> Iterator[None]:
        """Inside, if the model is fully sharded, fairseq sees no --bf16 (for which it would cast
        the weights) and, unless fairscale keeps them, no --fp16."""
        common = self.cfg.common
        given = common.bf16, common.fp16
        if self.is_fully_sharded:
            common.bf16, common.fp16 = False, common.fp16 and self.is_fsdp
        try:
            yield
        finally:
            common.bf16, common.fp16 = given

    @property
    def use_distributed_wrapper(self) -> bool:
        """Whether fairseq wraps the model; `fsdp2` has changed it in place."""
        return super().use_distributed_wrapper and not self.is_fsdp2

    # --- updates

    @metrics.aggregate("train")
    def train_step(self, samples: Sequence[Any], raise_oom: bool = False) -> Any:
        """Make one update from the micro-batches `samples`.

        Args:
            raise_oom: raise when a batch does not fit into memory, instead of leaving it out.
        Returns:
            What was logged, on a GPU an empty dict after the first update; None where no update was
            made (overflow, out of memory).
        """
        MoETrainer.has_stepped = True
        self._set_seed()
        self.model.train()
        self.criterion.train()
        self.zero_grad()
        metrics.log_start_time("train_wall", priority=800, round=0)
        began = time.perf_counter()

        expert_log.begin_update(self)
        if hasattr(self.get_criterion(), "begin_update"):
            self.get_criterion().begin_update(samples, self._sum_of_ranks)
        done = self._forward_backward(samples, raise_oom)
        if done is None:
            return None
        if self._sync_stats():
            self._sum_over_ranks(done)

        overflow = False
        self._step_times.begin_optimizer()
        try:
            grad_norm = self._reduce_and_clip_grads(done)
            if not math.isfinite(grad_norm):
                if not self.cfg.common.amp:
                    raise FloatingPointError("gradients are Nan/Inf")
                overflow = True  # AMP's scaler needs the optimizer step nevertheless
            with record_function("optimizer"):
                self.task.optimizer_step(
                    self.optimizer, model=self.model, update_num=self.get_num_updates()
                )
            self._step_times.end_optimizer()
        except FloatingPointError as error:
            failed_updates.save_crash_checkpoint(self)
            raise failed_updates.not_finite(self, error, samples) from error
        except OverflowError as error:
            logger.info("NOTE: gradient overflow detected, ignoring gradient, %s", error)
            failed_updates.log_overflowed_parameters(self)
            overflow, grad_norm = True, 0.0
            self.zero_grad()
        except (RuntimeError, MemoryError) as error:
            if not failed_updates.is_out_of_memory(error):
                raise
            self._log_oom(error)
            raise failed_updates.out_of_memory(self, "in the optimizer's step") from error
        if overflow and self._retries_batch():
            self._discard_update()
            return self.train_step(samples, raise_oom)

        if hasattr(self.model, "perform_slowmo"):
            self.model.perform_slowmo(
                self.optimizer.optimizer, getattr(self.optimizer, "fp32_params", None)
            )
        logged = None
        if overflow and self.cfg.distributed_training.ddp_backend != "slowmo":
            self._discard_update()
        else:
            logged = self._finish_update(done, grad_norm, began)
        self._log_loss_scale()
        metrics.log_stop_time("train_wall")
        return logged

    def _sum_of_ranks(self, value: Tensor) -> Tensor:
        if self.data_parallel_world_size == 1:
            return value
        group = self.data_parallel_process_group
        return distributed_utils.all_reduce(value.to(self.device), group=group)

    def _forward_backward(self, samples: Sequence[Any], raise_oom: bool) -> _Accumulated | None:
        """Accumulate gradients; None where a batch did not fit into memory and is left out.

        Raises:
            RunFailed: it did not, and there are other ranks.
        """
        done = _Accumulated([], 0, False)
        model = self.get_model()
        checking: contextlib.AbstractContextManager[Any] = contextlib.nullcontext(())
        # A loss scaler would take NaN of a forward pass for an overflow.
        waits_later = waits.waiting_costs(self.device) and self._scaler is None
        if waits_later and hasattr(model, "checking_later"):
            checking = model.checking_later()
        with checking as done.are_finite:
            return self._accumulate(done, samples, raise_oom)

    def _accumulate(
        self, done: _Accumulated, samples: Sequence[Any], raise_oom: bool
    ) -> _Accumulated | None:
        """`_forward_backward`, adding to `done`."""
        for i, sample in enumerate(samples):
            sample, done.is_dummy = self._prepare_sample(sample)
            try:
                with self._no_sync(i < len(samples) - 1), self._not_recording(done.is_dummy):
                    self._step_times.begin_batch()
                    loss, size, logging_output = self.task.train_step(
                        sample=sample,
                        model=self.model,
                        criterion=self.criterion,
                        optimizer=self.optimizer,
                        update_num=self.get_num_updates(),
                        ignore_grad=done.is_dummy,
                        **self.ema_arguments,
                    )
                    self._step_times.end_batch()
                    del loss  # the graph that it holds, before the next is built
                done.logging_outputs.append(logging_output)
                done.sample_size += size
                if self.cuda and self.get_num_updates() == 0:
                    torch.cuda.empty_cache()  # what the first step allocated is not typical
            except (RuntimeError, MemoryError) as error:
                if not failed_updates.is_out_of_memory(error):
                    raise
                self._log_oom(error)
                if raise_oom:
                    raise
                if failed_updates.others_wait(self):
                    raise failed_updates.out_of_memory(self) from error
                logger.warning("attempting to recover from OOM in forward/backward pass")
                self.zero_grad()
                if self.cuda:
                    torch.cuda.empty_cache()
                self._discard_update()
                return None
            except Exception as error:
                failed_updates.save_crash_checkpoint(self)
                if isinstance(error, RunFailed):
                    raise failed_updates.on_rank(self, error) from error
                raise
        size = 0.0 * done.sample_size if done.is_dummy else done.sample_size
        done.sample_size = size.float() if torch.is_tensor(size) else float(size)
        return done

    def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
        """fairseq's, which takes a batch to the device."""
        padding: dict[str, Padding] = {}
        dictionary = getattr(self.task, "source_dictionary", None)
        if dictionary is not None and waits.waiting_costs(self.device):
            padding = host_padding.count(sample, dictionary.pad())
        prepared, is_dummy = super()._prepare_sample(sample, is_dummy)
        host_padding.pass_on(padding, prepared)
        return prepared, is_dummy

    @property
    def ema_arguments(self) -> dict[str, Any]:
        """For tasks that look at the moving average of the weights."""
        wanted = self.cfg.ema.store_ema and getattr(self.task, "uses_ema", False)
        return {"ema_model": self.ema.get_model()} if wanted else {}

    def _no_sync(self, accumulates: bool) -> contextlib.AbstractContextManager[Any]:
        """Inside, DDP leaves gradients local. FSDP would hold unsharded ones, and reduces."""
        if (
            accumulates
            and self.data_parallel_world_size > 1
            and not self.is_fsdp
            and hasattr(self.model, "no_sync")
        ):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _not_recording(self, is_dummy: bool) -> contextlib.AbstractContextManager[None]:
        """Inside, routing is not counted: a rank without a batch repeats an earlier one."""
        model = self.get_model()
        if is_dummy and hasattr(model, "not_recording"):
            return model.not_recording()
        return contextlib.nullcontext()

    def _sum_over_ranks(self, done: _Accumulated) -> None:
        given = done.logging_outputs, done.sample_size, self._local_cumulative_training_time()
        if waits.waiting_costs(self.device):
            given = on_device(given, self.device)
        done.logging_outputs, (done.sample_size, seconds) = self._aggregate_logging_outputs(
            *given, ignore=done.is_dummy
        )
        self._cumulative_training_time = seconds / self.data_parallel_world_size

    def _reduce_and_clip_grads(self, done: _Accumulated) -> float:
        """Gradients of the mean loss over all ranks, clipped.

        Returns:
            Their norm before.
        """
        groups = expert_groups_of(self.get_model())
        if self.is_fsdp2:
            fsdp2.pass_gradients(self._trained, self.optimizer)
        with record_function("reduce-grads"):
            if groups is not None and not self.is_fully_sharded:
                sharded_gradients.all_reduce_grads(self, groups)
            else:
                self.optimizer.all_reduce_grads(self.model)
            if utils.has_parameters(self.criterion):
                self.optimizer.all_reduce_grads(self.criterion)
        with record_function("multiply-grads"):
            # Gradients are means over ranks, and sums over the samples of each.
            size = done.sample_size
            size = torch.where(size == 0, 1.0, size) if torch.is_tensor(size) else size or 1.0
            self.optimizer.multiply_grads(self.data_parallel_world_size / size)
        with record_function("clip-grads"):
            grad_norm = self.clip_grad_norm(self.cfg.optimization.clip_norm)
        differs_by_design = self.cfg.distributed_training.ddp_backend == "slowmo"
        compares_ranks = self._grad_norm_buf is not None and not differs_by_design
        return self._norm_on_host(grad_norm, done.are_finite, compares_ranks)

    def _norm_on_host(
        self, grad_norm: Tensor, are_finite: Sequence[Tensor], compares_ranks: bool
    ) -> float:
        """The norm; NaN if a forward pass was not finite. On a GPU the host waits here.

        Raises:
            FloatingPointError: the ranks have different norms.
        """
        if grad_norm.device != self.device:  # --cpu-offload
            grad_norm = grad_norm.to(self.device)
        known = [grad_norm.double().reshape(1)]
        if are_finite:
            known.append(torch.stack(list(are_finite)).all().double().reshape(1))
        if compares_ranks:
            norms = known[0].new_zeros(self.data_parallel_world_size)
            norms[self.data_parallel_rank] = known[0][0]
            known.append(
                distributed_utils.all_reduce(norms, group=self.data_parallel_process_group)
            )
        norm, *others = torch.cat(known).tolist()
        if are_finite and not others.pop(0):
            return math.nan
        if math.isfinite(norm) and any(
            not abs(other - others[0]) / (others[0] + 1e-6) < 1e-6 for other in others
        ):
            raise FloatingPointError(f"the ranks' gradients differ: their norms are {others}")
        return norm

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """Clip by the norm of the whole model's gradients, of which each rank may hold a part."""
        groups = expert_groups_of(self.get_model())

        def over_ranks(norm_of_this_rank: Tensor) -> Tensor:
            if groups is not None and not self.is_fully_sharded:
                return sharded_gradients.grad_norm(self, groups)
            # Of gradients on the CPU (--cpu-offload) too: the ranks are connected by the device's.
            squared = norm_of_this_rank.to(self.device).float() ** 2
            group = self.data_parallel_process_group
            return distributed_utils.all_reduce(squared, group=group) ** 0.5

        return self.optimizer.clip_grad_norm(
            clip_norm,
            aggregate_norm_fn=over_ranks if self.is_fully_sharded or groups else None,
        )

    def _retries_batch(self) -> bool:
        """Whether AMP, after an overflow, tries the same batch again with a smaller scale."""
        if not self.cfg.common.amp:
            return False
        if self._amp_retries == self.cfg.common.amp_batch_retries:
            logger.info("AMP: skipping this batch.")
            self._amp_retries = 0
            return False
        self._amp_retries += 1
        return True

    def _finish_update(self, done: _Accumulated, grad_norm: float, began: float) -> Any:
        """Count and log an update whose optimizer step is done; call the hooks.

        Args:
            began: when it did, by `time.perf_counter`.
        """
        self.set_num_updates(self.get_num_updates() + 1)
        if self.cfg.ema.store_ema:
            self.ema.step(self.get_model(), self.get_num_updates())
            metrics.log_scalar("ema_decay", self.ema.get_decay(), priority=10000, round=5, weight=0)
        if self.cuda and self.cuda_env is not None:
            used = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
            metrics.log_scalar(
                "gb_free", self.cuda_env.total_memory_in_GB - used, priority=1500, round=1, weight=0
            )
            metrics.log_scalar("peak_gb", used, priority=1491, round=2, weight=0)
        self._log_speed(done, began)
        expert_log.log_experts(self, done.logging_outputs)
        logged = self._log_update(
            lambda outputs, size: self._reduce_and_log_stats(
                outputs, size, torch.tensor(grad_norm)
            ),
            done.logging_outputs,
            done.sample_size,
        )
        self._has_logged = True
        every = self.cfg.common.empty_cache_freq
        if self.cuda and every > 0 and (self.get_num_updates() - 1) % every == 0:
            torch.cuda.empty_cache()
        model = self.get_model()
        if hasattr(model, "finish_update"):
            group = None
            if self.data_parallel_world_size > 1:
                group = self.data_parallel_process_group
            model.finish_update(self.get_num_updates(), group)
            for callback in hooks.UPDATE_END:
                callback(self)
            self._log_exchanges()
        return logged

    def _log_update(self, log: Callable[..., Any], *values: Any) -> Any:
        """What `log(*values)` returns; on a GPU, after the first update, it is called later."""
        if not (waits.waiting_costs(self.device) and self._has_logged):
            return log(*values)
        later_log.add(log, *values)
        return {}

    def _discard_update(self) -> None:
        model = self.get_model()
        if hasattr(model, "discard_update"):
            model.discard_update()

    @functools.cached_property
    def _step_times(self) -> StepTimes:
        return StepTimes(self.device, self.get_criterion())

    @functools.cached_property
    def _speed_log(self) -> SpeedLog:
        model, common = self.cfg.model, self.cfg.common
        half = torch.float16 if common.fp16 else torch.bfloat16
        is_half = common.fp16 or common.bf16 or getattr(model, "moe_matmul_dtype", "") == "bf16"
        return SpeedLog(
            self.device,
            half if is_half else torch.float32,
            self.data_parallel_world_size,
            getattr(model, "moe_peak_tflops", None),
            self.cfg.optimization.max_update,
        )

    def _log_speed(self, done: _Accumulated, began: float) -> None:
        """How long this rank's update took and waited for data, and what that amounts to."""
        waited = data_wait.take_seconds()
        metrics.log_scalar("data_wait_ms", 1000 * waited, priority=1510, round=2)
        for part, milliseconds in self._step_times.take().items():
            metrics.log_scalar(f"{part}_ms", milliseconds, priority=1511, round=2)
        if not self.cuda:
            speed_log.log_memory()
        seconds = time.perf_counter() - began + waited
        self._log_update(self._speed_log.log_rate, done.logging_outputs, seconds)
        self._speed_log.log_left(self.get_num_updates())

    def _log_exchanges(self) -> None:
        """How long this rank waited for exchanges of rows of sharded experts."""
        exchange_meters = [layer.meter for layer in sharded_layers(self.get_model())]
        if exchange_meters:
            waited = sum(meter.seconds for meter in exchange_meters)
            metrics.log_scalar("ep_wait_ms", 1000 * waited, priority=1500, round=1)
        for meter in exchange_meters:
            meter.reset()

    def _log_loss_scale(self) -> None:
        if self._scaler is not None:
            scale = loss_scaler.scale(self._scaler)
            metrics.log_scalar("loss_scale", scale, priority=700, round=4, weight=0)

    # --- validation

    def get_valid_iterator(
        self, subset: str, disable_iterator_cache: bool = False
    ) -> EpochBatchIterating:
        """The batches of a validation subset; `valid_step` is for those of the last call."""
        batches = super().get_valid_iterator(subset, disable_iterator_cache)
        self._routing = validation.begin_routing_samples(
            self, subset, batches, self._routing_samples
        )
        most = self.cfg.dataset.max_valid_steps
        return batches if most is None else validation.FirstBatches(batches, most)

    def begin_epoch(self, epoch: int) -> None:
        """As fairseq's; before the first, check the name that validation must log."""
        if not self._has_begun:
            self._has_begun = True
            validation.check_best_metric(self, super().get_valid_iterator)
        super().begin_epoch(epoch)

    @metrics.aggregate("valid")
    def valid_step(self, sample: Any, raise_oom: bool = False) -> Any:
        """Evaluate a batch.

        Args:
            sample: the batch; empty on a rank that has none left.
            raise_oom: raise if it does not fit into memory, instead of trying once more. Where
                there are other ranks, the run ends.
        Returns:
            What was logged.
        """
        return validation.valid_step(self, sample, raise_oom, self._routing)

    @property
    def _scaler(self) -> Any:
        """The loss scaler of --fp16 or --amp; else None."""
        return getattr(self.optimizer, "scaler", None)

    def set_num_updates(self, num_updates: int) -> None:
        """Set the number of completed updates, of the model too: its schedules follow it."""
        super().set_num_updates(num_updates)
        self._set_model_updates()

    def _set_model_updates(self) -> None:
        model = self.get_model()  # asking for the wrapped one would build the wrapper
        if hasattr(model, "set_num_updates"):
            model.set_num_updates(self.get_num_updates())

    def _build_optimizer(self) -> None:
        name = self.cfg.optimizer._name
        if self.is_fsdp2:
            free_whole(self.model)
        if name == "muon":
            mark_matrices(self.model)
        if self.is_fsdp2:
            self._trained = [p for p in self.model.parameters() if p.requires_grad]
            self._optimizer = fsdp2.build_optimizer(self.cfg, self._trained)
            self._lr_scheduler = build_lr_scheduler(self.cfg.lr_scheduler, self._optimizer)
            self._lr_scheduler.step_update(0)
        else:
            with self._weights_in_fp32():
                super()._build_optimizer()
        # fairseq's Adagrad is pointwise, though it does not say so.
        pointwise = self.optimizer.supports_flat_params or name == "adagrad"
        if sharded_layers(self.get_model()) and not pointwise:
            raise OptionError(
                "optimizer",
                f"{name} with --moe-expert-parallel-size",
                "it must treat each weight by itself, and say so (supports_flat_params): give adam",
            )

    def zero_grad(self) -> None:
        """Clear all gradients."""
        super().zero_grad()
        if self.is_fsdp2:
            for parameter in self._trained:
                parameter.grad = None

    # --- checkpoints

    @property
    def always_call_state_dict_during_save_checkpoint(self) -> bool:
        """Whether `state_dict` is a collective."""
        return self.is_fsdp2 or super().always_call_state_dict_during_save_checkpoint

    def consolidate_optimizer(self) -> None:
        """Gather the optimizer's state, for the next `state_dict`. A collective."""
        if not self.is_fsdp2:
            super().consolidate_optimizer()
        elif not self.cfg.checkpoint.no_save_optimizer_state:
            self._gathered_optim_state = whole_optimizer_state(
                self.optimizer.state_dict(),
                self._trained,
                self.should_save_checkpoint_on_current_rank,
            )

    @property
    def _optimizer_name(self) -> str:
        """As checkpoints have it: the same for all ways of training in half precision."""
        kept_in_fp32 = self.is_fully_sharded and self.cfg.common.bf16
        return "FP16Optimizer" if kept_in_fp32 else type(self.optimizer).__name__

    def state_dict(self) -> dict[str, Any]:
        """fairseq's state, with fp32 masters in place of half-precision weights and the names of
        the optimizer's entries."""
        state = super().state_dict()
        if self.is_fsdp2:
            state["model"] = whole_state(self.model, self.should_save_checkpoint_on_current_rank)
        state["optimizer_history"][-1]["optimizer_name"] = self._optimizer_name
        model = state["model"]
        # By address, since shared parameters have several names. Copies, since a file would hold
        # all of the flat master for every view of it.
        masters = {
            model[name].data_ptr(): master.clone()
            for name, master in fp32_masters(self).items()
            if name in model and master.numel()
        }
        for name, value in model.items():
            model[name] = masters.get(value.data_ptr(), value)
        if "last_optimizer_state" in state and not self.is_fsdp:
            state[PARAMETER_NAMES] = list(model_layout(self).names)
        extra_state = state["extra_state"]
        if self.cfg.ema.store_ema:
            extra_state[_EMA_COUNTER] = self.ema.update_freq_counter
        if self._scaler is not None:
            extra_state[_SCALER] = loss_scaler.state_dict(self._scaler)
        if self.cfg.checkpoint.patience > 0:
            extra_state[_EARLY_STOPPING] = early_stopping.STATE.state_dict()
        return state

    def save_checkpoint(self, filename: str, extra_state: Mapping[str, Any]) -> str | None:
        """Write the state to `filename`; on other ranks than the first, gather it with that one.

        Raises:
            RunFailed: it cannot be written; or experts are sharded, where only
                `fairseq.checkpoint_utils.save_checkpoint`, on all ranks, writes checkpoints.
        """
        if sharded_layers(self.get_model()):
            raise RunFailed(
                f"cannot write {filename}: with --moe-expert-parallel-size checkpoints "
                "are written by fairseq.checkpoint_utils.save_checkpoint, on all ranks"
            )
        state = TrainerState(self)
        if not self.should_save_checkpoint_on_current_rank:
            return None
        state.add_extra(dict(extra_state))
        state.write(filename)
        return os.path.abspath(filename)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """Resume from a checkpoint of any parallelism, called on all ranks.

        Returns:
            fairseq's `extra_state`; None where there is no checkpoint, and the run begins.
        Raises:
            OptionError: the checkpoint cannot be read or does not fit the run.
        """
        try:
            try:
                return self._load_checkpoint(filename, *args, **kwargs)
            except resume.TornCheckpoint as error:
                earlier = resume.earlier_whole(self, filename)
                if earlier is None:
                    raise
                logger.warning("%s; this run resumes from %s", error, earlier)
                return self._load_checkpoint(earlier, *args, **kwargs)
        except OptionError as error:
            option, value, remedy = error.arguments
            given = self.cfg.checkpoint
            if option != "checkpoint":
                raise
            if filename == given.finetune_from_model:
                option = "finetune_from_model"
            elif given.restore_file != "checkpoint_last.pt":
                option = "restore_file"
            raise OptionError(option, value, remedy) from error

    def _load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        optimizer_overrides: dict[str, Any] | None = None,
        reset_meters: bool = False,
    ) -> dict[str, Any] | None:
        checkpoint = self.cfg.checkpoint
        if self.data_parallel_rank == 0 and not checkpoint.no_save:
            checkpoint_files.remove_leftovers(checkpoint.save_dir)
        self._optim_history = []
        logger.info("Preparing to load checkpoint %s", filename)
        # Of an earlier run in this process, as of a Hydra sweep.
        early_stopping.STATE.restore({})
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        path = resume.file_to_read(self, filename)
        state = self._read_checkpoint(path, reset_optimizer)
        if state is None:
            resume.check_begins(checkpoint, path)
            logger.info("No existing checkpoint found %s", path)
            self._set_model_updates()
            for callback in hooks.TRAIN_START:
                callback(self)
            return None

        exact = self._load_model(path, state)
        self._optim_history = state["optimizer_history"]
        optimizer_state = state.pop("last_optimizer_state", None)
        if optimizer_state is not None and not reset_optimizer:
            self._load_optimizer(path, optimizer_state, reset_lr_scheduler, optimizer_overrides)
        elif not reset_optimizer:
            logger.warning(
                "%s has no optimizer state (--no-save-optimizer-state): its moments, the number of "
                "updates and the schedules that follow it begin anew",
                path,
            )
        if exact:
            for name, master in fp32_masters(self).items():
                if name in exact:
                    master.copy_(exact[name])
        extra_state = state["extra_state"]
        if not reset_optimizer:
            if self._scaler is not None:
                loss_scaler.restore(self._scaler, extra_state.get(_SCALER, {}))
            if not reset_meters:  # as fairseq does with the best score
                early_stopping.STATE.restore(extra_state.get(_EARLY_STOPPING, {}))
        self._load_progress(extra_state, reset_meters)
        self._set_model_updates()  # 0 with --reset-optimizer
        self._check_same_on_all_ranks(path, filename)
        logger.info(
            "Loaded checkpoint %s (epoch %d @ %d updates)",
            path,
            extra_state["train_iterator"]["epoch"],
            self.get_num_updates(),
        )
        hours = self._previous_training_time / 3600
        limit = run_end.limit_reached(self.cfg, self.get_num_updates(), hours, early_stopping.STATE)
        if limit is not None:
            logger.info(
                "nothing to train: the checkpoint, of update %d and %.2f hours, has reached %s",
                self.get_num_updates(),
                hours,
                limit,
            )
            # Main reads it after loading (0 would be no limit). It would look at the other limits
            # only after one more update, and write that.
            self.cfg.optimization.max_epoch = -1
        return extra_state

    def _read_checkpoint(self, path: str, reset_optimizer: bool) -> dict[str, Any] | None:
        """This rank's state, fitted to the run; None where there is no file.

        Rank 0 reads and sends it to the others, unless the ranks need different parts of it.
        """
        is_sharded = bool(sharded_layers(self.get_model()))
        exists = PathManager.isfile(path)
        if is_sharded:
            check_all_ranks_see(path, exists)
        elif resume.reads_own_shard(self):
            resume.check_all_have_shards(self, path, exists)
        if not exists:
            return None
        on_all_ranks = (
            is_sharded
            or self.cfg.checkpoint.load_checkpoint_on_all_dp_ranks
            or resume.reads_own_shard(self)
            or getattr(self.cfg.model, "base_layers", 0) > 0  # fairseq's, with a file a rank
        )

        def check(state: dict[str, Any], path: str) -> None:
            check_finite(state["model"], path)
            for function in hooks.LOADING:
                function(self, state, path, reset_optimizer)

        state: Any = None
        if on_all_ranks or self.data_parallel_rank == 0:
            state = resume.read_for(self, path, reset_optimizer, on_all_ranks, check)
        if self.data_parallel_world_size == 1 or on_all_ranks:
            return state
        kept = None
        if state is not None and self.cfg.distributed_training.zero_sharding == "os":
            kept = state.get("last_optimizer_state")
            if kept is not None:  # each rank is sent its shard of it when the optimizer loads it
                state["last_optimizer_state"] = "SHARDED"
        state = distributed_utils.broadcast_object(
            state, src_rank=0, group=self.data_parallel_process_group, dist_device=self.device
        )
        if kept is not None:
            state["last_optimizer_state"] = kept
        return state

    def _load_model(self, path: str, state: dict[str, Any]) -> dict[str, Tensor]:
        """Load the weights, and take them out of `state`.

        Returns:
            By name, those that the file holds in fp32 and the model in half precision.
        """
        history, weights = state["optimizer_history"], state.pop("model")
        if history and "num_updates" in history[-1]:
            self.model.set_num_updates(history[-1]["num_updates"])
        try:
            if self.is_fsdp and not resume.reads_own_shard(self):
                self._add_heads(weights)
                # fairseq's FSDP would send rank 0's weights, and so its experts, to all ranks.
                super(FullyShardedDataParallel, self.model).load_state_dict(weights, strict=True)
            else:
                self.model.load_state_dict(weights, strict=True, model_cfg=self.cfg.model)
            if utils.has_parameters(self.get_criterion()):
                self.get_criterion().load_state_dict(state.pop("criterion"), strict=True)
        except OptionError:
            raise
        except Exception as error:
            saved = (state.get("cfg") or {}).get("model") or {}
            raise misfit(path, error, saved, self.cfg.model) from error
        if self.is_fully_sharded or not (self.cfg.common.fp16 or self.cfg.common.bf16):
            return {}
        return {  # by the names of today, which loading gave to those of an earlier fairseq
            name: weights[name]
            for name, p in self.get_model().named_parameters()
            if name in weights and weights[name].dtype == torch.float32 != p.dtype
        }

    def _add_heads(self, weights: dict[str, Any]) -> None:
        """Under FSDP, have a model with classification heads add new ones to pretrained weights.

        Without FSDP its `load_state_dict` does.
        """
        heads = (m for m in self.model.modules() if hasattr(m, "register_classification_head"))
        model: Any = next((m for m in heads if not isinstance(m, FullyShardedDataParallel)), None)
        if model is not None:
            with self.model.summon_full_params(recurse=False):
                model.upgrade_state_dict(weights)

    def _load_optimizer(
        self, path: str, state: Any, reset_lr_scheduler: bool, overrides: dict[str, Any] | None
    ) -> None:
        self._build_optimizer()  # anew: the parameters may be other tensors now
        last = self._optim_history[-1]
        for what, saved, now in (
            ("Criterion", last["criterion_name"], type(self.get_criterion()).__name__),
            ("Optimizer", last["optimizer_name"], self._optimizer_name),
        ):
            if saved != now:
                raise OptionError(
                    "checkpoint",
                    path,
                    f"{what} does not match; please reset the "
                    f"optimizer (--reset-optimizer). {saved} vs "
                    f"{now}",
                )
        try:
            if not reset_lr_scheduler:
                self.lr_scheduler.load_state_dict(last["lr_scheduler_state"])
            if self.is_fsdp and not resume.reads_own_shard(self):
                state = self.model.get_shard_from_optim_state_dict(state)
            elif self.is_fsdp2:
                state = own_optimizer_state(state, self._trained)
            elif self.cfg.distributed_training.zero_sharding == "os":
                state = self.optimizer.broadcast_global_state_dict(state)
            self.optimizer.load_state_dict(state, overrides)
        except Exception as error:  # of a state of other parameters, anything
            raise OptionError(
                "checkpoint",
                path,
                f"its optimizer state does not fit the run ({describe(error)}): give its options, "
                "or --reset-optimizer",
            ) from error
        check_moments(self.optimizer.optimizer, path, self.optimizer.supports_flat_params)
        self.set_num_updates(last["num_updates"])

    def _load_progress(self, extra_state: dict[str, Any], reset_meters: bool) -> None:
        """Restore times, learning rate, meters and the moving average of weights."""
        if "previous_training_time" in extra_state:
            self._previous_training_time = extra_state["previous_training_time"]
            self._start_time = time.time()
        iterator = extra_state["train_iterator"]
        if iterator.get("epoch", 1) < 1:
            raise OptionError(
                "restore_file",
                self.cfg.checkpoint.restore_file,
                "does not say how far the run was: take an earlier one, or give "
                "--finetune-from-model to start from its weights",
            )
        self.lr_step(iterator["epoch"])
        starts_epoch = iterator.get("version", 1) >= 2 and iterator["iterations_in_epoch"] == 0
        if "metrics" in extra_state and not reset_meters and not starts_epoch:
            metrics.load_state_dict(extra_state["metrics"])
            for meter in metrics.get_meters("default"):
                if isinstance(meter, meters.TimeMeter):
                    meter.reset()  # its start belongs to the earlier process
        if not self.cfg.ema.store_ema:
            return
        if "ema" not in extra_state:
            logger.warning(
                "the checkpoint has no moving average of the weights: it starts from the weights"
            )
            self.ema.restore(self.get_model().state_dict(), build_fp32_params=self.cfg.ema.ema_fp32)
            return
        self.ema.restore(extra_state["ema"], build_fp32_params=False)
        self.ema.update_freq_counter = extra_state.get(_EMA_COUNTER, 0)
        if self.cfg.ema.ema_fp32:
            self.ema.build_fp32_params(extra_state.get("ema_fp32_params"))

    def _check_same_on_all_ranks(self, path: str, filename: str) -> None:
        """Raise `OptionError` on all ranks if each read a file of its own and they differ."""
        updates = self._optim_history[-1].get("num_updates")
        if resume.reads_own_shard(self):
            resume.check_same_update(self, filename, updates)
        elif sharded_layers(self.get_model()):
            check_all_ranks_see(path, updates)
