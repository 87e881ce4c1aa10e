"""A model as the configuration names it: which weights, on which engine, on which part of the cluster."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.config.blocks import Room
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.identity import model_identity, text_digest
from ray_pipeline.engines.openai import EndpointSettings, OpenAIEngine, OpenAISpec, validate_request_extra
from ray_pipeline.engines.vllm import VllmEngine, VllmSpec, validate_engine_args, validate_sampling_extra
from ray_pipeline.pocket import model_path

EngineFactory = Callable[[], ChatEngine]

#: Of a GPU's memory, what engines that share it may take together; the rest is for their CUDA contexts.
_MEMORY_SHARE = 0.9


class Placement(Room):
    """Where the actors of a stage run and how many there are. Nothing here changes what is computed."""

    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs an actor, 0.5 for two on one; default: tensor_parallel_size where there are GPUs now (say it "
        "where GPU nodes come on demand)",
    )
    num_cpus: float = Field(0, ge=0, description="CPUs that an actor reserves; engines need none reserved")
    min_actors: int = Field(1, ge=1, description="actors that are always held while a stage runs")
    max_actors: int = Field(1, ge=1, description="shared by stages on one model that can begin together")
    shards_in_flight: int = Field(
        3, ge=1, description="shards that an actor works on at once, so that its engine never drains"
    )
    concurrency: int = Field(256, ge=1, description="calls in flight an actor")

    @model_validator(mode="after")
    def _range(self) -> Placement:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors ({self.min_actors}) is over max_actors ({self.max_actors})")
        for name in ("CPU", "GPU"):
            if name in self.resources:
                raise ValueError(f"resources.{name} is no custom resource; set num_{name.lower()}s")
        return self


class TokenizerSettings(Settings):
    """A model's tokenizer, to count with, and the arguments that its chat template gets from the engine as well."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template_args: dict[str, Any] = Field(default_factory=dict)


class ModelSettings(Settings):
    """A model that stages refer to by its key under `models`.

    Engine `vllm` loads it here; engine `openai` asks the OpenAI-compatible server that `endpoint` describes. The keys
    of one engine are errors under the other.
    """

    engine: Literal["vllm", "openai"] = Field(
        "vllm", description="vllm: served here; openai: an OpenAI-compatible endpoint"
    )
    model: str = Field(
        description="folder, hub name, or `pocket:NAME` (policy, judge, reviewer, generator); "
        "engine openai: the endpoint's name for it"
    )
    endpoint: EndpointSettings | None = Field(None, description="engine openai alone: where the model is served")
    revision: str | None = Field(None, description="branch, tag or commit; default: the newest commit of main")
    adapter: str | None = Field(None, description="folder of a LoRA adapter")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="data type of weights and activations; auto: the model's own"
    )
    quantization: str | None = Field(None, description="vLLM's name of a quantization; default: the model's own")
    max_model_len: int | None = Field(
        None, ge=16, description="maximum length of prompt and reply together, in tokens; default: the model's"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs over which each layer is split, in one actor")
    seed: int = Field(0, description="seed of the engine; calls have seeds of their own")
    chat_template: str | None = Field(None, description="file of a chat template (Jinja); default: the tokenizer's")
    chat_template_args: dict[str, Any] = Field(
        default_factory=lambda: {"enable_thinking": False}, description="arguments of the chat template"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    args: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine arguments by their own names")
    canary: bool = Field(True, description="prove at the start, with short calls, that the model answers as asked")
    placement: Placement = Field(Placement(), description="where the actors of the model run and how many there are")

    @model_validator(mode="after")
    def _keys_of_one_engine(self) -> ModelSettings:
        if self.engine == "vllm":
            if self.endpoint is not None:
                raise ValueError("endpoint is read by engine openai alone; set engine: openai, or remove the block")
            return self
        if self.endpoint is None:
            raise ValueError("engine openai needs the block endpoint, with base_url at least")
        fields = type(self).model_fields
        for name in sorted(set(fields) - {"engine", "model", "endpoint", "canary", "placement"}):
            if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                raise ValueError(
                    f"{name} is read by engine vllm alone; remove it (what an endpoint should be sent beside the "
                    "sampling goes under endpoint.extra_body), or set engine: vllm"
                )
        if self.placement.num_gpus:
            raise ValueError("placement.num_gpus: a model at an endpoint takes no GPU here; remove it")
        return self

    @model_validator(mode="after")
    def _gpus_of_one_actor(self) -> ModelSettings:
        """Tensor parallelism stays inside one actor, and so inside one node."""
        gpus, wanted = self.placement.num_gpus, self.tensor_parallel_size
        if wanted > 1 and gpus is not None and gpus < wanted:
            raise ValueError(
                f"placement.num_gpus is {gpus:g}, and tensor_parallel_size {wanted} needs as many GPUs in one actor; "
                "leave num_gpus out, or raise it"
            )
        return self

    def spec(self) -> VllmSpec:
        """What the engine gets. Of a GPU that it shares, it takes its part of the memory and no more."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(VllmSpec)}
        share = self.placement.num_gpus
        if share and share < 1:
            given["args"] = {"gpu_memory_utilization": round(_MEMORY_SHARE * share, 3), **given["args"]}
        return VllmSpec(**given)

    def factory(self) -> EngineFactory:
        if self.endpoint is not None:
            spec = OpenAISpec(self.model, self.endpoint, self.canary, share=self.placement.max_actors)
            return functools.partial(OpenAIEngine, spec)
        return functools.partial(VllmEngine, self.spec())

    @property
    def shown(self) -> str:
        """Its name for readers."""
        return shown_name(self.model)

    @property
    def is_here(self) -> bool:
        """Whether its weights and tokenizer can be loaded here: to be trained, or to count tokens with."""
        return self.engine == "vllm"

    def check(self) -> None:
        """What types cannot say. Raises EngineStartError or ModelNotFound; asks no endpoint."""
        if self.is_here:
            validate_engine_args(self.args)
        self.weights()

    def check_extra(self, extra: Mapping[str, Any]) -> None:
        """Whether the engine takes the names under a sampling's `extra`. Raises EngineStartError."""
        if self.is_here:
            validate_sampling_extra(extra)
        else:
            validate_request_extra(extra)

    def weights(self) -> dict[str, str]:
        """Content identity of weights, adapter and chat template; of a model at an endpoint its address and name.

        Raises ModelNotFound, naming the model.
        """
        if self.endpoint is not None:
            return {"model": self.endpoint.identity(self.model)}
        found = {k: str(v) for k, v in model_identity(self.model, self.revision, self.adapter).items()}
        if self.chat_template is not None:
            with open(self.chat_template, encoding="utf-8") as file:
                found["chat_template"] = text_digest(file.read())
        return found

    @property
    def tokenizer(self) -> TokenizerSettings:
        return TokenizerSettings(**{name: getattr(self, name) for name in TokenizerSettings.model_fields})

    def semantics(self) -> dict[str, Any]:
        """What decides the replies beside `weights()`: settings that differ from their defaults, without names and
        placement."""
        if self.endpoint is not None:
            return {"engine": self.engine, **self.endpoint.answers()}
        elsewhere = {"model", "revision", "adapter", "chat_template", "endpoint", "placement", "canary"}
        return {"engine": self.engine, **self.decisive(exclude=elsewhere)}

    def trained(self, folder: str) -> ModelSettings:
        """The same model on other weights: a policy that was trained from it."""
        return self.model_copy(update={"model": folder, "revision": None, "adapter": None, "quantization": None})


Purpose = Literal["generate", "judge", "train", "count tokens"]


@dataclasses.dataclass(frozen=True)
class ModelUse:
    """One key of a configuration that chooses a model.

    Attributes:
        key: as it is written in the file (`judge.rubrics.factuality.model`).
        model: the model's key in `block`.
        sampling: key of the sampling block that its calls are made with; "" where there is none.
        extra: the `extra` of that block: sampling arguments by the engine's own names.
        block: of the models to choose from.
    """

    key: str
    model: str
    purpose: Purpose = "judge"
    sampling: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    block: str = "models"

    @property
    def needs_weights(self) -> bool:
        """Whether the weights or the tokenizer must be here, so that no endpoint will do."""
        return self.purpose in ("train", "count tokens")


def resolve_model(model: Any) -> Any:
    """A model block as written, with the folder of a pocket model for its name and absolute paths of what lies here.

    Raises ConfigError for an unknown pocket model.
    """
    if not isinstance(model, Mapping) or not isinstance(model.get("model"), str):
        return model
    if model.get("engine") == "openai":  # its name is the endpoint's word, whatever lies in this folder
        return model
    name = model["model"]
    if name.startswith("pocket:"):
        try:
            return {**model, "model": model_path(name)}
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error
    # Actors have another working folder, so paths are made absolute here; a hub name is `owner/name` and stays.
    paths = {key: model[key] for key in ("model", "adapter", "chat_template") if isinstance(model.get(key), str)}
    paths = {key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items()}
    return {**model, **{key: path for key, path in paths.items() if os.path.exists(path)}}


def shown_name(model: str) -> str:
    """A model's name for readers: hub names as they are, folders by their last part."""
    return os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model
