"""The feedback loop by the real command: small real models review and revise, a judge picks, datasets are made, and the
policy that is trained on them writes in the loop of a second round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.dags.conftest import engine_calls, manifest, tables
from tests.dags.in_process import here

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

COMMAND = ["run", "fellowship", "-c", "configs/pocket_fellowship.yaml"]
SMALL = ["prompts.sources.0.count=48", "prompts.num_shards=2", "loop.responses=2"]
ROUNDS = [
    "rounds.n=2",
    "rounds.prompts=same",
    "improve=null",
    "train.save=adapter",
    "train.num_workers=1",
    "train.global_batch=2",
    "train.batch_size=2",
    "train.epochs=1",
]
LOOP = ("generate-1", "review-1", "generate-2", "candidates", "judge", "select")


def rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    path = folder / manifest(folder)["stages"][stage]["path"]
    return [row for shard in sorted(path.glob("shard-*.parquet")) for row in pq.read_table(shard).to_pylist()]


def test_a_loop_its_data_sets_and_a_second_round(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    here(*COMMAND, "--run-dir", str(folder), "--to", "loop", *SMALL)

    candidates = {row["candidate_id"]: row for row in rows(folder, "candidates")}
    reviews, asked = rows(folder, "review-1"), rows(folder, "prompts")
    assert len(reviews) == len(asked) == 48
    assert sum(row["feedback"] is None for row in reviews) <= 2
    revised = {row["prompt_id"] for row in candidates.values() if row["k"] == 1}
    assert revised == {row["prompt_id"] for row in reviews if row["feedback"]}
    assert all(candidates[row["candidate_id"]]["prompt_id"] == row["prompt_id"] for row in reviews)

    stats = json.loads((folder / "loop" / "loop.json").read_text())
    print("\n" + (folder / "loop" / "report.md").read_text())
    assert stats["prompts"] == 48 == sum(stats["ends"].values()) and stats["truth"]
    assert stats["responses"][1]["accuracy_so_far"] > stats["responses"][0]["accuracy"]

    before = tables(folder, LOOP)
    assert set(engine_calls(folder)) == {"generate-1", "review-1", "generate-2", "judge"}
    further = here(*COMMAND, "--run-dir", str(folder), "--to", "datasets", *SMALL)
    assert not further.engines and tables(folder, LOOP) == before
    assert list((folder / "datasets" / "dpo").rglob("*.parquet"))
    assert "no problem" in here("audit", str(folder)).output

    here(*COMMAND, "--run-dir", str(folder), *SMALL, *ROUNDS)
    stages = manifest(folder)["stages"]
    assert {entry["status"] for entry in stages.values()} == {"done"} and tables(folder, LOOP) == before
    assert {"generate-1-2", "review-1-2", "generate-2-2", "judge-2"} <= engine_calls(folder).keys()
    assert not {row["candidate_id"] for row in rows(folder, "candidates-2")} & candidates.keys()
    assert "starts from" in (folder / stages["train-2"]["path"] / "adapter" / "README.md").read_text()
    assert (folder / "loop").resolve() == folder / stages["loop-2"]["path"]
    numbers = json.loads((folder / "report" / "metrics.json").read_text())["rounds"]
    assert [one["number"] for one in numbers] == [1, 2] and all(one["policy"] and one["panel"] for one in numbers)
    audited = here("audit", str(folder)).output
    assert "datasets-2" in audited and audited.count("no problem") == 2
