"""Calls in flight follow `placement.concurrency`, however prompts were cut into shards, and open rows are bounded."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.models import Placement
from ray_pipeline.graph.asking import Asking, Outcome, ShardTables, Skip
from ray_pipeline.graph.batches import in_batches
from ray_pipeline.graph.driver import RunSettings, execute
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.ray_executor import RayExecutor
from ray_pipeline.graph.session import Session, StageTask
from ray_pipeline.graph.stage import Dag, ShardWork, Stage, StageResult, StageStop, WholeInput, WholeWork
from ray_pipeline.store.keys import prompt_id
from ray_pipeline.store.schemas import CANDIDATES, CRITIQUES
from ray_pipeline.store.tables import ShardedTable
from tests.scripted import ScriptedEngine, said, user

CONCURRENCY = 16
FIXED = {"k": 0, "seed": 0, "generator": "g", "finish_reason": "stop", "response": "x"}


class Full(ScriptedEngine):
    """Gives a reply, to the oldest call, only while as many calls are in flight as may be, or as are left."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.left = rows
        self.waiting: collections.deque[asyncio.Event] = collections.deque()

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        self.waiting.append(mine := asyncio.Event())
        self.most_in_flight = max(self.most_in_flight, len(self.waiting))
        self._go_on()
        await asyncio.wait_for(mine.wait(), timeout=120)
        self.left -= 1
        self._go_on()
        return said("ok")

    def _go_on(self) -> None:
        if len(self.waiting) >= min(CONCURRENCY, self.left) and self.waiting:
            self.waiting.popleft().set()


class Nothing(Settings):
    only: str = ""


class Item(NamedTuple):
    prompt_id: str
    candidate_id: str


def items(shard: ShardTables, settings: Nothing) -> list[Item | Skip]:
    found = [Item(row["prompt_id"], row["candidate_id"]) for row in shard.rows("candidates")]
    return [item if settings.only in item.candidate_id else Skip("other") for item in found]


class World:
    """A stage that asks about each candidate once, and the number of rows that are open at once."""

    def __init__(self, folder: Path, rows: int, shards: int, only: str = "", **placement: Any) -> None:
        self.rows, self.engine, self.open, self.most_open = rows, Full(rows), 0, 0
        place = Placement(**{"concurrency": CONCURRENCY, **placement})
        asking = Asking({"critiques": CRITIQUES}, items, self._ask, "r")
        work = ShardWork(asking, ("critiques",), Nothing(only=only), lambda: self.engine, place)
        self.candidates = Stage("candidates", WholeWork(self._write, tables=("candidates",)), {})
        self.ask = Stage("ask", work, {}, {"candidates": self.candidates})
        failure = FailureSettings(retries=0)
        self.session = Session(str(folder), str(folder / "calls"), shards, failure)
        self.results: dict[str, StageResult] = {}

    def make(self, *stages: Stage) -> None:
        make_here(stages or (self.candidates, self.ask), self.session, self.results, lambda line: None)

    def batches(self, actors: int = 1) -> list[tuple[int, ...]]:
        self.make(self.candidates)
        todo = [("ask", shard) for shard in range(self.session.num_shards)]
        return [shards for _, shards in in_batches([self.task()], todo, actors)]

    def task(self) -> StageTask:
        return self.session.task(self.ask).reading(self.results)

    def _write(self, given: WholeInput) -> dict[str, Any]:
        row = dict.fromkeys(CANDIDATES.names)
        rows = [
            {**row, "candidate_id": f"c{n}", "prompt_id": prompt_id(user(str(n))), **FIXED} for n in range(self.rows)
        ]
        ShardedTable(given.folder.location, "candidates", given.num_shards, given.fingerprint).write_rows(rows)
        return {}

    async def _ask(self, engine: Any, settings: Nothing, item: Item) -> Outcome:
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        reply = await engine.chat(user(item.candidate_id), Sampling())
        self.open -= 1
        row = {**dict.fromkeys(CRITIQUES.names), **item._asdict(), "reason": reply.text, "parse_status": "ok"}
        return Outcome({"critiques": [row]})


@pytest.mark.parametrize(("rows", "shards"), [(120, 32), (200, 2), (20, 8)], ids=["many small", "few big", "all"])
def test_calls_in_flight_do_not_depend_on_the_shards(tmp_path: Path, rows: int, shards: int) -> None:
    world = World(tmp_path, rows, shards)
    world.make()  # else a call waits in vain for others beside it, and the stage fails
    assert world.engine.most_in_flight == CONCURRENCY and world.engine.left == 0
    assert world.results["ask"].rows == {"critiques": rows}
    if shards == 32:
        assert world.most_open <= 3 * CONCURRENCY


@pytest.mark.e2e
def test_ray_data_gives_an_actor_the_shards_that_it_needs(tmp_path: Path) -> None:
    world = World(tmp_path, 120, 32)
    settings = RunSettings(world.session, {}, beat_seconds=1.0)
    outcome = execute(Dag("world", [world.ask]), settings, RayExecutor(), console=Console(file=io.StringIO()))
    assert not outcome.failures and outcome.results["ask"].rows == {"critiques": 120}


def test_small_shards_are_put_together_and_no_actor_is_left_without_work(tmp_path: Path) -> None:
    batches = World(tmp_path, 120, 32).batches()
    assert [shard for batch in batches for shard in batch] == list(range(32))
    assert all(6 <= len(batch) <= 11 for batch in batches)  # of about 4 rows, and 2 × 16 rows are open
    assert set(map(len, World(tmp_path, 120, 32, shards_in_flight=32).batches())) == {1}
    assert len(World(tmp_path, 120, 32, concurrency=2048).batches()) == 3
    assert len(World(tmp_path, 120, 32, concurrency=2048).batches(actors=4)) == 11
    assert len(World(tmp_path, 120, 32, only="nobody").batches()) == 3
    own = World(tmp_path, 120, 32, concurrency=None)
    own.engine.useful_concurrency = CONCURRENCY  # type: ignore[attr-defined]
    assert own.batches() == batches


def test_large_shards_are_batches_of_their_own(tmp_path: Path) -> None:
    assert World(tmp_path, 240, 8).batches() == [(shard,) for shard in range(8)]


def test_items_that_cannot_be_counted_are_their_shards_trouble(tmp_path: Path) -> None:
    world = World(tmp_path, 8, 4)
    assert isinstance(world.ask.work, ShardWork)

    def broken(error: Exception, shard: ShardTables, settings: Nothing) -> list[Item | Skip]:
        raise error

    asking: Any = world.ask.work.function
    for error in (KeyError("no such column"), StageStop("the input is damaged")):
        function = dataclasses.replace(asking, items=functools.partial(broken, error))
        object.__setattr__(world.ask, "work", dataclasses.replace(world.ask.work, function=function))
        if isinstance(error, KeyError):
            assert len(world.batches()) == 4
        else:
            with pytest.raises(StageStop, match="damaged"):
                world.batches()


def test_a_shard_that_a_lost_actor_finished_is_not_made_again(tmp_path: Path) -> None:
    """Its actor is lost with another shard of the batch, and the batch goes to another actor."""
    from ray_pipeline.graph.shards import EngineHost

    world = World(tmp_path, 8, 2)
    world.make(world.candidates)
    task = world.task()
    world.engine.left = 0  # no call waits for others
    first = asyncio.run(EngineHost([task]).make("ask", 1))
    assert first.status == "ok"
    before = world.engine.left
    assert asyncio.run(EngineHost([task]).make("ask", 1)) == first and world.engine.left == before
    (tmp_path / task.ref.folder / "_receipts/shard-00001.json").unlink()
    again = asyncio.run(EngineHost([task]).make("ask", 1))
    assert again.rows == first.rows and again.usage["calls_log"] == first.rows["critiques"]
