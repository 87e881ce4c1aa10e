"""MT-Bench's part of the page: grades and pairwise win rates of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ray_pipeline.bench.benchmark import Measurement, Reading, Score, count_statuses, make_score, percent
from ray_pipeline.bench.mt_bench.judge import TurnComparison, TurnRating
from ray_pipeline.bench.mt_bench.score import (
    RatingMean,
    mt_bench_scores,
    pairwise_scores,
    published_mt_bench,
)
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol
from ray_pipeline.stats.winrate import WinRate


def mt_bench_grades(
    model: str, ratings: Sequence[TurnRating], run: Measurement, measured: Callable[[int], Protocol]
) -> tuple[list[Score], list[dict[str, Any]], Reading]:
    """Overall and by turn; rows of the table of categories; and how the replies were read.

    Args:
        measured: the protocol, by the number of contradictory replies.
    """
    found = mt_bench_scores(ratings, draws=run.draws, seed=run.seed)
    protocol, published = measured(found.contradictory), published_mt_bench()
    means = {"": found.overall, **{f"turn {turn}": mean for turn, mean in found.turns.items()}}
    scores = [
        make_score(
            model,
            run.benchmark,
            metric or "overall",
            dataclasses.replace(protocol, metric=metric),
            PublishedProtocol(dataclasses.replace(published.protocol, metric=metric), published.open_fields),
            **_rating_columns(mean),
        )
        for metric, mean in means.items()
    ]
    of_category = {(name, "both"): mean for name, mean in found.categories.items()}
    of_category |= {(name, str(turn)): mean for (name, turn), mean in found.category_turns.items()}
    rows = [
        {"model": model, "category": name, "turn": turn, **_rating_columns(mean)}
        for (name, turn), mean in sorted(of_category.items())
    ]
    return scores, rows, Reading(model, run.benchmark, found.statuses, found.contradictory)


def _rating_columns(mean: RatingMean) -> dict[str, Any]:
    return {
        "value": mean.mean,
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
    model: str,
    against: str,
    comparisons: Sequence[TurnComparison],
    run: Measurement,
    measured: Callable[[int], Protocol],
) -> tuple[list[Score], list[dict[str, Any]], Reading]:
    """Win rate of a model over another one, overall and by turn, ties counting half; a turn is won only if both orders
    say so. Rows of the table of categories; and how the replies were read."""
    found = pairwise_scores(comparisons, "judge", draws=run.draws, seed=run.seed)
    statuses = count_statuses(c.parse_status for c in comparisons)
    protocol = measured(found.contradictory)
    rates = {"": found.overall, **{f", turn {turn}": rate for turn, rate in sorted(found.turns.items())}}
    scores = [
        make_score(
            model,
            run.benchmark,
            f"pairwise against {against}{part}",
            dataclasses.replace(protocol, metric=part.removeprefix(", ")) if part else protocol,
            None,
            **_rate_columns(rate),
        )
        for part, rate in rates.items()
    ]
    rows = [
        {"model": model, "category": name, "turn": f"both, pairwise against {against}", **_rate_columns(rate)}
        for name, rate in sorted(found.categories.items())
    ]
    return (
        scores,
        rows,
        Reading(model, f"{run.benchmark} pairwise", statuses, found.contradictory, found.overall.flip_rate),
    )


def _rate_columns(rate: WinRate) -> dict[str, Any]:
    return {
        "value": percent(rate.score.mean),
        "low": percent(rate.score.low),
        "high": percent(rate.score.high),
        "unit": "%",
        "rows": rate.decided,
        "unread": rate.unread,
        "worst": percent(rate.score_worst),
        "best": percent(rate.score_best),
        "note": "" if rate.decided else "no comparison could be read in both orders",
    }
