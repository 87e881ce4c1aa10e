"""What to train (`TrainSettings`, `TrainSpec`) and the outcome (`TrainResult`). Imports neither Ray nor torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.training.methods import MethodName, method_of

if TYPE_CHECKING:
    import pyarrow as pa

Quantization = Literal["nf4", "int8"]
Shard = Literal["none", "fsdp", "zero2", "zero3"]

#: File in `TrainSpec.output_dir` with the progress of a running training: {"step", "steps", "line"}.
PROGRESS = "progress.json"
#: File there that ends a training at its next checkpoint, unless that is the last: {"reason"}.
STOP = "stop.json"


class TrainingStopped(RuntimeError):
    """A training ended at a checkpoint on request; rerun the same call to resume."""


class ModelNotWritten(RuntimeError):
    """A training took all its steps, but its model could not be written; rerun the same call to write it."""


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) under PEFT's names; defaults as published."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="scaling; the update is alpha / r · B·A")
    dropout: float = Field(
        0.05, ge=0, lt=1, description="probability on the adapter's input; no effect with train.disable_dropout"
    )
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="all-linear (every linear layer but the output head), a list of module names, or a regular "
        "expression of whole names",
    )


class TrainSettings(Settings):
    """The `train` block; the defaults are the published hyper-parameters."""

    method: MethodName = Field(
        "kto", description="sft, dpo, kto, orpo, simpo, or a file that registers a method (my_method.py)"
    )
    model: str = Field("policy", description="a key of `models`: the base that is adapted")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="of the loaded base and the written model; on GPUs bfloat16 also turns on autocast. Full "
        "fine-tuning keeps its weights in float32, since bfloat16 rounds most updates away",
    )
    num_workers: int = Field(1, ge=1, description="data-parallel workers")
    use_gpu: bool | None = Field(None, description="one GPU per worker; default: where the cluster has GPUs")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of one worker")
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="labels of the nodes that may be used; empty: any"
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="custom resources of one worker, beside CPUs and GPU"
    )
    autoscaling: bool = Field(False, description="wait for nodes that start on demand instead of refusing the run")
    seed: int = Field(0, ge=0, description="of shuffling, dropout and new weights")
    beta: float | None = Field(
        None, gt=0, description="β of the method's paper (λ in ORPO's); default: the one published with it"
    )
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate")
    epochs: float = Field(2, gt=0, description="passes over the data; may be a fraction")
    batch_size: int = Field(2, ge=1, description="rows per worker and micro-batch; kto needs at least 2")
    gradient_accumulation: int = Field(8, ge=1, description="micro-batches per optimiser step")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of all steps")
    lr_scheduler: str = Field("cosine", description="a transformers.SchedulerType value")
    lora: LoraSettings | None = Field(
        LoraSettings(),
        description="null trains every weight; methods with a reference then hold a frozen copy of the base",
    )
    quantization: Quantization | None = Field(
        None,
        description="frozen base in 4 bits (nf4, QLoRA: arXiv:2305.14314) or 8 (int8); the adapter is merged at full "
        "precision. Needs LoRA, GPUs and the extra qlora",
    )
    shard: Shard = Field(
        "none",
        description="for models larger than one GPU: fsdp shards parameters, gradients and optimiser states (FSDP2), "
        "zero2 gradients and optimiser states, zero3 parameters too (extra deepspeed)",
    )
    disable_dropout: bool = Field(
        False, description="zero every dropout, the adapter's too (TRL's own default would be true)"
    )
    gradient_checkpointing: bool = Field(True, description="recompute activations to save memory")
    save_steps: int = Field(
        50, ge=1, description="optimiser steps between checkpoints: the most that a failure or a stop can cost"
    )
    logging_steps: int = Field(1, ge=1, description="optimiser steps between rows of the metrics table")
    desirable_weight: float | None = Field(
        None, gt=0, description="λ_D of the KTO paper; default: from the class balance"
    )
    undesirable_weight: float | None = Field(
        None, gt=0, description="λ_U of the KTO paper; default: from the class balance"
    )
    max_failures: int = Field(3, ge=0, description="restarts of a failed worker group, each from the newest checkpoint")
    report_to: tuple[str, ...] = Field((), description="loggers: tensorboard, wandb, mlflow, …")
    trainer_args: dict[str, Any] = Field(
        default_factory=dict, description="further settings under TRL's names, e.g. {loss_type: apo_zero_unpaired}"
    )

    @model_validator(mode="after")
    def _of_the_method(self) -> TrainSettings:
        method = method_of(self.method)
        if self.batch_size < method.min_batch_size:
            raise ValueError(
                f"train.batch_size must be {method.min_batch_size} or more for {self.method}: its KL term pairs the "
                "rows of a micro-batch"
            )
        if self.beta is not None and method.beta is None:
            raise ValueError(f"train.beta: the loss of {self.method} has none; remove it")
        if self.method != "kto" and (self.desirable_weight or self.undesirable_weight):
            raise ValueError(
                f"train.desirable_weight and undesirable_weight are of kto; {self.method} has no such weights"
            )
        if self.quantization is not None and self.lora is None:
            raise ValueError("train.quantization needs train.lora: quantized weights cannot be trained")
        if self.beta is None:
            # Shown as the method's own and still not set: a copy for another method must not inherit it.
            self.__dict__["beta"] = method.beta
        return self


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run: its settings, its base model, its data and its folders.

    Paths are absolute, or URIs of any pyarrow filesystem: Ray Train's workers run in folders of their own.

    Attributes:
        settings: what to learn and how. `use_gpu` null means CPUs, weights null mean 1; its `model` is not read.
        model: base model, a local folder or a hub name; the adapter's config keeps it as given.
        revision: hub commit, branch or tag.
        chat_template_args: variables that the chat template is rendered with, such as enable_thinking.
        train_files: path, URI or glob of Parquet files, read in the order of their names. Rows keep their order.
        val_files: the same for evaluation (after each epoch and at the end), or None.
        output_dir: `adapter/` and `merged/` (the whole trained model) are written here: on a disk that the workers
            and the caller share, or a URI. Loggers that write files get a folder of their name here.
        storage_path: where Ray Train keeps checkpoints: a path that all nodes share, or a URI.
        run_name: names the run below `storage_path`. A run of the same name is resumed, so it must contain a
            fingerprint of settings and data.
        max_length: tokens of prompt and completion together; longer rows are cut at the end.
        schedule_timeout_s: seconds to wait for resources that other work holds.
        card: facts for the model cards, for example the fingerprint of the dataset.
    """

    settings: TrainSettings
    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    train_files: str
    val_files: str | None = None
    output_dir: str
    storage_path: str
    run_name: str
    max_length: int = 1024
    schedule_timeout_s: float = 6 * 3600
    card: dict[str, str] = field(default_factory=dict)

    @property
    def micro_batch(self) -> int:
        """Rows that all workers take together in one forward pass."""
        return self.settings.batch_size * self.settings.num_workers

    @property
    def effective_batch(self) -> int:
        """Rows behind one optimiser step."""
        return self.micro_batch * self.settings.gradient_accumulation

    @property
    def packs(self) -> bool:
        """Whether TRL joins several rows into one sequence (SFT only)."""
        return bool(self.settings.trainer_args.get("packing"))

    @property
    def worker_resources(self) -> dict[str, float]:
        """Ray resources of one worker."""
        gpu = {"GPU": 1.0} if self.settings.use_gpu else {}
        return {"CPU": self.settings.cpus_per_worker, **gpu, **self.settings.resources}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as Ray Train passes it to the workers."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"settings": self.settings.model_dump()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainSpec:
        return cls(**{**values, "settings": TrainSettings.model_validate(values["settings"])})


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        steps: optimiser steps of the whole run, those before a resume included.
        epochs: passes over the data.
        train_loss: mean loss over the logged steps of the whole run (TRL's own forgets what was before a resume).
        adapter, merged: the two folders; no adapter after full fine-tuning.
        effective: settings as they were in force: LoRA dropout, bf16, world size, effective batch, ….
        data: the pre-flight check's counts of rows, as plain data.
        resumed_from: step of the checkpoint that the last attempt started from, None for a fresh start.
        max_logit_diff: largest |Δ logit| between base + adapter and the merged model, before the cast to `dtype`;
            None after full fine-tuning, which merges nothing.
        metrics: the `train_metrics` table.
        seconds: wall clock of `fit`, worker start and merge included; `train_seconds` is the training loop alone,
            in the last attempt.
    """

    steps: int
    epochs: float
    train_loss: float
    adapter: str | None
    merged: str
    effective: dict[str, Any]
    data: dict[str, Any]
    resumed_from: int | None
    max_logit_diff: float | None
    metrics: pa.Table
    seconds: float
    train_seconds: float
