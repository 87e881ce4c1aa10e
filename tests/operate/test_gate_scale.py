"""The benchmark of gate and datasets, small: what it makes, and that it goes on where it was interrupted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_pipeline.data import datasets


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gate_scale", Path("perf/gate_scale.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gate_scale", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(datasets, "token_counter", datasets.token_counter)  # the benchmark puts its own in place
    monkeypatch.setattr(module, "SHARD", 100)
    return module


def test_a_small_size_through_all_stages(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "400"
    bench.make(folder, 400, bench.JUDGES)
    bench.run(folder, 400, bench.JUDGES, None)
    found = json.loads((folder / "run.json").read_text())
    assert found["shards"] == 4 and found["peak"] >= found["loaded"] > 0
    (gate,) = folder.glob("gate-*")
    labels = [label for f in gate.glob("*.parquet") for label in pq.read_table(f)["label"].to_pylist()]
    assert len(labels) == 400 and {"desirable", "undesirable", "discard", "abstain"} <= set(labels)
    kept = found["rows"]["kto"]["train"] + found["rows"]["kto"]["val"]
    assert kept == labels.count("desirable") + labels.count("undesirable")
    assert found["rows"]["dpo"]["train"] > 0 and found["rows"]["kto"]["val"] > 0

    made = sorted(gate.glob("shard-*.parquet"))
    (gate / "_result.json").unlink()
    made[0].unlink()
    kept_files = {f: f.stat().st_mtime_ns for f in made[1:]}
    bench.run(folder, 400, bench.JUDGES, None)  # as after an interruption: the other shards stay
    assert {f: f.stat().st_mtime_ns for f in made[1:]} == kept_files and made[0].exists()

    bench.show(tmp_path, [400])
    assert f"| 400 | 4 | {kept:,} |" in capsys.readouterr().out
    for chart in ("cost", "memory"):
        assert "<circle" in (tmp_path / f"gate_scale_{chart}.svg").read_text()


def test_posteriors_of_a_small_size(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, judges = tmp_path / "400", [*bench.JUDGES, "fourth"]
    bench.make(folder, 400, judges)
    bench.run(folder, 400, judges, "one_coin")
    (gate,) = (found for found in folder.glob("gate-*") if "numbers" not in found.name)
    found = [p for f in sorted(gate.glob("*.parquet")) for p in pq.read_table(f)["posterior_desirable"].to_pylist()]
    assert len(found) == 400 and all(0 <= p <= 1 for p in found)
    bench.show_posteriors(tmp_path, [400])
    assert "| 400 | 4 |" in capsys.readouterr().out
    bench.POSTERIOR_SECONDS = 0
    with pytest.raises(SystemExit, match="over 0 s"):
        bench.show_posteriors(tmp_path, [400])
