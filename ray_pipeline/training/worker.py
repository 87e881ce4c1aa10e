"""What each Ray Train worker runs."""

from __future__ import annotations

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
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import TrainerState

from ray_pipeline.store.keys import digest
from ray_pipeline.training.callbacks import EvaluateEachEpoch, LogProgress, ReportCheckpoint
from ray_pipeline.training.card import model_card
from ray_pipeline.training.folders import clear, partial_folder, publish
from ray_pipeline.training.merge import MergeReport, merge_adapter
from ray_pipeline.training.metrics import train_metrics
from ray_pipeline.training.spec import PROGRESS, TrainSpec
from ray_pipeline.training.trainer import build_trainer, effective_settings

logger = logging.getLogger("quorum.train")

#: Prompts of the data set that the merge is checked on.
_CHECK_PROMPTS = 4


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """Train, or go on training, and leave adapter and merged model behind. Rank 0 returns what `fit` reports.

    Args:
        config: {"spec": `TrainSpec.to_dict()`}.
    """
    spec = TrainSpec.from_dict(config["spec"])
    rank = ray.train.get_context().get_world_rank()
    _log_to_stderr()
    if not spec.use_gpu:
        torch.set_num_threads(max(1, int(spec.cpus_per_worker)))  # else every worker takes every core

    scratch = _scratch_folder(spec, rank)
    clear(scratch)
    try:
        trainer = build_trainer(
            spec,
            str(scratch),
            callbacks=[ReportCheckpoint(), LogProgress(spec.effective_batch, Path(spec.output_dir) / PROGRESS)],
        )
        if trainer.eval_dataset is not None:
            trainer.add_callback(EvaluateEachEpoch())
        effective = effective_settings(spec, trainer)
        started = time.monotonic()
        resumed_from = _train(trainer)
        train_seconds = time.monotonic() - started

        metrics = train_metrics(trainer.state.log_history)
        effective |= {
            "max_steps": trainer.state.max_steps,
            "warmup_steps": trainer.args.get_warmup_steps(trainer.state.max_steps),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        if torch.cuda.is_available() and spec.use_gpu:
            effective["peak_gpu_mb"] = torch.cuda.max_memory_allocated() // 2**20
        rows = metrics.to_pylist()
        last = next((row for row in reversed(rows) if row["split"] == "train"), None)
        steps = trainer.state.global_step

        _save_adapter(spec, trainer, rank, model_card(spec, "adapter", steps, effective, last))
        if rank != 0:
            return None
        logger.info("merging the adapter into %s on the CPU", spec.model)
        merge = _merge(spec, trainer, model_card(spec, "merged", steps, effective, last))
        return {
            "steps": steps,
            "epochs": float(trainer.state.epoch or 0.0),
            "effective": effective,
            "resumed_from": resumed_from,
            "max_logit_diff": merge.max_logit_diff,
            "adapter_effect": merge.adapter_effect,
            "metrics": rows,
            "train_seconds": train_seconds,
        }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _train(trainer: Any) -> int | None:
    """Train from the newest checkpoint of this run, if there is one; returns its step."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
        return None
    with checkpoint.as_directory() as folder:
        state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
        if state.global_step < state.max_steps:
            logger.info("going on from step %d/%d", state.global_step, state.max_steps)
            trainer.train(resume_from_checkpoint=folder)
        else:
            # transformers would take one optimiser step more before it looks at max_steps.
            logger.info("all %d steps are done already", state.max_steps)
            model = trainer.accelerator.unwrap_model(trainer.model)
            set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
            trainer.state = state
    return state.global_step


def _save_adapter(spec: TrainSpec, trainer: Any, rank: int, readme: str) -> None:
    final = Path(spec.output_dir) / "adapter"
    partial = partial_folder(final)
    if rank == 0:
        clear(partial)
    trainer.save_model(str(partial))  # on all ranks: a sharded model is gathered here; only rank 0 writes
    if rank == 0:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine
        (partial / "README.md").write_text(readme)
        publish(final)


def _merge(spec: TrainSpec, trainer: Any, readme: str) -> MergeReport:
    rows = trainer.train_dataset.select(range(min(_CHECK_PROMPTS, len(trainer.train_dataset))))
    return merge_adapter(
        spec.model,
        str(Path(spec.output_dir) / "adapter"),
        str(Path(spec.output_dir) / "merged"),
        spec.dtype,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        prompts=[trainer.processing_class.decode(ids) for ids in rows["prompt_ids"]],
        readme=readme,
    )


def _scratch_folder(spec: TrainSpec, rank: int) -> Path:
    """A folder of this rank alone, the same after a restart, so that a killed worker leaves nothing to pile up."""
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
    # Says at the end of each pass, many times over, that it cannot trim a last batch that is whole anyway.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
