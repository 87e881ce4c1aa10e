"""Damaged files in a run folder: each is set aside, named, and made again by the same command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.graph.failures import FailureLedger
from ray_pipeline.graph.resume import load_result
from ray_pipeline.graph.spending import Budget, Spending
from ray_pipeline.graph.stage import StageRef
from ray_pipeline.store.files import RESULT, Folder
from tests.graph.test_in_process import QUICK, SHARDS, World, world
from tests.store.test_damage import flip

__all__ = ["world"]


def set_aside(world: World) -> list[str]:
    return sorted(str(file.relative_to(world.folder)) for file in world.folder.rglob("*.damaged-*"))


def lines(world: World, text: str) -> list[str]:
    return [line for line in world.out.getvalue().splitlines() if text in line]


def test_a_damaged_shard_is_made_again_in_the_run_that_reads_it(world: World) -> None:
    world.run()
    before = world.tables()
    name = f"{world.ask.folder_name}/shard-00002.parquet"
    flip(world.folder / name)
    outcome = world.run()
    assert all(result.cached for result in outcome.results.values())  # nobody reads it
    world.asked.clear()

    outcome = world.run(from_group="copy")
    assert not outcome.failures and world.tables() == before
    assert world.asked == [2] and world.engines[-1].calls == 0  # its call is in the log
    assert set_aside(world) == [f"{name}.damaged-1"]
    (told,) = lines(world, "set aside")
    assert f"{name} is damaged (" in told and "(set aside as shard-00002.parquet.damaged-1)" in told
    assert lines(world, "remaking what was damaged: ask")
    assert all(result.cached for result in world.run().results.values()) and not lines(world, "damaged")


def test_a_damaged_shard_that_a_whole_stage_reads(world: World) -> None:
    world.run()
    before = world.tables()
    flip(world.folder / world.copy.folder_name / "shard-00001.parquet")
    (world.folder / world.count.folder_name / RESULT).unlink()
    outcome = world.run()
    assert not outcome.failures and world.tables() == before
    assert outcome.results["count"].facts == {"rows": SHARDS} and outcome.results["ask"].cached
    assert set_aside(world) == [f"{world.copy.folder_name}/shard-00001.parquet.damaged-1"]


def test_shards_with_footers_that_do_not_fit_are_kept_beside_the_new_ones(world: World) -> None:
    world.run()
    before = world.tables()
    place = world.folder / world.copy.folder_name
    (place / "shard-00000.parquet").write_bytes((place / "shard-00000.parquet").read_bytes()[:-1])
    (place / "shard-00001.parquet").write_bytes(
        (world.folder / f"{world.ask.folder_name}/shard-00001.parquet").read_bytes()
    )
    outcome = world.run()
    assert not outcome.failures and outcome.results["ask"].cached and world.tables() == before
    assert [len(lines(world, f"(set aside as shard-0000{n}.parquet.damaged-1)")) for n in (0, 1)] == [1, 1]
    assert lines(world, "another stage or configuration") and len(set_aside(world)) == 2


RECORD = {"stage": "ask", "fingerprint": "f", "rows": {"critiques": 4}, "facts": {}, "usage": {}}


@pytest.mark.parametrize(
    "change",
    [
        "",
        "{",
        "[]",
        "null",
        *({k: v for k, v in RECORD.items() if k != name} for name in ("fingerprint", "rows", "facts", "usage")),
        *(RECORD | {name: value} for name in ("rows", "facts", "usage") for value in (None, 3, "x", ["x"])),
        RECORD | {"rows": {"critiques": 5}},
        RECORD | {"rows": {}},
        RECORD | {"usage": {"calls_engine": "many"}},
    ],
)
def test_a_result_that_cannot_be_used_is_written_again(world: World, change: Any) -> None:
    world.run()
    path = world.folder / world.ask.folder_name / RESULT
    before = path.read_text()
    ref = StageRef.of(world.ask, str(world.folder), SHARDS)
    if isinstance(change, dict) and "fingerprint" in change:
        change["fingerprint"] = ref.fingerprint
    text = change if isinstance(change, str) else json.dumps(change)
    path.write_text(text)
    assert load_result(ref) is None and path.read_text() == text  # who only looks renames nothing
    world.asked.clear()
    outcome = world.run()
    assert not outcome.failures and world.asked == [] and outcome.results["copy"].cached
    assert (
        path.with_name(f"{RESULT}.damaged-1").read_text() == text and len(lines(world, f"{RESULT} is damaged (")) == 1
    )
    now, then = json.loads(path.read_text()), json.loads(before)
    assert now | {"usage": 0} == then | {"usage": 0}
    world.run()
    assert len(set_aside(world)) == 1


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"stage": "ask", "counts": {}}', "null"])
def test_a_receipt_that_is_lost_or_broken_is_made_again(world: World, text: str | None) -> None:
    world.run()
    before, place = world.tables(), world.folder / world.ask.folder_name
    facts = json.loads((place / RESULT).read_text())["facts"]
    path = place / "_receipts/shard-00003.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert all(result.cached for result in world.run().results.values())  # it is not needed any more
    (place / RESULT).unlink()
    world.asked.clear()
    outcome = world.run()
    assert not outcome.failures and world.asked == [3] and world.engines[-1].calls == 0
    assert world.tables() == before and outcome.results["ask"].facts == facts
    assert lines(world, "ask: shard 3 has no receipt and is remade")
    assert set_aside(world) == (
        [] if text is None else [f"{world.ask.folder_name}/_receipts/shard-00003.json.damaged-1"]
    )


def test_a_damaged_part_of_the_call_log_is_named_once_and_its_calls_are_made_again(world: World) -> None:
    world.run()
    before = world.tables()
    (part,) = (world.folder / "calls").rglob("0001of*.parquet")
    flip(part)
    world.run(from_group="ask")
    assert world.engines[-1].calls == 1 and world.tables() == before
    (told,) = lines(world, "call log")
    assert told.startswith("ask: call log: ") and told.endswith(
        f"(set aside as {part.name}.damaged-1); its calls are made again"
    )
    world.run(from_group="ask")
    assert world.engines[-1].calls == 0 and not lines(world, "call log")


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[1]", '[{"shard": 1}]', '[{"shard": "x", "failures": 1, "error": ""}]']
)
def test_records_of_failures_and_of_spending(tmp_path: Path, text: str) -> None:
    folder, told = Folder(str(tmp_path)), list[str]()
    for name in ("_failures.json", "spent.json"):
        (tmp_path / name).write_text(text)
    assert FailureLedger(folder, QUICK, [1], told.append).quarantined == set()
    assert Spending(folder, Budget(), told.append).money == 0
    expected = ["spent.json"] if text == "{}" else ["_failures.json", "spent.json"]  # no failures are fine
    assert [line.split(" is damaged ")[0] for line in told] == [folder.uri(name) for name in expected]
    assert folder.names("damaged-1") == [f"{name}.damaged-1" for name in expected]
    FailureLedger(folder, QUICK, [1], told.append)
    Spending(folder, Budget(), told.append)
    assert len(told) == len(expected)
