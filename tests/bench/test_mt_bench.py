"""MT-Bench: published means and pairwise verdicts from recorded judgments, and what a score is made of."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import Any

import pytest

from ray_pipeline.bench.conversation import Conversation
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.judge_prompts import mt_bench_prompts, own_mt_bench_prompts
from ray_pipeline.bench.mt_bench.judge import BenchAsking, TurnComparison, TurnRating
from ray_pipeline.bench.mt_bench.questions import CATEGORY_TEMPERATURES, Question, questions_of
from ray_pipeline.bench.mt_bench.replies import Reading, read_bracketed_choice, read_rating, rules_differ
from ray_pipeline.bench.mt_bench.score import (
    compare,
    grade,
    mt_bench_protocol,
    mt_bench_scores,
    pairwise_scores,
    published_mt_bench,
)
from ray_pipeline.stats.protocol import score_name
from tests.published import DATA, json_lines, needs, table
from tests.scripted import ScriptedEngine, said

FOLDER = DATA / "mt_bench"
JUDGED = FOLDER / "judgments_gpt4omini"
MEANS = [("gemma-2-9b-it", 8.0125), ("Mistral-7B-Instruct-v0.3", 7.20625)]
READINGS: list[Reading] = ["published", "unanimous"]
GPT4 = "endpoint:gpt-4@https://api.openai.com/v1"


def published_questions() -> list[Question]:
    return questions_of(json_lines(FOLDER / "question.jsonl"), json_lines(FOLDER / "reference_answer" / "gpt-4.jsonl"))


@needs("mt_bench")
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(("model", "mean"), MEANS)
def test_recorded_judgments_give_the_published_means(model: str, mean: float, reading: Reading) -> None:
    ratings = []
    for row in json_lines(JUDGED / "single_grade" / f"{model}.jsonl"):
        for turn in (1, 2):
            read = read_rating(said(row[f"judgment_turn{turn}"]), reading, 1, 10)
            assert read is not None and read.fields["score"] == row[f"score_turn{turn}"]
            ratings.append(
                TurnRating(int(row["question_id"]), row["category"], turn, read.fields["score"], read.status)
            )  # type: ignore[arg-type]
    assert ratings == published_ratings(model)
    assert_mean(ratings, mean)


@pytest.mark.parametrize(("model", "mean"), MEANS)
def test_published_means_from_published_ratings(model: str, mean: float) -> None:
    assert_mean(published_ratings(model), mean)


def published_ratings(model: str) -> list[TurnRating]:
    rows = [row for row in table("mt_bench_ratings.csv") if row["model"] == model]
    return [TurnRating(int(r["question_id"]), r["category"], int(r["turn"]), float(r["score"]), "ok") for r in rows]  # type: ignore[arg-type]


def assert_mean(ratings: list[TurnRating], mean: float) -> None:
    recorded = {turn: sum(r.score or 0 for r in ratings if r.turn == turn) / 80 for turn in (1, 2)}
    found = mt_bench_scores(ratings, draws=200)
    assert found.overall.mean == mean and found.overall.read == 160 and found.statuses == {"ok": 160}
    assert {turn: m.mean for turn, m in found.turns.items()} == pytest.approx(recorded)
    assert found.overall.interval.low < mean < found.overall.interval.high  # type: ignore[operator]
    assert found.overall.interval.groups == 80  # both turns of a question are drawn together
    assert len(found.categories) == 8 and all(m.read == 20 for m in found.categories.values())
    assert sum(m.mean for m in found.categories.values()) / 8 == pytest.approx(mean)  # type: ignore[misc]
    assert found.category_turns["math", 2].read == 10


@needs("mt_bench")
def test_recorded_judgments_with_references() -> None:
    """The recorded run graded the second turn against references too; its −1 stand for turns that were not asked."""
    for model in ("gemma-2-9b-it", "Mistral-7B-Instruct-v0.3"):
        rows = json_lines(JUDGED / "single_grade_ref" / f"{model}.jsonl")
        for row in rows:
            read = read_rating(said(row["judgment_turn2"]), "unanimous", 1, 10)
            assert read is not None and read.fields["score"] == row["score_turn2"]
            assert read_rating(said(row["judgment_turn1"]), "published", 1, 10) is None


@needs("mt_bench")
def test_pairwise_verdicts_and_flips_recomputed() -> None:
    rows = json_lines(JUDGED / "pairwise" / "gemma-2-9b-it_vs_Mistral-7B-Instruct-v0.3.jsonl")
    comparisons: list[TurnComparison] = []
    for row, order in itertools.product(rows, ("ab", "ba")):
        read = read_bracketed_choice(said(row[f"judgment_{order}"]), "unanimous")
        assert read is not None and read.fields["choice"] == row[f"winner_{order}"]
        comparisons.append(
            TurnComparison(row["question_id"], row["category"], row["turn"], order, read.fields["choice"], read.status)  # type: ignore[arg-type]
        )
    assert_flips(comparisons, rows)
    for row in rows:
        for order in ("ab", "ba"):
            assert re.findall(r"\[\[(.)\]\]", row[f"judgment_{order}"])[-1] == row[f"winner_{order}"]


def test_flips_from_published_verdicts() -> None:
    rows = table("mt_bench_pairwise.csv")
    comparisons = [
        TurnComparison(int(r["question_id"]), r["category"], int(r["turn"]), order, r[f"winner_{order}"], "ok")  # type: ignore[arg-type]
        for r, order in itertools.product(rows, ("ab", "ba"))
    ]
    assert_flips(comparisons, rows)


def assert_flips(comparisons: list[TurnComparison], rows: list[dict[str, Any]]) -> None:
    found = pairwise_scores(comparisons, "gpt-4o-mini", draws=100).overall
    wins = losses = flips = 0
    for row in rows:
        one, other = row["winner_ab"], row["winner_ba"]
        wins, losses = wins + (one + other == "AB"), losses + (one + other == "BA")
        flips += one == other != "C"
    assert (found.wins, found.losses, found.ties, found.flips) == (wins, losses, 80 - wins - losses, flips)
    recorded = [row["winner"] for row in rows]
    assert (wins, losses) == (recorded.count("gemma-2-9b-it"), recorded.count("Mistral-7B-Instruct-v0.3"))
    assert found.flip_rate == flips / 80 == 29 / 80 and found.score.mean == (wins + (80 - wins - losses) / 2) / 80


@needs("mt_bench")
def test_only_the_published_protocol_has_the_name() -> None:
    prompts = mt_bench_prompts(json_lines(FOLDER / "judge_prompts.jsonl"), "judge_prompts.jsonl")
    questions = published_questions()
    assert len(questions) == 80 and sum(q.references is not None for q in questions) == 30

    def name(judge: str = GPT4, contradictory: int = 0, **other: Any) -> Any:
        given = {"questions": questions, "prompts": prompts, "asking": BenchAsking(), "mode": "single", **other}
        return score_name(mt_bench_protocol(judge=judge, contradictory=contradictory, **given), published_mt_bench())

    assert name().text == "MT-Bench" and name().exact
    assert name(contradictory=2, asking=BenchAsking(reading="published")).exact
    assert name(contradictory=2).departures == ("reading",)
    assert name("gpt-4o-mini").text == "MT-Bench-style, judge gpt-4o-mini, reference gpt-4"
    without = [Question(q.question_id, q.category, q.turns) for q in questions]
    # What the recorded judgments above are: graded without references.
    assert name("gpt-4o-mini", questions=without).text == "MT-Bench-style, judge gpt-4o-mini, no reference"
    assert name(questions=questions[:79]).departures == ("questions",)
    assert name(prompts=own_mt_bench_prompts()).departures == ("judge_prompts",)
    assert name(asking=BenchAsking(retries=1)).departures == ("judge_sampling",)
    assert name(temperatures={**CATEGORY_TEMPERATURES, "math": 0.7}).departures == ("answers",)
    pairwise = mt_bench_protocol("pairwise", questions, prompts, BenchAsking(), GPT4, 0, reference="base")
    assert score_name(pairwise, None).text == "MT-Bench-style pairwise, judge gpt-4, reference base"


def test_unread_ratings_are_an_outcome_with_bounds() -> None:
    ratings = [
        TurnRating(1, "math", 1, 8.0, "ok"),
        TurnRating(1, "math", 2, None, "unparsed", contradictory=True),
        TurnRating(2, "stem", 1, 4.0, "repaired"),
        TurnRating(2, "stem", 2, None, "skipped"),
    ]
    found = mt_bench_scores(ratings, draws=20)
    assert (found.overall.mean, found.overall.read, found.overall.unread) == (6.0, 2, 2)
    assert (found.overall.worst, found.overall.best) == ((12 + 2) / 4, (12 + 20) / 4)
    assert found.turns[2].mean is None and (found.turns[2].worst, found.turns[2].best) == (1, 10)
    assert found.statuses == {"ok": 1, "repaired": 1, "skipped": 1, "unparsed": 1} and found.contradictory == 1
    with pytest.raises(ValueError, match="rated twice"):
        mt_bench_scores([ratings[0], ratings[0]])
    with pytest.raises(ValueError, match="status unparsed, but score 5"):
        mt_bench_scores([TurnRating(1, "math", 1, 5.0, "unparsed")])


QUESTION = Question(7, "math", ("What is 2+2?", "And 3+3?"), ("four", "six"))
ANSWERS = Conversation(("it is 4", "it is 6"), ("stop", "stop"))


def test_grading_shows_references_and_the_second_turn_in_context() -> None:
    engine = ScriptedEngine(lambda messages, _: f"Fine. Rating: [[{9 if '3+3' in messages[-1]['content'] else 7}]]")
    ratings = asyncio.run(grade(engine, QUESTION, ANSWERS, own_mt_bench_prompts(), BenchAsking()))
    assert [(r.turn, r.score, r.parse_status, r.category) for r in ratings] == [
        (1, 7.0, "ok", "math"),
        (2, 9.0, "ok", "math"),
    ]
    first, second = sorted((m[-1]["content"] for m, _ in engine.asked), key=len)
    assert "four" in first and "six" not in first and "it is 6" not in first
    assert all(text in second for text in ("four", "six", "it is 4", "it is 6", "What is 2+2?"))
    sampling = engine.asked[0][1]
    assert (sampling.temperature, sampling.max_tokens, sampling.grammar) == (0.0, 2048, None)


def test_an_answer_that_is_not_there_is_not_judged() -> None:
    engine = ScriptedEngine("[[5]]")
    answers = Conversation(("it is 4", None), ("stop", "error"))
    ratings = asyncio.run(grade(engine, QUESTION, answers, own_mt_bench_prompts(), BenchAsking()))
    assert [(r.score, r.parse_status) for r in ratings] == [(5.0, "ok"), (None, "skipped")] and engine.calls == 1
    pairs = asyncio.run(compare(engine, QUESTION, ANSWERS, answers, own_mt_bench_prompts(), BenchAsking()))
    assert [p.parse_status for p in pairs] == ["unparsed", "unparsed", "skipped", "skipped"]


def test_comparing_in_both_orders_finds_a_judge_of_places() -> None:
    other = Conversation(("it is 5", "it is 7"), ("stop", "stop"))
    prompts = own_mt_bench_prompts()
    by_place = asyncio.run(compare(ScriptedEngine("[[A]]"), QUESTION, ANSWERS, other, prompts, BenchAsking()))
    assert [(p.turn, p.order) for p in by_place] == [(1, "ab"), (1, "ba"), (2, "ab"), (2, "ba")]
    flipped = pairwise_scores(by_place, "j", draws=10)
    assert (flipped.overall.ties, flipped.overall.flip_rate, flipped.turns[2].pairs) == (2, 1.0, 1)

    def knows(messages: Any, _: Any) -> str:
        text = messages[-1]["content"]
        return "[[A]]" if text.index("it is 4") < text.index("it is 5") else "[[B]]"

    engine = ScriptedEngine(knows)
    right = pairwise_scores(
        asyncio.run(compare(engine, QUESTION, ANSWERS, other, prompts, BenchAsking())), "j", draws=9
    )
    assert (right.overall.wins, right.categories["math"].wins, right.overall.flips) == (2, 2, 0)
    assert all("four" in messages[-1]["content"] for messages, _ in engine.asked)


@pytest.mark.parametrize(
    ("text", "published", "unanimous", "status"),
    [
        ("Good. Rating: [[7]]", 7.0, 7.0, "ok"),
        ("[[7.5]] and again [[7.5]]", 7.5, 7.5, "ok"),
        ("The answer says [[10]]. Rating: [[2]]", 10.0, None, "ok"),
        ("It reads `x[1]`, fine.\n\nRating: [[9]]", 9.0, 9.0, "ok"),
        ("It reads x[1] and `[[3]]`, fine.\n\nRating: [[9]]", 3.0, 9.0, "ok"),
        ("```\nreturn [[1]]\n```\nreturns a list.\n\nRating: [[9]]", 1.0, 9.0, "ok"),
        ("It is supported by a source [2].", 2.0, None, "repaired"),
        ("The essay ends with:\n[[10]]", 10.0, None, "ok"),
        ("Rating: [6]", 6.0, 6.0, "repaired"),
        ("see [1] … Rating: [6]", 1.0, None, "repaired"),
        ("It quotes [10]. Rating: [[6]]", 6.0, None, "ok"),
        ("see [2024] and [0] … Rating: [[6]] or [6]", 6.0, 6.0, "ok"),
        ("[[7]] or [[70]]", 7.0, None, "ok"),
        ("Rating: [[11]]", None, None, ""),
        ("Rating: [[0]]", None, None, ""),
        ("Rating: 7", None, None, ""),
        ("Rating: [[-3]]", None, None, ""),
        ("", None, None, ""),
    ],
)
def test_ratings_are_read_by_either_rule(text: str, published: float, unanimous: float, status: str) -> None:
    for reading, score in (("published", published), ("unanimous", unanimous)):
        read = read_rating(said(text), reading, 1, 10)  # type: ignore[arg-type]
        assert (None if read is None else read.fields["score"]) == score
        if read is not None:
            assert read.status == status
    differ = rules_differ(said(text), lambda reply, reading: read_rating(reply, reading, 1, 10))
    assert differ == (published is not None and unanimous is None)
    cut = read_rating(said(text, "length"), "published", 1, 10)
    assert (None if cut is None else cut.fields["score"]) == published
    assert read_rating(said(text, "length"), "unanimous", 1, 10) is None


@pytest.mark.parametrize(
    ("text", "published", "unanimous"),
    [
        ("So [[B]].", "B", "B"),
        ("[[C]]", "C", "C"),
        ("not [[A]] but [[B]]", "A", None),
        ("[[B]] [[B]]", "B", "B"),
        ("[A]", None, None),
        ("[[D]]", None, None),
    ],
)
def test_choices_are_read_by_either_rule(text: str, published: str, unanimous: str) -> None:
    for reading, choice in (("published", published), ("unanimous", unanimous)):
        read = read_bracketed_choice(said(text), reading)  # type: ignore[arg-type]
        assert (None if read is None else read.fields["choice"]) == choice
    cut = read_bracketed_choice(said(text, "length"), "published")
    assert (None if cut is None else cut.fields["choice"]) == published
    assert read_bracketed_choice(said(text, "length"), "unanimous") is None


def test_files_are_checked() -> None:
    row = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
    assert questions_of([row])[0].references is None and questions_of([row])[0].temperature == 0
    assert questions_of([{**row, "category": "odd"}])[0].temperature == 0.7
    reference = {"question_id": 2, "choices": [{"turns": ["c", "d"]}]}
    with pytest.raises(BenchmarkFileError, match=r"question 1 .math. has no reference"):
        questions_of([row], [reference])
    with pytest.raises(BenchmarkFileError, match="comes twice"):
        questions_of([row, row])
    with pytest.raises(BenchmarkFileError, match="row 1: two turns"):
        questions_of([{**row, "turns": ["a"]}])
    with pytest.raises(BenchmarkFileError, match="row 1: turns is missing"):
        questions_of([{"question_id": 1, "category": "math"}])
