"""Blocks of the YAML file that every workflow has, and where work may be placed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.store.files import join, normalise_location


class Room(Settings):
    """On which nodes something may run."""

    label_selector: dict[str, str] = Field(default_factory=dict, description="labels of the nodes that may be used")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="custom resources that it takes, as `ray start --resources` names them"
    )

    def room(self) -> dict[str, Any]:
        """The same as options of a Ray task or actor."""
        options = {"label_selector": self.label_selector, "resources": self.resources}
        return {name: value for name, value in options.items() if value}


class RunBlock(Settings):
    """The `run` block: name and place of the run folder."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its folder")
    root: str = Field("runs", description="folder of run folders; a path or the URI of any pyarrow filesystem")

    def folder(self, run_dir: str | None = None) -> str:
        """The run folder: `run_dir`, or the run's name below the root."""
        return normalise_location(run_dir or join(self.root, self.name))


class CallsBlock(Settings):
    """The `calls` block: the log of every LLM call."""

    root: str | None = Field(None, description="folder of the call log; default: `calls` in the run folder")
    replay_only: bool = Field(False, description="answer from the log alone, and fail where it has no reply")

    def folder(self, run_folder: str) -> str:
        """Where the call log lies."""
        return normalise_location(self.root or join(run_folder, "calls"))


class RayBlock(Settings):
    """The `ray` block: which cluster, and what a local one may use."""

    address: str | None = Field(None, description="default: RAY_ADDRESS, or a new cluster on this machine")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a new local cluster; default: all")
    num_gpus: int | None = Field(None, ge=0, description="GPUs of a new local cluster; default: all")
    object_store_memory: int | None = Field(None, ge=80_000_000, description="bytes")
    max_stages: int | None = Field(
        None, ge=1, description="stages at work at once; default: all whose inputs are there (set it without GPUs)"
    )
    tables: Room = Field(Room(), description="nodes for stages without an engine, one task of one CPU a shard")

    def arguments(self) -> dict[str, Any]:
        """Arguments of `ray.init`."""
        return {k: v for k, v in self.model_dump(exclude={"max_stages", "tables"}).items() if v is not None}
