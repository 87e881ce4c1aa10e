"""One training run, from checks to merged model."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from ray_pipeline.engines.imports import heavy_imports
from ray_pipeline.store.files import Folder
from ray_pipeline.store.locations import join
from ray_pipeline.store.schemas import TRAIN_METRICS
from ray_pipeline.training.checkpoints import check_checkpoints
from ray_pipeline.training.data_check import check_data
from ray_pipeline.training.methods import TrainingInputError, validate_trainer_args
from ray_pipeline.training.metrics import mean_train_loss
from ray_pipeline.training.preflight import check_cluster, check_model, check_spec
from ray_pipeline.training.spec import ModelNotWritten, TrainingStopped, TrainResult, TrainSpec

logger = logging.getLogger("quorum.train")

#: Ray Train retries placing the workers after this long (its own default, set explicitly).
_START_TIMEOUT_S = 60.0

WORKER_ENV = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it, `datasets.map` floods the log with disassembly
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def fit(spec: TrainSpec, warn: Callable[[str], None] = logger.warning) -> TrainResult:
    """Train with Ray Train, resuming a run of the same name, and write the model to `output_dir`.

    Needs a connected Ray; call it from a driver or from a task with `num_cpus=0`.

    Args:
        warn: called with warnings about the data and the checkpoints, as sentences, before the workers start.

    Raises:
        TrainingInputError: invalid settings or data, or the cluster cannot place the workers (nothing was started), or
            the training diverged (no model was written).
        TrainingStopped: `output_dir` contained the file `STOP`. Remove it and call again to resume.
        ModelNotWritten: the training is finished, but merging or writing the model failed. Call again to do that only.
        ray.train.TrainingFailedError: workers failed more than `max_failures` times, or could not be placed within
            `schedule_timeout_s`. Call again to resume from the newest checkpoint.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    started = time.monotonic()
    check_spec(spec)
    validate_trainer_args(spec.settings.method, spec.settings.trainer_args)
    check_model(spec)
    check_cluster(spec)
    data = check_data(spec)
    for warning in data.warnings:
        warn(warning)
    for place in (spec.output_dir, spec.storage_path):
        if Folder(place).is_local:
            os.makedirs(place, exist_ok=True)

    storage = Folder(spec.storage_path)
    check_checkpoints(storage / spec.run_name, warn)
    trainer = TorchTrainer(
        _train,  # type: ignore[arg-type]  # Train V2 keeps the return value; the types are V1's
        train_loop_config={"spec": spec.to_dict()},
        torch_config=TorchConfig(timeout_s=2 * 3600),  # ranks wait while rank 0 tokenizes a large dataset
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=spec.settings.num_workers,
            use_gpu=bool(spec.settings.use_gpu),
            resources_per_worker=spec.worker_resources,
            label_selector=spec.settings.label_selector or None,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=spec.run_name,
            storage_path=storage.path(),
            storage_filesystem=None if storage.is_local else storage.fs,
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=spec.settings.max_failures,
                controller_failure_limit=math.ceil(spec.schedule_timeout_s / _START_TIMEOUT_S),
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": WORKER_ENV},
        ),
    )
    done = trainer.fit().return_value  # type: ignore[attr-defined]
    if "stopped" in done:
        raise TrainingStopped(done["stopped"])
    if "diverged" in done:
        raise TrainingInputError(
            f"the training diverged: {done['diverged']}; no model was written. Lower learning_rate "
            f"({spec.settings.learning_rate:g}) or raise warmup_ratio ({spec.settings.warmup_ratio:g})"
        )
    adapter = None if spec.settings.lora is None else join(spec.output_dir, "adapter")
    if "unwritten" in done:
        kept = f"; the adapter is in {adapter}" if adapter and Folder(adapter).exists("adapter_config.json") else ""
        raise ModelNotWritten(
            f"the training is finished ({done['steps']} steps), but its model could not be written: "
            f"{done['unwritten']}{kept}. Correct the cause and rerun the same command: it does not train again"
        )
    metrics = pa.Table.from_pylist(done["metrics"], schema=TRAIN_METRICS)
    written = done["written"]
    return TrainResult(
        steps=done["steps"],
        epochs=done["epochs"],
        train_loss=mean_train_loss(metrics),
        adapter=None if spec.settings.save == "merged" else adapter,
        merged=None if spec.settings.save == "adapter" else join(spec.output_dir, "merged"),
        effective=done["effective"] | {k: v for k, v in written.items() if k == "adapter_effect"},
        data=dataclasses.asdict(data),
        resumed_from=done["resumed_from"],
        max_logit_diff=written["max_logit_diff"],
        metrics=metrics,
        seconds=time.monotonic() - started,
        train_seconds=done["train_seconds"],
    )


def _train(config: dict[str, Any]) -> dict[str, Any] | None:
    """Run one worker. The import is here because importing TRL takes seconds, which this process and Ray Train's
    controller would spend as well, one after the other."""
    with heavy_imports():
        from ray_pipeline.training.worker import train_worker

    return train_worker(config)
