"""A TRL trainer for a `TrainSpec`, from model, data and settings. Independent of Ray."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from pyarrow.dataset import ParquetFragmentScanOptions
from transformers import BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl.trainer.utils import disable_dropout_in_model

from ray_pipeline.engines.chat_template import end_token, folding
from ray_pipeline.store.local import local_copy
from ray_pipeline.training.data_check import parquet_files
from ray_pipeline.training.methods import TrainingInputError, method_of
from ray_pipeline.training.sharding import fsdp_on_cpus, sharding_settings
from ray_pipeline.training.spec import Reference, TrainSpec
from ray_pipeline.training.tokenizer import complete_generation_config, load_tokenizer

#: PEFT's name of the adapter that is trained, and TRL's of a frozen one whose log-probabilities are the reference.
_TRAINED, _REFERENCE = "default", "ref"


def build_trainer(spec: TrainSpec, output_dir: str, callbacks: Sequence[TrainerCallback] = ()) -> Any:
    """The trainer of one rank.

    The reference model of a method, if any, is the base with the adapter switched off, the policy that training starts
    from (`spec.reference`) or, in full fine-tuning, a frozen copy of the base that TRL makes.

    Every rank loads all rows and Accelerate distributes them: rows already distributed by Ray Data would be
    distributed twice, and half of them never used.
    """
    settings, method = spec.settings, method_of(spec.settings.method)
    tokenizer = load_tokenizer(spec)
    with fsdp_on_cpus(spec):
        trainer = method.trainer_class()(
            model=spec.model,
            args=trainer_config(spec, output_dir),
            train_dataset=_rows(spec, tokenizer, spec.train_files, "train_files"),
            eval_dataset=_rows(spec, tokenizer, spec.val_files, "val_files") if spec.val_files else None,
            processing_class=tokenizer,
            peft_config=lora_config(spec),
            callbacks=list(callbacks),
        )
    if spec.adapter is not None:
        _start_from(local_copy(spec.adapter), trainer, spec.reference)
    if settings.disable_dropout and "disable_dropout" not in method.fields:  # SFT's config has no such setting
        disable_dropout_in_model(trainer.model)
    if method.trains_policy:  # checkpoints of full fine-tuning contain it
        end = end_token(tokenizer, spec.chat_template_args)
        complete_generation_config(trainer.model.generation_config, tokenizer, end)
    trainer.remove_callback(PrinterCallback)  # prints every log as a dict; `callbacks.LogProgress` replaces it
    trainer.train_dataset = trainer.train_dataset.select(range(spec.rows_per_epoch(len(trainer.train_dataset))))
    if trainer.eval_dataset is not None:
        # An incomplete last batch would be padded with used rows, and a row in a batch of one is its own KL pair.
        whole = len(trainer.eval_dataset) - len(trainer.eval_dataset) % settings.micro_batch
        trainer.eval_dataset = trainer.eval_dataset.select(range(whole)) if whole else None
    return trainer


def _start_from(adapter: str, trainer: Any, reference: Reference) -> None:
    """Give the new adapter the weights of a trained one, and with `previous` the model a frozen copy of that as TRL's
    reference. (TRL makes such a copy of any adapted model that it is handed, and so would leave the base no reference.)
    """
    model, weights = trainer.model, load_peft_weights(adapter, device="cpu")
    _load(model, weights, _TRAINED)
    if reference == "previous" and hasattr(trainer, "ref_model"):
        still = copy.copy(model.peft_config[_TRAINED])
        still.lora_dropout = 0.0  # the model is in training mode when the reference is computed
        model.add_adapter(_REFERENCE, still)
        _load(model, weights, _REFERENCE)
        model.set_adapter(_TRAINED)
        # Neither in the policy nor in checkpoints: a trainer that resumes would load the copy alone.
        model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=[_TRAINED])


def _load(model: Any, weights: dict[str, Any], name: str) -> None:
    found: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    if found.unexpected_keys:
        raise TrainingInputError(
            f"the adapter that training starts from has weights that train.lora does not: {found.unexpected_keys[0]}"
        )


def trainer_config(spec: TrainSpec, output_dir: str) -> Any:
    """TRL's config for a spec.

    Args:
        output_dir: scratch folder of this worker for Hugging Face checkpoints, before they go to Ray Train.
    """
    settings = spec.settings
    method = method_of(settings.method)
    user = dict(settings.trainer_args)
    own = {name: getattr(settings, name) for name in ("beta", *method.fields)}
    defaults = {
        "ddp_find_unused_parameters": False,  # every trained weight is used in each forward pass
        "disable_tqdm": True,  # progress goes through `logging`
        **method.settings,
        **sharding_settings(spec),
    }
    if spec.packs:
        defaults["train_sampling_strategy"] = "random"  # by seed: packing sorts the rows by length
    return method.config_class()(
        output_dir=output_dir,
        run_name=spec.run_name,
        model_init_kwargs=_model_args(spec, user.pop("model_init_kwargs", {})),
        trust_remote_code=spec.trust_remote_code,
        per_device_train_batch_size=settings.batch_size,
        # TRL makes KTO's KL pairs of the evaluation rows in batches of the training size.
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=-1 if spec.steps is None else spec.steps,
        max_length=spec.max_length,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,  # transformers 5 reads a number below 1 as a share
        seed=settings.seed,
        use_cpu=not settings.use_gpu,
        bf16=bool(settings.use_gpu) and settings.dtype == "bfloat16",  # TRL's default is True, also on CPUs
        fp16=False,
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_strategy="steps",
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # it would hide them from `callbacks.StopWhenDiverged`
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        eval_strategy="no",  # callbacks.EvaluateEachEpoch evaluates before the checkpoint of the same step
        dataloader_drop_last=True,
        report_to=list(settings.report_to) or "none",
        **{name: value for name, value in own.items() if value is not None},
        **{**defaults, **user},
    )


def _model_args(spec: TrainSpec, user: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for loading the base. Every worker has one device; "auto" would use all visible ones."""
    settings = spec.settings
    # DeepSpeed keeps float32 copies of the trained weights itself.
    in_float32 = settings.lora is None and settings.shard not in ("zero2", "zero3")
    args = {"dtype": "float32" if in_float32 else settings.dtype, "device_map": None, **user}
    if spec.revision is not None:
        args["revision"] = spec.revision
    if settings.quantization is not None:
        args["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=settings.quantization == "int8",
            load_in_4bit=settings.quantization == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        )
    return args


def effective_settings(spec: TrainSpec, trainer: Any) -> dict[str, Any]:
    """The settings in effect, read from the trainer rather than from the spec."""
    settings, args, model = spec.settings, trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    dropouts = [
        module.p
        for name, module in model.named_modules()
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
    ]
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    base = next((p for p in parameters if not p.requires_grad), parameters[0])
    effective = {
        "objective": method_of(settings.method).objective,
        "loss_type": getattr(args, "loss_type", None),
        "beta": getattr(args, "beta", None),
        "simpo_gamma": getattr(args, "simpo_gamma", None),
        "reference": _reference(spec, trainer),
        "trains": "every weight" if settings.lora is None else "a LoRA adapter",
        "lora_dropout": max(dropouts, default=0.0) if settings.lora is not None else None,
        "disable_dropout": settings.disable_dropout,
        "base_dtype": settings.quantization or str(base.dtype).removeprefix("torch."),
        "trained_dtype": str(trained[0].dtype).removeprefix("torch."),
        "bf16": args.bf16,
        "device": args.device.type,
        "world_size": args.world_size,
        "shard": settings.shard,
        "effective_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "sampling": str(args.train_sampling_strategy),
        "packing": getattr(args, "packing", None),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "trained_parameters": sum(map(_size, trained)),
        "parameters": sum(map(_size, parameters)),
        "train_rows": len(trainer.train_dataset),  # sequences, if rows are packed
        "eval_rows": len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0,
    }
    return {name: value for name, value in effective.items() if value is not None}


def _reference(spec: TrainSpec, trainer: Any) -> str | None:
    """Description of the reference model; None if the method has none."""
    if not hasattr(trainer, "ref_model"):
        return None
    if trainer.ref_model is None:
        of_start = _REFERENCE in getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
        return "a frozen copy of the policy it starts from" if of_start else "the base, adapter switched off"
    return "a frozen copy of the base"


def _size(parameter: torch.nn.Parameter) -> int:
    """Number of entries: DeepSpeed leaves empty shells of sharded parameters, bitsandbytes packs two into a byte."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


def lora_config(spec: TrainSpec) -> LoraConfig | None:
    """PEFT's config of the adapter; None if every weight is trained."""
    lora = spec.settings.lora
    if lora is None:
        return None
    modules = lora.target_modules
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type=method_of(spec.settings.method).task,  # with SEQ_CLS the new head is trained and kept, too
        revision=spec.revision,
    )


def _rows(spec: TrainSpec, tokenizer: Any, pattern: str, setting: str) -> Dataset:
    """The columns that the method needs and no others: TRL would interpret `images` or `tools`."""
    columns = list(method_of(spec.settings.method).columns)
    rows = load_dataset(
        "parquet",
        data_files=parquet_files(pattern, setting),
        columns=columns,
        fragment_scan_options=ParquetFragmentScanOptions(page_checksum_verification=True),
        split="train",
    )
    fold = folding(tokenizer, spec.chat_template_args)
    if fold is not None:
        rows = rows.map(lambda prompt: {"prompt": fold(prompt)}, input_columns="prompt")
    return with_template_args(spec, rows)


def with_template_args(spec: TrainSpec, rows: Dataset) -> Dataset:
    """The rows with the variables of the chat template, which TRL reads from a column of every row."""
    if spec.chat_template_args:
        rows = rows.add_column("chat_template_kwargs", [spec.chat_template_args] * len(rows))
    return rows
