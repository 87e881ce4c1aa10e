"""The feedback loop end to end: small real models review, revise, are judged, and give all kinds of data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.dags.conftest import engine_calls, manifest, run, tables

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CONFIG = "configs/pocket_fellowship.yaml"
SMALL = ["prompts.sources.0.count=24", "prompts.num_shards=2", "--skip-generation"]
LOOP = ("generate-1", "review-1", "generate-2", "review-2", "generate-3", "candidates", "judge", "select")


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything but the training."""
    folder = tmp_path_factory.mktemp("fellowship") / "run"
    quorum = run("run", "fellowship", "-c", CONFIG, "--run-dir", str(folder), *SMALL)
    assert quorum.living_engines() == []
    return folder


def rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    path = folder / manifest(folder)["stages"][stage]["path"]
    return [row for shard in sorted(path.glob("shard-*.parquet")) for row in pq.read_table(shard).to_pylist()]


def data(folder: Path, stage: str, kind: str) -> list[dict[str, Any]]:
    path = folder / manifest(folder)["stages"][stage]["path"] / kind
    return [row for file in sorted(path.rglob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_loops_end_where_their_reviews_say_and_every_row_leads_back(looped: Path) -> None:
    candidates = {row["candidate_id"]: row for row in rows(looped, "candidates")}
    reviews = [row for n in ("review-1", "review-2") for row in rows(looped, n)]
    asked = {row["prompt_id"]: row["messages"] for row in rows(looped, "prompts")}
    assert {(r["prompt_id"], 0) for r in candidates.values()} <= {(r["prompt_id"], r["k"]) for r in candidates.values()}
    assert {row["prompt_id"] for row in candidates.values()} == set(asked) and len(asked) == 24
    assert sum(row["feedback"] is None for row in reviews) <= 0.1 * len(reviews)
    have = {(row["prompt_id"], row["k"]) for row in candidates.values()}
    for review in reviews:
        answer = candidates[review["candidate_id"]]
        assert (answer["prompt_id"], answer["k"]) == (review["prompt_id"], review["iteration"])
        if not review["feedback"]:
            assert (review["prompt_id"], review["iteration"] + 1) not in have
    kto, dpo = data(looped, "datasets", "kto"), data(looped, "datasets", "dpo")
    assert kto and dpo
    for row in kto:
        assert row["completion"][0]["content"] == candidates[row["candidate_id"]]["response"]
        assert row["prompt"] == asked[row["prompt_id"]]
    best: dict[str, float] = {}
    for row in rows(looped, "select"):
        best[row["prompt_id"]] = max(best.get(row["prompt_id"], 0.0), row["final_score"] or 0.0)
    assert all(row["chosen_score"] == best[row["prompt_id"]] > row["rejected_score"] for row in dpo)


def test_the_second_kind_of_data(looped: Path) -> None:
    revisions = {row["candidate_id"]: row for row in rows(looped, "improve-revise")}
    reviews = {row["review_id"]: row for row in rows(looped, "improve-review")}
    first = {row["candidate_id"]: row for row in rows(looped, "improve-generate")}
    assert len(reviews) == 2 * len(first) and revisions
    for row in data(looped, "datasets-revisions", "kto"):
        revision = revisions[row["candidate_id"]]
        review = reviews[revision["review_id"]]
        answer = first[review["candidate_id"]]
        assert [m["role"] for m in row["prompt"][-3:]] == ["user", "assistant", "user"]
        assert row["prompt"][-2]["content"] == answer["response"]
        assert review["feedback"] in row["prompt"][-1]["content"]
    for row in data(looped, "datasets-reviews", "dpo"):
        assert row["chosen"][0]["content"] == reviews[row["chosen_id"]]["raw"]
        assert row["chosen_score"] > row["rejected_score"]
    calls = engine_calls(looped)
    assert "improve-generate" not in calls  # the loop's own first responses


def test_the_pages_and_a_second_run(looped: Path) -> None:
    stats = json.loads((looped / "loop" / "loop.json").read_text())
    print("\n" + (looped / "loop" / "report.md").read_text())
    assert stats["prompts"] == 24 == sum(stats["ends"].values()) and stats["truth"]
    assert "fellowship" in json.loads((looped / "report" / "metrics.json").read_text())["run"]["workflow"]
    before = tables(looped, LOOP)
    page = (looped / "loop" / "report.md").read_bytes()
    again = run("run", "fellowship", "-c", CONFIG, "--run-dir", str(looped), *SMALL)
    assert again.engines == {} and tables(looped, LOOP) == before
    run("report", str(looped))
    assert (looped / "loop" / "report.md").read_bytes() == page
    assert "no problem" in run("audit", str(looped)).output
