"""The page of a feedback loop: loop.json and report.md, from the stored responses, reviews and decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_pipeline.evaluate.stage import with_truth, write_report
from ray_pipeline.feedback.loop import reviews_by_prompt, what_next
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.stage import Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.store.files import Folder
from ray_pipeline.store.local import written_here
from ray_pipeline.store.schemas import REVIEWS
from ray_pipeline.store.settings import Settings

#: Why a loop ends, in words.
WORDS = {
    "limit": "all responses were given",
    "empty": "nothing to improve",
    "repeated": "the feedback came again",
    "unread": "no review could be read",
    "no_response": "no response",
}


class LoopPage(Settings):
    """What the page says beside the tables."""

    run_name: str
    reviewers: tuple[str, ...]


def loop_page(settings: LoopPage, prompts: Stage, candidates: Stage, reviews: Sequence[Stage], select: Stage) -> Stage:
    """How far the loops went, why they ended, and whether reviews helped."""
    return Stage(
        name="loop",
        view="loop",
        work=WholeWork(function=write_loop_page, settings=settings),
        config=settings.decisive(exclude={"run_name"}),
        inputs={stage.name: stage for stage in (prompts, candidates, *reviews, select)},
    )


def write_loop_page(given: WholeInput) -> dict[str, Any]:
    with written_here(given.folder) as folder:
        stats = build_page(given.settings, {r.name: r for r in given.inputs.values()}, folder)
    given.log(
        "; ".join(
            f"response {r['response']}: {r['responses']} prompts, mean score "
            + ("–" if r["mean_score"] is None else f"{r['mean_score']:.2f}")
            + (f", right {r['accuracy']:.1%}" if r.get("accuracy") is not None else "")
            for r in stats["responses"]
        )
    )
    return {"ends": stats["ends"]}


def rewrite_page(run: Run) -> Folder:
    """The loop's page anew, if it came so far, and the report; returns its folder."""
    if "loop" in run.results:
        entry = run.manifest["stages"]["loop"]
        reviewers = tuple(r["name"] for r in run.manifest["config"]["loop"]["reviewers"])
        page = LoopPage(run_name=run.manifest["config"]["run"]["name"], reviewers=reviewers)
        with written_here(run.folder / entry["path"]) as folder:
            build_page(page, run.results, folder)
        run.show("loop", entry["path"])
    return write_report(run)


def build_page(settings: LoopPage, results: Mapping[str, StageResult], folder: Path) -> dict[str, Any]:
    from ray_pipeline.feedback.loop_stats import loop_stats
    from ray_pipeline.report.markdown import render

    candidates = with_truth(results["candidates"].table().read_all(), results["prompts"].table().read_all())
    tables = [r.table().read_all() for name, r in sorted(results.items()) if name.startswith("review-")]
    reviews = pa.concat_tables([REVIEWS.empty_table(), *tables])
    ends = loop_ends(candidates, reviews, settings.reviewers)
    stats = loop_stats(candidates, reviews, results["select"].table().read_all(), ends)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stats, indent=2, allow_nan=False)
    (folder / "loop.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    page = render("loop.md.j2", {"name": settings.run_name, "stats": stats, "words": WORDS})
    (folder / "report.md").write_text(page, encoding="utf-8", newline="\n")
    return stats


def loop_ends(candidates: pa.Table, reviews: pa.Table, reviewers: Sequence[str]) -> dict[str, str]:
    """Why the loop of each prompt ended."""
    last: dict[str, dict[str, Any]] = {}
    for row in candidates.select(["prompt_id", "k", "response"]).to_pylist():
        if row["prompt_id"] not in last or row["k"] > last[row["prompt_id"]]["k"]:
            last[row["prompt_id"]] = row
    said = reviews_by_prompt(reviews.to_pylist(), reviewers)
    return {prompt: what_next(row, said.get(prompt, []))[1] or "limit" for prompt, row in last.items()}
