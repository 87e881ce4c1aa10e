"""A stage is a value with a fingerprint; a DAG is the stages that a workflow needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ray_pipeline.config.settings import refuse_repeated
from ray_pipeline.engines.models import EngineFactory, Placement
from ray_pipeline.engines.usage import Usage
from ray_pipeline.extensions import digests_in
from ray_pipeline.store.files import RESULT, Folder
from ray_pipeline.store.keys import fingerprint
from ray_pipeline.store.locations import join

if TYPE_CHECKING:
    import pyarrow as pa

    from ray_pipeline.engines.logged import LoggedEngine
    from ray_pipeline.store.tables import ShardedTable


class StageStop(RuntimeError):
    """A stage must not go on. The message says what is wrong and what to do; it is shown to the user as it is."""


class BadInput(StageStop):
    """What the user gave cannot be used: the same command would fail again until it is changed."""


@dataclasses.dataclass
class ShardInput:
    """What a shard function gets: its shard of every input table, and an engine if the stage has one.

    Attributes:
        tables: by input role, this shard's table; a role whose stage writes several tables appears as `role.kind`.
        facts: by input role, what that stage found out about the whole run.
        engine: the call log with the engine behind it, or None for a columnar stage.
        settings: the stage's own settings.
        tick: called with a number of rows when they are done, for the progress display.
        watch: called with a judge's name and whether its reply was read; stops the stage when too few are.
        plan: called with the number of rows that `tick` will count in this shard, once they are known.
    """

    shard: int
    num_shards: int
    tables: Mapping[str, pa.Table]
    facts: Mapping[str, Mapping[str, Any]]
    engine: LoggedEngine | None
    settings: Any
    tick: Callable[[int], None]
    watch: Callable[[str, bool], None]
    plan: Callable[[int], None] = lambda rows: None


@dataclasses.dataclass(frozen=True)
class ShardOutput:
    """The tables of a shard by kind, and counts that add up over shards (rows dropped by reason, for example)."""

    tables: Mapping[str, pa.Table]
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ShardWork:
    """Work that maps shard i of the inputs to shard i of the output.

    Attributes:
        function: importable; a coroutine function when the stage has an engine.
        tables: kinds of table that it writes. One: into the stage's folder; several: each into a folder of its kind.
        engine: makes the engine, once an actor; None for a columnar stage, which runs as tasks.
        settings: handed to the function as it is.
    """

    function: Callable[[ShardInput], Awaitable[ShardOutput]] | Callable[[ShardInput], ShardOutput]
    tables: tuple[str, ...]
    settings: Any = None
    engine: EngineFactory | None = None
    placement: Placement = dataclasses.field(default_factory=Placement)


@dataclasses.dataclass
class WholeInput:
    """What a whole-run function gets.

    Attributes:
        inputs: results of the stages that it reads, by role.
        folder: where it writes; it is the stage's own and keeps what an interrupted attempt left there.
        calls_root: folder of the call log.
        log: a line for the run's log and terminal.
        tick: how far it is, of how much, with the newest figures in words.
        stopping: why it should end in good order now, or None.
        phase: called with what it is doing in a word or two ("loading model"), for the progress display.
        settings_key: what decides the output beside its inputs, see `Stage.settings_key`.
        again: the user asked for a new output, whatever is there.
    """

    inputs: Mapping[str, StageResult]
    folder: Folder
    calls_root: Folder
    fingerprint: str
    num_shards: int
    settings: Any
    log: Callable[[str], None]
    tick: Callable[[int, int, str], None]
    stopping: Callable[[], str | None] = lambda: None
    phase: Callable[[str], None] = lambda phase: None
    settings_key: str = ""
    again: bool = False


@dataclasses.dataclass(frozen=True)
class WholeWork:
    """Work on whole tables (the prompt loader, the training writer, training, evaluation).

    The function returns its counts and plain facts, which become the stage's result.

    Attributes:
        trains: the function starts workers of Ray Train.
    """

    function: Callable[[WholeInput], dict[str, Any]]
    settings: Any = None
    tables: tuple[str, ...] = ()
    trains: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One step of a DAG.

    Attributes:
        name: unique in the DAG.
        group: the word that `--from` and `--to` know it by; several stages may share it.
        role: what its table is, by which others find it; default: the kind of its first table. Not in the fingerprint.
        version: raised when the code changes what the stage writes.
        round: of a run in several rounds, that of the stage, from 1; 0: of all rounds. Not in the fingerprint.
        repeatable: making it again gives the same output. Where it does not (training), everything that was made
            from an output that is gone is made again too.
        config: the slice of the configuration that decides its output, as plain data.
        inputs: the stages that it reads, by role.
        external: digests of what it reads from outside the run: files, hub commits, model identities.
    """

    name: str
    work: ShardWork | WholeWork
    config: Any
    inputs: Mapping[str, Stage] = dataclasses.field(default_factory=dict)
    external: Mapping[str, str] = dataclasses.field(default_factory=dict)
    version: int = 1
    repeatable: bool = True
    group: str = ""
    view: str = ""
    role: str = ""
    round: int = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        # Kept: every stage asks all that it reads, and the number of paths through a DAG grows fast.
        inputs = {role: stage.fingerprint for role, stage in self.inputs.items()}
        return self._fingerprint(inputs)

    @functools.cached_property
    def settings_key(self) -> str:
        """The fingerprint that it would have without inputs: equal for stages that differ in what they read alone."""
        return self._fingerprint({})

    def _fingerprint(self, inputs: Mapping[str, str]) -> str:
        external = {**self.external, **digests_in(self.config)}
        return fingerprint(self.name, self.version, self.config, inputs, external)

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.fingerprint}"

    @property
    def group_name(self) -> str:
        return self.group or self.name

    @property
    def role_name(self) -> str:
        return self.role or next(iter(self.work.tables), "")


@dataclasses.dataclass(frozen=True)
class StageRef:
    """Where the output of a stage is, or will be, and what it is (`role`, `round`): enough to find its tables."""

    name: str
    fingerprint: str
    folder: str
    num_shards: int
    tables: tuple[str, ...]
    role: str = dataclasses.field(default="", kw_only=True)
    round: int = dataclasses.field(default=0, kw_only=True)

    @classmethod
    def of(cls, stage: Stage, run: str, num_shards: int) -> StageRef:
        """The reference to a stage in a run folder."""
        folder = join(run, stage.folder_name)
        return cls(
            stage.name,
            stage.fingerprint,
            folder,
            num_shards,
            stage.work.tables,
            role=stage.role_name,
            round=stage.round,
        )

    def table(self, kind: str | None = None) -> ShardedTable:
        """The (only) table of the stage, or the one of a kind."""
        from ray_pipeline.store.tables import ShardedTable

        if kind is None:
            (kind,) = self.tables
        folder = self.folder if len(self.tables) == 1 else join(self.folder, kind)
        return ShardedTable(folder, kind, self.num_shards, self.fingerprint)

    def missing(self) -> list[int]:
        """Shards of which a table is missing."""
        return sorted({shard for kind in self.tables for shard in self.table(kind).state().missing})

    def count_rows(self) -> dict[str, int]:
        """Rows of every table. Raises StageStop when a shard is missing, naming it."""
        rows: dict[str, int] = {}
        for kind in self.tables:
            state = self.table(kind).state()
            if state.missing:
                raise StageStop(
                    f"{self.name}: shards {state.missing[:8]} of {kind} are missing after the stage; rerun the command"
                )
            rows[kind] = sum(state.rows.values())
        return rows


@dataclasses.dataclass(frozen=True)
class StageResult(StageRef):
    """What travels between stages: where the output is and what is in it, never the data."""

    rows: Mapping[str, int]
    facts: Mapping[str, Any]
    usage: Usage = dataclasses.field(default_factory=Usage)
    cached: bool = False

    @classmethod
    def read(cls, ref: StageRef, stored: Mapping[str, Any]) -> StageResult:
        """From what `plain` gave. Raises KeyError, TypeError and ValueError when it is something else."""
        rows, facts, usage = (dict(stored[name]) for name in ("rows", "facts", "usage"))
        return cls(**vars(ref), rows=rows, facts=facts, usage=Usage() + Usage.read(usage), cached=True)

    def plain(self) -> dict[str, Any]:
        """What is stored of it, here and in the manifest."""
        return {"rows": dict(self.rows), "facts": dict(self.facts), "usage": self.usage.plain()}

    def save(self, inputs: Mapping[str, StageRef]) -> StageResult:
        """Record that the stage is done, and from which folders: what a later run finds (`load_result`)."""
        folders = {role: f"{parent.name}-{parent.fingerprint}" for role, parent in inputs.items()}
        value = {"stage": self.name, "fingerprint": self.fingerprint, "inputs": folders, **self.plain()}
        Folder(self.folder).write_json(RESULT, value)
        return self


class Dag:
    """Stages in an order in which every one comes after those that it reads."""

    def __init__(self, name: str, stages: Iterable[Stage]) -> None:
        self.name = name
        self.stages = list(_with_inputs(stages))
        refuse_repeated((stage.name for stage in self.stages), f"stages of {name}")

    @functools.cached_property
    def groups(self) -> list[str]:
        """The words that `--from` and `--to` accept, in order; they accept the position in this list (from 1), too."""
        return list(dict.fromkeys(stage.group_name for stage in self.stages))

    def group(self, reference: str) -> str:
        """The group with a name or a number.

        Raises:
            ValueError: there is no such group, naming those that there are.
        """
        groups = self.groups
        if reference in groups:
            return reference
        if reference.isdecimal() and 1 <= int(reference) <= len(groups):
            return groups[int(reference) - 1]
        numbered = ", ".join(f"{number} {name}" for number, name in enumerate(groups, 1))
        raise ValueError(f"{self.name} has no stage {reference!r}; it has {numbered}")

    def upto(self, group: str | None) -> list[Stage]:
        """The stages that a group (see `group`) needs, itself included; all of them for None."""
        if group is None:
            return list(self.stages)
        group = self.group(group)
        wanted = _with_inputs(stage for stage in self.stages if stage.group_name == group)
        return [stage for stage in self.stages if stage in wanted]

    def downstream(self, group: str) -> list[Stage]:
        """The stages of a group (see `group`) and everything that reads them."""
        group = self.group(group)
        found: dict[Stage, None] = {}
        for stage in self.stages:
            if stage.group_name == group or any(parent in found for parent in stage.inputs.values()):
                found[stage] = None
        return list(found)

    def is_before(self, stage: Stage, group: str) -> bool:
        """Whether a stage is an ancestor of the stages of a group (see `group`)."""
        group = self.group(group)
        return stage in _with_inputs(p for s in self.stages if s.group_name == group for p in s.inputs.values())


def _with_inputs(stages: Iterable[Stage]) -> dict[Stage, None]:
    """Stages and all that they read, directly or through others, each once and after those that it reads."""
    found: dict[Stage, None] = {}

    def add(stage: Stage) -> None:
        if stage not in found:
            for parent in stage.inputs.values():
                add(parent)
            found[stage] = None

    for stage in stages:
        add(stage)
    return found
