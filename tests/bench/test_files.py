"""Files of benchmarks: what cannot be read is refused with its name."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from ray_pipeline.bench.files import BenchmarkFileError, read_csv, read_rows


@pytest.mark.parametrize(
    "data",
    [gzip.compress(b'[{"a": 1}]')[:-6], gzip.compress(b"x")[:10] + b"\xff" * 9, b"PK"],
    ids=["cut", "damaged", "of another kind"],  # the bytes name the second in which they were packed
)
def test_a_damaged_packed_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json.gz").write_bytes(data)
    with pytest.raises(BenchmarkFileError, match=r"x\.json\.gz cannot be read: "):
        read_rows(str(tmp_path / "x.json.gz"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfa,b\n1,2\n")
    assert read_rows(str(tmp_path / "x.json")) == [{"a": 1}]
    assert read_csv(str(tmp_path / "x.csv")) == [{"a": "1", "b": "2"}]


def test_what_the_csv_reader_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n" + "x" * 200_000 + ",2\n")
    with pytest.raises(BenchmarkFileError, match=r"x\.csv, row 2 is not CSV: field larger"):
        read_csv(str(tmp_path / "x.csv"))
