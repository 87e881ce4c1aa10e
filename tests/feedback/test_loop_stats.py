"""The figures of a feedback loop, from planted tables, and the page that shows them."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ray_pipeline.feedback.loop_stats import loop_stats
from ray_pipeline.feedback.page import loop_document, loop_ends
from ray_pipeline.report.html import render_html
from ray_pipeline.report.markdown import render_markdown
from ray_pipeline.store.schemas import REVIEWS, to_table

#: Prompt → (right, score, label) of each response.
LOOPS = {
    "p": [(False, 3.0, "undesirable"), (True, 8.0, "desirable")],
    "q": [(False, 4.0, "discard"), (False, 4.0, "discard"), (False, 2.0, "undesirable")],
    "r": [(True, 9.0, "discard")],
    "s": [(True, 9.0, "desirable"), (False, None, "incomplete")],
}
ENDS = {"p": "empty", "q": "limit", "r": "empty", "s": "no_response"}


def tables(truth: bool = True) -> tuple[pa.Table, pa.Table, pa.Table]:
    candidates, decisions = [], []
    for prompt, loop in LOOPS.items():
        for k, (right, score, label) in enumerate(loop):
            name = f"{prompt}{k}"
            row = {"candidate_id": name, "prompt_id": prompt, "k": k, "response": "x", "correct": right}
            candidates.append(row if truth else {n: v for n, v in row.items() if n != "correct"})
            decisions.append({"candidate_id": name, "mean_score": score, "label": label})
    reviews = [
        {"reviewer": "a|b", "iteration": 0, "feedback": feedback, "parse_status": "ok"}
        for feedback in ("x", "", None, "y")
    ]
    return tuple(map(pa.Table.from_pylist, (candidates, reviews, decisions)))  # type: ignore[return-value]


def test_responses_scores_and_truth_by_iteration() -> None:
    found = loop_stats(*tables(), ENDS)
    assert (found["prompts"], found["ends"]) == (4, {"empty": 2, "limit": 1, "no_response": 1})
    first, second, third = found["responses"]
    assert [r["responses"] for r in found["responses"]] == [4, 3, 1]
    assert (first["mean_score"], first["accepted"], first["better"]) == (6.25, 1, 0)
    assert (second["scored"], second["mean_score"], second["sd"]) == (2, 6.0, pytest.approx(2.8284271))
    assert (second["better"], second["equal"], second["worse"]) == (1, 1, 0)
    assert (third["better"], third["equal"], third["worse"], third["sd"]) == (0, 0, 1, None)
    assert [r["accuracy"] for r in found["responses"]] == [0.5, 1 / 3, 0.0]
    # r has one response, and it counts on: p and r are right in the end.
    assert [r["accuracy_so_far"] for r in found["responses"]] == [0.5, 0.5, 0.5]
    assert (second["mended"], second["wrong_before"], second["kept_right"], second["right_before"]) == (1, 2, 0, 1)
    assert found["reviewers"] == [
        {"reviewer": "a|b", "of_response": 1, "reviews": 4, "unread": 1, "nothing_to_improve": 1}
    ]


def test_the_page_shows_truth_only_where_it_is_known_and_names_stay_in_their_cells() -> None:
    pages = [loop_document("<b>run</b>", loop_stats(*tables(truth), ENDS)) for truth in (True, False)]
    with_truth, without = map(render_markdown, pages)
    assert "## The truth" in with_truth and "## The truth" not in without
    assert "<b>" not in with_truth and "| a|b |" not in with_truth
    html, html_without = map(render_html, pages)
    assert '<section id="truth"' in html and '<section id="truth"' not in html_without and "<b>run" not in html
    for text in (with_truth, html):
        assert "nothing to improve 2, all responses were given 1, no response 1" in text and "1 of 2" in text
        assert "Revisions scored higher than the preceding response 1 times, lower 1 times, equal 1." in text


def test_ends_follow_from_the_stored_reviews() -> None:
    def said(prompt: str, iteration: int, feedback: str | None) -> dict:
        ids = {"review_id": f"{prompt}{iteration}", "candidate_id": "c", "prompt_id": prompt, "reviewer": "r"}
        status = "unparsed" if feedback is None else "ok"
        return {**ids, "iteration": iteration, "feedback": feedback, "parse_status": status}

    reviews = [
        said("done", 0, ""), said("again", 0, "x"), said("again", 1, "X "), said("dumb", 0, None),
        said("whole", 0, "x"), said("whole", 1, "y"), said("lost", 0, "x"),
    ]  # fmt: skip
    responses = [
        {"prompt_id": prompt, "k": k, "response": None if (prompt, k) == ("lost", 1) else "x"}
        for prompt, number in (("done", 1), ("again", 2), ("dumb", 1), ("whole", 3), ("lost", 2))
        for k in range(number)
    ]
    assert loop_ends(pa.Table.from_pylist(responses), to_table(reviews, REVIEWS), ["r"]) == {
        "done": "empty", "again": "repeated", "dumb": "unread", "whole": "limit", "lost": "no_response",
    }  # fmt: skip
