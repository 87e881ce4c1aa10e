"""Building the trainer once, without weights: what a worker would refuse is refused before anything is paid."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from logging import getLogger
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ray_pipeline.engines.chat_template import end_token
from ray_pipeline.training.methods import TrainingInputError, method_of, model_args, model_class
from ray_pipeline.training.spec import TrainSettings, TrainSpec
from ray_pipeline.training.tokenizer import complete_generation_config, load_tokenizer
from ray_pipeline.training.trainer import lora_config, trainer_config, with_template_args

#: TRL settings that depend on the worker's device, or that read weights.
_ON_WORKERS = ("tf32", "torch_compile", "fsdp_config", "deepspeed", "precompute_ref_log_probs", "model_init_kwargs")


def check_build(spec: TrainSpec) -> None:
    """Build config, model, adapter, trainer and optimiser as a worker does, on PyTorch's device without memory and with
    made-up rows. Reads the base's configuration and tokenizer, but no weights. The model is built once, and for full
    fine-tuning with a reference model twice.

    Not checked, since it depends on the workers' devices: how FSDP and DeepSpeed divide the model (their settings are),
    and what loads with quantization or an attention of its own.

    Raises:
        TrainingInputError: what a worker would raise; the message names the key and the remedy.
    """
    settings = original = spec.settings
    args = {name: value for name, value in settings.trainer_args.items() if name not in _ON_WORKERS}
    here = settings.model_copy(update={"use_gpu": False, "shard": "none", "quantization": None, "trainer_args": args})
    spec = dataclasses.replace(spec, settings=here, val_files=None, max_length=max(spec.max_length, 1024))
    with _quietly(), tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(spec)
        config = _model_config(spec)
        _check_loading(spec, config, original)
        if getattr(config, "quantization_config", None) is not None:
            return  # can be loaded with its kernels only
        model = _model(spec, config)
        _check_sharding(spec, original, model, scratch)
        _check_saving(spec, model, tokenizer, scratch)
        _check_trainer(spec, config, model, tokenizer, scratch)


def _model_config(spec: TrainSpec) -> Any:
    try:
        return AutoConfig.from_pretrained(
            spec.model,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            **model_args(method_of(spec.settings.method).task),
        )
    except (OSError, ValueError) as error:
        raise TrainingInputError(f"model: cannot read config.json of {spec.model}: {_words(error)}") from error


def _check_loading(spec: TrainSpec, config: Any, settings: TrainSettings) -> None:
    """What `from_pretrained` refuses before it reads weights: names and values of `model_init_kwargs`, and another
    quantization than that of the base.

    Args:
        settings: with what depends on the workers' devices.
    """
    stored = getattr(config, "quantization_config", None)
    if settings.quantization is not None and stored is not None:
        kind = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if kind != "bitsandbytes":
            raise TrainingInputError(
                f"quantization: the weights of {spec.model} are quantized already ({kind}); remove the key, or choose "
                "the base that is not quantized"
            )
    given = settings.trainer_args.get("model_init_kwargs") or {}
    try:
        _, left = AutoConfig.from_pretrained(
            spec.model,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            return_unused_kwargs=True,
            **given,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise TrainingInputError(f"trainer_args.model_init_kwargs cannot be used: {_words(error)}") from error
    loading = PreTrainedModel.from_pretrained  # takes some arguments by name, others out of **kwargs
    known = {*inspect.signature(loading).parameters, *re.findall(r'"(\w+)"', inspect.getsource(loading))}
    for name in given.keys() & left.keys() - known:
        try:
            _model(spec, config, {name: given[name]})
        except TypeError as error:
            raise TrainingInputError(
                f"trainer_args.model_init_kwargs.{name}: neither the configuration of {spec.model} nor its loading has "
                f"such a setting ({_words(error)})"
            ) from error
    attention, names = given.get("attn_implementation", "eager"), ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    of_the_hub = isinstance(attention, str) and re.search(r"[/|]", attention)
    if isinstance(attention, str) and not of_the_hub and attention not in names:
        raise TrainingInputError(
            f"trainer_args.model_init_kwargs.attn_implementation: transformers has no {attention!r}; choose from "
            f"{', '.join(names)}, or name a kernel of the Hub"
        )


def _model(spec: TrainSpec, config: Any, more: Mapping[str, Any] | None = None) -> Any:
    """The base without weights.

    Args:
        more: arguments of its class.
    """
    named = ", ".join(config.architectures or []) or "no architecture"
    method, remedy = method_of(spec.settings.method), "choose a causal language model (…ForCausalLM)"
    try:
        with torch.device("meta"):
            model = model_class(method.task).from_config(
                config,
                dtype=getattr(torch, spec.settings.dtype),
                trust_remote_code=spec.trust_remote_code,
                **(more or {}),
            )
    except (ValueError, KeyError, AttributeError) as error:
        if not method.trains_policy:
            raise TrainingInputError(
                f"model: transformers has no class for sequence classification for {spec.model} ({named} in its "
                f"config.json), so that it cannot become a reward model: {_words(error)}; choose another base"
            ) from error
        raise TrainingInputError(
            f"model: {spec.model} ({named} in its config.json) is no causal language model: {_words(error)}; {remedy}"
        ) from error
    if not method.trains_policy:
        return model
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
    parts = {"config.json": model.config}
    if method_of(spec.settings.method).trains_policy:
        complete_generation_config(model.generation_config, tokenizer, end_token(tokenizer, spec.chat_template_args))
        parts["generation_config.json"] = model.generation_config
    for name, part in parts.items():
        try:
            part.save_pretrained(scratch)
        except ValueError as error:
            raise TrainingInputError(
                f"model: transformers cannot write the {name} of {spec.model} with the policy: "
                f"{_words(error)}; correct that file"
            ) from error


def _check_sharding(spec: TrainSpec, settings: TrainSettings, model: Any, scratch: str) -> None:
    """Names and values of the settings of FSDP and DeepSpeed.

    Args:
        settings: with what depends on the workers' devices.
    """
    given = settings.trainer_args.get("deepspeed")
    try:
        if settings.shard in ("zero2", "zero3") and given is not None:
            if not isinstance(given, str | dict):  # a number would be taken for an open file
                raise ValueError(f"{given!r} is neither a mapping nor the path of a JSON file")
            HfDeepSpeedConfig(given)
    except (ValueError, OSError, AttributeError, TypeError) as error:  # the last two of parts of another kind
        raise TrainingInputError(f"trainer_args.deepspeed cannot be used: {_words(error)}") from error
    if settings.shard != "fsdp":
        return
    given = settings.trainer_args.get("fsdp_config")
    given = {} if given is None else given
    if not isinstance(given, str | dict):
        raise TrainingInputError(
            f"trainer_args.fsdp_config: {given!r} is neither a mapping nor the path of a JSON file"
        )
    source = inspect.getsource(TrainingArguments._process_fsdp_args)
    known = set(re.findall(r'fsdp_config(?:\.get\(|\.setdefault\(|\[)"(\w+)"', source))
    for name in given if isinstance(given, dict) else ():
        if name.removeprefix("fsdp_") not in known:
            raise TrainingInputError(
                f"trainer_args.fsdp_config.{name}: there is no such setting; choose from {', '.join(sorted(known))}"
            )
    args = {**spec.settings.trainer_args, **({"fsdp_config": copy.deepcopy(given)} if given else {})}
    here = spec.settings.model_copy(update={"shard": "fsdp", "trainer_args": args})
    environment = dict(os.environ)  # transformers and Accelerate write into it
    try:
        plugin = trainer_config(dataclasses.replace(spec, settings=here), scratch).fsdp_plugin_args
        if plugin is not None:
            FullyShardedDataParallelPlugin(**plugin).set_auto_wrap_policy(model)
    except Exception as error:  # of transformers or Accelerate, whose errors have many kinds
        raise TrainingInputError(f"trainer_args.fsdp_config cannot be used: {_words(error)}") from error
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _adapter_key(spec: TrainSpec, model: Any) -> tuple[str, str]:
    """The key of the adapter's layers with its value, and what could be named there."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert spec.settings.lora is not None
    names = spec.settings.lora.target_modules
    return (
        f"lora.target_modules: {names if isinstance(names, str) else list(names)!r}",
        f"the linear layers of {spec.model} are {', '.join(sorted(linear))}",
    )


def _check_adapter(spec: TrainSpec, config: Any) -> None:
    """Raises what is wrong with the adapter alone."""
    adapter = lora_config(spec)
    if adapter is None or spec.settings.lora is None:
        return
    model = _model(spec, config)
    key, layers = _adapter_key(spec, model)
    try:
        adapted: Any = get_peft_model(model, adapter)
    except ValueError as error:
        text = isinstance(spec.settings.lora.target_modules, str)
        hint = "; a single text is a regular expression: write names as a list" if text else ""
        raise TrainingInputError(f"{key} cannot be adapted: {_words(error)}{hint}; {layers}") from error
    _check_embeddings(spec, config, adapted)


def _check_embeddings(spec: TrainSpec, config: Any, adapted: Any) -> None:
    if not isinstance(adapted, PeftModel):
        return
    base: Any = adapted.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if config.get_text_config().tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        key, layers = _adapter_key(spec, _model(spec, config))
        raise TrainingInputError(
            f"{key} includes the embeddings, which {spec.model} shares with its output head: merging would change "
            f"both; leave them out; {layers}"
        )


def _check_trainer(spec: TrainSpec, config: Any, model: Any, tokenizer: Any, scratch: str) -> None:
    """
    Args:
        model: the base, which the trainer changes.
    """
    try:
        adapted = _trained_model(spec, config, model, tokenizer, scratch)
    except Exception as error:  # of TRL, transformers or PEFT
        _check_adapter(spec, config)
        args = spec.settings.trainer_args
        for name in args:  # the one without which it works
            fewer = spec.settings.model_copy(update={"trainer_args": {k: v for k, v in args.items() if k != name}})
            without = dataclasses.replace(spec, settings=fewer)
            try:
                _trained_model(without, config, _model(spec, config), tokenizer, scratch)
            except Exception:  # not this one alone
                continue
            raise TrainingInputError(f"trainer_args.{name}: {args[name]!r} cannot be used: {_words(error)}") from error
        method = method_of(spec.settings.method)
        raise TrainingInputError(f"{method.trainer} cannot be built from these settings: {_words(error)}") from error
    _check_embeddings(spec, config, adapted)


def _trained_model(spec: TrainSpec, config: Any, model: Any, tokenizer: Any, scratch: str) -> Any:
    """Build config, trainer, optimiser and scheduler; returns the trainer's model. Raises what they raise."""
    method = method_of(spec.settings.method)
    cls = method.trainer_class()
    # A model without weights cannot be moved to a device.
    without_weights = type(cls.__name__, (cls,), {"_move_model_to_device": lambda *_: None})
    args = trainer_config(spec, scratch)
    args.model_init_kwargs = None
    reference = {}
    if spec.settings.lora is None and "ref_model" in inspect.signature(cls).parameters:
        reference["ref_model"] = still = _model(spec, config)
        still.to = lambda *_, **__: still
    trainer = without_weights(
        model=model,
        args=args,
        train_dataset=_rows(spec),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=lora_config(spec),
        **reference,
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    return trainer.model


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
