"""Train: a policy from the training rows, by TRL inside Ray Train."""

from __future__ import annotations

import contextlib
import threading
from typing import Annotated, Any, Literal

import ray
from pydantic import Field, model_validator

from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.stage import BadInput, Stage, StageStop, WholeInput, WholeWork
from ray_pipeline.store.files import NotWritten, StoreError, join
from ray_pipeline.store.schemas import TRAIN_METRICS
from ray_pipeline.store.settings import Settings
from ray_pipeline.training.fit import fit
from ray_pipeline.training.methods import METHODS
from ray_pipeline.training.spec import (
    PROGRESS,
    STOP,
    LoraSpec,
    MethodName,
    Quantization,
    Shard,
    TrainingInputError,
    TrainingStopped,
    TrainSpec,
)

METRICS = "train_metrics.parquet"


class LoraSettings(Settings):
    """Low-rank adapters under PEFT's names; defaults as published."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"


class TrainSettings(Settings):
    """The `train` block; the defaults are the published hyper-parameters."""

    method: MethodName = "kto"
    model: str = Field("policy", description="a key of `models`: the base that is adapted")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    num_workers: int = Field(1, ge=1)
    use_gpu: bool | None = Field(None, description="default: where the cluster has GPUs")
    cpus_per_worker: float = Field(1, gt=0)
    label_selector: dict[str, str] = Field(default_factory=dict, description="labels of the nodes that may be used")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="custom resources that a worker takes"
    )
    autoscaling: bool = Field(
        False, description="wait for nodes that come on demand, and do not refuse for lack of them"
    )
    seed: int = 0
    beta: float | None = Field(
        None, gt=0, description="β of the method's paper (λ in ORPO's); default: the one published with it"
    )
    learning_rate: float = Field(5e-5, gt=0)
    epochs: float = Field(2, gt=0)
    batch_size: int = Field(2, ge=1)
    gradient_accumulation: int = Field(8, ge=1)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    lr_scheduler: str = "cosine"
    lora: LoraSettings | None = Field(LoraSettings(), description="null trains every weight")
    quantization: Quantization | None = Field(None, description="the frozen base in 4 or 8 bits; GPUs, extra qlora")
    shard: Shard = Field("none", description="deal a model that does not fit one worker out to all of them")
    disable_dropout: bool = Field(False, description="TRL's own default, true, would zero the LoRA dropout as well")
    gradient_checkpointing: bool = True
    save_steps: int = Field(50, ge=1)
    logging_steps: int = Field(1, ge=1, description="steps between rows of the metrics")
    desirable_weight: float | None = Field(None, gt=0, description="kto; default: from the class balance")
    undesirable_weight: float | None = Field(None, gt=0, description="kto; default: from the class balance")
    max_failures: int = Field(3, ge=0)
    report_to: tuple[str, ...] = ()
    trainer_args: dict[str, Any] = Field(default_factory=dict, description="further settings by TRL's own names")

    @model_validator(mode="after")
    def _of_the_method(self) -> TrainSettings:
        method = METHODS[self.method]
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


class _Given(Settings):
    train: TrainSettings
    model: ModelSettings
    max_length: int


#: Settings that say how to run and not what to learn.
_NOT_LEARNT = {
    "use_gpu",
    "cpus_per_worker",
    "label_selector",
    "resources",
    "autoscaling",
    "max_failures",
    "report_to",
    "save_steps",
}


def train(
    settings: TrainSettings,
    model: ModelSettings,
    max_length: int,
    datasets: Stage,
    *,
    name: str = "train",
    view: str = "policy",
) -> Stage:
    """One policy: `merged/`, `adapter/` unless every weight was trained, and the metrics of every step.

    Args:
        datasets: the stage with `<kind>/train/*.parquet` in its folder, for the kind that the method learns from.
        name: of the stage, where a workflow trains several policies; all are in the group `train`.
        view: link in the run's folder that shows the newest of them; "" makes none.
    """
    return Stage(
        name=name,
        group="train",
        view=view,
        repeatable=False,
        work=WholeWork(function=train_policy, settings=_Given(train=settings, model=model, max_length=max_length)),
        config={
            **settings.decisive(exclude=_NOT_LEARNT),
            "max_length": max_length,
            "chat_template_args": model.chat_template_args,
        },
        inputs={"datasets": datasets},
        external=model.weights(),
    )


def train_policy(given: WholeInput) -> dict[str, Any]:
    """Train on the data set files of the `datasets` stage.

    Raises:
        BadInput: the data, the settings or the cluster cannot give a training run.
        StageStop: the run was to end (`--max-cost`), and the training ended at a checkpoint.
    """
    settings: _Given = given.settings
    train, model = settings.train, settings.model
    data = given.inputs["datasets"]
    kind = METHODS[train.method].data
    weights = (data.facts.get("kto_weights") or {}) if kind == "kto" else {}
    validation = data.facts.get("rows", {}).get(kind, {}).get("val", 0)
    use_gpu = train.use_gpu if train.use_gpu is not None else bool(ray.cluster_resources().get("GPU"))
    spec = TrainSpec(
        method=train.method,
        model=model.model,
        revision=model.revision,
        dtype=train.dtype,
        train_files=join(data.folder, f"{kind}/train/*.parquet"),
        val_files=join(data.folder, f"{kind}/val/*.parquet") if validation else None,
        output_dir=given.folder.location,
        storage_path=given.folder.uri("ray_train"),
        run_name=f"{train.method}-{given.fingerprint}",
        num_workers=train.num_workers,
        use_gpu=use_gpu,
        cpus_per_worker=train.cpus_per_worker,
        label_selector=train.label_selector,
        resources=train.resources,
        autoscaling=train.autoscaling,
        seed=train.seed,
        beta=train.beta,
        learning_rate=train.learning_rate,
        epochs=train.epochs,
        batch_size=train.batch_size,
        gradient_accumulation=train.gradient_accumulation,
        warmup_ratio=train.warmup_ratio,
        lr_scheduler=train.lr_scheduler,
        chat_template_args=model.chat_template_args,
        max_length=settings.max_length,
        lora=None if train.lora is None else LoraSpec(**train.lora.model_dump()),
        quantization=train.quantization,
        shard=train.shard,
        desirable_weight=train.desirable_weight or weights.get("desirable_weight", 1.0),
        undesirable_weight=train.undesirable_weight or weights.get("undesirable_weight", 1.0),
        disable_dropout=train.disable_dropout,
        save_steps=train.save_steps,
        logging_steps=train.logging_steps,
        max_failures=train.max_failures,
        gradient_checkpointing=train.gradient_checkpointing,
        report_to=train.report_to,
        trust_remote_code=model.trust_remote_code,
        trainer_args=train.trainer_args,
        card={"data set": data.fingerprint, "kind of rows": kind, "training": given.fingerprint},
    )
    given.folder.delete(STOP)  # of an earlier attempt
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(given, ended), daemon=True)
    teller.start()
    try:
        result = fit(spec, lambda warning: given.log(f"warning: {warning}"))
    except TrainingInputError as error:
        raise BadInput(str(error)) from error
    except TrainingStopped as error:
        raise StageStop(str(error)) from error
    finally:
        ended.set()
        teller.join()
    metrics = result.metrics.select(TRAIN_METRICS.names).cast(TRAIN_METRICS)
    given.folder.write_table(METRICS, metrics, fingerprint=given.fingerprint, kind="train_metrics")
    return {
        "method": train.method,
        "steps": result.steps,
        "epochs": result.epochs,
        "train_loss": result.train_loss,
        "effective": result.effective,
        "data": result.data,
        "resumed_from": result.resumed_from,
        "max_logit_diff": result.max_logit_diff,
        "train_seconds": result.train_seconds,
    }


def _tell(given: WholeInput, ended: threading.Event) -> None:
    """Pass on what the workers write about their progress, and to them that the run is to end."""
    told = asked = None
    while not ended.wait(1.0):
        if asked is None and (reason := given.stopping()):
            with contextlib.suppress(NotWritten):  # then in a second
                given.folder.write_json(STOP, {"reason": reason})
                given.log(f"ends at its next checkpoint, unless that is the last: {reason}")
                asked = reason
        try:
            now = given.folder.read_json(PROGRESS)
        except (OSError, StoreError):
            continue
        if now != told:
            told = now
            given.tick(now["step"], now["steps"])
            given.log(now["line"])
