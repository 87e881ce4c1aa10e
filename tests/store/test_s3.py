"""The store on an object store: a real S3 API on loopback, spoken to by pyarrow as on any bucket."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from ray_pipeline.graph.heartbeat import Heartbeat, RunBusy
from ray_pipeline.store.calls import model_folder, read_calls
from ray_pipeline.store.errors import DamagedFile, ForeignFile, StoreError
from ray_pipeline.store.files import Folder, point_at
from ray_pipeline.store.local import CACHE_VARIABLE, local_copy, written_here
from ray_pipeline.store.schemas import TABLES
from ray_pipeline.store.tables import ShardedTable, shard_name
from tests.s3 import BUCKET, location, s3_server
from tests.store.test_calls import row, write


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def folder(server: str, request: pytest.FixtureRequest) -> Folder:
    return Folder(location(server, f"runs/{request.node.name.replace('[', '-').rstrip(']')}"))


def test_members_of_a_folder_keep_the_query_of_its_uri(folder: Folder) -> None:
    inner = folder / "judge-abc" / "_receipts"
    inner.write_json("a.json", {"x": 1})
    assert folder.folders() == ["judge-abc"]
    assert (folder / "judge-abc/_receipts").names(".json") == ["a.json"]
    assert inner.location.startswith(f"s3://{BUCKET}/runs/") and "/_receipts?scheme=http" in inner.location
    assert folder.uri("a.json").count("?") == 1
    again: Folder = pickle.loads(pickle.dumps(inner))
    assert again.read_json("a.json") == {"x": 1}


def test_what_is_not_there_is_not_found_as_on_a_disk(folder: Folder) -> None:
    assert folder.names() == [] and folder.folders() == []
    assert not folder.exists("a") and not folder.exists()
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a")
    with pytest.raises(FileNotFoundError):
        folder.check_table("a.parquet", fingerprint="f")
    folder.delete("a")
    folder.delete_folder("b")


def test_files_are_written_replaced_listed_and_deleted(folder: Folder) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        folder.write_bytes(name, b"one")
    folder.write_bytes("a.txt", b"two")
    assert folder.read_bytes("a.txt") == b"two"
    assert folder.names() == ["a.txt", "b.txt"]
    assert folder.folders() == ["sub"]
    folder.delete("b.txt")
    folder.delete_folder("sub")
    assert folder.names() == ["a.txt"] and folder.folders() == []
    assert folder.exists("a.txt") and folder.exists()


def test_a_name_cannot_leave_the_folder(folder: Folder) -> None:
    with pytest.raises(StoreError, match="leaves the folder"):
        folder.read_bytes("../secret")


def prompts(n: int) -> pa.Table:
    rows = [
        {
            "prompt_id": f"{i:032x}",
            "messages": [{"role": "user", "content": f"question {i}"}],
            "source": "test",
            "task_type": "none",
            "split": "train",
            "meta": "{}",
        }
        for i in range(n)
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["prompts"])


def test_shards_are_committed_and_a_resumed_run_sees_what_is_missing(folder: Folder) -> None:
    table = ShardedTable(folder.location, "prompts", 4, "f1")
    assert table.state().missing == [0, 1, 2, 3]
    table.write(0, prompts(3))
    table.write(2, prompts(0))
    state = ShardedTable(folder.location, "prompts", 4, "f1").state()
    assert (state.rows, state.missing, state.bad) == ({0: 3, 2: 0}, [1, 3], {})
    for shard in state.missing:
        table.write(shard, prompts(1))
    assert table.state().done
    assert table.read_all().num_rows == 5
    assert table.read(0).equals(prompts(3))
    other = ShardedTable(folder.location, "prompts", 4, "f2").state()
    assert other.missing == [0, 1, 2, 3] and "another stage or configuration" in other.bad[0]


def test_a_torn_upload_is_named_and_remade(folder: Folder) -> None:
    table = ShardedTable(folder.location, "prompts", 2, "f1")
    for shard in (0, 1):
        table.write(shard, prompts(5))
    whole = folder.read_bytes(shard_name(1))
    folder.write_bytes(shard_name(1), whole[: len(whole) // 2])
    state = table.state()
    assert state.missing == [1] and shard_name(1) in state.bad[1] and "is damaged" in state.bad[1]
    with pytest.raises(DamagedFile, match="shard-00001"):
        table.read(1)
    assert folder.names(".damaged-1") == [f"{shard_name(1)}.damaged-1"] and not folder.exists(shard_name(1))
    table.write(1, prompts(5))
    assert table.state().done
    assert folder.read_bytes(shard_name(1)) == whole  # the same rows give the same bytes, here too


def test_an_upload_that_is_never_ended_leaves_what_was_there(folder: Folder) -> None:
    """A writer that dies in the middle: object stores publish an object when its upload ends, and not before."""
    folder.write_bytes("a.bin", b"old")
    stream = folder.fs.open_output_stream(folder.path("a.bin"))
    stream.write(b"x" * 100_000)
    assert folder.read_bytes("a.bin") == b"old"
    assert folder.names() == ["a.bin"]
    stream.close()
    assert len(folder.read_bytes("a.bin")) == 100_000


def test_foreign_and_other_schemas_are_refused_by_name(folder: Folder) -> None:
    folder.write_table("t.parquet", pa.table({"a": [1]}), fingerprint="f", kind="x")
    assert folder.check_table("t.parquet", fingerprint="f", kind="x") == 1
    with pytest.raises(ForeignFile, match=r"t\.parquet"):
        folder.read_table("t.parquet", fingerprint="g")
    with pytest.raises(ForeignFile, match="unexpected columns"):
        folder.read_table("t.parquet", fingerprint="f", schema=pa.schema([("b", pa.int64())]))
    folder.write_bytes("j.json", b"{")
    with pytest.raises(StoreError, match=r"j\.json\?.* is not valid JSON"):
        folder.read_json("j.json")


def test_the_call_log_is_written_merged_and_found_under_another_shard_count(folder: Folder) -> None:
    calls = model_folder(folder, {"model": "m"})
    numbers = list(range(8))
    write(calls, numbers, 2, parts=2, compact=True)
    assert len(calls.names(".parquet")) == 2
    wanted = {row(n)["call_key"] for n in numbers}
    for num_shards in (1, 4):
        found = [read_calls(calls, shard, num_shards)["call_key"].to_pylist() for shard in range(num_shards)]
        assert sorted(key for keys in found for key in keys) == sorted(wanted)
    assert sum(calls.read_table(name).num_rows for name in calls.names(".parquet")) == 8


def test_one_of_two_runs_holds_the_folder(folder: Folder) -> None:
    with Heartbeat(folder, beat_seconds=0.2), pytest.raises(RunBusy, match="another process is running"):
        Heartbeat(folder, beat_seconds=4.0).__enter__()  # it comes back as soon as it sees a beat
    assert not folder.exists("heartbeat.json")
    folder.write_json("heartbeat.json", {"owner": "dead", "beat": 7})
    begin = time.monotonic()
    with Heartbeat(folder, beat_seconds=0.1):
        assert time.monotonic() - begin >= 0.5


def test_views_are_left_to_the_manifest(folder: Folder) -> None:
    point_at(folder, "datasets", "datasets-abc")
    assert folder.names() == [] and not folder.exists("datasets")


def test_a_bucket_that_is_not_there_and_keys_that_are_missing_are_told(server: str) -> None:
    gone = Folder(location(server, "x").replace(BUCKET, "no-such-bucket"))
    with pytest.raises(OSError, match="no-such-bucket"):
        gone.write_bytes("a", b"x")


@pytest.mark.parametrize(
    "uri", ["s3://AKIA:secret@bucket/run", "s3://bucket/run?secret_key=x", "s3://bucket/run?region=a&access_key=x"]
)
def test_a_location_with_a_key_in_it_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(StoreError, match="environment") as refused:
        Folder(uri)
    assert "AKIA" not in str(refused.value) and "=x" not in str(refused.value)


def test_whole_filesystems_of_pyarrow_are_taken_by_their_uri(server: str) -> None:
    fs = Folder(location(server, "x")).fs
    assert isinstance(fs, pafs.S3FileSystem)


# --- for libraries that know disks alone ------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_that_a_folder_lies_in(folder: Folder, tmp_path: Path) -> None:
    assert (folder / "judge-abc").parent.location == folder.location
    assert Folder(str(tmp_path / "a")).parent.location == str(tmp_path)


def test_a_copy_is_fetched_once_and_anew_when_something_was_written(
    folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder / "merged"
    model.write_bytes("config.json", b"{}")
    model.write_bytes("deep/weights.bin", b"1" * 10)
    first = Path(local_copy(model.location))
    assert first.is_relative_to(cache)
    assert (first / "config.json").read_bytes() == b"{}"
    assert (first / "deep/weights.bin").read_bytes() == b"1" * 10
    with monkeypatch.context() as nothing_is_copied:
        nothing_is_copied.setattr(pafs, "copy_files", None)
        assert Path(local_copy(model.location)) == first
    model.write_bytes("deep/weights.bin", b"2" * 11)
    second = Path(local_copy(model.location))
    assert second != first and (second / "deep/weights.bin").read_bytes() == b"2" * 11
    assert (first / "deep/weights.bin").read_bytes() == b"1" * 10  # whoever has it open goes on


def test_a_copy_that_was_cut_short_is_made_anew(folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        folder.write_bytes(name, name.encode())
    copied, real = [], pafs.copy_files

    def cut_short(source: str, *args: object, **kwargs: object) -> None:
        if copied:
            raise OSError("connection lost")
        copied.append(source)
        real(source, *args, **kwargs)

    with monkeypatch.context() as cut:
        cut.setattr(pafs, "copy_files", cut_short)
        with pytest.raises(StoreError, match=rf"connection lost.*{CACHE_VARIABLE}"):
            local_copy(folder.location)
    assert sorted(path.name for path in Path(local_copy(folder.location)).iterdir()) == ["a", "b"]


def test_what_is_local_is_its_own_copy_and_what_is_not_there_is_said(folder: Folder, tmp_path: Path) -> None:
    for name in (str(tmp_path), "openbmb/MiniCPM", "pocket:policy", "../x"):
        assert local_copy(name) == name
    with pytest.raises(FileNotFoundError, match="has no files"):
        local_copy(folder.location)


def test_a_page_is_written_on_this_machine_and_put_into_the_folder(folder: Folder, tmp_path: Path) -> None:
    for place in (folder / "report", Folder(str(tmp_path / "report"))):
        with written_here(place) as here:
            (here / "report.md").write_text("text")
            (here / "plots").mkdir()
            (here / "plots" / "a.png").write_bytes(b"png")
        assert place.read_bytes("report.md") == b"text"
        assert (place / "plots").names() == ["a.png"]
    with pytest.raises(KeyError), written_here(folder / "broken") as here:
        (here / "report.md").write_text("half")
        raise KeyError
    assert not (folder / "broken").names()
