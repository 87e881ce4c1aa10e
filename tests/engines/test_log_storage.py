"""No call starts while its reply could not be kept: full disks, read-only and slow storage under the call log."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines import log_storage
from ray_pipeline.engines.base import Completion, EngineStop, Message, Sampling
from ray_pipeline.engines.log_storage import LogStorage
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.store.calls import model_folder
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id, shard_of
from tests.scripted import ScriptedEngine, echo, logged_calls, user

SHARDS = 4
TEXTS = [f"prompt {i}" for i in range(60)]
IN_FLIGHT = 6


class Disk:
    """The files below a folder: `number` of the error that a write there has, and whether it `responds` at all."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number, self.responds = 0, threading.Event()
        self.responds.set()
        write = Folder._write_bytes

        def written(folder: Folder, name: str, data: bytes) -> None:
            if folder.location.startswith(str(root)):
                assert self.responds.wait(30)
                if self.number:
                    raise OSError(self.number, "No space left on device")
            write(folder, name, data)

        monkeypatch.setattr(Folder, "_write_bytes", written)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUORUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "calls"


@pytest.fixture
def disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(root, monkeypatch)


class Held(ScriptedEngine):
    """Answers some calls and does something with the last of them; the next are held until they are let go.

    Attributes:
        begun: calls that have started, answered or not.
    """

    def __init__(self, last: Callable[[], None], number: int = 12) -> None:
        super().__init__(echo)
        self.begun, self.go = 0, asyncio.Event()
        self._last, self._number = last, number

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        self.begun += 1
        if self.begun == self._number:
            self._last()
        elif self.begun > self._number:
            await self.go.wait()
        return await super().chat(messages, sampling)


class Shards:
    """All shards of a stage on one engine, as an actor has them."""

    def __init__(self, root: Path, engine: ScriptedEngine, num_shards: int = SHARDS) -> None:
        self.engine, self._num_shards = engine, num_shards
        self.storage = LogStorage(engine, Folder(str(root)), num_shards)
        limit = asyncio.Semaphore(IN_FLIGHT)
        self.logs = [
            LoggedEngine(
                engine, Folder(str(root)), shard, num_shards, limit=limit, storage=self.storage, flush_seconds=0.05
            )
            for shard in range(num_shards)
        ]

    async def all(self, texts: Sequence[str] = TEXTS) -> list[BaseException | None]:
        """How the shards end."""
        return await asyncio.gather(
            *(self._one(shard, texts) for shard in range(self._num_shards)), return_exceptions=True
        )

    async def _one(self, shard: int, texts: Sequence[str]) -> None:
        async with self.logs[shard] as log:
            mine = [t for t in texts if shard_of(prompt_id(user(t)), self._num_shards) == shard]
            await asyncio.gather(*(log.bound(prompt_id(user(t)), "r").chat(user(t), Sampling()) for t in mine))


def asked(*engines: ScriptedEngine) -> list[str]:
    return [messages[0]["content"] for engine in engines for messages, _ in engine.asked]


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_shards_that_begin_together_share_a_listing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    names = Folder.names
    monkeypatch.setattr(Folder, "names", lambda self, suffix="": listed.append(self.location) or names(self, suffix))
    engine = ScriptedEngine(echo)
    of_calls = model_folder(Folder(str(root)), engine.identity).location

    async def go() -> None:
        for session in range(2):  # nothing is made twice
            assert await Shards(root, engine, 64).all() == [None] * 64
            assert sorted(asked(engine)) == sorted(TEXTS)
            assert listed.count(of_calls) <= 16 * (session + 1)  # some come during a listing, and share the next one

    run(go())


def test_a_listing_that_has_begun_serves_nobody_who_comes_later(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, go_on, names = Folder(str(root)), threading.Event(), Folder.names
    begun: list[int] = []

    def held(self: Folder, suffix: str = "") -> list[str]:
        found = names(self, suffix)
        begun.append(len(found))
        assert go_on.wait(30)
        return found

    monkeypatch.setattr(Folder, "names", held)

    async def go() -> None:
        storage = LogStorage(ScriptedEngine(echo), folder)
        first = asyncio.create_task(storage.parts(folder))
        await until(lambda: len(begun) == 1)
        folder.write_bytes("0000of0004-a-000000.parquet", b"")
        later = [asyncio.create_task(storage.parts(folder)) for _ in range(5)]
        await asyncio.sleep(0.05)
        go_on.set()
        assert (await first).of(0, 4) == []
        for one in later:
            assert (await one).of(0, 4) == ["0000of0004-a-000000.parquet"]
        assert begun == [0, 1]

    run(go())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_no_call_starts_while_replies_cannot_be_written(root: Path, disk: Disk, number: int) -> None:
    engine = Held(lambda: setattr(disk, "number", number))

    async def go() -> None:
        shards = Shards(root, engine)
        work = asyncio.create_task(shards.all())
        await until(lambda: not shards.storage.is_ready)
        at_once = engine.begun
        engine.go.set()
        await until(lambda: engine.calls == at_once)
        await asyncio.sleep(0.3)
        assert engine.begun == at_once < len(TEXTS) and not work.done()
        disk.number = 0
        assert await work == [None] * SHARDS

    run(go())
    assert sorted(asked(engine)) == sorted(TEXTS)
    assert logged_calls(Folder(str(root))).num_rows == len(TEXTS)
    assert [log.name for log in root.parent.glob("cache/*/*/*")] == []


def broken_run(root: Path, disk: Disk) -> tuple[ScriptedEngine, list[BaseException | None]]:
    """The disk is full after some calls and stays so: the engine, and how the shards end."""
    engine = Held(lambda: setattr(disk, "number", errno.ENOSPC))

    async def go() -> list[BaseException | None]:
        shards = Shards(root, engine)
        work = asyncio.create_task(shards.all())
        await until(lambda: not shards.storage.is_ready)
        engine.go.set()
        return await work

    ends: list[BaseException | None] = run(go())
    return engine, ends


def test_a_disk_that_stays_full_stops_the_stage_and_nothing_is_paid_twice(
    root: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_storage, "PATIENCE_SECONDS", 0.3)
    second, third = ScriptedEngine(echo), ScriptedEngine(echo)
    first, ends = broken_run(root, disk)
    assert {type(end) for end in ends} == {EngineStop}
    for end in ends:
        assert f"cannot write {root}/" in str(end)
        assert "No space left on device; free disk space there, then rerun the same command to resume" in str(end)
    assert first.calls < len(TEXTS)

    # Still full: what this machine kept is not paid for again.
    assert all("free disk space there" in str(end) for end in run(Shards(root, second).all())) and second.calls == 0

    disk.number = 0
    assert run(Shards(root, third, 2).all()) == [None] * 2
    assert sorted(asked(first, third)) == sorted(TEXTS)
    assert list(root.parent.glob("cache/*/*/*")) == []


def test_replies_that_cannot_be_kept_anywhere_are_counted(
    root: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_storage, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setenv("QUORUM_CACHE", str(root / "cache"))
    (first, _), again = broken_run(root, disk), ScriptedEngine(echo)
    kept = logged_calls(Folder(str(root))).num_rows if list(root.rglob("*.parquet")) else 0
    assert f"nor kept on this machine (cannot write {root}" in caplog.text
    disk.number = 0
    run(Shards(root, again).all())
    twice = len(asked(first, again)) - len(TEXTS)
    assert 0 < twice == first.calls - kept < len(TEXTS)


def test_a_write_that_hangs_makes_new_calls_wait(root: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_storage, "LATE_SECONDS", 0.05)
    engine = Held(lambda: disk.responds.clear())

    async def go() -> None:
        shards = Shards(root, engine)
        work = asyncio.create_task(shards.all())
        await until(lambda: not shards.storage.is_ready)
        at_once = engine.begun
        engine.go.set()
        await until(lambda: engine.calls == at_once)
        await asyncio.sleep(0.1)
        assert engine.begun == at_once < len(TEXTS)
        disk.responds.set()
        assert await work == [None] * SHARDS

    run(go())
    assert sorted(asked(engine)) == sorted(TEXTS)


def test_a_stop_reaches_calls_that_wait_for_the_storage(root: Path, disk: Disk) -> None:
    engine = Held(lambda: setattr(disk, "number", errno.ENOSPC))

    async def go() -> list[BaseException | None]:
        shards = Shards(root, engine)
        work = asyncio.create_task(shards.all())
        await until(lambda: not shards.storage.is_ready)
        for log in shards.logs:
            log.stop("enough")
        engine.go.set()
        return await work

    ends = run(go())
    assert all(isinstance(end, EngineStop) for end in ends) and "enough" in {str(end) for end in ends}
    disk.number = 0
    again = ScriptedEngine(echo)
    run(Shards(root, again).all())
    assert sorted(asked(engine, again)) == sorted(TEXTS)


class Paid(ScriptedEngine):
    """Its spending takes long to write once a call is made."""

    settled = 0
    settling = False

    def cost(self, completion: object) -> float:
        return 1.0

    async def settle(self, root: Folder) -> None:
        self.settled += 1
        if self.calls and not self.settling:
            self.settling = True
            await asyncio.sleep(60)


def test_spending_that_is_slow_to_write_holds_no_reply_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_storage, "SETTLE_SECONDS", 0.01)
    engine = Paid(echo)

    async def go() -> None:
        begun = 0
        async with Shards(root, engine, 1).logs[0] as log:
            for number in range(5):
                await log.bound(prompt_id(user(str(number))), "r").chat(user(str(number)), Sampling())
                await until(lambda: engine.settling)
                begun = begun or engine.settled
                await until(lambda number=number: len(list(root.rglob("*.parquet"))) > number)
            assert engine.settled == begun  # one write of spending at a time, not one a reply

    run(go())  # ends the settler that is still at it, and settles once more
    assert engine.settled >= 3
