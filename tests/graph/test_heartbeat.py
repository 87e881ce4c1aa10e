"""One writer a run folder, without process ids and without comparing clocks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.graph.heartbeat import BEATS_WAITED, Heartbeat, LogUse, RunBusy
from ray_pipeline.store.files import Folder

BEAT = 0.05
FILE = "heartbeat.json"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "run"))


def beat(folder: Folder, **options: Any) -> Heartbeat:
    return Heartbeat(folder, **{"beat_seconds": BEAT, **options})


def until(true: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(BEAT / 5)
    return True


def test_an_owner_beats_and_leaves_nothing_behind(folder: Folder) -> None:
    with beat(folder) as mine:
        first = folder.read_json(FILE)
        assert first["owner"] == mine.owner
        assert until(lambda: folder.read_json(FILE)["beat"] > first["beat"] + 1)
    assert folder.names() == [] and not mine.lost
    begin = time.monotonic()
    with beat(folder, beat_seconds=1.0):  # a clean exit lets the next one in at once
        assert time.monotonic() - begin < 0.9 * BEATS_WAITED


def test_a_living_owner_is_not_disturbed(folder: Folder) -> None:
    said: list[str] = []
    busy = pytest.raises(RunBusy, match=r"another process is running in .*run.*--run-dir")
    with beat(folder, beat_seconds=0.1) as owner:
        with busy, beat(folder, beat_seconds=0.5, say=said.append):
            pass
        time.sleep(0.3)
        assert not owner.lost and folder.read_json(FILE)["owner"] == owner.owner
    assert "watching it" in said[0]


def test_a_dead_owner_is_replaced(folder: Folder) -> None:
    said: list[str] = []
    folder.write_json(FILE, {"owner": "the dead", "beat": 41})
    begin = time.monotonic()
    with beat(folder, say=said.append) as mine:
        assert time.monotonic() - begin >= BEAT * BEATS_WAITED
        assert folder.read_json(FILE)["owner"] == mine.owner
    assert any("its owner is gone" in line for line in said) and folder.names() == []


@pytest.mark.parametrize("hours", [-30, 30])
def test_clocks_that_differ_by_more_than_a_day_decide_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """The newcomer's clock and the times of the owner's file: the living stay, the dead are replaced."""
    now = time.time() + 3600 * hours
    monkeypatch.setattr(time, "time", lambda: now)
    with beat(folder, beat_seconds=0.1) as owner:
        os.utime(folder.path(FILE), (now, now))
        with pytest.raises(RunBusy), beat(folder, beat_seconds=0.5):
            pass
        assert not owner.lost
    folder.write_json(FILE, {"owner": "the dead", "beat": 41})
    os.utime(folder.path(FILE), (now, now))
    with beat(folder) as mine:
        assert folder.read_json(FILE)["owner"] == mine.owner


def test_an_owner_that_ends_while_it_is_watched_lets_in(folder: Folder) -> None:
    folder.write_json(FILE, {"owner": "leaving", "beat": 1})
    threading.Timer(1.5 * BEAT, lambda: folder.delete(FILE)).start()
    with beat(folder, beat_seconds=0.2) as mine:
        assert folder.read_json(FILE)["owner"] == mine.owner


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"7", b'{"owner": 3}'])
def test_a_corrupt_file_is_a_dead_owner(folder: Folder, content: bytes) -> None:
    folder.write_bytes(FILE, content)
    with beat(folder, beat_seconds=0.02) as mine:
        assert folder.read_json(FILE)["owner"] == mine.owner


def test_an_owner_notices_that_it_was_replaced(folder: Folder) -> None:
    lost, others = threading.Event(), {"owner": "somebody else", "beat": 1}

    def replaced() -> bool:
        if not lost.is_set():  # again: a beat between the owner's look and its own write replaces this one
            folder.write_json(FILE, others)
        return lost.is_set()

    with beat(folder, on_loss=lost.set) as mine:
        assert until(replaced) and mine.lost
    # The file is the other one's: it is neither overwritten nor removed.
    assert folder.read_json(FILE) == others


def test_an_owner_notices_that_its_file_is_gone(folder: Folder) -> None:
    lost = threading.Event()
    with beat(folder, on_loss=lost.set):
        folder.delete(FILE)
        assert lost.wait(20)
    assert folder.names() == []


def test_what_the_owner_does_about_a_loss_happens_once(folder: Folder) -> None:
    told: list[int] = []

    with beat(folder, on_loss=lambda: told.append(1)) as mine:
        folder.delete(FILE)
        assert until(lambda: mine.lost)
        time.sleep(5 * BEAT)
    assert told == [1]


@pytest.mark.parametrize("error", [OSError("hiccup"), RuntimeError("odd")])
def test_a_storage_hiccup_stops_no_heart(folder: Folder, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    said: list[str] = []
    with beat(folder, say=said.append) as mine:
        read, failures = Folder.read_json, iter([error, error])

        def sometimes(self: Folder, name: str) -> Any:
            if (failure := next(failures, None)) is not None:
                raise failure
            return read(self, name)

        monkeypatch.setattr(Folder, "read_json", sometimes)
        assert until(lambda: bool(said))
        before = mine._count
        assert until(lambda: mine._count > before + 1) and not mine.lost
    assert len(said) == 1 and str(error) in said[0]  # twice the same is told once


@pytest.mark.parametrize("stale", [True, False])
def test_of_newcomers_at_the_same_moment_exactly_one_wins(folder: Folder, stale: bool) -> None:
    if stale:
        folder.write_json(FILE, {"owner": "the dead", "beat": 41})
    else:
        folder.write_json("other.json", {})
    start, done = threading.Barrier(3), threading.Event()
    won: list[Heartbeat] = []
    refused: list[RunBusy] = []

    def come() -> None:
        start.wait()
        try:
            with beat(folder, beat_seconds=0.2) as mine:
                won.append(mine)
                done.wait(30)
        except RunBusy as error:
            refused.append(error)

    threads = [threading.Thread(target=come) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert until(lambda: len(refused) == 2), (len(won), len(refused))
    assert until(lambda: len(won) == 1) and not won[0].lost
    assert folder.read_json(FILE)["owner"] == won[0].owner
    done.set()
    for thread in threads:
        thread.join(20)
    assert not folder.exists(FILE)


# --- a call log that several runs share -------------------------------------------------------------------------------


def use(folder: Folder, run: str, said: list[str]) -> LogUse:
    return LogUse(folder, run, beat_seconds=BEAT, say=said.append)


def test_the_second_run_on_a_call_log_says_that_it_pays_again(folder: Folder) -> None:
    first: list[str] = []
    second: list[str] = []
    with use(folder, "/runs/a", first), use(folder, "/runs/b", second):
        pass
    assert first == [] and folder.names() == []
    [line] = second
    assert line.startswith(f"/runs/a is running on the same call log ({folder.location})") and "paid for twice" in line
    with use(folder, "/runs/b", first):  # the other has ended
        pass
    assert first == []


def test_the_mark_of_a_killed_run_is_removed(folder: Folder) -> None:
    said: list[str] = []
    folder.write_json("running-dead.json", {"run": "/runs/a", "beat": 7})
    folder.write_bytes("running-torn.json", b"{")
    with use(folder, "/runs/b", said):
        assert "running-dead.json" not in folder.names()
    assert said == []
    folder.write_json("running-dead.json", {"run": "/runs/b", "beat": 7})
    begin = time.monotonic()
    with LogUse(folder, "/runs/b", beat_seconds=2.0, say=said.append):  # nobody else can be in its run folder
        assert time.monotonic() - begin < 2.0 * BEATS_WAITED
    assert said == []
