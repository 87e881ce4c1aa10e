"""Building the trainer once, without weights: what a worker would refuse is refused before anything is paid."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import tempfile
from collections.abc import Iterator
from logging import getLogger
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from ray_pipeline.training.methods import TrainingInputError, method_of
from ray_pipeline.training.spec import TrainSpec
from ray_pipeline.training.tokenizer import complete_generation_config, end_token, load_tokenizer
from ray_pipeline.training.trainer import lora_config, trainer_config, with_template_args

#: TRL settings that depend on the worker's device, or that read weights.
_ON_WORKERS = ("tf32", "torch_compile", "fsdp_config", "deepspeed", "precompute_ref_log_probs", "model_init_kwargs")


def check_build(spec: TrainSpec) -> None:
    """Build config, model, adapter, trainer and optimiser as a worker does, on PyTorch's device without memory and with
    made-up rows. Reads the base's configuration and tokenizer, but no weights.

    Not checked, since it depends on the workers' devices: quantization, sharding, and `model_init_kwargs`.

    Raises:
        TrainingInputError: what a worker would raise; the message names the key and the remedy.
    """
    settings = spec.settings
    args = {name: value for name, value in settings.trainer_args.items() if name not in _ON_WORKERS}
    here = settings.model_copy(update={"use_gpu": False, "shard": "none", "quantization": None, "trainer_args": args})
    spec = dataclasses.replace(spec, settings=here, val_files=None, max_length=max(spec.max_length, 1024))
    with _quietly(), tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(spec)
        config = _model_config(spec)
        if getattr(config, "quantization_config", None) is not None:
            return  # can be loaded with its kernels only
        _check_saving(spec, _model(spec, config), tokenizer, scratch)
        _check_adapter(spec, config)
        _check_trainer(spec, config, tokenizer, scratch)


def _model_config(spec: TrainSpec) -> Any:
    try:
        return AutoConfig.from_pretrained(spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise TrainingInputError(f"model: cannot read config.json of {spec.model}: {_words(error)}") from error


def _model(spec: TrainSpec, config: Any) -> Any:
    """The base without weights."""
    named = ", ".join(config.architectures or []) or "no architecture"
    remedy = "choose a causal language model (…ForCausalLM)"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, spec.settings.dtype), trust_remote_code=spec.trust_remote_code
            )
    except (ValueError, KeyError, AttributeError) as error:
        raise TrainingInputError(
            f"model: {spec.model} ({named} in its config.json) is no causal language model: {_words(error)}; {remedy}"
        ) from error
    if type(model).__name__ not in (config.architectures or []):
        raise TrainingInputError(
            f"model: the config.json of {spec.model} names {named}, but training and merging would load it as "
            f"{type(model).__name__}, whose weights it does not have; {remedy}"
        )
    with contextlib.suppress(OSError):  # without the file, it is made from config.json
        model.generation_config = GenerationConfig.from_pretrained(
            spec.model, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    return model


def _check_saving(spec: TrainSpec, model: Any, tokenizer: Any, scratch: str) -> None:
    complete_generation_config(model.generation_config, tokenizer, end_token(tokenizer, spec.chat_template_args))
    for name, part in {"config.json": model.config, "generation_config.json": model.generation_config}.items():
        try:
            part.save_pretrained(scratch)
        except ValueError as error:
            raise TrainingInputError(
                f"model: transformers cannot write the {name} of {spec.model} with the policy: "
                f"{_words(error)}; correct that file"
            ) from error


def _check_adapter(spec: TrainSpec, config: Any) -> None:
    adapter = lora_config(spec)
    if adapter is None or spec.settings.lora is None:
        return
    model = _model(spec, config)
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = spec.settings.lora.target_modules
    key = f"lora.target_modules: {names if isinstance(names, str) else list(names)!r}"
    layers = f"the linear layers of {spec.model} are {', '.join(sorted(linear))}"
    try:
        adapted: Any = get_peft_model(model, adapter)
    except ValueError as error:
        hint = "; a single text is a regular expression: write names as a list" if isinstance(names, str) else ""
        raise TrainingInputError(f"{key} cannot be adapted: {_words(error)}{hint}; {layers}") from error
    base = adapted.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if config.get_text_config().tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise TrainingInputError(
            f"{key} includes the embeddings, which {spec.model} shares with its output head: merging would change "
            f"both; leave them out; {layers}"
        )


def _check_trainer(spec: TrainSpec, config: Any, tokenizer: Any, scratch: str) -> None:
    error = _refusal(spec, config, tokenizer, scratch)
    if error is None:
        return
    args = spec.settings.trainer_args
    for name in args:  # the one without which it works
        fewer = spec.settings.model_copy(update={"trainer_args": {k: v for k, v in args.items() if k != name}})
        if _refusal(dataclasses.replace(spec, settings=fewer), config, tokenizer, scratch) is None:
            raise TrainingInputError(f"trainer_args.{name}: {args[name]!r} cannot be used: {_words(error)}") from error
    method = method_of(spec.settings.method)
    raise TrainingInputError(f"{method.trainer} cannot be built from these settings: {_words(error)}") from error


def _refusal(spec: TrainSpec, config: Any, tokenizer: Any, scratch: str) -> Exception | None:
    """What building config, trainer, optimiser and scheduler raises."""
    method = method_of(spec.settings.method)
    cls = method.trainer_class()
    # A model without weights cannot be moved to a device.
    without_weights = type(cls.__name__, (cls,), {"_move_model_to_device": lambda *_: None})
    try:
        args = trainer_config(spec, scratch)
        args.model_init_kwargs = None
        reference = {}
        if spec.settings.lora is None and "ref_model" in inspect.signature(cls).parameters:
            reference["ref_model"] = still = _model(spec, config)
            still.to = lambda *_, **__: still
        trainer = without_weights(
            model=_model(spec, config),
            args=args,
            train_dataset=_rows(spec),
            processing_class=copy.deepcopy(tokenizer),
            peft_config=lora_config(spec),
            **reference,
        )
        trainer.create_optimizer_and_scheduler(num_training_steps=10)
    except Exception as error:  # of TRL, transformers or PEFT
        return error
    return None


def _rows(spec: TrainSpec) -> Dataset:
    """Two batches of chats."""
    row: dict[str, Any] = {}
    for column, kind in method_of(spec.settings.method).columns.items():
        role = "user" if column == "prompt" else "assistant"
        row[column] = [{"role": role, "content": f"a {column}"}] if kind == "messages" else True
    return with_template_args(spec, Dataset.from_list([row] * (2 * spec.settings.batch_size)))


def _words(error: Exception) -> str:
    """The message on one line; for an error that says little, with its kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, ImportError)) and text else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings and progress bars of a training that does not happen."""
    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    of_trl = getLogger("trl")
    level_of_trl = of_trl.level
    logging.set_verbosity_error()
    of_trl.setLevel("ERROR")
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        of_trl.setLevel(level_of_trl)
        if bars:
            enable_progress_bars()
