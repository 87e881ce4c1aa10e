"""The training methods as a table, and the check of `trainer_args` against TRL's own settings.

To add a method, add a row to `METHODS`, or register a `Method` in a file of your own. TRL is imported only when a
config or trainer class is needed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from ray_pipeline.extensions import ExtensionError, find, register

#: The kinds of training rows: single responses, pairs, and responses with a label.
DataKind = Literal["sft", "dpo", "kto"]
ColumnKind = Literal["messages", "bool", "weight"]
Task = Literal["CAUSAL_LM", "SEQ_CLS"]


class TrainingInputError(ValueError):
    """Invalid settings, data or cluster for a training run; the message names the key and the fix."""


#: Kind of data -> the columns that a trainer reads; it reads no others.
COLUMNS: dict[DataKind, Mapping[str, ColumnKind]] = {
    "sft": {"prompt": "messages", "completion": "messages"},
    "dpo": {"prompt": "messages", "chosen": "messages", "rejected": "messages"},
    "kto": {"prompt": "messages", "completion": "messages", "label": "bool"},
}


#: Column with the weight of a row in the loss, 0 or more.
WEIGHT = "weight"


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        module: TRL module with the two classes.
        config: name of the config class; `trainer` is that of the trainer class.
        data: the kind of rows that it trains on.
        objective: the loss of one batch as TRL computes it, and how it differs from the paper.
        beta: the published β; None: the loss has none.
        fields: fields of `TrainSettings` that the config has under the same name, beside those shared by all methods.
        settings: TRL settings that turn the two classes into this method; `trainer_args` can override them.
        min_batch_size: the smallest `batch_size` that the loss is defined for.
        adds_ends: the trainer adds the tokenizer's BOS and EOS around a chat if the template leaves them out.
        refuses: TRL setting → why it would break this method.
        weighted: it reads the weight of each row, too.
        below: TRL setting → the number that it must be below, being 0 or more.
        task: PEFT's name of the kind of model: one that writes (a policy), or one that scores a chat (a reward model).
    """

    module: str
    config: str
    trainer: str
    data: DataKind
    objective: str
    beta: float | None = None
    fields: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    min_batch_size: int = 1
    adds_ends: bool = False
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    weighted: bool = False
    below: Mapping[str, float] = dataclasses.field(default_factory=dict)
    task: Task = "CAUSAL_LM"

    @property
    def trains_policy(self) -> bool:
        return self.task == "CAUSAL_LM"

    @property
    def columns(self) -> Mapping[str, ColumnKind]:
        return COLUMNS[self.data] if not self.weighted else {**COLUMNS[self.data], WEIGHT: "weight"}

    def config_class(self) -> Any:
        return getattr(self._module(), self.config)

    def trainer_class(self) -> Any:
        return getattr(self._module(), self.trainer)

    def _module(self) -> Any:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # two of the modules warn that they may change
        return importlib.import_module(self.module)


#: Reads rows in the order of the files, as every method of `METHODS` does.
FILE_ORDER = {"train_sampling_strategy": "sequential"}

# Rows are stored interleaved by label and shuffled by seed, and all methods read them in that order: KTO must (its KL
# pairs are made per fixed batch), and with the others the rows of a step can be looked up in the files.
METHODS: dict[str, Method] = {
    "sft": Method(
        "trl", "SFTConfig", "SFTTrainer",
        data="sft",
        objective=(
            "−log π(y|x) per token: the mean over all completion tokens of an optimiser step (so that a long answer "
            "counts more than a short one); prompts are context only."
        ),
        settings={**FILE_ORDER, "completion_only_loss": True},
    ),
    "dpo": Method(  # Rafailov et al. 2023, arXiv:2305.18290
        "trl", "DPOConfig", "DPOTrainer",
        data="dpo",
        objective="−log σ(β·(r_w − r_l)), r = log π(y|x) − log π_ref(y|x) (eq. 7), the mean over pairs.",
        beta=0.1,
        fields=("disable_dropout",),
        settings=FILE_ORDER,
    ),
    "kto": Method(  # Ethayarajh et al. 2024, arXiv:2402.01306
        "trl", "KTOConfig", "KTOTrainer",
        data="kto",
        objective=(
            "λ_D·(1 − σ(β·(r − z0))) for desirable and λ_U·(1 − σ(β·(z0 − r))) for undesirable rows (eq. 7–8), "
            "r = log π(y|x) − log π_ref(y|x); z0 ≥ 0 is the mean r of each prompt with the completion of the row "
            "before it in the micro-batch."
        ),
        beta=0.1,
        fields=("disable_dropout", "desirable_weight", "undesirable_weight"),
        settings=FILE_ORDER,
        min_batch_size=2,
        refuses={
            "train_sampling_strategy": "KTO's KL pairs are made per batch in file order; the rows are shuffled already",
            "dataset_num_proc": "TRL would split the dataset before it makes KTO's KL pairs, which breaks them",
        },
    ),
    "orpo": Method(  # Hong et al. 2024, arXiv:2403.07691
        "trl.experimental.orpo", "ORPOConfig", "ORPOTrainer",
        data="dpo",
        objective=(
            "NLL(chosen) − β·log σ(log odds(y_w|x) − log odds(y_l|x)), odds = p/(1 − p), log p = the mean log π per "
            "token of the answer (eq. 6–7, where β is λ). TRL's NLL differs from the paper's: it is taken over the "
            "prompt as well as the chosen answer, and over all tokens of the micro-batch together."
        ),
        beta=0.1,
        fields=("disable_dropout",),
        settings={**FILE_ORDER, "remove_unused_columns": False},
        adds_ends=True,
    ),
    "simpo": Method(  # Meng et al. 2024, arXiv:2405.14734
        "trl.experimental.cpo", "CPOConfig", "CPOTrainer",
        data="dpo",
        objective=(
            "−log σ(β·(p_w − p_l) − γ), p = the mean log π per token of the answer (eq. 6), the mean over pairs; "
            "γ is `simpo_gamma`."
        ),
        beta=2.0,
        fields=("disable_dropout",),
        # β and γ of the paper's section 4: 2.0 to 2.5 and 0.5 to 1.5.
        settings={
            **FILE_ORDER, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "remove_unused_columns": False
        },
        adds_ends=True,
        refuses={"loss_type": "another loss would not be SimPO (for AlphaPO set trainer_args.alpha)"},
    ),
    "reward": Method(  # Ouyang et al. 2022, arXiv:2203.02155
        "trl", "RewardConfig", "RewardTrainer",
        data="dpo",
        objective=(
            "−log σ(r(x, y_w) − r(x, y_l)) (eq. 1), r = the one output of a new head at the last token of the chat; "
            "the mean over pairs."
        ),
        fields=("disable_dropout",),
        settings=FILE_ORDER,
        task="SEQ_CLS",
    ),
}  # fmt: skip

_SMOOTHED = {"loss_type": ["robust"], "label_smoothing": 0.1}
_NO_OTHER_LOSS = {"loss_type": "another loss would be another method"}

#: Methods for labels of which some are wrong. `baselines.methods` has those of `METHODS` by default.
NOISE_AWARE: dict[str, Method] = {
    "cdpo": dataclasses.replace(  # Mitchell 2023, ericmitchell.ai/cdpo.pdf
        METHODS["dpo"], module="ray_pipeline.training.noise_aware", trainer="ConservativeDPOTrainer",
        objective=(
            "−(1 − ε)·log σ(β·δ) − ε·log σ(−β·δ), δ = r_w − r_l, r = log π(y|x) − log π_ref(y|x), the mean over "
            "pairs; ε is `label_smoothing`, the share of pairs that are taken to be the wrong way round."
        ),
        settings={**FILE_ORDER, **_SMOOTHED}, refuses=_NO_OTHER_LOSS, below={"label_smoothing": 0.5},
    ),
    "rdpo": dataclasses.replace(  # Chowdhury et al. 2024, arXiv:2403.00409
        METHODS["dpo"],
        objective=(
            "(−(1 − ε)·log σ(β·δ) + ε·log σ(−β·δ)) / (1 − 2ε), δ = r_w − r_l, r = log π(y|x) − log π_ref(y|x), "
            "the mean over pairs: unbiased if a share ε of them, `label_smoothing`, is the wrong way round at random."
        ),
        settings={**FILE_ORDER, **_SMOOTHED}, refuses=_NO_OTHER_LOSS, below={"label_smoothing": 0.5},
    ),
    "dpo_weighted": dataclasses.replace(
        METHODS["dpo"], module="ray_pipeline.training.noise_aware", trainer="WeightedDPOTrainer",
        objective="DPO's loss of each pair times the weight of the row, the sum over pairs divided by their number.",
        settings={**FILE_ORDER, "use_weighting": True}, weighted=True,
        refuses={"use_weighting": "its weights are those of the rows"},
    ),
    "kto_weighted": dataclasses.replace(
        METHODS["kto"], module="ray_pipeline.training.noise_aware", trainer="WeightedKTOTrainer",
        objective="KTO's loss of each row times the weight of the row, the sum over rows divided by their number.",
        weighted=True,
    ),
}  # fmt: skip
for _name, _method in {**METHODS, **NOISE_AWARE}.items():
    register("method", _name)(_method)


def method_of(reference: str) -> Method:
    """The method with a name, or the one that a file registers.

    Raises:
        ExtensionError, a ValueError: there is none.
    """
    method = find("method", reference).value
    if not isinstance(method, Method):
        raise ExtensionError(f"method {reference!r} is a {type(method).__name__}; register a Method")
    return method


def model_class(task: Task) -> Any:
    """The class of transformers that loads the model of a task."""
    import transformers

    return transformers.AutoModelForCausalLM if task == "CAUSAL_LM" else transformers.AutoModelForSequenceClassification


def model_args(task: Task) -> dict[str, Any]:
    """Further arguments of its configuration."""
    return {} if task == "CAUSAL_LM" else {"num_labels": 1}


def method_label(reference: str) -> str:
    """The name under which a method is registered, for folders and pages."""
    return find("method", reference).name


def _known(reference: str) -> str:
    method_of(reference)
    return reference


#: A reference to a method, checked.
MethodName = Annotated[str, AfterValidator(_known)]

#: TRL's name of a setting -> the field of `TrainSettings` or `TrainSpec` with its value.
OWNED: dict[str, str] = {
    "output_dir": "output_dir",
    "run_name": "run_name",
    "resume_from_checkpoint": "run_name",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "gradient_accumulation_steps": "global_batch",
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
    "fsdp": "shard",
}
#: Place of a setting in a run's configuration, if not in the `train` block.
_ELSEWHERE = {
    "max_length": " (datasets.max_length)",
    "trust_remote_code": " (of the model)",
    "output_dir": " (the run folder)",
    "run_name": " (the run folder)",
    "resume_from_checkpoint": " (rerun the same command to resume)",
    "max_steps": " (a fraction of an epoch is allowed)",
}
#: Names that transformers has dropped but that are still in use.
_RENAMED = ("warmup_ratio",)

#: Settings that a resumable run must not change -> the reason.
FIXED: dict[str, str] = {
    "save_strategy": "checkpoints go to Ray Train every save_steps steps",
    "save_only_model": "a checkpoint without optimiser and random states cannot be resumed exactly",
    "save_total_limit": "Ray Train keeps the newest two checkpoints",
    "logging_strategy": "the metrics table has one row every logging_steps steps",
    "eval_strategy": "val_files are evaluated after each epoch and at the end",
    "eval_steps": "val_files are evaluated after each epoch and at the end",
    "logging_nan_inf_filter": "a training stops at a loss of NaN or infinity",
    "load_best_model_at_end": "the policy is the one after the last step",
    "ignore_data_skip": "a resumed run must not see rows twice",
    "dataloader_drop_last": "only whole batches are trained on: KTO's KL pairs need them",
    "sync_ref_model": "the reference is always the base",
    "truncation_mode": "prompts are kept whole and responses truncated at the end, as the pre-flight check counts them",
}

#: Key of `model_init_kwargs` -> the field of `TrainSettings` or `TrainSpec` with its value.
OWNED_MODEL_ARGS: dict[str, str] = {
    "dtype": "dtype", "torch_dtype": "dtype", "revision": "revision", "trust_remote_code": "trust_remote_code",
    "device_map": "use_gpu", "quantization_config": "quantization",
}  # fmt: skip


def validate_trainer_args(method: str, trainer_args: Mapping[str, Any]) -> None:
    """Check `trainer_args` against TRL's config class of the method. Loads no model.

    Raises:
        TrainingInputError: a name is unknown (the message suggests the nearest one), belongs to a field of
            `TrainSettings` (the message names it) or must not be changed; or a value is not one of the choices.
    """
    spec = method_of(method)
    if not trainer_args:
        return  # importing TRL takes seconds, and every command reads a config
    known = {f.name: f for f in dataclasses.fields(spec.config_class()) if f.init}
    owned = {name: field for name, field in OWNED.items() if name in known or name in _RENAMED}
    for name, value in trainer_args.items():
        key = f"trainer_args.{name}"
        if name in owned:
            raise TrainingInputError(
                f"{key} would override {OWNED[name]!r}; set that one instead{_ELSEWHERE.get(name, '')}"
            )
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *owned], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TrainingInputError(f"{key}: TRL's {spec.config} has no such setting{hint}")
        reason = FIXED.get(name) or spec.refuses.get(name)
        if reason:
            raise TrainingInputError(f"{key} cannot be set: {reason}")
        if name in spec.below and not (isinstance(value, (int, float)) and 0 <= value < spec.below[name]):
            raise TrainingInputError(f"{key} must be 0 or more and below {spec.below[name]:g}, not {value!r}")
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
                f"trainer_args.model_init_kwargs.{name} would override {OWNED_MODEL_ARGS[name]!r}; set that one instead"
            )
