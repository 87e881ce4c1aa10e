"""What to train (`TrainSettings`, `TrainSpec`) and the outcome (`TrainResult`). Imports neither Ray nor torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.training.methods import MethodName, method_of

if TYPE_CHECKING:
    import pyarrow as pa

Quantization = Literal["nf4", "int8"]
Shard = Literal["none", "fsdp", "zero2", "zero3"]
Save = Literal["adapter", "merged", "both"]
Reference = Literal["base", "previous"]

#: File in `TrainSpec.output_dir` with the progress of a running training: {"phase", "step", "steps", "note"}.
PROGRESS = "progress.json"
#: File there that ends a training at its next checkpoint, unless that is the last: {"reason"}.
STOP = "stop.json"
#: Roles of the stages that train; the page of a run is about its `policy`.
POLICIES = ("policy", "branch policy")


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
        "kto",
        description="sft, dpo, kto, orpo, simpo; for labels that are partly wrong cdpo, rdpo, dpo_weighted, "
        "kto_weighted; reward (a reward model; in `train` and `dmapo`); or a file that registers a method "
        "(my_method.py)",
    )
    model: str = Field("policy", description="a key of `models`: the base that is adapted")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="of the loaded base and the written model; on GPUs bfloat16 also turns on autocast. Full "
        "fine-tuning keeps its weights in float32, since bfloat16 rounds most updates away",
    )
    num_workers: int = Field(1, ge=1, description="data-parallel workers")
    use_gpu: bool | None = Field(None, description="one GPU per worker; default: where the cluster has GPUs")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of one worker, and its threads")
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
    global_batch: int = Field(
        16,
        ge=1,
        description="rows per optimiser step, of all workers together; a multiple of num_workers × batch_size, which "
        "only divide it into micro-batches",
    )
    batch_size: int = Field(2, ge=1, description="rows per worker and micro-batch; kto needs at least 2")
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
    save: Save = Field(
        "both",
        description="what is written of a LoRA policy. merged: the whole model, of the base's size; adapter: a few "
        "thousandths of that. With adapter, vLLM serves base and adapter, with the base's chat template and end "
        "tokens, and one engine serves all policies of a run",
    )
    logging_steps: int = Field(1, ge=1, description="optimiser steps between rows of the metrics table")
    desirable_weight: float | None = Field(
        None, gt=0, description="λ_D of the KTO paper; default: from the class balance"
    )
    undesirable_weight: float | None = Field(
        None, gt=0, description="λ_U of the KTO paper; default: from the class balance"
    )
    max_failures: int = Field(3, ge=0, description="restarts of a failed worker group, each from the newest checkpoint")
    report_to: tuple[str, ...] = Field(
        (),
        description="loggers: tensorboard, wandb, trackio, mlflow (extras of the same names), or others it supports",
    )
    trainer_args: dict[str, Any] = Field(
        default_factory=dict, description="further settings under TRL's names, e.g. {loss_type: apo_zero_unpaired}"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_accumulation(cls, block: Any) -> Any:
        if isinstance(block, Mapping) and "gradient_accumulation" in block:
            parts = [block.get(name, 1) for name in ("num_workers", "gradient_accumulation")]
            parts.append(block.get("batch_size", cls.model_fields["batch_size"].default))
            rows = f" = {math.prod(parts)}" if all(isinstance(part, int) for part in parts) else ""
            raise ValueError(
                "train.gradient_accumulation follows from train.global_batch, the rows per optimiser step; remove it "
                f"and set train.global_batch to num_workers × batch_size × gradient_accumulation{rows} for the same "
                "training"
            )
        return block

    @model_validator(mode="after")
    def _of_the_method(self) -> TrainSettings:
        method = method_of(self.method)
        if self.batch_size < method.min_batch_size:
            raise ValueError(
                f"train.batch_size must be {method.min_batch_size} or more for {self.method}: its KL term pairs the "
                "rows of a micro-batch"
            )
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch is {self.global_batch}, which is not a multiple of num_workers "
                f"({self.num_workers}) × batch_size ({self.batch_size}) = {self.micro_batch}; "
                f"set {self._divisions(method.min_batch_size)}"
            )
        if self.beta is not None and method.beta is None:
            raise ValueError(f"train.beta: the loss of {self.method} has none; remove it")
        if "desirable_weight" not in method.fields and (self.desirable_weight or self.undesirable_weight):
            raise ValueError(
                f"train.desirable_weight and undesirable_weight are of kto; {self.method} has no such weights"
            )
        if self.quantization is not None and self.lora is None:
            raise ValueError("train.quantization needs train.lora: quantized weights cannot be trained")
        if self.save == "adapter" and self.lora is None:
            raise ValueError("train.save is adapter, but without train.lora every weight is trained; set it to merged")
        if self.save == "adapter" and not method.trains_policy:
            raise ValueError(
                f"train.save is adapter, but a reward model of {self.method} is served as a whole; set it to merged or "
                "both"
            )
        if self.beta is None:
            # Shown as the method's own and still not set: a copy for another method must not inherit it.
            self.__dict__["beta"] = method.beta
        return self

    @property
    def micro_batch(self) -> int:
        """Rows that all workers take together in one forward pass."""
        return self.batch_size * self.num_workers

    @property
    def gradient_accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.global_batch // self.micro_batch

    def _divisions(self, least: int) -> str:
        """The nearest values of each key with which the workers' micro-batches divide the global batch."""
        rows, whole = self.micro_batch, self.global_batch
        fitting: dict[str, tuple[Sequence[int], int]] = {
            "global_batch": (range(rows, whole + rows + 1, rows), whole),
            "batch_size": (
                [b for b in range(least, whole + 1) if whole % (b * self.num_workers) == 0],
                self.batch_size,
            ),
            "num_workers": ([n for n in range(1, whole + 1) if whole % (n * self.batch_size) == 0], self.num_workers),
        }
        nearest = {
            key: [*[v for v in values if v < now][-1:], *[v for v in values if v > now][:1]]
            for key, (values, now) in fitting.items()
        }
        return ", or ".join(f"{key} to {' or '.join(map(str, values))}" for key, values in nearest.items() if values)


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
        steps: optimiser steps in all, whatever `settings.epochs` says; None: those of the epochs.
        schedule_timeout_s: seconds to wait for resources that other work holds.
        card: facts for the model cards, for example the fingerprint of the dataset.
        adapter: folder or URI of a LoRA adapter of the same shape whose weights training starts from; None: new ones.
        reference: of a method with a reference model: the base, or the policy that training starts from (`adapter`).
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
    steps: int | None = None
    schedule_timeout_s: float = 6 * 3600
    card: dict[str, str] = field(default_factory=dict)
    adapter: str | None = None
    reference: Reference = "base"

    def rows_per_epoch(self, rows: int) -> int:
        """How many of the rows (sequences, if they are packed) are trained on in one pass: those of whole steps.

        The rest would make a step of fewer rows, of a size that depends on the number of workers. Rows that do not fill
        one step make one of whole micro-batches.
        """
        whole = self.settings.global_batch if rows >= self.settings.global_batch else self.settings.micro_batch
        return rows - rows % whole

    def steps_for(self, rows: int) -> int:
        """Optimiser steps of `settings.epochs` passes over this number of rows."""
        return math.ceil(self.settings.epochs * max(self.rows_per_epoch(rows) // self.settings.global_batch, 1))

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
        adapter, merged: the two folders, as far as `save` says; no adapter after full fine-tuning.
        effective: settings as they were in force: LoRA dropout, bf16, world size, effective batch, ….
        data: the pre-flight check's counts of rows, as plain data.
        resumed_from: step of the checkpoint that the last attempt started from, None for a fresh start.
        max_logit_diff: largest |Δ logit| between base + adapter and the merged model, before the cast to `dtype`;
            None where nothing is merged.
        metrics: the `train_metrics` table.
        seconds: wall clock of `fit`, worker start and merge included; `train_seconds` is the training loop alone,
            in the last attempt.
    """

    steps: int
    epochs: float
    train_loss: float
    adapter: str | None
    merged: str | None
    effective: dict[str, Any]
    data: dict[str, Any]
    resumed_from: int | None
    max_logit_diff: float | None
    metrics: pa.Table
    seconds: float
    train_seconds: float
