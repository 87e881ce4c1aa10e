"""An agent stage: which rows of a shard to ask a model about, and the call for one of them.

The module of a stage writes those two functions. Running the calls together, the call log, progress, the watch over
unreadable replies, counts and tables are added here. Nothing in this module needs Ray.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.schemas import READ_STATUSES, to_table

Row = dict[str, Any]
"""One row of a table, by column."""

Counter = Callable[[Mapping[str, Sequence[Row]]], Mapping[str, int]]
"""Counts of a shard, from its rows by kind of table. They are summed over shards."""


class OfPrompt(Protocol):
    """An item to ask about. The prompt it belongs to decides where its calls are logged."""

    @property
    def prompt_id(self) -> str: ...


S = TypeVar("S", bound=Settings)
R = TypeVar("R", bound=OfPrompt)


@dataclasses.dataclass(frozen=True)
class ShardTables:
    """One shard of every input table by role, and the facts of the stages that wrote them."""

    tables: Mapping[str, pa.Table]
    facts: Mapping[str, Mapping[str, Any]]

    def rows(self, role: str) -> list[Row]:
        rows: list[Row] = self.tables[role].to_pylist()
        return rows

    def under(self, prefix: str) -> list[pa.Table]:
        """Tables of all roles that begin with `prefix`, ordered by role."""
        return [self.tables[role] for role in sorted(self.tables) if role.startswith(prefix)]

    def messages(self) -> dict[str, list[Message]]:
        """Chat messages by prompt_id, from the input `prompts`."""
        return {row["prompt_id"]: row["messages"] for row in self.rows("prompts")}


@dataclasses.dataclass(frozen=True)
class Skip:
    """A row that needs no call and gives no row, counted under `count`."""

    count: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one item gave.

    Attributes:
        rows: new rows by kind of table.
        replies: name of whoever replied (a judge, the generator) and whether the reply could be read. A stage stops
            when too few replies under one name can be read.
    """

    rows: Mapping[str, Sequence[Row]]
    replies: Sequence[tuple[str, bool]] = ()


def reply_status(name: str, *statuses: str) -> list[tuple[str, bool]]:
    """`Outcome.replies` from parse statuses. A reply that was never requested, or could not be because the prompt is
    too long, is not the model's fault and is left out."""
    return [(name, status in READ_STATUSES) for status in statuses if status not in ("too_long", "skipped")]


def count_by(table: str, *columns: str) -> Counter:
    """Rows of one table by the values of some columns, joined by dots (`helpfulness.ok`)."""
    return functools.partial(_count_by, table, columns)


def _count_by(table: str, columns: Sequence[str], rows: Mapping[str, Sequence[Row]]) -> Mapping[str, int]:
    return collections.Counter(".".join(row[column] for column in columns) for row in rows[table])


def _count_nothing(rows: Mapping[str, Sequence[Row]]) -> Mapping[str, int]:
    return {}


@dataclasses.dataclass(frozen=True)
class Asking(Generic[S, R]):
    """An agent stage, without its settings, model and inputs. S: settings; R: an item to ask about.

    `items` and `ask` are pure apart from the engine that `ask` receives: to find out which calls a stage would make,
    pass `ask` an engine that records them.

    Attributes:
        tables: schema of every kind of table that is written, in order.
        items: what to ask about, in the order of the rows.
        ask: the rows of one item. The engine logs its calls under the item's prompt and `role`.
        role: name of the calls in the call log, for all items or by item.
        counts: counts of the finished rows.
        version: see `Stage.version`.
    """

    tables: Mapping[str, pa.Schema]
    items: Callable[[ShardTables, S], Iterable[R | Skip]]
    ask: Callable[[ChatEngine, S, R], Awaitable[Outcome]]
    role: str | Callable[[S, R], str]
    counts: Counter = _count_nothing
    version: int = 1

    def stage(
        self,
        name: str,
        settings: S,
        model: ModelSettings,
        inputs: Mapping[str, Stage],
        *,
        group: str = "",
        holds: str = "",
        train: Stage | None = None,
    ) -> Stage:
        """The stage under a name; its settings and the identity of the model decide its output.

        Args:
            holds: role of its table, see `Stage.role`.
            train: the stage that makes the model's weights. They need not exist yet: its fingerprint stands for them.
        """
        return Stage(
            name=name,
            version=self.version,
            group=group,
            role=holds,
            work=ShardWork(
                function=self,
                tables=tuple(self.tables),
                settings=settings,
                engine=model.factory(),
                placement=model.placement,
            ),
            config={**settings.decisive(), "engine": model.semantics()},
            inputs={**inputs, **({"train": train} if train is not None else {})},
            external=model.weights() if train is None else {},
        )

    async def __call__(self, given: ShardInput) -> ShardOutput:
        """Ask about all items of a shard at once; rows keep the order of the items.

        Raises:
            ValueError: the stage has no engine, or `ask` returned rows of a table that is not in `tables`.
        """
        if given.engine is None:
            raise ValueError("an agent stage needs an engine")
        settings: S = given.settings
        counts: collections.Counter[str] = collections.Counter()
        items: list[R] = []
        for item in self.items(ShardTables(given.tables, given.facts), settings):
            if isinstance(item, Skip):
                counts[item.count] += 1
            else:
                items.append(item)
        given.plan(len(items))
        outcomes = await all_of(self._ask_one(given, given.engine, settings, item, counts) for item in items)
        if unknown := {kind for outcome in outcomes for kind in outcome.rows} - set(self.tables):
            raise ValueError(f"rows of {', '.join(sorted(unknown))}, but the stage writes {', '.join(self.tables)}")
        rows = {kind: [row for outcome in outcomes for row in outcome.rows.get(kind, ())] for kind in self.tables}
        counts.update(self.counts(rows))
        return ShardOutput({kind: to_table(rows[kind], schema) for kind, schema in self.tables.items()}, dict(counts))

    async def _ask_one(
        self, given: ShardInput, engine: LoggedEngine, settings: S, item: R, counts: collections.Counter[str]
    ) -> Outcome:
        role = self.role if isinstance(self.role, str) else self.role(settings, item)
        bound = engine.bound(item.prompt_id, role)
        outcome = await self.ask(bound, settings, item)
        if bound.cut_prompts:  # a mark in the tables that have the column
            counts["prompt_cut"] += 1
            for row in (row for rows in outcome.rows.values() for row in rows):
                row["prompt_cut"] = True
        for name, read in outcome.replies:
            given.watch(name, read)
        given.tick(1)
        return outcome
