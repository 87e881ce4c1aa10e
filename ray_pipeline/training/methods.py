"""The training methods as a table, and how a `TrainSpec` becomes a TRL config.

Adding a method is adding a row to `METHODS` (and its name to `TrainSpec.method`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Literal

from ray_pipeline.training.spec import TrainingInputError, TrainSpec

ColumnKind = Literal["messages", "bool"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        module: where TRL keeps the two classes.
        config: name of the config class; `trainer` is the trainer's.
        columns: what the data set must have. Only these columns are read.
        fields: fields of `TrainSpec` that the config takes under the same name.
        settings: settings that make the class pair this method. `trainer_args` may replace them.
        min_batch_size: the smallest `batch_size` that the loss is defined for.
        refuses: TRL settings that would break this method, and why.
    """

    module: str
    config: str
    trainer: str
    columns: Mapping[str, ColumnKind]
    fields: tuple[str, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    min_batch_size: int = 1
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def config_class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.config)

    def trainer_class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.trainer)


# Rows come interleaved by label and shuffled by seed. KTO has to read them in order (its KL pairs are made per fixed
# batch); the others do too, so that what a step saw can be looked up in the files.
METHODS: dict[str, Method] = {
    "kto": Method(  # Ethayarajh et al. 2024, arXiv:2402.01306
        "trl", "KTOConfig", "KTOTrainer",
        columns={"prompt": "messages", "completion": "messages", "label": "bool"},
        fields=("beta", "max_length", "disable_dropout", "desirable_weight", "undesirable_weight"),
        settings={"train_sampling_strategy": "sequential"},
        min_batch_size=2,
        refuses={
            "train_sampling_strategy": "KTO's KL pairs are made per batch of rows in file order; they are shuffled",
            "dataset_num_proc": "TRL cuts the data set before it makes KTO's KL pairs, which breaks them",
        },
    ),
    "dpo": Method(  # Rafailov et al. 2023, arXiv:2305.18290
        "trl", "DPOConfig", "DPOTrainer",
        columns={"prompt": "messages", "chosen": "messages", "rejected": "messages"},
        fields=("beta", "max_length", "disable_dropout"),
        settings={"train_sampling_strategy": "sequential"},
    ),
}  # fmt: skip

#: TRL's name of a setting -> the field of `TrainSpec` that has it.
OWNED: dict[str, str] = {
    "output_dir": "output_dir",
    "run_name": "run_name",
    "resume_from_checkpoint": "run_name",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "num_train_epochs": "epochs",
    "max_steps": "epochs",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_ratio",
    "beta": "beta",
    "max_length": "max_length",
    "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight",
    "disable_dropout": "disable_dropout",
    "seed": "seed",
    "save_steps": "save_steps",
    "logging_steps": "logging_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "report_to": "report_to",
    "trust_remote_code": "trust_remote_code",
    "bf16": "dtype",
    "fp16": "dtype",
    "use_cpu": "use_gpu",
}

#: Settings that a resumable run needs as they are, and why.
FIXED: dict[str, str] = {
    "save_strategy": "checkpoints go to Ray Train every save_steps steps",
    "save_only_model": "a checkpoint without optimiser and random states cannot be resumed exactly",
    "save_total_limit": "Ray Train keeps the newest two checkpoints",
    "logging_strategy": "the metrics table has a row every logging_steps steps",
    "eval_strategy": "val_files are evaluated after each epoch and at the end",
    "eval_steps": "val_files are evaluated after each epoch and at the end",
    "load_best_model_at_end": "the policy is the one after the last step",
    "ignore_data_skip": "a resumed run must not see rows twice",
    "dataloader_drop_last": "only whole batches train: KTO's KL pairs need them",
    "sync_ref_model": "the reference is the base with the adapter switched off",
}

#: Keys of `model_init_kwargs` -> the field of `TrainSpec` that has it.
OWNED_MODEL_ARGS: dict[str, str] = {
    "dtype": "dtype", "torch_dtype": "dtype", "revision": "revision", "trust_remote_code": "trust_remote_code",
    "device_map": "use_gpu",
}  # fmt: skip


def method_of(name: str) -> Method:
    """The row of a method.

    Raises:
        TrainingInputError: there is none of that name.
    """
    if name not in METHODS:
        raise TrainingInputError(f"method must be one of {', '.join(METHODS)}, not {name!r}")
    return METHODS[name]


def validate_trainer_args(method: str, trainer_args: Mapping[str, Any]) -> None:
    """Check `trainer_args` against TRL's config class of the method. Loads no model.

    Raises:
        TrainingInputError: a name is unknown (the message has the nearest right one), belongs to a field of
            `TrainSpec` (the message names it) or must not be changed; or a value is none of the choices.
    """
    known = {f.name: f for f in dataclasses.fields(method_of(method).config_class()) if f.init}
    for name, value in trainer_args.items():
        key = f"trainer_args.{name}"
        if name in OWNED:
            raise TrainingInputError(f"{key} would override the setting {OWNED[name]!r}: set that one")
        reason = FIXED.get(name) or method_of(method).refuses.get(name)
        if reason:
            raise TrainingInputError(f"{key} cannot be set: {reason}")
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *OWNED], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TrainingInputError(f"{key}: TRL's {method_of(method).config} has no such setting{hint}")
        choices = known[name].metadata.get("choices")
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if choices and item not in choices:
                raise TrainingInputError(f"{key} must be one of {', '.join(map(str, choices))}, not {item!r}")
        if name == "model_init_kwargs":
            _check_model_args(value)


def _check_model_args(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TrainingInputError(f"trainer_args.model_init_kwargs must be a mapping, not {value!r}")
    for name in value:
        if name in OWNED_MODEL_ARGS:
            raise TrainingInputError(
                f"trainer_args.model_init_kwargs.{name} would override the setting {OWNED_MODEL_ARGS[name]!r}: "
                "set that one"
            )


def trainer_config(spec: TrainSpec, output_dir: str) -> Any:
    """TRL's config for a spec.

    Args:
        output_dir: scratch folder of this worker for Hugging Face checkpoints, before Ray Train takes them.
    """
    method = method_of(spec.method)
    user = dict(spec.trainer_args)
    model_args = {"dtype": spec.dtype, **user.pop("model_init_kwargs", {})}
    if spec.revision is not None:
        model_args["revision"] = spec.revision
    defaults = {
        "ddp_find_unused_parameters": False,  # every adapter weight is used in each forward pass
        "disable_tqdm": True,  # progress goes through `logging`
        **method.settings,
    }
    return method.config_class()(
        output_dir=output_dir,
        run_name=spec.run_name,
        model_init_kwargs=model_args,
        trust_remote_code=spec.trust_remote_code,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,  # TRL makes KTO's KL pairs of the evaluation rows in train batches
        gradient_accumulation_steps=spec.gradient_accumulation,
        num_train_epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler,
        warmup_steps=spec.warmup_ratio,  # transformers 5 reads a number below 1 as a share
        seed=spec.seed,
        use_cpu=not spec.use_gpu,
        bf16=spec.use_gpu and spec.dtype == "bfloat16",  # TRL's default is True, also on CPUs
        fp16=False,
        gradient_checkpointing=spec.gradient_checkpointing,
        logging_strategy="steps",
        logging_steps=spec.logging_steps,
        save_strategy="steps",
        save_steps=spec.save_steps,
        save_total_limit=2,
        eval_strategy="no",  # callbacks.EvaluateEachEpoch does it, before the checkpoint of the same step
        dataloader_drop_last=True,
        report_to=list(spec.report_to) or "none",
        **{name: getattr(spec, name) for name in method.fields},
        **{**defaults, **user},
    )
