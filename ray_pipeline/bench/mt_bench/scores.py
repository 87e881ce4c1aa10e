"""MT-Bench's part of the page: grades and pairwise win rates of all models from the stored tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.bench.judge_prompts import BenchPrompt
from ray_pipeline.bench.mt_bench.questions import Mode, MtBenchSettings, Question, question_of
from ray_pipeline.bench.mt_bench.score import (
    RatingMean,
    TurnComparison,
    TurnRating,
    mt_bench_protocol,
    mt_bench_scores,
    pairwise_scores,
    published_mt_bench,
)
from ray_pipeline.bench.scores import Measurement, Reading, Score, Scored, count_statuses, make_score, percent
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol
from ray_pipeline.stats.winrate import WinRate

_TABLE = "mt_bench_categories"


def scored(settings: MtBenchSettings, run: Measurement) -> Scored:
    """Scores of all models, by single grading and by comparison, as far as their tables exist."""
    questions = [question_of(question) for question in run.tables.of("mt_bench")]
    rules = MtBenchRules(settings, run, questions, settings.judge_prompts())
    result = Scored()
    columns = ("category", "turn", "parse_status", "contradictory", "raw")
    if (rated := run.tables.rows("bench_ratings")) is not None:
        for name in run.names:
            ratings = [
                TurnRating(question_id=int(r["question_id"]), score=r["score"], **{c: r[c] for c in columns})
                for r in rated
                if r["model"] == name
            ]
            scores, rows, reading = mt_bench_grades(name, ratings, rules)
            result.add(scores, reading, _TABLE, rows)
    if (compared := run.tables.rows("bench_comparisons")) is not None:
        for name in run.names:
            if name == settings.against:
                continue
            pairs = [
                TurnComparison(
                    question_id=int(r["question_id"]),
                    order=r["order"],
                    choice=r["choice"],
                    **{c: r[c] for c in columns},
                )
                for r in compared
                if r["model"] == name
            ]
            scores, rows, reading = mt_bench_pairs(name, settings.against, pairs, rules)
            result.add(scores, reading, _TABLE, rows)
    return result


@dataclasses.dataclass(frozen=True)
class MtBenchRules:
    """What all models' MT-Bench scores have in common."""

    settings: MtBenchSettings
    run: Measurement
    questions: Sequence[Question]
    prompts: Mapping[str, BenchPrompt]

    def protocol(self, mode: Mode, contradictory: int, reference: str | None) -> Protocol:
        judge = self.run.judges[self.settings.judge]
        return judge.marked(
            mt_bench_protocol(
                mode,
                self.questions,
                self.prompts,
                self.settings.asking,
                judge.identity,
                contradictory,
                reference=reference,
                answer_tokens=self.settings.answer_tokens,
                temperatures=self.settings.temperatures,
            )
        )


def mt_bench_grades(
    model: str, ratings: Sequence[TurnRating], rules: MtBenchRules
) -> tuple[list[Score], list[dict[str, Any]], Reading]:
    """Overall and by turn; rows of the table of categories; and how the replies were read."""
    found = mt_bench_scores(ratings, draws=rules.run.draws, seed=rules.run.seed)
    protocol = rules.protocol("single", found.contradictory, rules.settings.reference_name)
    published = published_mt_bench()
    means = {"": found.overall, **{f"turn {turn}": mean for turn, mean in found.turns.items()}}
    scores = [
        make_score(
            model,
            "mt_bench",
            metric or "overall",
            dataclasses.replace(protocol, metric=metric),
            PublishedProtocol(dataclasses.replace(published.protocol, metric=metric), published.open_fields),
            mean.mean,
            **_rating_columns(mean),
        )
        for metric, mean in means.items()
    ]
    of_category = {(name, "both"): mean for name, mean in found.categories.items()}
    of_category |= {(name, str(turn)): mean for (name, turn), mean in found.category_turns.items()}
    rows = [
        {"model": model, "category": name, "turn": turn, "value": mean.mean, **_rating_columns(mean)}
        for (name, turn), mean in sorted(of_category.items())
    ]
    return scores, rows, Reading(model, "mt_bench", found.statuses, found.contradictory)


def _rating_columns(mean: RatingMean) -> dict[str, Any]:
    return {
        "low": mean.interval.low,
        "high": mean.interval.high,
        "unit": "1–10",
        "rows": mean.read,
        "unread": mean.unread,
        "worst": mean.worst,
        "best": mean.best,
        "note": "" if mean.read else "no rating could be read",
    }


def mt_bench_pairs(
    model: str, against: str, comparisons: Sequence[TurnComparison], rules: MtBenchRules
) -> tuple[list[Score], list[dict[str, Any]], Reading]:
    """Win rate of a model over another one, overall and by turn, ties counting half; a turn is won only if both orders
    say so. Rows of the table of categories; and how the replies were read."""
    found = pairwise_scores(comparisons, "judge", draws=rules.run.draws, seed=rules.run.seed)
    statuses = count_statuses(c.parse_status for c in comparisons)
    protocol = rules.protocol("pairwise", found.contradictory, against)
    rates = {"": found.overall, **{f", turn {turn}": rate for turn, rate in sorted(found.turns.items())}}
    scores = [
        make_score(
            model,
            "mt_bench",
            f"pairwise against {against}{part}",
            dataclasses.replace(protocol, metric=part.removeprefix(", ")) if part else protocol,
            None,
            percent(rate.score.mean),
            **_rate_columns(rate),
        )
        for part, rate in rates.items()
    ]
    rows = [
        {
            "model": model,
            "category": name,
            "turn": f"both, pairwise against {against}",
            "value": percent(rate.score.mean),
            **_rate_columns(rate),
        }
        for name, rate in sorted(found.categories.items())
    ]
    return scores, rows, Reading(model, "mt_bench pairwise", statuses, found.contradictory, found.overall.flip_rate)


def _rate_columns(rate: WinRate) -> dict[str, Any]:
    return {
        "low": percent(rate.score.low),
        "high": percent(rate.score.high),
        "unit": "%",
        "rows": rate.decided,
        "unread": rate.unread,
        "worst": percent(rate.score_worst),
        "best": percent(rate.score_best),
        "note": "" if rate.decided else "no comparison could be read in both orders",
    }
