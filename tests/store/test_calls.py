"""The call log's files: every call is found by every reader, whatever the shard counts and whoever writes beside."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_pipeline.store import calls
from ray_pipeline.store.calls import CallWriter, Listing, model_folder, part_name, read_calls
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import bucket_of, shard_of
from tests.scripted import logged_calls

COUNTS = [2**i for i in range(11)]


def row(number: int, text: str = "t", key: str | None = None) -> dict[str, Any]:
    pid = f"{number:032x}"
    return {
        "call_key": key or f"key-{number:06d}",
        "bucket": bucket_of(pid),
        "prompt_id": pid,
        "model": "{}",
        "role": "judge/a",
        "messages": [{"role": "user", "content": str(number)}],
        "sampling": "{}",
        "text": text,
        "finish_reason": "stop",
        "logprobs": None,
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "cached_tokens": 0,
        "latency_s": 0.5,
    }


def write(folder: Folder, numbers: list[int], num_shards: int, parts: int = 1, compact: bool = False) -> None:
    for shard in range(num_shards):
        mine = [n for n in numbers if shard_of(f"{n:032x}", num_shards) == shard]
        writer = CallWriter(folder, shard, num_shards)
        for part in range(parts):
            writer.flush([row(n) for n in mine[part::parts]])
        if compact:
            writer.compact()


def keys_of(table: pa.Table) -> list[str]:
    return sorted(table["call_key"].to_pylist())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 2**64), min_size=1, max_size=12, unique=True),
    st.sampled_from([1, 2, 8, 16]),
    st.sampled_from(COUNTS),
    st.booleans(),
)
def test_any_reader_finds_exactly_its_calls(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], written: int, read: int, compact: bool
) -> None:
    folder = Folder(str(tmp_path_factory.mktemp("calls")))
    write(folder, numbers, written, parts=2, compact=compact)
    shards = {shard_of(f"{n:032x}", read) for n in numbers} | {0, read - 1}
    for shard in shards:
        mine = [f"key-{n:06d}" for n in numbers if shard_of(f"{n:032x}", read) == shard]
        assert keys_of(read_calls(folder, shard, read)) == sorted(mine)


class Named(Folder):
    """A folder that holds files of some names."""

    def __init__(self, *names: str) -> None:
        super().__init__("/nowhere")
        self._names = names

    def names(self, suffix: str = "") -> list[str]:
        return sorted(name for name in self._names if name.endswith(suffix))


@given(
    st.lists(st.tuples(st.sampled_from(COUNTS), st.integers(0, 1023)), max_size=6),
    st.sampled_from(COUNTS),
    st.integers(0, 1023),
)
def test_a_part_is_passed_over_only_if_it_shares_no_bucket(
    written: list[tuple[int, int]], read: int, bucket: int
) -> None:
    shard, share = bucket % read, set()
    parts = {part_name(b % n, n, "abc", i): (b % n, n) for i, (n, b) in enumerate(written)}
    for name, (i, n) in parts.items():
        if any(b % read == shard for b in range(i, 1024, n)):
            share.add(name)
    assert Listing(Named(*parts)).of(shard, read) == sorted(share)


def test_names_of_strangers_hold_nothing() -> None:
    strangers = ("x.parquet", "1of2of3-a.parquet", "of-a.parquet", "1of0-a.parquet", "-.parquet")
    assert [Listing(Named(*strangers)).of(shard, 4) for shard in range(4)] == [[]] * 4


def test_a_reader_opens_only_what_can_hold_its_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    write(folder, list(range(16)), 16)
    opened: list[str] = []
    read_table = Folder.read_table
    monkeypatch.setattr(
        Folder, "read_table", lambda self, name, **k: opened.append(name) or read_table(self, name, **k)
    )
    assert len(keys_of(read_calls(folder, 3, 8))) == 2
    assert [name[:10] for name in opened] == ["0003of0016", "0011of0016"]


def test_compaction_keeps_every_call_and_touches_nobody_elses(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    mine, other = CallWriter(folder, 0, 1), CallWriter(folder, 0, 1)
    for part in range(4):
        mine.flush([row(n) for n in range(part * 5, part * 5 + 5)])
        other.flush([row(100 + part)])
    mine.compact()
    assert keys_of(read_calls(folder, 0, 1)) == sorted(f"key-{n:06d}" for n in [*range(20), *range(100, 104)])
    assert len(folder.names()) == 5
    buckets = read_calls(folder, 0, 1)
    assert buckets.num_rows == 24
    mine.flush([row(50)])  # a writer goes on after it compacted, under new names
    mine.compact()
    assert read_calls(folder, 0, 1).num_rows == 25 and len(folder.names()) == 5


def test_a_compacted_part_is_sorted_by_bucket(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    writer = CallWriter(folder, 0, 1)
    writer.flush([row(9), row(3)])
    writer.flush([row(4), row(1)])
    writer.compact()
    assert read_calls(folder, 0, 1)["bucket"].to_pylist() == [1, 3, 4, 9]


def test_a_failed_compaction_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    writer = CallWriter(folder, 0, 1)
    writer.flush([row(1)])
    writer.flush([row(2)])
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_table", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            writer.compact()
    assert keys_of(read_calls(folder, 0, 1)) == ["key-000001", "key-000002"]


def test_a_reader_tolerates_a_part_that_is_merged_away_under_its_eyes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path))
    writer = CallWriter(folder, 0, 1)
    for n in range(5):
        writer.flush([row(n)])
    read_table, reads = Folder.read_table, 0

    def compact_in_between(self: Folder, name: str, **kwargs: Any) -> pa.Table:
        nonlocal reads
        reads += 1
        if reads == 3:
            monkeypatch.setattr(Folder, "read_table", read_table)
            writer.compact()
        return read_table(self, name, **kwargs)

    monkeypatch.setattr(Folder, "read_table", compact_in_between)
    found = read_calls(folder, 0, 1)
    assert set(keys_of(found)) == {f"key-{n:06d}" for n in range(5)}


def test_a_torn_part_is_named_and_the_others_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Folder(str(tmp_path))
    for n in range(3):
        CallWriter(folder, 0, 1).flush([row(n)])
    torn = folder.names()[1]
    (tmp_path / torn).write_bytes((tmp_path / torn).read_bytes()[:100])
    folder.write_table("0000of0001-stranger-000000.parquet", pa.table({"a": [1]}), fingerprint="x")
    with caplog.at_level(logging.WARNING):
        assert read_calls(folder, 0, 1).num_rows == 2
    assert torn in caplog.text and "stranger" in caplog.text
    assert f"(set aside as {torn}.damaged-1); its calls are made again" in caplog.text
    caplog.clear()
    assert read_calls(folder, 0, 1).num_rows == 2
    assert torn not in caplog.text  # once is enough


def test_two_writers_with_the_same_key(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    CallWriter(folder, 0, 1).flush([row(1, "one")])
    CallWriter(folder, 1, 2).flush([row(1, "other")])
    found = read_calls(folder, 1, 4)
    assert keys_of(found) == ["key-000001"] * 2
    # Every reader meets them in the same order, so that all take the same one for the answer.
    first = {read_calls(folder, s, n)["text"][0].as_py() for s, n in ((0, 1), (1, 2), (1, 4), (1, 1024))}
    assert len(first) == 1


def test_an_empty_log(tmp_path: Path) -> None:
    assert read_calls(Folder(str(tmp_path / "none")), 0, 4).num_rows == 0
    CallWriter(Folder(str(tmp_path / "none")), 0, 4).flush([])
    assert not (tmp_path / "none").exists()


def test_models_lie_apart_and_a_scan_sees_them_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = Folder(str(tmp_path))
    for n, identity in enumerate(({"model": "a"}, {"model": "b"})):
        CallWriter(model_folder(root, identity), 0, 1).flush([row(n)])
    assert model_folder(root, {"model": "a"}).location != model_folder(root, {"model": "b"}).location
    assert sorted(keys_of(logged_calls(root))) == ["key-000000", "key-000001"]
    part = next(tmp_path.glob("*/*.parquet"))
    part.write_bytes(part.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        assert logged_calls(root).num_rows == 1
    assert part.name in caplog.text


def test_parts_are_small_enough_to_be_skipped_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_ROW_GROUP", 4)
    folder = Folder(str(tmp_path))
    CallWriter(folder, 0, 1).flush([row(n) for n in range(10)])
    import pyarrow.parquet as pq

    assert pq.ParquetFile(tmp_path / folder.names()[0]).num_row_groups == 3
