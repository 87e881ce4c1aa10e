"""The call log in front of an engine: a call that was ever answered is not made again."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines import log_storage
from ray_pipeline.engines.base import Completion, EngineError, EngineStop, Grammar, PromptTooLong, Sampling
from ray_pipeline.engines.logged import CallNotLogged, LoggedEngine
from ray_pipeline.engines.usage import Usage
from ray_pipeline.store.calls import CallWriter
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id, shard_of
from tests.scripted import ScriptedEngine, echo, said, user

PROMPTS = [f"prompt {i}" for i in range(12)]
COLD = Sampling()


async def ask(log: LoggedEngine, text: str, sampling: Sampling = COLD, role: str = "judge/a") -> Completion:
    return await log.bound(prompt_id(user(text)), role).chat(user(text), sampling)


async def session(
    engine: ScriptedEngine,
    root: Path,
    num_shards: int = 1,
    samplings: tuple[Sampling, ...] = (COLD,),
    texts: list[str] = PROMPTS,
    **options: Any,
) -> tuple[dict[Any, str], Usage]:
    """All texts under all samplings, shard by shard; what was answered and what it cost."""
    found: dict[Any, str] = {}
    total = Usage()
    for shard in range(num_shards):
        mine = [t for t in texts if shard_of(prompt_id(user(t)), num_shards) == shard]
        async with LoggedEngine(engine, Folder(str(root)), shard, num_shards, **options) as log:
            replies = await asyncio.gather(*(ask(log, t, s) for t in mine for s in samplings))
            found |= zip([(t, s) for t in mine for s in samplings], (r.text for r in replies), strict=True)
        total += log.stats
    return found, total


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_a_second_run_makes_no_call(tmp_path: Path) -> None:
    first, again = ScriptedEngine(echo), ScriptedEngine(echo)
    answered, stats = run(session(first, tmp_path))
    assert first.calls == stats.calls_engine == len(PROMPTS) and stats.calls_log == 0
    assert stats.prompt_tokens == 11 * len(PROMPTS) and stats.cached_tokens == 3 * len(PROMPTS)
    replayed, stats = run(session(again, tmp_path))
    assert again.calls == stats.calls_engine == 0 and stats.calls_log == len(PROMPTS) and stats.prompt_tokens == 0
    assert replayed == answered
    assert run(session(again, tmp_path, replay_only=True))[0] == answered and again.calls == 0


@pytest.mark.parametrize(("written", "read"), [(4, 1), (1, 8), (4, 16), (16, 2)])
def test_another_number_of_shards_finds_every_call(tmp_path: Path, written: int, read: int) -> None:
    run(session(ScriptedEngine(echo), tmp_path, written))
    again = ScriptedEngine(echo)
    _, stats = run(session(again, tmp_path, read))
    assert again.calls == 0 and stats.calls_log == len(PROMPTS)


def test_only_what_was_never_asked_is_asked(tmp_path: Path) -> None:
    run(session(ScriptedEngine(echo), tmp_path))
    engine = ScriptedEngine(echo)
    warm = Sampling(temperature=0.7, seed=3)
    run(session(engine, tmp_path, samplings=(COLD, warm)))
    assert engine.calls == len(PROMPTS) and {s for _, s in engine.asked} == {warm}
    more = ScriptedEngine(echo)
    run(session(more, tmp_path, texts=[*PROMPTS, "one more"]))
    assert [m[0]["content"] for m, _ in more.asked] == ["one more"]


def test_another_model_finds_no_call(tmp_path: Path) -> None:
    run(session(ScriptedEngine(echo), tmp_path))
    retrained = ScriptedEngine(echo, identity={"engine": "scripted", "model": "retrained"})
    run(session(retrained, tmp_path))
    assert retrained.calls == len(PROMPTS)


def test_a_reply_comes_back_whole(tmp_path: Path) -> None:
    logprobs = [[("7", -0.1), ("8", -2.5), ("é", float("-inf"))], []]
    given = Completion('{"score": 7}', "length", 5, 6, 2, logprobs=logprobs, latency_s=0.25)
    sampling = Sampling(grammar=Grammar.choice(["a"]), logprobs=3, extra=(("top_k", 5),), stop=("x",))

    async def go(engine: ScriptedEngine) -> Completion:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            return await ask(log, "hi", sampling)

    fresh = run(go(ScriptedEngine(given)))
    assert fresh == given and not fresh.from_log
    stored = run(go(ScriptedEngine("never")))
    assert stored.from_log
    for field in ("text", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "logprobs"):
        assert getattr(stored, field) == getattr(given, field)


def test_equal_calls_in_flight_are_one(tmp_path: Path) -> None:
    engine = ScriptedEngine(echo, delay=0.02)

    async def go() -> tuple[list[Completion], Usage]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            replies = await asyncio.gather(*(ask(log, "same") for _ in range(5)), ask(log, "other"))
            await ask(log, "same")
        return replies, log.stats

    replies, stats = run(go())
    assert engine.calls == 2 and len({r.text for r in replies[:5]}) == 1
    assert (stats.calls_engine, stats.calls_shared, stats.calls_log) == (2, 4, 1)


def test_an_error_reaches_all_who_share_it_and_is_not_remembered(tmp_path: Path) -> None:
    engine = ScriptedEngine(EngineError("boom"), delay=0.01)

    async def go() -> tuple[list[Any], Usage]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            first = await asyncio.gather(*(ask(log, "same") for _ in range(3)), return_exceptions=True)
            engine._reply = "well"
            return [*first, await ask(log, "same")], log.stats

    found, stats = run(go())
    assert [str(e) for e in found[:3]] == ["boom"] * 3 and found[3].text == "well"
    assert engine.calls == 2 and stats.errors == 1 and stats.calls_engine == 1
    again = ScriptedEngine("never")
    assert run(session(again, tmp_path, texts=["same"]))[0] == {("same", COLD): "well"} and again.calls == 0


def test_the_cancelled_caller_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    engine = ScriptedEngine(echo, delay=0.05)

    async def go() -> list[Any]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            tasks = [asyncio.create_task(ask(log, "same")) for _ in range(3)]
            await asyncio.sleep(0.01)
            tasks[0].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = run(go())
    assert isinstance(first, asyncio.CancelledError)
    assert [o.text for o in others] == [echo(user("same"), COLD)] * 2 and engine.calls == 2


def test_a_cancelled_sharer_cancels_nobody(tmp_path: Path) -> None:
    engine = ScriptedEngine(echo, delay=0.05)

    async def go() -> list[Any]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            tasks = [asyncio.create_task(ask(log, "same")) for _ in range(3)]
            await asyncio.sleep(0.01)
            tasks[1].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    found = run(go())
    assert isinstance(found[1], asyncio.CancelledError) and engine.calls == 1
    assert found[0].text == found[2].text


def test_a_prompt_that_is_too_long_is_remembered_for_replay_only(tmp_path: Path) -> None:
    async def go(engine: ScriptedEngine, times: int = 1, **options: Any) -> Any:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1, **options) as log:
            for _ in range(times):
                try:
                    reply = await ask(log, "long")
                except PromptTooLong as error:
                    reply = (error.prompt_tokens, error.max_tokens, error.limit)
            return reply

    small = ScriptedEngine(PromptTooLong(900, 512, 1024))
    assert run(go(small, times=3)) == (900, 512, 1024) and small.calls == 3
    never = ScriptedEngine("never")
    assert run(go(never, replay_only=True)) == (900, 512, 1024) and never.calls == 0
    # The engine has a longer context now: it is asked, and its answer counts from then on, for replays too.
    large = ScriptedEngine("answer")
    assert run(go(large)).text == "answer" and large.calls == 1
    for options in ({}, {"replay_only": True}):
        assert run(go(never, **options)).text == "answer" and never.calls == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_answer_counts_for_more_than_a_refusal_whichever_part_is_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    names = iter(f"{n:012x}" for n in order)

    class Named(CallWriter):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.writer = next(names, self.writer)

    monkeypatch.setattr("ray_pipeline.engines.logged.CallWriter", Named)
    with pytest.raises(PromptTooLong):
        run(session(ScriptedEngine(PromptTooLong(9, 9, 9)), tmp_path, texts=["x"]))
    run(session(ScriptedEngine("answer"), tmp_path, texts=["x"]))
    found, _ = run(session(ScriptedEngine("never"), tmp_path, texts=["x"], replay_only=True))
    assert found == {("x", COLD): "answer"}


def test_replay_of_a_call_that_is_not_there(tmp_path: Path) -> None:
    engine = ScriptedEngine(echo)
    with pytest.raises(CallNotLogged, match="no judge/a call for prompt"):
        run(session(engine, tmp_path, texts=["x"], replay_only=True))
    assert engine.calls == 0


def test_the_limit_bounds_the_calls_in_flight(tmp_path: Path) -> None:
    engine = ScriptedEngine(echo, delay=0.005)

    async def go() -> None:
        await session(engine, tmp_path, limit=asyncio.Semaphore(3))

    run(go())
    assert engine.most_in_flight == 3 and engine.calls == len(PROMPTS)


# --- writing ----------------------------------------------------------------------------------------------------------


def parts(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.parquet"))


def test_calls_are_flushed_every_interval_and_merged_at_the_end(tmp_path: Path) -> None:
    async def go() -> int:
        async with LoggedEngine(ScriptedEngine(echo), Folder(str(tmp_path)), 0, 1, flush_seconds=0.02) as log:
            for number in range(3):
                await ask(log, f"p{number}")
                while len(parts(tmp_path)) <= number:
                    await asyncio.sleep(0.01)
            return len(parts(tmp_path))

    assert run(go()) == 3
    assert len(parts(tmp_path)) == 1
    again = ScriptedEngine("never")
    run(session(again, tmp_path, texts=["p0", "p1", "p2"]))
    assert again.calls == 0


@pytest.mark.parametrize("error", [ValueError("a bug"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_what_was_answered_survives_whatever_ends_the_shard(tmp_path: Path, error: BaseException) -> None:
    async def go() -> None:
        async with LoggedEngine(ScriptedEngine(echo), Folder(str(tmp_path)), 0, 1) as log:
            await ask(log, "kept")
            raise error

    with pytest.raises(type(error)):
        run(go())
    again = ScriptedEngine("never")
    run(session(again, tmp_path, texts=["kept"]))
    assert again.calls == 0


def test_a_cancelled_shard_keeps_what_was_answered_and_nothing_else(tmp_path: Path) -> None:
    engine = ScriptedEngine(echo)

    async def go() -> None:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            await ask(log, "kept")
            engine.delay = 30
            await ask(log, "never answered")

    async def cancelled() -> None:
        task = asyncio.create_task(go())
        while engine.in_flight == 0 or engine.calls < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancelled())
    again = ScriptedEngine(echo)
    run(session(again, tmp_path, texts=["kept", "never answered"]))
    assert [m[0]["content"] for m, _ in again.asked] == ["never answered"]


def test_a_writer_is_never_used_by_two_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last flush, the merge and the flush of a dying actor may each meet a periodic one. Two at once would give two
    # parts the same name, and the calls of one of them would be lost.
    write, inside, met = CallWriter._write, threading.Semaphore(1), []

    def slow(self: CallWriter, table: Any) -> None:
        if not inside.acquire(blocking=False):
            met.append(table.num_rows)
            return write(self, table)
        try:
            threading.Event().wait(0.05)
            return write(self, table)
        finally:
            inside.release()

    monkeypatch.setattr(CallWriter, "_write", slow)

    async def go() -> None:
        async with LoggedEngine(ScriptedEngine(echo), Folder(str(tmp_path)), 0, 1, flush_seconds=0.01) as log:
            for number in range(6):
                await ask(log, f"p{number}")
                await asyncio.gather(asyncio.sleep(0.02), log.flush())
            await ask(log, "last")
            await asyncio.sleep(0.02)

    run(go())
    assert met == []
    again = ScriptedEngine("never")
    run(session(again, tmp_path, texts=["last", *(f"p{n}" for n in range(6))]))
    assert again.calls == 0


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flush, failures = CallWriter.flush, iter([OSError("disk full"), ValueError("odd")])

    def sometimes(self: CallWriter, rows: Any) -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        flush(self, rows)

    monkeypatch.setattr(CallWriter, "flush", sometimes)

    async def go() -> None:
        async with LoggedEngine(ScriptedEngine(echo), Folder(str(tmp_path)), 0, 1, flush_seconds=0.01) as log:
            await ask(log, "x")
            while not parts(tmp_path):
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING):
        run(go())
    assert "disk full" in caplog.text and "odd" in caplog.text
    again = ScriptedEngine("never")
    run(session(again, tmp_path, texts=["x"]))
    assert again.calls == 0


def full(*_: Any) -> None:
    raise OSError("disk full")


def test_a_disk_that_stays_full_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CallWriter, "flush", full)
    monkeypatch.setattr(log_storage, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(EngineStop, match="disk full; rerun the same command to resume"):
        run(session(ScriptedEngine(echo), tmp_path, texts=["x"]))


def test_a_full_disk_does_not_hide_why_the_shard_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CallWriter, "flush", full)

    async def go() -> None:
        async with LoggedEngine(ScriptedEngine(echo), Folder(str(tmp_path)), 0, 1) as log:
            await ask(log, "x")
            raise LookupError("the engine is dead")

    with caplog.at_level(logging.WARNING), pytest.raises(LookupError, match="dead"):
        run(go())
    assert "1 calls were not written (disk full)" in caplog.text


def test_parts_that_cannot_be_merged_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CallWriter, "compact", full)
    with caplog.at_level(logging.WARNING):
        run(session(ScriptedEngine(echo), tmp_path, texts=["x"]))
    assert "stay unmerged" in caplog.text and len(parts(tmp_path)) == 1


def test_half_a_character_does_not_spoil_a_shard(tmp_path: Path) -> None:
    found, _ = run(session(ScriptedEngine(said("smile \ud83d!")), tmp_path, texts=["x", "y"]))
    assert set(found.values()) == {"smile \ufffd!"}
    assert run(session(ScriptedEngine("never"), tmp_path, texts=["x", "y"]))[0] == found
