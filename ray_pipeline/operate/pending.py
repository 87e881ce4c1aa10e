"""What a run is about to do, as the checks before it see it, and what they find."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.resume import drop_stale, finished, to_do
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, ShardWork, Stage, StageResult, WholeWork
from ray_pipeline.operate.estimate import StandIns, calls_model, needed
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow.config import RunConfig

Scope = Literal["light", "offline", "all"]
"""`light`: nothing that takes seconds (network, rows, large packages); `offline`: no network."""

#: Prompts of each split whose calls are tried out on stand-in replies.
_SAMPLE = 2


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found about one thing.

    Attributes:
        detail: figures, or the problem with its remedy, or why it was not checked.
    """

    what: str
    state: Literal["ok", "warning", "problem", "not checked"]
    detail: str = ""

    @property
    def line(self) -> str:
        return f"{self.state:<11}  {self.what}{': ' if self.detail else ''}{self.detail}"


@dataclasses.dataclass(frozen=True)
class Pending:
    """What a run is about to do.

    Attributes:
        todo: stages that are not done, each after those that it reads.
        results: of the stages that are.
        on_cluster: engines may run on other machines than this one.
        engines: whether to start local engines for test calls; None: the run itself is about to start them.
    """

    config: RunConfig
    session: Session
    todo: Sequence[Stage]
    results: Mapping[str, StageResult]
    scope: Scope = "all"
    on_cluster: bool = False
    engines: bool | None = None
    scratch: str = ""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        dag: Dag,
        session: Session,
        from_group: str | None = None,
        to_group: str | None = None,
        **other: Any,
    ) -> Self:
        """Raises ValueError: unknown stages, a stage before `from_group` that is not complete, a file as run folder."""
        if Folder(session.folder).is_local and os.path.isfile(session.folder):
            raise StoreError(f"{session.folder} is a file; choose another run folder")
        wanted = dag.upto(to_group)
        results = finished(dag, wanted, session, from_group, lambda line: None)
        drop_stale(wanted, results)
        return cls(config, session, to_do(wanted, results), results, **other)

    @property
    def roots(self) -> list[Stage]:
        """Stages to do that read what the user gave, and no other stage."""
        return [stage for stage in self.todo if not stage.inputs and isinstance(stage.work, WholeWork)]

    @functools.cached_property
    def models(self) -> dict[str, tuple[ModelSettings, list[Stage]]]:
        """Key of a model in the file → the model and the stages to do that call it."""
        found: dict[str, tuple[ModelSettings, list[Stage]]] = {}
        for key, model in self.config.served().items():
            factory: Any = model.factory()
            stages = [stage for stage in self.todo if _spec_of(stage) == factory.args[0]]
            if stages and not any(other == model for other, _ in found.values()):
                found[key] = model, stages
        return found

    @functools.cached_property
    def stand_ins(self) -> StandIns:
        """Where stages are tried out on stand-in replies."""
        return StandIns(self.scratch, lambda stage: _quarter, lambda stage: 16.0, _SAMPLE)

    @functools.cached_property
    def tried(self) -> str:
        """Try out all stages to do that call a model; why that was not possible, or an empty text."""
        if self.scope == "light":
            return "takes seconds; run `quorum check`"
        try:
            for stage in needed(filter(calls_model, self.todo)):
                if stage in self.stand_ins:
                    continue
                if not stage.inputs and stage.name in self.results:
                    self.stand_ins.take(stage, self.results[stage.name])
                elif not stage.inputs:
                    return f"it needs the rows of {stage.name}"
                else:
                    self.stand_ins.make(stage)
        except Exception as error:  # stand-in replies may be what a user's strategy does not expect
            return f"the stages could not be tried out on stand-in replies ({type(error).__name__}: {error})"
        return ""


def names(stages: Sequence[Stage]) -> str:
    """Names of stages for a message, the first few of many."""
    shown = [stage.name for stage in stages[:3]]
    return ", ".join(shown) + (f" and {len(stages) - 3} more" if len(stages) > 3 else "")


def _quarter(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages) // 4


def _spec_of(stage: Stage) -> Any:
    """Specification of the engine of a stage; None without one."""
    engine = stage.work.engine if isinstance(stage.work, ShardWork) else None
    return engine.args[0] if isinstance(engine, functools.partial) and engine.args else None
