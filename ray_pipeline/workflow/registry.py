"""Workflows by name: from the modules of `dags`, installed packages, or a Python file, each of which registers one."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ray_pipeline import extensions
from ray_pipeline.config.messages import ConfigError

if TYPE_CHECKING:
    from ray_pipeline.audit.run import Audit
    from ray_pipeline.config.starters import Machine, Starter
    from ray_pipeline.data.scored import ScoredDataset
    from ray_pipeline.graph.results import Run
    from ray_pipeline.graph.stage import Dag
    from ray_pipeline.store.files import Folder
    from ray_pipeline.workflow.config import RunConfig

C = TypeVar("C", bound="RunConfig")


@dataclasses.dataclass(frozen=True)
class Workflow(Generic[C]):
    """A workflow.

    Attributes:
        name: its name for `quorum run`.
        config: class of its configuration.
        wire: configuration and run folder → its stages. Names of stages are unique.
        page: rebuilds the page of a run from its tables, finished or not; returns its folder.
        numbers: file beside the page that `quorum compare` reads; None if its runs cannot be compared.
        audit: traces every training row back; None if it makes no training rows.
        scored: the datasets that it makes from candidates and their scores; `quorum regate` rebuilds them.
        pocket: name of the shipped configuration that runs it on the pocket models, the default of `--config`.
        starters: machine → the starter file that `quorum init` writes for it.
        not_on: machine → why it has no starter file for that one, and what to do instead.
        thresholds: prefixes of the keys that decide how these follow from stored scores.
    """

    name: str
    config: type[C]
    wire: Callable[[C, str], Dag]
    page: Callable[[Run], Folder] | None = None
    numbers: str | None = None
    audit: Callable[[Run, C], Audit] | None = None
    scored: Callable[[C], Sequence[ScoredDataset]] | None = None
    pocket: str | None = None
    starters: Mapping[Machine, Starter] = dataclasses.field(default_factory=dict)
    not_on: Mapping[Machine, str] = dataclasses.field(default_factory=dict)
    thresholds: tuple[str, ...] = ("gate.", "datasets.")


def workflow_names() -> list[str]:
    """Names that `find_workflow` accepts; imports no workflow."""
    return list(dict.fromkeys([*_shipped(), *extensions.names("workflow")]))


def find_workflow(reference: str) -> Workflow[Any]:
    """The workflow with a name, or the one that a Python file registers.

    Raises:
        ConfigError: unknown name, or a file that does not register a workflow.
    """
    if reference in _shipped():
        importlib.import_module(f"dags.{reference}")
    elif ".py" not in reference and reference not in extensions.names("workflow"):
        raise ConfigError(
            f"unknown workflow {reference!r}; choose from {', '.join(workflow_names())}, or name a .py file"
        )
    try:
        workflow: Workflow[Any] = extensions.find("workflow", reference).value
    except extensions.ExtensionError as error:
        raise ConfigError(str(error)) from error
    return workflow


def default_config(workflow: Workflow[Any]) -> str:
    """Name of the shipped configuration that runs a workflow on the pocket models. Raises ConfigError for one of the
    user's own, which has none."""
    if workflow.pocket is None:
        raise ConfigError(f"{workflow.name} has no configuration of its own; pass one with --config")
    return workflow.pocket


def _shipped() -> list[str]:
    """Modules of `dags`; each registers the workflow with its name."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module("dags").__path__))
