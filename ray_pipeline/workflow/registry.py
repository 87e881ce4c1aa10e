"""Workflows by name: the modules of `dags`, installed packages, or a Python file; all of them register themselves."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ray_pipeline import extensions
from ray_pipeline.config.messages import ConfigError

if TYPE_CHECKING:
    from ray_pipeline.audit.run import Audit
    from ray_pipeline.graph.results import Run
    from ray_pipeline.graph.stage import Dag
    from ray_pipeline.store.files import Folder
    from ray_pipeline.workflow.config import RunConfig

C = TypeVar("C", bound="RunConfig")


@dataclasses.dataclass(frozen=True)
class Workflow(Generic[C]):
    """A workflow.

    Attributes:
        name: as `quorum run` takes it.
        config: class of its configuration.
        wire: configuration and run folder → its stages. Names of stages are unique.
        page: writes the page of a run again from its tables, as far as there are any; returns its folder.
        numbers: file beside the page that `quorum compare` reads; None where runs cannot be compared.
        audit: walks every training row back; None where it makes none.
    """

    name: str
    config: type[C]
    wire: Callable[[C, str], Dag]
    page: Callable[[Run], Folder] | None = None
    numbers: str | None = None
    audit: Callable[[Run, C], Audit] | None = None


def workflow_names() -> list[str]:
    """Names that `find_workflow` takes; no workflow is imported."""
    return list(dict.fromkeys([*_shipped(), *extensions.names("workflow")]))


def find_workflow(reference: str) -> Workflow[Any]:
    """The workflow of a name, or the one that a Python file registers.

    Raises:
        ConfigError: unknown name, or a file that does not register a workflow.
    """
    if reference in _shipped():
        importlib.import_module(f"dags.{reference}")
    elif ".py" not in reference and reference not in extensions.names("workflow"):
        raise ConfigError(
            f"unknown workflow {reference!r}; choose from {', '.join(workflow_names())}, or give a .py file"
        )
    try:
        found: Workflow[Any] = extensions.find("workflow", reference).value
    except extensions.ExtensionError as error:
        raise ConfigError(str(error)) from error
    return found


def _shipped() -> list[str]:
    """Modules of `dags`; each registers the workflow of its name."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module("dags").__path__))
