"""The training loop of one Ray Train worker."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch

from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest
from ray_pipeline.store.local import upload
from ray_pipeline.training.callbacks import (
    AllStepsDone,
    Diverged,
    EvaluateEachEpoch,
    LogProgress,
    ReportCheckpoint,
    StopAtCheckpoint,
    StopWhenDiverged,
    StopWhenDone,
    report,
)
from ray_pipeline.training.card import model_card
from ray_pipeline.training.checkpoints import newest_checkpoint
from ray_pipeline.training.folders import clear
from ray_pipeline.training.metrics import train_metrics
from ray_pipeline.training.save import write_model
from ray_pipeline.training.spec import TrainSpec
from ray_pipeline.training.trainer import build_trainer, effective_settings

logger = logging.getLogger("quorum.train")


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """Train, or resume training, and write the trained model. Rank 0 returns the figures that `fit` reports, or the
    reason why there is no model: the training was stopped, it diverged, or its model could not be written.

    Args:
        config: {"spec": `TrainSpec.to_dict()`}.
    """
    spec = TrainSpec.from_dict(config["spec"])
    rank = ray.train.get_context().get_world_rank()
    _log_to_stderr()
    if not spec.settings.use_gpu:
        torch.set_num_threads(max(1, int(spec.settings.cpus_per_worker)))  # otherwise every worker uses every core

    scratch = _scratch_folder(spec, rank)
    clear(scratch)
    kept = Folder(spec.output_dir)
    if rank == 0:
        report(kept, "loading model")
    if not kept.is_local:
        spec = dataclasses.replace(spec, output_dir=str(scratch / "model"))
        os.makedirs(spec.output_dir)
    _logger_folders(spec)
    try:
        progress = LogProgress(spec.settings.global_batch, kept)
        stop = StopAtCheckpoint(kept)
        run = Folder(spec.storage_path) / spec.run_name
        trainer = build_trainer(spec, str(scratch), callbacks=[ReportCheckpoint(run), stop, progress])
        if trainer.eval_dataset is not None:
            trainer.add_callback(EvaluateEachEpoch())
        trainer.add_callback(StopWhenDiverged(trainer))
        effective = effective_settings(spec, trainer)
        started = time.monotonic()
        try:
            resumed_from = _train(trainer, run)
        except Diverged as error:  # a restart would diverge again
            return {"diverged": str(error)}
        train_seconds = time.monotonic() - started
        if stop.reason is not None:
            if rank == 0 and not kept.is_local:  # keep the loggers' files
                upload(Path(spec.output_dir), kept)
            return {"stopped": stop.reason}

        metrics = train_metrics(trainer.state.log_history)
        effective |= {
            "max_steps": trainer.state.max_steps,
            "warmup_steps": trainer.args.get_warmup_steps(trainer.state.max_steps),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        if torch.cuda.is_available() and spec.settings.use_gpu:
            effective["peak_gpu_mb"] = torch.cuda.max_memory_allocated() // 2**20
        rows = metrics.to_pylist()
        last = next((row for row in reversed(rows) if row["split"] == "train"), None)
        steps = trainer.state.global_step

        card = functools.partial(model_card, spec, steps=steps, effective=effective, final=last)
        unwritten = None
        try:
            written = write_model(spec, trainer, card)
        except Exception as error:  # a restart would fail again
            if spec.settings.shard != "none":
                raise  # the other ranks may wait for this one
            logger.exception("the trained model could not be written")
            unwritten = f"{type(error).__name__}: {error}"
        if rank != 0:
            return None
        if not kept.is_local:
            upload(Path(spec.output_dir), kept)
        if unwritten is not None:
            return {"unwritten": unwritten, "steps": steps}
        return {
            "steps": steps,
            "epochs": float(trainer.state.epoch or 0.0),
            "effective": effective,
            "written": written,
            "resumed_from": resumed_from,
            "metrics": rows,
            "train_seconds": train_seconds,
        }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _train(trainer: Any, run: Folder) -> int | None:
    """Train from the newest whole checkpoint of this run, if there is one; returns its step."""
    recorded = ray.train.get_checkpoint()
    name = newest_checkpoint(run, Path(recorded.path).name if recorded else None)
    if name is None:
        trainer.train()
        return None
    begun = StopWhenDone()
    trainer.add_callback(begun)
    with ray.train.Checkpoint(run.path(name), run.fs).as_directory() as folder:
        try:
            trainer.train(resume_from_checkpoint=folder)
        except AllStepsDone:
            logger.info("all %d steps are done already", begun.step)
    return begun.step


def _logger_folders(spec: TrainSpec) -> None:
    """Make loggers write beside the model, not into the scratch folder; a resumed training continues its logger run.

    The user's environment variables take precedence.
    """
    run = digest(spec.run_name)
    for name, value in {
        "TENSORBOARD_LOGGING_DIR": f"{spec.output_dir}/tensorboard",
        "WANDB_DIR": spec.output_dir,  # wandb creates its folder `wandb` in it
        "WANDB_RUN_ID": run,
        "WANDB_RESUME": "allow",
        "MLFLOW_TRACKING_URI": f"sqlite:///{spec.output_dir}/mlflow.db",
    }.items():
        os.environ.setdefault(name, value)


def _scratch_folder(spec: TrainSpec, rank: int) -> Path:
    """The folder of this rank, the same after a restart, so that leftovers of killed workers do not pile up."""
    name = digest([os.getuid(), spec.storage_path, spec.run_name])
    return Path(tempfile.gettempdir()) / f"quorum-train-{name}-rank-{rank}"


def _log_to_stderr() -> None:
    """Ray forwards a worker's stderr to the driver; without a handler, lines below WARNING would be lost."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)
    # It warns at the end of each pass, many times, that it cannot trim a last batch that is complete anyway.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
