"""A TRL trainer for a `TrainSpec`: model, data and settings put together. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from ray_pipeline.training.methods import Method, method_of, trainer_config
from ray_pipeline.training.preflight import parquet_files
from ray_pipeline.training.spec import TrainSpec


def build_trainer(spec: TrainSpec, output_dir: str, callbacks: Sequence[TrainerCallback] = ()) -> Any:
    """The trainer of one rank. The reference model is the base with the adapter switched off.

    Every rank loads all rows and Accelerate deals them out: rows that Ray Data has dealt out already would be
    dealt out twice, and half of them never seen.
    """
    method = method_of(spec.method)
    tokenizer = AutoTokenizer.from_pretrained(
        spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
    )
    lora = LoraConfig(
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=spec.lora.target_modules
        if isinstance(spec.lora.target_modules, str)
        else list(spec.lora.target_modules),
        task_type="CAUSAL_LM",
        revision=spec.revision,
    )
    trainer = method.trainer_class()(
        model=spec.model,
        args=trainer_config(spec, output_dir),
        train_dataset=_rows(spec.train_files, "train_files", method),
        eval_dataset=_rows(spec.val_files, "val_files", method) if spec.val_files else None,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # prints every log as a dict; `callbacks.LogProgress` says it better
    if trainer.eval_dataset is not None:
        # A last batch that is not whole would be padded with rows seen already, and a batch of one is its own KL pair.
        whole = len(trainer.eval_dataset) - len(trainer.eval_dataset) % spec.micro_batch
        trainer.eval_dataset = trainer.eval_dataset.select(range(whole)) if whole else None
    return trainer


def effective_settings(spec: TrainSpec, trainer: Any) -> dict[str, Any]:
    """Settings as they are in force, read from the trainer rather than from the spec."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    dropouts = [
        module.p
        for name, module in model.named_modules()
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "lora_dropout": max(dropouts, default=0.0),
        "disable_dropout": args.disable_dropout,
        "base_dtype": str(next(p for p in model.parameters() if not p.requires_grad).dtype).removeprefix("torch."),
        "adapter_dtype": str(trained[0].dtype).removeprefix("torch."),
        "bf16": args.bf16,
        "device": args.device.type,
        "world_size": args.world_size,
        "effective_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "loss_type": args.loss_type,
        "sampling": str(args.train_sampling_strategy),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "trained_parameters": sum(p.numel() for p in trained),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_rows": len(trainer.train_dataset),
        "eval_rows": len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0,
        "rows_per_epoch": len(trainer.train_dataset) // spec.micro_batch * spec.micro_batch,
    }


def _rows(pattern: str, setting: str, method: Method) -> Dataset:
    """The columns that the method needs, and no others: `images` or `tools` would mean something to TRL."""
    return load_dataset(
        "parquet", data_files=parquet_files(pattern, setting), columns=list(method.columns), split="train"
    )
