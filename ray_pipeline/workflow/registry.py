"""Workflows by name: the modules of `dags`, installed packages (entry points `quorum.workflows`), or a Python file."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ray_pipeline.config.messages import ConfigError
from ray_pipeline.workflow.config import RunConfig

if TYPE_CHECKING:
    from ray_pipeline.audit.run import Audit
    from ray_pipeline.graph.results import Run
    from ray_pipeline.graph.stage import Dag
    from ray_pipeline.store.files import Folder

C = TypeVar("C", bound=RunConfig)

ENTRY_POINTS = "quorum.workflows"


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
    audit: Callable[[Run], Audit] | None = None


def workflow_names() -> list[str]:
    """Names that `find_workflow` takes; no workflow is imported."""
    return [*_shipped(), *sorted({point.name for point in _installed()} - set(_shipped()))]


def find_workflow(reference: str) -> Workflow[Any]:
    """The workflow of a name, or the one that a Python file defines.

    Raises:
        ConfigError: unknown name, no such file, or a module that does not define exactly one workflow.
    """
    if reference.endswith(".py"):
        return _only_workflow(_load_file(os.path.abspath(os.path.expanduser(reference))), reference)
    if reference in _shipped():
        return _only_workflow(importlib.import_module(f"dags.{reference}"), f"dags/{reference}.py")
    for point in _installed():
        if point.name == reference:
            found = point.load()
            return found if isinstance(found, Workflow) else _only_workflow(found, point.value)
    raise ConfigError(f"unknown workflow {reference!r}; choose from {', '.join(workflow_names())}, or give a .py file")


def _shipped() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module("dags").__path__))


@functools.cache
def _installed() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=ENTRY_POINTS))


def _only_workflow(module: ModuleType, source: str) -> Workflow[Any]:
    found = {id(value): value for value in vars(module).values() if isinstance(value, Workflow)}
    if len(found) != 1:
        names = ", ".join(workflow.name for workflow in found.values()) or "none"
        raise ConfigError(f"{source} must define one Workflow value; it has {names}")
    return next(iter(found.values()))


@functools.cache
def _load_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        raise ConfigError(f"no workflow file {path}; give a Python file that defines a Workflow")
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules:
        raise ConfigError(f"{path}: a module {name!r} is loaded already; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import it: it lies outside their path
    return module
