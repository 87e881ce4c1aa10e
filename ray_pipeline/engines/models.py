"""A model of the configuration: its weights, its engine, and its placement on the cluster."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.config.blocks import Room
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.account import Prices
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.endpoint_settings import BatchSettings, EndpointSettings, OpenAISpec, validate_request_extra
from ray_pipeline.engines.identity import ModelNotFound, model_identity, text_digest
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.engines.packaged import PREFIX, default_dtype, packaged_model
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_spec import VllmSpec, validate_engine_args, validate_sampling_extra
from ray_pipeline.pocket import adapter_path, model_path
from ray_pipeline.store.locations import join

EngineFactory = Callable[[], ChatEngine]

#: `placement.shards_in_flight` of a model on engine openai_batch where it is not set.
_BATCHED_SHARDS = 256

#: Share of a GPU's memory that engines on it may take together; the rest is for their CUDA contexts.
_MEMORY_SHARE = 0.9


class Placement(Room):
    """Where the actors of a stage run and how many there are. Placement does not change any result."""

    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs per actor, 0.5 for two on one; default: tensor_parallel_size if there are GPUs now (set it "
        "if GPU nodes start on demand)",
    )
    num_cpus: float = Field(
        0,
        ge=0,
        description="CPUs that an actor reserves, and threads of an engine that runs on them; an engine needs none "
        "reserved and then has a thread for every CPU but one",
    )
    min_actors: int = Field(1, ge=1, description="minimum number of actors while a stage runs")
    max_actors: int = Field(
        1, ge=1, description="maximum number of actors, shared by stages on one model that can start together"
    )
    shards_in_flight: int = Field(
        3,
        ge=1,
        description="shards that an actor works on at once, so that its engine never drains; small shards count "
        "together as one; default with engine openai_batch: 256",
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="calls in flight per actor; default: two batches of the engine (`max_num_seqs`), or as many as "
        "`endpoint.concurrency`",
    )

    @model_validator(mode="after")
    def _range(self) -> Placement:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors ({self.min_actors}) exceeds max_actors ({self.max_actors}); lower it")
        for name in ("CPU", "GPU"):
            if name in self.resources:
                raise ValueError(f"resources.{name} is not a custom resource; set num_{name.lower()}s")
        return self


class CardSettings(Settings):
    """A judge's card, made by `quorum judge-check`, and what the judge must reach on it before a run starts."""

    path: str = Field(description="run folder of the card, or its judge_card.json")
    floor: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="least score by name (`judgebench: 0.6`, `order: 0.8`, `read: 0.98`); below one, no run starts",
    )


class TokenizerSettings(Settings):
    """A model's tokenizer, to count with, and the arguments that its chat template gets from the engine as well."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template_args: dict[str, Any] = Field(default_factory=dict)


class ModelSettings(Settings):
    """A model that stages refer to by its key under `models`.

    Engine `vllm` loads it locally; engine `openai` calls the OpenAI-compatible server of the `endpoint` block. The keys
    of one engine are errors under the other.
    """

    engine: Literal["vllm", "openai", "openai_batch"] = Field(
        "vllm",
        description="vllm: served locally; openai: an OpenAI-compatible endpoint; openai_batch: the same in batches "
        "(files and /v1/batches), which take up to a day and cost half",
    )
    model: str = Field(
        description="folder, Hub name, `pocket:NAME` (policy, judge, reviewer, generator), or `smol:135m-instruct` "
        "(a real small model without a hub); "
        "engine openai or openai_batch: the endpoint's name for it"
    )
    endpoint: EndpointSettings | None = Field(
        None, description="only for engines openai and openai_batch: where the model is served"
    )
    revision: str | None = Field(None, description="branch, tag or commit; default: the newest commit of main")
    adapter: str | None = Field(
        None,
        description="folder of a LoRA adapter, or `pocket:NAME` (helpfulness, factuality, conciseness, critic); models "
        "that differ in it alone share an engine",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="data type of weights and activations; auto: the model's own"
    )
    quantization: str | None = Field(None, description="vLLM's name of a quantization; default: the model's own")
    max_model_len: int | None = Field(
        None, ge=16, description="maximum length of prompt and reply together, in tokens; default: the model's"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs over which each layer is split, in one actor")
    seed: int = Field(0, description="seed of the engine; calls have their own seeds")
    chat_template: str | None = Field(None, description="file of a chat template (Jinja); default: the tokenizer's")
    chat_template_args: dict[str, Any] = Field(
        default_factory=lambda: {"enable_thinking": False}, description="arguments of the chat template"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    args: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine arguments by their own names")
    thoughts: Literal["split", "keep"] = Field(
        "split",
        description="thoughts in replies (`<think>…</think>`, reasoning_content): split them off into a column, or "
        "keep them as a part of the text, which is then judged and trained on",
    )
    card: CardSettings | None = Field(None, description="of a judge: its card, for the report, and a floor")
    canary: bool = Field(True, description="check at the start, with short calls, that the model answers as expected")
    placement: Placement = Field(Placement(), description="where the actors of the model run and how many there are")

    @model_validator(mode="before")
    @classmethod
    def _many_shards_in_a_batch(cls, values: Any) -> Any:
        """Calls of few shards would be small batches, one after the other, each of which may take a day."""
        placement = values.get("placement", {}) if isinstance(values, Mapping) else None
        if isinstance(placement, Mapping) and values.get("engine") == "openai_batch":
            return {**values, "placement": {"shards_in_flight": _BATCHED_SHARDS, **placement}}
        return values

    @model_validator(mode="after")
    def _keys_of_one_engine(self) -> ModelSettings:
        if self.engine == "vllm":
            if self.endpoint is not None:
                raise ValueError(
                    "endpoint is only for engines openai and openai_batch; set engine: openai, or remove the block"
                )
            return self
        if self.endpoint is None:
            raise ValueError(f"engine {self.engine} needs the endpoint block; add it with at least base_url")
        if self.endpoint.batch is not None and self.engine != "openai_batch":
            raise ValueError("endpoint.batch is only for engine openai_batch; set engine: openai_batch, or remove it")
        fields = type(self).model_fields
        for name in sorted(set(fields) - {"engine", "model", "endpoint", "card", "canary", "placement", "thoughts"}):
            if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                raise ValueError(
                    f"{name} is only for engine vllm; remove it (put further request parameters under "
                    "endpoint.extra_body), or set engine: vllm"
                )
        if self.placement.num_gpus:
            raise ValueError("placement.num_gpus: a model at an endpoint uses no local GPU; remove it")
        return self

    @model_validator(mode="after")
    def _gpus_of_one_actor(self) -> ModelSettings:
        """Check the GPUs of one actor: tensor parallelism stays inside one actor, and so inside one node."""
        gpus, parallel = self.placement.num_gpus, self.tensor_parallel_size
        if parallel > 1 and gpus is not None and gpus < parallel:
            raise ValueError(
                f"placement.num_gpus is {gpus:g}, but tensor_parallel_size {parallel} needs as many GPUs in one actor; "
                "remove num_gpus, or raise it"
            )
        return self

    def spec(self) -> VllmSpec:
        """The engine's specification. On a shared GPU the engine takes only its share of the memory."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(VllmSpec)}
        share = self.placement.num_gpus
        if share and share < 1:
            values["args"] = {"gpu_memory_utilization": round(_MEMORY_SHARE * share, 3), **values["args"]}
        return VllmSpec(**values)

    def factory(self) -> EngineFactory:
        if self.endpoint is not None:
            share, keeps = self.placement.max_actors, self.thoughts == "keep"
            prices = self.endpoint.prices and self.charged(self.endpoint.prices)
            endpoint = self.endpoint.model_copy(update={"prices": prices})
            spec = OpenAISpec(self.model, endpoint, self.canary, share=share, keeps_thoughts=keeps, batch=self._batch)
            return functools.partial(OpenAIEngine, spec)
        return functools.partial(VllmEngine, self.spec())

    @property
    def _batch(self) -> BatchSettings | None:
        if self.engine != "openai_batch" or self.endpoint is None:
            return None
        return self.endpoint.batch or BatchSettings()

    def charged(self, prices: Prices) -> Prices:
        """What calls cost at these prices of the endpoint: in batches, a share of them."""
        return prices if self._batch is None else prices.times(self._batch.price)

    @property
    def shown(self) -> str:
        """The model's display name."""
        return shown_name(self.model)

    @property
    def is_here(self) -> bool:
        """Whether its weights and tokenizer can be loaded locally, for training or for counting tokens."""
        return self.engine == "vllm"

    def check(self) -> None:
        """Check what types cannot. Raises EngineStartError or ModelNotFound; contacts no endpoint."""
        if self.is_here:
            validate_engine_args(self.args)
        self.weights()

    def check_extra(self, extra: Mapping[str, Any]) -> None:
        """Check that the engine accepts the names under a sampling's `extra`. Raises EngineStartError."""
        if self.is_here:
            validate_sampling_extra(extra)
        else:
            validate_request_extra(extra)

    def weights(self) -> dict[str, str]:
        """Content identity of weights, adapter and chat template; for a model at an endpoint its name and address,
        or its `identity`.

        Raises ModelNotFound, naming the model.
        """
        if self.endpoint is not None:
            return {"model": self.endpoint.known_as(self.model)}
        identity = {k: str(v) for k, v in model_identity(self.model, self.revision, self.adapter).items()}
        if self.chat_template is not None:
            with open(self.chat_template, encoding="utf-8") as file:
                identity["chat_template"] = text_digest(file.read())
        return identity

    @property
    def tokenizer(self) -> TokenizerSettings:
        return TokenizerSettings(**{name: getattr(self, name) for name in TokenizerSettings.model_fields})

    def semantics(self) -> dict[str, Any]:
        """Settings that affect the replies beside `weights()`: those that differ from their defaults, without names
        and placement."""
        if self.endpoint is not None:
            kept = {} if self.thoughts == "split" else {"thoughts": self.thoughts}
            return {"engine": "openai", **self.endpoint.answers(), **kept}
        elsewhere = {"model", "revision", "adapter", "chat_template", "endpoint", "placement", "canary", "card"}
        return {"engine": self.engine, **self.decisive(exclude=elsewhere)}

    def trained(self, folder: str, save: str = "both") -> ModelSettings:
        """A policy trained from this model, as it is served.

        Args:
            folder: of its training, with `adapter/` or `merged/` as `save` says.
        """
        if save == "adapter":
            return self.model_copy(update={"adapter": join(folder, "adapter")})
        folder = join(folder, "merged")
        return self.model_copy(update={"model": folder, "revision": None, "adapter": None, "quantization": None})


Purpose = Literal["generate", "judge", "reward", "train", "count tokens"]


@dataclasses.dataclass(frozen=True)
class ModelUse:
    """One key of a configuration that chooses a model.

    Attributes:
        key: as it is written in the file (`judge.rubrics.factuality.model`).
        model: the model's key in `block`.
        sampling: key of the sampling block of its calls; "" if there is none.
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
        """Whether the weights or the tokenizer must be local, which excludes an endpoint."""
        return self.purpose in ("train", "count tokens", "reward")


def resolve_model(model: Any) -> Any:
    """A model block with the folder of a pocket or packaged model instead of its name, and absolute local paths.

    Raises ConfigError for an unknown model of these, or one whose package is not installed.
    """
    if not isinstance(model, Mapping) or not isinstance(model.get("model"), str):
        return model
    if model.get("engine") in (
        "openai",
        "openai_batch",
    ):  # the name is the endpoint's, even if a local folder has it as well
        return model
    name = model["model"]
    if name.startswith("pocket:"):
        try:
            found = {"model": model_path(name)}
            if str(adapter := model.get("adapter")).startswith("pocket:"):
                found["adapter"] = adapter_path(str(adapter))
            return {**model, **found}
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error
    if name.startswith(PREFIX):
        try:
            return {"dtype": default_dtype(), **model, "model": packaged_model(name)}
        except ModelNotFound as error:
            raise ConfigError(str(error)) from error
    # Actors have another working folder, so paths are made absolute here; a hub name is `owner/name` and stays.
    paths = {key: model[key] for key in ("model", "adapter", "chat_template") if isinstance(model.get(key), str)}
    paths = {key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items()}
    return {**model, **{key: path for key, path in paths.items() if os.path.exists(path)}}


def shown_name(model: str) -> str:
    """A model's display name: a Hub name unchanged, a folder's last part."""
    return os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model
