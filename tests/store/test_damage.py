"""Bytes that a disk or a network has changed: a file is read as it was written, or is set aside, never as other
content."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.store import parquet
from ray_pipeline.store.errors import DamagedFile, StoreError
from ray_pipeline.store.files import RESULT, Folder
from ray_pipeline.store.schemas import CALLS, VERDICTS, to_table
from tests.store.test_calls import row as call

DATA: dict[str, Any] = {"fingerprint": "0123abcd", "kind": "t"}


def verdicts(n: int) -> pa.Table:
    """Scores of two judges; a flipped bit of a score would leave no trace."""
    draw = random.Random(7)
    rows = [
        {"candidate_id": f"{i:032x}", "prompt_id": f"{i // 4:032x}", "judge": judge, "score": draw.randint(1, 10),
         "expected_score": 10 * draw.random(), "reason": f"reason {draw.getrandbits(40):x}", "parse_status": "ok",
         "raw": f"reply {draw.getrandbits(40):x}"}
        for i in range(n) for judge in ("facts", "style")
    ]  # fmt: skip
    return to_table(rows, VERDICTS)


TABLES = {
    "a shard": verdicts(30),
    "an empty shard": verdicts(0),
    "a call-log part": to_table([call(i, f"reply {i % 10}") for i in range(60)], CALLS),
}
WRITTEN = {name: parquet.encode(table, {b"quorum.fingerprint": b"f"}, 32) for name, table in TABLES.items()}


def read(data: bytes, columns: list[str] | None = None) -> pa.Table:
    file, verified = parquet.decode(data)
    assert verified
    return file.read(columns=columns).replace_schema_metadata(None)


@pytest.mark.parametrize("name", TABLES)
def test_every_flipped_bit_of_some_is_found(name: str) -> None:
    written, draw = WRITTEN[name], random.Random(name)
    assert read(written).equals(TABLES[name])
    for bit in draw.sample(range(8 * len(written)), 500):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(parquet.Damaged):
            read(bytes(flipped))


def test_every_flipped_bit_of_a_footer_is_found_from_the_footer_alone() -> None:
    written = WRITTEN["a shard"]
    footer = written[-parquet.footer_size(written[-8:]) :]
    assert parquet.decode(footer)[0].metadata.num_rows == 60
    for bit in range(8 * len(footer)):
        flipped = bytearray(footer)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(parquet.Damaged):
            parquet.decode(bytes(flipped))


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(list(TABLES)), data=st.data())
def test_other_bytes_are_found(name: str, data: st.DataObject) -> None:
    """Blocks overwritten, moved, cut out and cut off."""
    written = WRITTEN[name]
    start = data.draw(st.integers(0, len(written) - 1))
    end = data.draw(st.integers(start + 1, len(written)))
    other = data.draw(st.sampled_from([b"\0" * (end - start), written[start:end][::-1], b"", os.urandom(end - start)]))
    changed = written[:start] + other + written[end:]
    try:
        assert read(changed).equals(TABLES[name])
        assert changed == written
    except parquet.Damaged:
        pass


def test_pages_have_checksums_that_other_readers_verify(tmp_path: Path) -> None:
    written = bytearray(WRITTEN["a shard"])
    path = tmp_path / "a.parquet"
    path.write_bytes(written)
    whole = TABLES["a shard"]
    options = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
    load: dict[str, Any] = {"data_files": str(path), "split": "train", "cache_dir": str(tmp_path / "cache")}
    assert pq.read_table(path, page_checksum_verification=True).replace_schema_metadata(None).equals(whole)
    assert len(pd.read_parquet(path)) == pq.read_metadata(path).num_rows == 60
    assert datasets.load_dataset("parquet", **load).to_list() == whole.to_pylist()

    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    written[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(written)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(path, page_checksum_verification=True)
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        datasets.load_dataset("parquet", fragment_scan_options=options, **load)


def test_a_file_of_a_version_without_checksums_is_read(tmp_path: Path) -> None:
    whole = TABLES["a shard"].replace_schema_metadata({b"quorum.fingerprint": b"0123abcd", b"quorum.table": b"t"})
    pq.write_table(whole, tmp_path / "a.parquet", compression="zstd")
    folder = Folder(str(tmp_path))
    assert folder.check_table("a.parquet", **DATA, schema=VERDICTS) == 60
    assert folder.read_table("a.parquet", **DATA, schema=VERDICTS).equals(TABLES["a shard"])
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2] + data[-8:])
    with pytest.raises(DamagedFile, match=r"a\.parquet is damaged"):
        folder.read_table("a.parquet", **DATA)


# --- set aside --------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change a bit in the pages of a Parquet file."""
    data = bytearray(path.read_bytes())
    data[(len(data) - parquet.footer_size(bytes(data[-8:]))) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [".", "kto/train"])
def test_a_damaged_file_is_set_aside_and_its_stage_is_not_done(tmp_path: Path, place: str) -> None:
    stage = Folder(str(tmp_path / "run/judge-0123"))
    folder = stage if place == "." else stage / place
    stage.write_json(RESULT, {"rows": {}})
    for number in (1, 2):
        folder.write_table("a.parquet", TABLES["a shard"], **DATA)
        flip(tmp_path / "run/judge-0123" / place / "a.parquet")
        assert folder.check_table("a.parquet", **DATA) == 60  # its footer is whole
        with pytest.raises(DamagedFile) as found:
            folder.read_table("a.parquet", **DATA)
        told = str(found.value)
        assert told.startswith(f"{folder.uri('a.parquet')} is damaged (")
        assert told.endswith(f"`quorum run` regenerates it (set aside as a.parquet.damaged-{number})")
        assert folder.names(".parquet") == [] and not stage.exists(RESULT)
    assert folder.names() == ["a.parquet.damaged-1", "a.parquet.damaged-2"]
    with pytest.raises(FileNotFoundError):
        folder.read_table("a.parquet", **DATA)


def test_a_file_that_cannot_be_set_aside_is_named_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    folder.write_table("a.parquet", TABLES["a shard"], **DATA)
    flip(tmp_path / "a.parquet")
    for error, told in (
        (PermissionError("read-only"), r"regenerates it \(it cannot be set aside: read-only; remove it\)"),
        (FileNotFoundError("gone"), "regenerates it$"),  # another process was first
    ):
        move = mock.Mock(side_effect=error)
        monkeypatch.setattr(Folder, "fs", SimpleNamespace(move=move))
        with pytest.raises(DamagedFile, match=told):
            folder.read_table("a.parquet", **DATA)


def test_a_whole_file_that_this_pyarrow_cannot_read_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    folder.write_table("a.parquet", TABLES["a shard"], **DATA)

    def newer(*_: Any, **__: Any) -> None:
        raise OSError("unknown encoding")

    monkeypatch.setattr(pq.ParquetFile, "read", newer)
    with pytest.raises(StoreError, match=r"cannot be read by pyarrow .*unknown encoding.*update pyarrow"):
        folder.read_table("a.parquet", **DATA)
    assert folder.names() == ["a.parquet"]
