"""The files of a benchmark page."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa

from ray_pipeline.bench.table import BenchmarkPage, write_benchmarks


def test_names_of_models_are_no_formulas_in_any_table(tmp_path: Path) -> None:
    name = "=HYPERLINK(A1)"
    tables = {"plain": [{"model": name, "score": -1.5}], "arrow": [pa.table({"model": [name], "score": [-1.5]})]}
    write_benchmarks(BenchmarkPage(name="p", models=[name], facts={}, tables=tables), tmp_path)
    for file in ("plain.csv", "arrow.csv"):
        with open(tmp_path / file, encoding="utf-8", newline="") as text:
            assert list(csv.reader(text)) == [["model", "score"], [f"'{name}", "-1.5"]]
    header = (tmp_path / "benchmarks.csv").read_text("utf-8")
    assert header.startswith("model,benchmark,metric") and header.count("\n") == 1
