"""Training a policy: TRL trainers inside Ray Train workers, resumable, with one whole model at the end.

>>> result = fit(TrainSpec(method="kto", model=…, train_files=…, output_dir=…, storage_path=…, run_name=…))
>>> result.adapter, result.merged, result.metrics
"""

from ray_pipeline.training.fit import fit
from ray_pipeline.training.merge import MergeError, MergeReport, merge_adapter
from ray_pipeline.training.methods import METHODS, validate_trainer_args
from ray_pipeline.training.preflight import DataReport, check_cluster, check_data, check_spec
from ray_pipeline.training.spec import (
    DataKind,
    LoraSpec,
    MethodName,
    TrainingInputError,
    TrainingStopped,
    TrainResult,
    TrainSpec,
)

__all__ = [
    "METHODS",
    "DataKind",
    "DataReport",
    "LoraSpec",
    "MergeError",
    "MergeReport",
    "MethodName",
    "TrainResult",
    "TrainSpec",
    "TrainingInputError",
    "TrainingStopped",
    "check_cluster",
    "check_data",
    "check_spec",
    "fit",
    "merge_adapter",
    "validate_trainer_args",
]
