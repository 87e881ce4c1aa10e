"""A model as the configuration names it: which weights, on which engine, on which part of the cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.identity import model_identity, text_digest
from ray_pipeline.engines.vllm import VllmEngine, VllmSpec
from ray_pipeline.store.settings import Settings

EngineFactory = Callable[[], ChatEngine]


class Placement(Settings):
    """Where the actors of a stage run and how many there are. Nothing here changes what is computed."""

    num_gpus: float | None = Field(
        None, ge=0, description="GPUs an actor; default: tensor_parallel_size where there are GPUs"
    )
    num_cpus: float = Field(0, ge=0, description="CPUs that an actor reserves; engines need none reserved")
    min_actors: int = Field(1, ge=1)
    max_actors: int = Field(1, ge=1)
    shards_in_flight: int = Field(
        3, ge=1, description="shards that an actor works on at once, so that its engine never drains"
    )
    concurrency: int = Field(256, ge=1, description="calls in flight an actor")
    label_selector: dict[str, str] = Field(default_factory=dict, description="labels of the nodes that may be used")

    @model_validator(mode="after")
    def _range(self) -> Placement:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors ({self.min_actors}) is over max_actors ({self.max_actors})")
        return self


class ModelSettings(Settings):
    """A model that stages refer to by its key under `models`."""

    engine: Literal["vllm"] = "vllm"
    model: str = Field(description="folder, hub name, or `pocket:policy` / `pocket:judge`")
    revision: str | None = None
    adapter: str | None = Field(None, description="folder of a LoRA adapter")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: str | None = None
    max_model_len: int | None = Field(None, ge=16)
    tensor_parallel_size: int = Field(1, ge=1)
    seed: int = 0
    chat_template: str | None = None
    chat_template_args: dict[str, Any] = Field(default_factory=lambda: {"enable_thinking": False})
    trust_remote_code: bool = False
    args: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine arguments by their own names")
    canary: bool = True
    placement: Placement = Placement()

    def spec(self) -> VllmSpec:
        return VllmSpec(**self.model_dump(exclude={"engine", "placement"}))

    def factory(self) -> EngineFactory:
        return functools.partial(VllmEngine, self.spec())

    def weights(self) -> dict[str, str]:
        """Content identity of weights, adapter and chat template. Raises ModelNotFound, naming the model."""
        found = {k: str(v) for k, v in model_identity(self.model, self.revision, self.adapter).items()}
        if self.chat_template is not None:
            with open(self.chat_template, encoding="utf-8") as file:
                found["chat_template"] = text_digest(file.read())
        return found

    def semantics(self) -> dict[str, Any]:
        """What a stage's fingerprint needs to know beside the weights: everything but names and placement."""
        return self.model_dump(
            mode="json", exclude={"model", "revision", "adapter", "placement", "canary", "chat_template"}
        )

    def trained(self, folder: str) -> ModelSettings:
        """The same model on other weights: a policy that was trained from it."""
        return self.model_copy(update={"model": folder, "revision": None, "adapter": None, "quantization": None})
