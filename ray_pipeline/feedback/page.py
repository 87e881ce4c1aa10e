"""The page of a feedback loop, from the stored responses, reviews and decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.checkers import CheckerKey, with_truth
from ray_pipeline.engines.usage import Usage
from ray_pipeline.evaluate.first_screen import first_screen
from ray_pipeline.evaluate.stage import write_report
from ray_pipeline.feedback.loop import reviews_by_prompt, what_next
from ray_pipeline.graph.results import Run, of_final_round, of_role, table_of
from ray_pipeline.graph.stage import Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.report.charts import Chart, Series, lines
from ray_pipeline.report.figures import number, percent
from ray_pipeline.report.page import Page, Rows, Section, Table, Text, panels
from ray_pipeline.store.files import Folder
from ray_pipeline.store.local import written_here
from ray_pipeline.store.schemas import REVIEWS

#: Role of the page of a loop.
LOOP_PAGE = "loop page"
#: Reasons for which a loop ends, as text.
WORDS = {
    "limit": "all responses were given",
    "empty": "nothing to improve",
    "repeated": "the feedback came again",
    "unread": "no review could be read",
    "no_response": "no response",
}


class LoopPage(Settings):
    """Content of the page beside the tables; `models` are role → model."""

    run_name: str
    reviewers: tuple[str, ...]
    models: dict[str, str] = Field(default_factory=dict)
    checker: CheckerKey = None


def loop_page(settings: LoopPage, stages: Sequence[Stage], name: str = "loop") -> Stage:
    """How far the loops went, why they ended, and whether reviews helped.

    Args:
        stages: all that made the prompts, responses, reviews, verdicts and decisions.
    """
    return Stage(
        name=name,
        view="loop",
        role=LOOP_PAGE,
        work=WholeWork(function=write_loop_page, settings=settings),
        config=settings.decisive(exclude={"run_name", "models"}),
        inputs={stage.name: stage for stage in stages},
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
    """Rewrite the pages of the loops that are done, one each round, and the report; returns the report's folder."""
    final = of_final_round(run.results)
    for done in of_role(run.results, LOOP_PAGE):
        record = run.stages[done.name]
        reviewers = tuple(r["name"] for r in run.config["loop"]["reviewers"])
        checker = run.config["evaluate"].get("checker")
        page = LoopPage(run_name=run.name, reviewers=reviewers, checker=checker, models=run.page.get("models", {}))
        behind = set(record.inputs.values())
        with written_here(run.folder / record.path) as folder:
            build_page(page, {name: result for name, result in run.results.items() if name in behind}, folder)
        if done.name in final:
            run.show("loop", record.path)
    return write_report(run)


def build_page(settings: LoopPage, results: Mapping[str, StageResult], folder: Path) -> dict[str, Any]:
    """Write the page and loop.json; returns the figures."""
    from ray_pipeline.feedback.loop_stats import loop_stats
    from ray_pipeline.report.write import write_page

    candidates, prompts, decisions = (table_of(results, role) for role in ("candidates", "prompts", "decisions"))
    assert candidates is not None and prompts is not None and decisions is not None
    candidates, reviews = (
        with_truth(candidates, prompts, settings.checker),
        table_of(results, "reviews") or REVIEWS.empty_table(),
    )
    ends = loop_ends(candidates, reviews, settings.reviewers)
    stats = loop_stats(candidates, reviews, decisions, ends)
    verdicts = [result.table().read_all(["judge"])["judge"] for result in of_role(results, "verdicts")]
    judges = sorted({judge for column in verdicts for judge in column.unique().to_pylist()})
    answers = first_screen(
        "feedback loop: responses, reviews, revisions",
        models=dict(sorted(settings.models.items())),
        judges={"reviewers": ", ".join(settings.reviewers), "of the responses": ", ".join(judges)},
        amounts=[
            (stats["prompts"], "prompts"),
            (len(candidates), "responses"),
            (len(reviews), "reviews"),
            (decisions["label"].to_pylist().count("desirable"), "responses accepted"),
        ],
        usage=sum((result.usage for result in results.values()), Usage()),
    )
    write_page(loop_document(settings.run_name, stats, answers), {"loop.json": stats}, folder)
    return stats


def loop_document(name: str, stats: Mapping[str, Any], answers: Sequence[tuple[str, str]] = ()) -> Page:
    """The page of loop.json; `answers` are its `about`."""
    responses = stats["responses"]
    rows: Rows = [
        [
            str(r["response"]),
            number(r["responses"]),
            percent(r["responses"] / stats["prompts"]),
            number(r["scored"]),
            number(r["mean_score"]),
            number(r["sd"]),
            *(number(r[key]) for key in ("better", "equal", "worse", "accepted")),
        ]
        for r in responses
    ]
    columns = ["response", "prompts", "share", "scored", "mean score", "sd", "better than before", "equal", "worse"]
    text = "A later response exists only where a reviewer still wanted a change, so its mean is over harder prompts."
    charts = [_line("Mean score", "blue", responses, "mean_score")]
    if stats["truth"]:
        charts.append(_line("Accuracy of each prompt's newest response", "green", responses, "accuracy_so_far"))
    sections = [
        Section("responses", "Responses", [*panels(*charts), Table([*columns, "accepted"], rows), Text(text)]),
        *([Section("truth", "The truth", [_truth(responses)])] if stats["truth"] else []),
        Section("reviews", "Reviews", [_reviews(stats["reviewers"])]),
    ]
    ends = ", ".join(f"{WORDS[why]} {count:,}" for why, count in stats["ends"].items())
    return Page(
        title=f"Feedback loop of {name}",
        subtitle="Quorum, feedback loop",
        headline=f"{stats['prompts']:,} prompts. Loops ended because: {ends}.{_helped(responses)}",
        about=answers,
        sections=sections,
    )


def _helped(responses: Sequence[Mapping[str, Any]]) -> str:
    """Whether later responses scored higher than those before them."""
    better, equal, worse = (sum(r[key] for r in responses) for key in ("better", "equal", "worse"))
    if not better + equal + worse:
        return ""
    times = f"{better:,} times, lower {worse:,} times, equal {equal:,}"
    return f" Revisions scored higher than the preceding response {times}."


def _line(title: str, colour: str, responses: Sequence[Mapping[str, Any]], key: str) -> Chart | None:
    known = [(r["response"], r[key]) for r in responses if r[key] is not None]
    return lines(title, [Series(title, colour, [x for x, _ in known], [y for _, y in known])], "response")


def _truth(responses: Sequence[Mapping[str, Any]]) -> Table:
    rows: Rows = [
        [
            str(r["response"]),
            f"{r['right']:,} of {r['of']:,}",
            percent(r["accuracy"]),
            percent(r["accuracy_so_far"]),
            f"{r['mended']:,} of {r['wrong_before']:,}",
            f"{r['kept_right']:,} of {r['right_before']:,}",
        ]
        for r in responses
    ]
    columns = ["response", "right", "accuracy", "accuracy of each prompt's newest response", "wrong before, right now"]
    return Table([*columns, "right before, still right"], rows)


def _reviews(reviewers: Sequence[Mapping[str, Any]]) -> Table:
    rows: Rows = [
        [r["reviewer"], *(number(r[key]) for key in ("of_response", "reviews", "nothing_to_improve", "unread"))]
        for r in reviewers
    ]
    return Table(["reviewer", "of response", "reviews", "nothing to improve", "unread"], rows)


def loop_ends(candidates: pa.Table, reviews: pa.Table, reviewers: Sequence[str]) -> dict[str, str]:
    """Why the loop of each prompt ended."""
    last: dict[str, dict[str, Any]] = {}
    for row in candidates.select(["prompt_id", "k", "response"]).to_pylist():
        if row["prompt_id"] not in last or row["k"] > last[row["prompt_id"]]["k"]:
            last[row["prompt_id"]] = row
    of_prompt = reviews_by_prompt(reviews.to_pylist(), reviewers)
    return {prompt: what_next(row, of_prompt.get(prompt, []))[1] or "limit" for prompt, row in last.items()}
