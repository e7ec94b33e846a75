"""The trainer of all runs of this plugin: fairseq's, with its steps written out."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import utils
from fairseq.data.iterators import EpochBatchIterating
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from torch import Tensor
from torch.autograd.profiler import record_function

from evomoe_plugin.checkpoint.save import TrainerState
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.dispatch.sharded_layers import sharded_layers
from evomoe_plugin.optim.muon import mark_matrices
from evomoe_plugin.routing import waits
from evomoe_plugin.routing.padding import Padding
from evomoe_plugin.trainer import (
    data_wait,
    expert_log,
    failed_updates,
    first_step,
    hooks,
    host_padding,
    later_log,
    loss_scaler,
    run_state,
    speed_log,
    validation,
)
from evomoe_plugin.trainer.layouts import layout_of
from evomoe_plugin.trainer.routing_sample import RoutingSample
from evomoe_plugin.trainer.speed_log import SpeedLog
from evomoe_plugin.trainer.step_times import StepTimes
from evomoe_plugin.trainer.transfers import on_device

logger = logging.getLogger(__name__)


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
    _has_logged = False  # an update; its meters are timed from then on

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, *args: Any, **kwargs: Any):
        first_step.begin_run()
        self.layout = layout_of(cfg.distributed_training)
        self.layout.prepare(cfg, model, criterion)
        with self.layout.flags_hidden(cfg):
            super().__init__(cfg, task, model, criterion, *args, **kwargs)
        self._routing_samples: dict[tuple[str, str], RoutingSample] = {}

    @property
    def use_distributed_wrapper(self) -> bool:
        """Whether fairseq wraps the model."""
        return self.layout.is_wrapped and super().use_distributed_wrapper

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
        first_step.begin_step()
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
        waits_later = waits.waiting_costs(self.device) and self.scaler is None
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
            except RunFailed as error:  # NaN in a forward pass
                failed_updates.save_crash_checkpoint(self)
                raise failed_updates.on_rank(self, error) from error
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
            except Exception:
                failed_updates.save_crash_checkpoint(self)
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
        """Around a micro-batch. DDP leaves gradients local in all but the last one of an update
        (FSDP would hold unsharded ones, and reduces); in that one the layout may reduce them as
        they are made."""
        if not accumulates:
            return self.layout.reducing(self)
        if (
            self.data_parallel_world_size > 1
            and not self.layout.is_fully_sharded
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
        with record_function("reduce-grads"):
            self.layout.all_reduce_grads(self)
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
        return self.optimizer.clip_grad_norm(
            clip_norm, aggregate_norm_fn=self.layout.norm_over_ranks(self)
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
        if self.scaler is not None:
            scale = loss_scaler.scale(self.scaler)
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
    def scaler(self) -> Any:
        """The loss scaler of --fp16 or --amp; else None."""
        return getattr(self.optimizer, "scaler", None)

    def set_num_updates(self, num_updates: int) -> None:
        """Set the number of completed updates, of the model too: its schedules follow it."""
        super().set_num_updates(num_updates)
        self.set_model_updates()

    def set_model_updates(self) -> None:
        """Tell the model the number of completed updates."""
        model = self.get_model()  # asking for the wrapped one would build the wrapper
        if hasattr(model, "set_num_updates"):
            model.set_num_updates(self.get_num_updates())

    def _build_optimizer(self) -> None:
        name = self.cfg.optimizer._name
        self.layout.free_gathered(self)
        if name == "muon":
            mark_matrices(self.model)
        self.layout.build_optimizer(self, super()._build_optimizer)
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
        self.layout.zero_grad()

    # --- checkpoints

    @property
    def always_call_state_dict_during_save_checkpoint(self) -> bool:
        """Whether `state_dict` is a collective."""
        return self.layout.gathers_state

    def consolidate_optimizer(self) -> None:
        """Gather the optimizer's state, for the next `state_dict`. A collective."""
        self.layout.consolidate_optimizer(self, super().consolidate_optimizer)

    def state_dict(self) -> dict[str, Any]:
        """fairseq's state, with fp32 masters in place of half-precision weights and the names of
        the optimizer's entries."""
        return run_state.completed(self, super().state_dict())

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
        return run_state.load_checkpoint(self, filename, *args, **kwargs)
