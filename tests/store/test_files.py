"""Files: a reader sees a whole file or none, and a file that cannot be used is refused by name."""

from __future__ import annotations

import itertools
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_pipeline.store import files
from ray_pipeline.store.errors import DamagedFile, ForeignFile, StoreError
from ray_pipeline.store.files import Folder, point_at
from ray_pipeline.store.locations import base_name, beside
from ray_pipeline.store.schemas import CANDIDATES, CRITIQUES, DPO, PROMPTS, RENAMED, TABLES, to_table
from ray_pipeline.store.tables import ShardedTable, shard_name


def prompts(n: int, mark: str = "") -> pa.Table:
    rows = [
        {
            "prompt_id": f"{i:032x}",
            "messages": [{"role": "user", "content": f"{mark}{i}"}],
            "source": "test",
            "task_type": "general",
            "split": "train",
            "meta": "{}",
        }
        for i in range(n)
    ]
    return to_table(rows, PROMPTS)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    folder.write_bytes("a", b"old")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                folder.write_bytes("a", b"new and longer")
        assert folder.read_bytes("a") == b"old"
        assert os.listdir(tmp_path) == ["a"]


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A killed process removes nothing, so the temporary file stays: nobody may take it for a file of the folder.
    folder = Folder(str(tmp_path))
    folder.write_bytes("a.parquet", b"old")
    (tmp_path / files._temporary("a.parquet")).write_bytes(b"hal")
    (tmp_path / files._temporary("latest")).mkdir()
    assert folder.names() == ["a.parquet"]
    assert folder.folders() == []


def test_names_are_sorted_and_leave_out_folders_and_other_suffixes(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for name in ("b.parquet", "a.parquet", "c.json", "sub/d.parquet"):
        folder.write_bytes(name, b"")
    assert folder.names(".parquet") == ["a.parquet", "b.parquet"]
    assert folder.folders() == ["sub"]
    assert (folder / "missing").names() == [] and (folder / "missing").folders() == []


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", ".."])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="leaves the folder"):
        Folder(str(tmp_path / "run")).write_bytes(name, b"")


def test_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder("run").location == str(tmp_path / "run")
    assert Folder(f"file://{tmp_path}/run/").location == str(tmp_path / "run")
    assert Folder(f"file://{tmp_path}/my%20run").location == str(tmp_path / "my run")
    assert Folder("s3://bucket/run/").location == "s3://bucket/run"
    assert not Folder("s3://bucket").is_local
    with pytest.raises(StoreError, match="absolute path"):
        Folder("file://run")
    (Folder(f"file://{tmp_path}/u") / "x").write_bytes("a", b"1")
    assert (tmp_path / "u" / "x" / "a").read_bytes() == b"1"
    again = pickle.loads(pickle.dumps(Folder("run")))
    assert again.location == str(tmp_path / "run")


@pytest.mark.parametrize("name", ["with space", "per%20cent", "ha#sh", "qu?estion", "ümlaut", "co:lon"])
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    folder = Folder(str(tmp_path / name))
    folder.write_json("x.json", {"a": 1})
    assert (tmp_path / name / "x.json").exists() and folder.read_json("x.json") == {"a": 1}


def test_a_filesystem_that_is_not_local_is_written_by_one_upload(tmp_path: Path) -> None:
    folder = Folder("mock://bucket/run")
    folder._fs, folder._base = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "run"
    folder.write_table("a.parquet", prompts(3), fingerprint="f")
    assert folder.names() == ["a.parquet"]
    assert folder.read_table("a.parquet", fingerprint="f", schema=PROMPTS).num_rows == 3
    point_at(folder, "latest", "run")  # no links there: the manifest names the folder
    assert folder.names() == ["a.parquet"]


def test_broken_json_is_named(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for data in (b"{", b"\xff\xfe"):
        folder.write_bytes("manifest.json", data)
        with pytest.raises(StoreError, match=r"manifest\.json is not valid JSON"):
            folder.read_json("manifest.json")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for kind, schema in TABLES.items():
        folder.write_table(f"{kind}.parquet", schema.empty_table(), fingerprint="f", kind=kind)
        found = folder.read_table(f"{kind}.parquet", fingerprint="f", kind=kind, schema=schema)
        assert found.schema.equals(schema, check_metadata=True) and found.num_rows == 0
    folder.write_table("p.parquet", prompts(5), fingerprint="f")
    assert folder.read_table("p.parquet", schema=PROMPTS).equals(prompts(5))
    assert folder.read_table("p.parquet", schema=PROMPTS, columns=["prompt_id"]).column_names == ["prompt_id"]


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_file_is_refused_by_name(tmp_path: Path, keep: float) -> None:
    folder = Folder(str(tmp_path))
    folder.write_table("shard-00001.parquet", prompts(50), fingerprint="f")
    data = folder.read_bytes("shard-00001.parquet")
    (tmp_path / "shard-00001.parquet").write_bytes(data[: int(len(data) * keep)])
    for act in (folder.check_table, folder.read_table):
        with pytest.raises(DamagedFile, match=r"shard-00001\.parquet"):
            act("shard-00001.parquet", fingerprint="f")


def test_a_file_that_was_overwritten_inside_is_refused_by_name(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write_table("s.parquet", prompts(2000), fingerprint="f")
    data = bytearray(folder.read_bytes("s.parquet"))
    data[4 : len(data) // 2] = b"\0" * (len(data) // 2 - 4)
    (tmp_path / "s.parquet").write_bytes(data)
    with pytest.raises(DamagedFile, match=r"s\.parquet"):
        folder.read_table("s.parquet", fingerprint="f")


def test_a_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write_table("s.parquet", prompts(2), fingerprint="mine", kind="prompts")
    pq.write_table(prompts(2), tmp_path / "stranger.parquet")
    for name, fingerprint, kind in (
        ("s.parquet", "other", "prompts"),
        ("s.parquet", "mine", "candidates"),
        ("stranger.parquet", "mine", ""),
    ):
        with pytest.raises(ForeignFile, match=name):
            folder.read_table(name, fingerprint=fingerprint, kind=kind)
        with pytest.raises(ForeignFile, match=name):
            folder.check_table(name, fingerprint=fingerprint, kind=kind)


@pytest.mark.parametrize("columns", [None, ["prompt_id"]])
def test_a_file_of_another_schema_is_refused_by_name(tmp_path: Path, columns: list[str] | None) -> None:
    folder = Folder(str(tmp_path))
    folder.write_table("s.parquet", prompts(2).drop_columns(["meta"]), fingerprint="f")
    with pytest.raises(ForeignFile, match=r"s\.parquet has unexpected columns"):
        folder.read_table("s.parquet", fingerprint="f", schema=PROMPTS, columns=columns)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 6000), max_size=4))
def test_equal_tables_give_equal_bytes(tmp_path: Path, cuts: list[int]) -> None:
    # However a table came about: in pieces, with offsets, or whole. Long texts, so that there are several pages.
    whole = pa.table({"a": [f"{i:0200d}" for i in range(6000)], "b": [None, 1.5] * 3000})
    ends = sorted({0, *cuts, 6000})
    pieces = pa.concat_tables([whole.slice(a, b - a) for a, b in itertools.pairwise(ends)])
    assert pieces.equals(whole)
    folder = Folder(str(tmp_path))
    for name, table in (("whole", whole), ("pieces", pieces)):
        folder.write_table(name, table, fingerprint="f", kind="k")
    assert folder.read_bytes("whole") == folder.read_bytes("pieces")


def test_a_required_value_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'source' is empty in row 1"):
        to_table([*prompts(1).to_pylist(), {**prompts(1).to_pylist()[0], "source": None}], PROMPTS)


# --- sharded tables ---------------------------------------------------------------------------------------------------


def test_the_state_of_a_sharded_table(tmp_path: Path) -> None:
    table = ShardedTable(str(tmp_path / "t"), "prompts", 4, "f")
    assert table.state().missing == [0, 1, 2, 3] and not table.state().done
    for shard in range(4):
        assert table.write(shard, prompts(shard)) == shard
    assert table.state().done and table.state().rows == {0: 0, 1: 1, 2: 2, 3: 3}
    assert table.read_all().num_rows == 6 and [t.num_rows for t in table.scan()] == [0, 1, 2, 3]

    os.unlink(tmp_path / "t" / shard_name(0))
    data = (tmp_path / "t" / shard_name(2)).read_bytes()
    (tmp_path / "t" / shard_name(2)).write_bytes(data[: len(data) // 2])
    ShardedTable(str(tmp_path / "t"), "prompts", 4, "other").write(3, prompts(3))
    state = table.state()
    assert state.missing == [0, 2, 3] and state.rows == {1: 1} and set(state.bad) == {2, 3}
    assert shard_name(2) in state.bad[2] and shard_name(3) in state.bad[3]


def test_a_shard_without_a_later_column_that_may_be_null_is_read(tmp_path: Path) -> None:
    row = {"candidate_id": "c", "prompt_id": "p", "k": 0, "seed": 1, "response": "r", "finish_reason": "stop"}
    now = to_table([{**row, "generator": "g"}], CANDIDATES)
    table = ShardedTable(str(tmp_path), "candidates", 1, "f")
    older = now.drop_columns(["error", "completion_tokens"])
    Folder(str(tmp_path)).write_table(shard_name(0), older, fingerprint="f", kind="candidates")
    assert table.state().done and table.read(0).equals(now)
    assert table.read(0, ["error", "k"]).to_pylist() == [{"error": None, "k": 0}]
    Folder(str(tmp_path)).write_table(shard_name(0), now.drop_columns(["k"]), fingerprint="f", kind="candidates")
    assert "unexpected columns" in table.state().bad[0]  # a required column


def test_a_shard_of_an_older_schema_is_to_be_made_again(tmp_path: Path) -> None:
    table = ShardedTable(str(tmp_path), "prompts", 1, "f")
    Folder(str(tmp_path)).write_table(shard_name(0), CRITIQUES.empty_table(), fingerprint="f", kind="prompts")
    assert table.state().missing == [0] and "unexpected columns" in table.state().bad[0]


def test_a_shard_that_goes_away_while_we_look_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ShardedTable(str(tmp_path), "prompts", 2, "f")
    table.write(0, prompts(1))
    monkeypatch.setattr(Folder, "names", lambda *_: [shard_name(0), shard_name(1)])
    assert table.state().missing == [1]


def test_a_table_of_the_wrong_schema_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have the schema"):
        ShardedTable(str(tmp_path), "prompts", 1, "f").write(0, CRITIQUES.empty_table())
    assert os.listdir(tmp_path) == []


# --- views ------------------------------------------------------------------------------------------------------------


def test_a_view_is_swapped(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for name in ("one", "two"):
        folder.write_bytes(f"{name}/x", name.encode())
    for name in ("one", "two", "two"):
        point_at(folder, "latest", name)
        assert folder.read_bytes("latest/x") == name.encode()
    assert os.readlink(tmp_path / "latest") == "two"
    assert sorted(os.listdir(tmp_path)) == ["latest", "one", "two"]


def test_a_view_replaces_nothing_but_a_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    folder.write_bytes("policy/precious", b"1")
    with pytest.raises(StoreError, match="policy is in the place of a link"):
        point_at(folder, "policy", "train-1")
    assert folder.read_bytes("policy/precious") == b"1"
    point_at(folder, "gone", "never-was")  # a dangling view may be swapped too
    point_at(folder, "gone", "policy")
    assert folder.read_bytes("gone/precious") == b"1"

    def fail(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        point_at(folder, "gone", "policy")
    assert sorted(os.listdir(tmp_path)) == ["gone", "policy"]


def test_another_thread_never_sees_half_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The base must be known before anybody can see that the filesystem is: else a name is relative to the process.
    seen: list[tuple[bool, str]] = []

    class Watched(Folder):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name in ("_fs", "_base") and hasattr(self, "_base"):
                seen.append((self._fs is not None, self._base))

    _ = Watched(str(tmp_path)).fs
    assert (True, "") not in seen and (True, str(tmp_path)) in seen


def test_writing_needs_no_parquet_metadata_of_others(tmp_path: Path) -> None:
    table = prompts(2).replace_schema_metadata({b"pandas": b"noise"})
    Folder(str(tmp_path)).write_table("a", table, fingerprint="f")
    Folder(str(tmp_path)).write_table("b", prompts(2), fingerprint="f")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_folder_that_is_made_while_it_is_listed(tmp_path: Path) -> None:
    """Arrow alone calls some two in a hundred of these a folder that is not there."""

    def work(round_: int, worker: int) -> list[str]:
        folder = Folder(f"{tmp_path / str(round_)}/stage/attempts")
        before = folder.names()
        folder.write_bytes(f"{worker}", b"")
        return before

    with ThreadPoolExecutor(6) as pool:
        for round_ in range(300):
            seen = list(pool.map(work, [round_] * 6, range(6)))
            assert all(set(names) <= set("012345") for names in seen)
            assert Folder(f"{tmp_path / str(round_)}/stage").folders() == ["attempts"]


@pytest.mark.parametrize(
    ("location", "name", "probe"),
    [
        ("/runs/a", "a", "/runs/a-probe"),
        ("s3://bucket/runs/a", "a", "s3://bucket/runs/a-probe"),
        ("s3://bucket/runs/a?region=r&scheme=http", "a", "s3://bucket/runs/a-probe?region=r&scheme=http"),
    ],
)
def test_names_are_of_the_path_and_not_of_what_a_uri_says_of_its_filesystem(
    location: str, name: str, probe: str
) -> None:
    assert base_name(location) == name
    assert beside(location, "-probe") == probe


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_is_for_the_user_alone(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "runs/a"))
    folder.make()
    folder.write_bytes("deep/calls/part", b"x")
    folder.write_json("manifest.json", {})
    assert {mode(p) for p in (tmp_path / "runs").rglob("*") if p.is_dir()} == {0o700}
    assert {mode(p) for p in (tmp_path / "runs").rglob("*") if p.is_file()} == {0o600}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_shared_folder_is_for_the_group_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = Folder(str(tmp_path / "a"))
        folder.make(shared=True)
        folder.write_bytes("deep/part", b"x")
        folder.write_bytes("deep/part", b"y")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == mode(tmp_path / "a/deep") == 0o2770
    assert mode(tmp_path / "a/deep/part") == 0o660


def test_a_folder_that_exists_keeps_its_mode_and_files_follow_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o755)
    folder = Folder(str(tmp_path / "a"))
    folder.make()
    folder.write_bytes("part", b"x")
    assert mode(tmp_path / "a") == 0o755 and mode(tmp_path / "a/part") == 0o644 & ~current_umask()


def current_umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_a_pair_written_under_former_column_names_opens_under_the_present_ones(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}]
    row = {"prompt_id": "p", "chosen_id": "a", "rejected_id": "b", "split": "train", "prompt": chat, "chosen": chat,
           "rejected": chat, "score_chosen": 9.0, "score_rejected": 2.0, "score_gap": 7.0}  # fmt: skip
    new = to_table([row], DPO)
    former = {new: old for old, new in RENAMED.items()}
    old = new.rename_columns([former.get(name, name) for name in new.column_names])
    table = ShardedTable(str(tmp_path), "dpo", 1, "f")
    Folder(str(tmp_path)).write_table(shard_name(0), old, fingerprint="f", kind="dpo")
    assert table.state().done and table.read_all().equals(new)
    assert table.read(0, ["score_rejected", "prompt_id"]).to_pylist() == [{"score_rejected": 2.0, "prompt_id": "p"}]
    Folder(str(tmp_path)).write_table(shard_name(0), old.drop_columns(["chosen_score"]), fingerprint="f", kind="dpo")
    assert table.read_all()["score_chosen"].to_pylist() == [None]
