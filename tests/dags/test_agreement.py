"""The agreement workflow as a user types it: two pocket judges, their jury and a debate, killed in its middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_pipeline.pocket.pairs import make_pairs
from tests.dags.conftest import Quorum, calls_of, contradictions, engine_calls, manifest, tables, wait_until
from tests.dags.in_process import here

pytestmark = pytest.mark.e2e

PAIRS = 40
#: Every role speaks in every round and scores at the end.
ROLES, ROUNDS = 3, 2
CALLS = PAIRS * (ROLES * ROUNDS + ROLES)


def judged(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    document = json.loads((folder / "report" / "agreement.json").read_text())
    return {(j["strategy"], j["judge"]): j for j in document["judges"]}


def debated(calls: Path) -> int:
    return calls_of(calls, "debate")


def test_a_jury_of_two_and_a_debate_that_is_killed_in_its_middle(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    calls = folder / "calls"
    common = ["run", "agreement", "-c", "configs/pocket_agreement.yaml", f"data.limit={PAIRS}"]
    # One debate at a time, so that it can be hit in its middle.
    slow = "models.judge.placement.concurrency=1"
    first = Quorum(*common, "--run-dir", str(folder), "--to", "debate", slow, warm=True)
    wait_until(first, lambda: calls.exists() and debated(calls) > 5)
    first.kill()
    assert first.living_engines() == []
    kept = debated(calls)
    assert kept < CALLS, "the debates were over before they were killed"

    second = here(*common, "--run-dir", str(folder))
    assert "taking the run over" in second.output
    usage = manifest(folder)["stages"]["debate-judge"]["usage"]
    # What was answered is not asked again, and speeches that say the same are one call.
    assert usage["calls_log"] >= kept
    assert usage["calls_log"] + usage["calls_engine"] >= CALLS
    assert contradictions(calls) == []
    again = here(*common, "--run-dir", str(tmp_path / "again"), f"calls.root={calls}", "calls.replay_only=true")
    assert engine_calls(tmp_path / "again") == {} and not again.engines
    stages = ["items", "ask-judge", "ask-reviewer", "debate-judge"]
    assert tables(tmp_path / "again", stages) == tables(folder, stages)

    found = judged(folder)
    for name in ("judge", "reviewer"):
        assert found["direct", name]["accuracy_no_ties"]["value"] >= 0.9, name
        assert found["direct", name]["flip_rate"]["value"] <= 0.1, name
        assert found["independent_10", name]["accuracy"]["value"] > 0.7, name
    document = json.loads((folder / "report" / "agreement.json").read_text())
    assert [jury["jury"] for jury in document["juries"] if jury["strategy"] == "direct"] == [["judge", "reviewer"]]
    (debate,) = document["debates"]
    assert set(debate["voices"]) == {"critic", "general_public", "psychologist"}
    speeches = pq.read_table(folder / manifest(folder)["stages"]["debate-judge"]["path"] / "speeches")
    assert len(speeches) == PAIRS * ROLES * ROUNDS and None not in speeches["text"].to_pylist()


def test_recorded_judges_need_no_engine(tmp_path: Path) -> None:
    rows = make_pairs(60, seed=7)
    for row in rows:
        scores = (9, 2) if row["human_label"] == "A" else (2, 9)
        row["combined_10"] = {
            "always right": {"text": f"Score A: {scores[0]}/10\nScore B: {scores[1]}/10"},
            "always first": {"text": "Score A: 9/10\nScore B: 2/10"},
        }
    data, folder = tmp_path / "items.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replayed = here("run", "agreement", "-c", "configs/agreement.yaml", "--run-dir", str(folder), f"data.path={data}")
    assert "report/report.html" in replayed.output and engine_calls(folder) == {}
    found = judged(folder)
    assert found["combined_10", "always right"]["kappa"] == 1.0
    assert found["combined_10", "always first"]["kappa"] == pytest.approx(0.0)
    page = (folder / "report" / "report.md").read_text()
    (folder / "report" / "report.md").unlink()
    here("report", str(folder))
    assert (folder / "report" / "report.md").read_text() == page
    assert "makes no training rows to audit" in here("audit", str(folder), expect=2).output
