"""Blocks of the YAML file shared by all workflows, and the placement of work on nodes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.store.locations import join, normalise_location


class Room(Settings):
    """The nodes that work may run on."""

    label_selector: dict[str, str] = Field(default_factory=dict, description="labels of the nodes that may be used")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="custom resources to reserve, as named by `ray start --resources`"
    )

    def room(self) -> dict[str, Any]:
        """The same as options of a Ray task or actor."""
        options = {"label_selector": self.label_selector, "resources": self.resources}
        return {name: value for name, value in options.items() if value}


class RunBlock(Settings):
    """The `run` block: name and place of the run folder."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its folder")
    root: str = Field("runs", description="folder of run folders; a path or the URI of any pyarrow filesystem")
    shared: bool = Field(
        False,
        description="create run folder and call log for the user's group (mode 2770) instead of the user alone (0700); "
        "a folder that exists keeps its mode, and new files follow it",
    )

    def folder(self, run_dir: str | None = None) -> str:
        """The run folder: `run_dir`, or the run's name below the root."""
        return normalise_location(run_dir or join(self.root, self.name))


class CallsBlock(Settings):
    """The `calls` block: the log of every LLM call."""

    root: str | None = Field(None, description="folder of the call log; default: `calls` in the run folder")
    replay_only: bool = Field(False, description="use only stored replies, and fail on a call without one")

    def folder(self, run_folder: str) -> str:
        """The folder of the call log."""
        return normalise_location(self.root or join(run_folder, "calls"))


class RayBlock(Settings):
    """The `ray` block: the cluster to use, and the limits of a local one."""

    address: str | None = Field(None, description="default: RAY_ADDRESS, or a new cluster on this machine")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a new local cluster; default: all")
    num_gpus: int | None = Field(None, ge=0, description="GPUs of a new local cluster; default: all")
    object_store_memory: int | None = Field(
        None, ge=80_000_000, description="object store of a new local cluster, in bytes; default: Ray's"
    )
    dashboard: bool = Field(
        False, description="start Ray's dashboard with a new local cluster; the run prints its address"
    )
    max_stages: int | None = Field(
        None, ge=1, description="stages that run at once; default: all whose inputs are done (set it without GPUs)"
    )
    tables: Room = Field(Room(), description="nodes for stages without an engine (one task with one CPU per shard)")

    def arguments(self) -> dict[str, Any]:
        """Arguments of `ray.init`."""
        given = {k: v for k, v in self.model_dump(exclude={"dashboard", "max_stages", "tables"}).items()}
        return {k: v for k, v in given.items() if v is not None} | (
            {"include_dashboard": True} if self.dashboard else {}
        )
