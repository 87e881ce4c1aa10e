"""What to train (`TrainSpec`) and what came of it (`TrainResult`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

MethodName = Literal["sft", "dpo", "kto", "orpo", "simpo"]
#: The kinds of training rows: single answers, pairs, and answers with a label.
DataKind = Literal["sft", "dpo", "kto"]
Quantization = Literal["nf4", "int8"]
Shard = Literal["none", "fsdp", "zero2", "zero3"]

#: File in `TrainSpec.output_dir` that tells how far a running training is: {"step", "steps", "line"}.
PROGRESS = "progress.json"
#: File there that ends a training at its next checkpoint, unless that is the last: {"reason"}.
STOP = "stop.json"


class TrainingInputError(ValueError):
    """The settings, the data or the cluster cannot give a training run; the message names the key and the remedy."""


class TrainingStopped(RuntimeError):
    """A training ended at a checkpoint because it was asked to; the same call goes on from there."""


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) under PEFT's names.

    Attributes:
        r: rank.
        alpha: scaling; the update is `alpha / r · B·A`.
        dropout: probability on the adapter's input. Only in effect with `TrainSpec.disable_dropout=False`.
        target_modules: "all-linear" (every linear layer but the output head), or names of modules.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run. Paths are absolute, or URIs of any pyarrow filesystem: Ray Train's workers run in folders of
    their own.

    Attributes:
        method: a row of `methods.METHODS`.
        model: base model, a local folder or a hub name; the adapter's config keeps it as given.
        revision: hub commit, branch or tag.
        dtype: what the base is loaded with and the trained model is written in: "float32" or "bfloat16". On GPUs
            "bfloat16" also turns on autocast. Full fine-tuning keeps its weights in float32 all the same: bfloat16
            has 8 bits of precision and would round most updates of this size away.
        train_files: path, URI or glob of Parquet files, read in the order of their names. Rows keep their order.
        val_files: the same for evaluation (after each epoch and at the end), or None.
        output_dir: `adapter/` and `merged/` (the trained model as a whole) are made here: on a disk that the workers
            and the caller share, or a URI. Loggers that write files get a folder of their name here.
        storage_path: where Ray Train keeps checkpoints: a path that all nodes share, or a URI.
        run_name: names the run below `storage_path`. The same name goes on where that run stopped, so it must
            contain a fingerprint of settings and data.
        num_workers: data-parallel workers, each with `cpus_per_worker` CPUs and, with `use_gpu`, one GPU.
        label_selector: labels of the nodes that workers may run on; {}: any.
        resources: custom resources that each worker takes, beside CPUs and GPU.
        beta: the β of the method's paper (λ in ORPO's); None takes the one published with the method.
        epochs: passes over the data; a fraction is fine.
        batch_size: rows per worker and micro-batch; KTO needs at least 2 and estimates its KL term on each.
        gradient_accumulation: micro-batches per optimiser step.
        warmup_ratio: share of all steps, in [0, 1).
        lr_scheduler: a `transformers.SchedulerType` value.
        chat_template_args: variables that the chat template is rendered with, such as enable_thinking.
        max_length: tokens of prompt and completion together; what is longer is cut at the end.
        lora: None trains every weight; methods with a reference then hold a frozen copy of the base beside the policy.
        quantization: the frozen base in 4 bits ("nf4", QLoRA: Dettmers et al. 2023, arXiv:2305.14314) or 8 ("int8").
            The adapter is merged into the base at full precision. Needs LoRA, GPUs and the extra `qlora`.
        shard: for models that do not fit one GPU: "fsdp" deals out parameters, gradients and optimiser states
            (PyTorch FSDP2); "zero2" gradients and optimiser states, "zero3" parameters too (DeepSpeed, extra
            `deepspeed`). `trainer_args.fsdp_config` or `.deepspeed` replaces the preset.
        desirable_weight: λ_D of the KTO paper; `undesirable_weight` is its λ_U.
        disable_dropout: True zeroes every dropout, the adapter's too (TRL's silent default).
        save_steps: optimiser steps between checkpoints: what a failure can cost, and how late a stop can come.
        logging_steps: optimiser steps between rows of the metrics table.
        max_failures: how often a failed worker group is started again from the newest checkpoint.
        schedule_timeout_s: how long to wait for resources that other work holds.
        autoscaling: the cluster may grow, so that resources it does not have yet are worth waiting for.
        report_to: names of `transformers` integrations: "tensorboard", "wandb", "mlflow", …
        trainer_args: further settings under TRL's names, for example {"loss_type": "apo_zero_unpaired"}.
        card: facts for the model cards, for example the fingerprint of the data set.
    """

    method: MethodName
    model: str
    revision: str | None = None
    dtype: str = "float32"
    train_files: str
    val_files: str | None = None
    output_dir: str
    storage_path: str
    run_name: str
    num_workers: int = 1
    use_gpu: bool = False
    cpus_per_worker: float = 1
    label_selector: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    beta: float | None = None
    learning_rate: float = 5e-5
    epochs: float = 2.0
    batch_size: int = 2
    gradient_accumulation: int = 8
    warmup_ratio: float = 0.05
    lr_scheduler: str = "cosine"
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    max_length: int = 1024
    lora: LoraSpec | None = field(default_factory=LoraSpec)
    quantization: Quantization | None = None
    shard: Shard = "none"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    disable_dropout: bool = False
    save_steps: int = 50
    logging_steps: int = 1
    max_failures: int = 3
    schedule_timeout_s: float = 6 * 3600
    autoscaling: bool = False
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()
    trust_remote_code: bool = False
    trainer_args: dict[str, Any] = field(default_factory=dict)
    card: dict[str, str] = field(default_factory=dict)

    @property
    def micro_batch(self) -> int:
        """Rows that all workers take together in one forward pass."""
        return self.batch_size * self.num_workers

    @property
    def effective_batch(self) -> int:
        """Rows behind one optimiser step."""
        return self.micro_batch * self.gradient_accumulation

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as Ray Train records it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainSpec:
        lora = values["lora"]
        return cls(**{**values, "lora": None if lora is None else LoraSpec(**lora)})


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
