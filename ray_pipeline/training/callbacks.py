"""Trainer callbacks: evaluation, checkpoints to Ray Train, the stop of a diverged training, progress lines."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ray_pipeline.store.errors import NotWritten, StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.training.checkpoints import checkpoint_name, write_checksums
from ray_pipeline.training.spec import PROGRESS, STOP

logger = logging.getLogger("quorum.train")


class AllStepsDone(Exception):
    """The checkpoint to resume from is that of the last step."""


class StopWhenDone(TrainerCallback):
    """End a resumed training before its first step if all steps are done.

    transformers may take one more step before it checks `max_steps`. At this point model, optimiser and log have been
    restored from the checkpoint, sharded or not.

    Attributes:
        step: step of the checkpoint.
    """

    step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step
        if state.global_step >= state.max_steps:
            raise AllStepsDone
        logger.info("resuming from step %d/%d", state.global_step, state.max_steps)


class Diverged(Exception):
    """Loss, gradients or trained weights contain NaN or infinity."""


class StopWhenDiverged(TrainerCallback):
    """End a training at the first step whose loss, gradients or weights are not finite, before it is saved.

    All ranks raise at the same step.

    Args:
        trainer: with `logging_nan_inf_filter` off; otherwise it replaces such losses.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._gradients = torch.tensor(True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._gradients = all_finite(p.grad for p in self._trained() if p.grad is not None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = torch.isfinite(self._trainer._tr_loss)  # the sum since the last log
        weights = all_finite(self._trained())
        wrong = ~torch.stack([found.to(args.device) for found in (loss, self._gradients, weights)])
        if torch.distributed.is_initialized():
            flags = wrong.float()
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            wrong = flags.bool()
        if wrong.any():
            names = ("the loss", "gradients", "trained weights")
            which = [name for name, bad in zip(names, wrong.tolist(), strict=True) if bad]
            raise Diverged(f"NaN or infinity in {', '.join(which)} at step {state.global_step} of {state.max_steps}")

    def _trained(self) -> Iterator[torch.nn.Parameter]:
        return (p for p in self._trainer.model.parameters() if p.requires_grad)


def all_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Whether tensors, or this rank's shards of them, are finite: one pass, and no wait for the device."""
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)().detach() for tensor in tensors]
    norms = torch._foreach_norm([tensor for tensor in local if tensor.numel()])
    return torch.stack([norm.float() for norm in norms]).isfinite().all() if norms else torch.tensor(True)


class EvaluateEachEpoch(TrainerCallback):
    """Request an evaluation at the last step of each epoch and of the run.

    TRL's own `eval_strategy="epoch"` evaluates after writing the checkpoint of that step, so a resume from it would
    lose the metrics row.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps or float(state.epoch or 0.5).is_integer():
            control.should_evaluate = True


class ReportCheckpoint(TrainerCallback):
    """Report each Hugging Face checkpoint to Ray Train, which keeps it in shared storage and restarts from it.

    Rank 0 has the whole checkpoint, the other ranks only their random state (and shards, if the model is sharded).
    Each rank has its own folder, and Ray Train merges them. The report is a barrier: all ranks call it.

    Args:
        run: Ray Train's folder of the run.
    """

    def __init__(self, run: Folder) -> None:
        self._run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        newest = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        if folder.is_dir():
            write_checksums(folder, args.process_index)
        ray.train.report(
            {"step": state.global_step, **{k: v for k, v in newest.items() if isinstance(v, (int, float))}},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if folder.is_dir() else None,
            checkpoint_dir_name=checkpoint_name(self._run, state.global_step),
        )
        if not state.is_world_process_zero:
            shutil.rmtree(folder, ignore_errors=True)  # Hugging Face rotates checkpoints on rank 0 only


class StopAtCheckpoint(TrainerCallback):
    """End the training at a checkpoint if its folder contains `STOP`; all ranks stop at the same checkpoint.

    Must come after `ReportCheckpoint`, so that the checkpoint is kept.

    Attributes:
        reason: why the training ended before its last step, or None.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.reason: str | None = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            return
        reasons = [self._stop_reason() if state.is_world_process_zero else None]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(reasons)
        (self.reason,) = reasons
        if self.reason is not None:
            control.should_training_stop = True

    def _stop_reason(self) -> str | None:
        try:
            return str(self._folder.read_json(STOP)["reason"])
        except (OSError, StoreError):  # no request, or a storage error: the next checkpoint checks again
            return None


class LogProgress(TrainerCallback):
    """Report every few seconds: step, loss, steps and rows per second.

    What is newest is also written to `folder`, for the driver on another node.
    """

    def __init__(self, rows_per_step: int, folder: Folder, every_s: float = 5.0) -> None:
        self._rows_per_step = rows_per_step
        self._folder = folder
        self._every_s = every_s
        self._started = self._last = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()
        self._last = 0.0
        self._first_step = state.global_step
        if state.is_world_process_zero:
            report(self._folder, "training")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            report(self._folder, "writing model", step=state.global_step, steps=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs, now = logs or {}, time.monotonic()
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            logger.info("step %d/%d evaluation loss %.4f", state.global_step, state.max_steps, logs["eval_loss"])
        if "loss" not in logs or (now - self._last < self._every_s and state.global_step < state.max_steps):
            return
        self._last = now
        rate = (state.global_step - self._first_step) / max(now - self._started, 1e-9)
        note = (
            f"epoch {state.epoch or 0.0:.2f}, loss {logs['loss']:.4f}, {rate:.2f} steps/s, "
            f"{rate * self._rows_per_step:.1f} rows/s"
        )
        logger.info("step %d/%d, %s", state.global_step, state.max_steps, note)
        report(self._folder, "training", step=state.global_step, steps=state.max_steps, note=note)


def report(folder: Folder, phase: str, step: int = 0, steps: int = 0, note: str = "") -> None:
    """Write what rank 0 is doing to `folder`; a storage error is reported at the next checkpoint, which matters more.

    Args:
        steps: 0 until the first of them is made.
        note: the newest figures in words.
    """
    with contextlib.suppress(NotWritten):
        folder.write_json(PROGRESS, {"phase": phase, "step": step, "steps": steps, "note": note})
