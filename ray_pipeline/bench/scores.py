"""Scores of the public benchmarks as one list, each with its interval, its bounds and the protocol that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.bench.alpaca_eval.judge import PreferenceAsking
from ray_pipeline.bench.alpaca_eval.score import (
    Annotation,
    GamedRows,
    LengthControlled,
    OrderRule,
    alpaca_eval_protocol,
    fit_length_controlled,
    flip_rate,
    instruction_table,
    instructions_digest,
    preferences_of,
    published_alpaca_eval,
    raw_win_rate,
)
from ray_pipeline.bench.ifeval import score as ifeval
from ray_pipeline.bench.judge_prompts import BenchPrompt, PreferencePrompt
from ray_pipeline.bench.mt_bench import score as mt_bench
from ray_pipeline.bench.mt_bench.judge import BenchAsking
from ray_pipeline.bench.mt_bench.score import RatingMean, TurnComparison, TurnRating
from ray_pipeline.stats.length_control import at_equal_length
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol, ScoreName, score_name
from ray_pipeline.stats.winrate import WinRate

#: Two-sided 95 % of a normal distribution, for the published standard errors.
_Z95 = 1.959963984540054

_ACCURACIES = {
    "prompt_strict": "prompt, strict",
    "instruction_strict": "instruction, strict",
    "prompt_loose": "prompt, loose",
    "instruction_loose": "instruction, loose",
}


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure of one model.

    Attributes:
        benchmark, metric: what is measured, in words of ours ("mt_bench", "turn 1").
        name: what it may be called, by its protocol.
        value: None where nothing could be read; `note` says why.
        low, high: 95 % interval, None where there is none.
        unit: "1–10" or "%".
        rows: what the value is the mean of; `unread` more could not be read.
        worst, best: the value had all unread rows been the worst or the best.
    """

    model: str
    benchmark: str
    metric: str
    name: ScoreName
    protocol: Protocol
    value: float | None
    low: float | None
    high: float | None
    unit: str
    rows: int
    unread: int
    worst: float | None
    best: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How one model's answers were read on one benchmark, beside its scores. Shares are between 0 and 1."""

    model: str
    benchmark: str
    statuses: Mapping[str, int]
    contradictory: int = 0
    flip_rate: float | None = None
    mean_chars: float | None = None
    chance: int = 0


@dataclasses.dataclass(frozen=True)
class Judge:
    """Who judges, for the protocol: identity, and settings beside the sampling that an exact protocol has none of."""

    identity: str
    setup: str = ""

    def marked(self, protocol: Protocol) -> Protocol:
        """The protocol with the judge's own settings in it."""
        if not self.setup:
            return protocol
        return dataclasses.replace(protocol, judge_sampling=f"{protocol.judge_sampling} {self.setup}")


def _score(
    model: str,
    benchmark: str,
    metric: str,
    protocol: Protocol,
    published: PublishedProtocol | None,
    value: float | None,
    **more: Any,
) -> Score:
    return Score(model, benchmark, metric, score_name(protocol, published), protocol, value, **more)


# --- MT-Bench ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MtBenchRules:
    """What all models' MT-Bench scores have in common."""

    questions: Sequence[mt_bench.Question]
    prompts: Mapping[str, BenchPrompt]
    asking: BenchAsking
    judge: Judge
    reference: str | None
    answer_tokens: int
    temperatures: Mapping[str, float]
    draws: int = 2000
    seed: int = 0

    def protocol(self, mode: mt_bench.Mode, contradictory: int, reference: str | None) -> Protocol:
        return self.judge.marked(
            mt_bench.mt_bench_protocol(
                mode,
                self.questions,
                self.prompts,
                self.asking,
                self.judge.identity,
                contradictory,
                reference=reference,
                answer_tokens=self.answer_tokens,
                temperatures=self.temperatures,
            )
        )


def mt_bench_grades(
    model: str, ratings: Sequence[TurnRating], rules: MtBenchRules
) -> tuple[list[Score], list[dict[str, Any]], Reading]:
    """Overall and by turn; rows of the table of categories; and how the replies were read."""
    found = mt_bench.mt_bench_scores(ratings, draws=rules.draws, seed=rules.seed)
    protocol = rules.protocol("single", found.contradictory, rules.reference)
    published = mt_bench.published_mt_bench()
    means = {"": found.overall, **{f"turn {turn}": mean for turn, mean in found.turns.items()}}
    scores = [
        _score(
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
    found = mt_bench.pairwise_scores(comparisons, "judge", draws=rules.draws, seed=rules.seed)
    statuses = _count(c.parse_status for c in comparisons)
    protocol = rules.protocol("pairwise", found.contradictory, against)
    rates = {"": found.overall, **{f", turn {turn}": rate for turn, rate in sorted(found.turns.items())}}
    scores = [
        _score(
            model,
            "mt_bench",
            f"pairwise against {against}{part}",
            dataclasses.replace(protocol, metric=part.removeprefix(", ")) if part else protocol,
            None,
            _percent(rate.score.mean),
            **_rate_columns(rate),
        )
        for part, rate in rates.items()
    ]
    rows = [
        {
            "model": model,
            "category": name,
            "turn": f"both, pairwise against {against}",
            "value": _percent(rate.score.mean),
            **_rate_columns(rate),
        }
        for name, rate in sorted(found.categories.items())
    ]
    return scores, rows, Reading(model, "mt_bench pairwise", statuses, found.contradictory, found.overall.flip_rate)


def _rate_columns(rate: WinRate) -> dict[str, Any]:
    return {
        "low": _percent(rate.score.low),
        "high": _percent(rate.score.high),
        "unit": "%",
        "rows": rate.decided,
        "unread": rate.unread,
        "worst": _percent(rate.score_worst),
        "best": _percent(rate.score_best),
        "note": "" if rate.decided else "no comparison could be read in both orders",
    }


# --- AlpacaEval -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AlpacaEvalRules:
    """What all models' AlpacaEval scores have in common.

    Attributes:
        length_data: gamed rows and difficulties by place; None: length is controlled for by the project's own fit.
        published_instructions: they come whole from the benchmark's own file on the hub, unedited.
    """

    prompt: PreferencePrompt
    asking: PreferenceAsking
    judge: Judge
    order: OrderRule
    order_seed: int
    reference: str
    answers: str
    length_data: tuple[GamedRows, np.ndarray] | None = None
    published_instructions: bool = False
    draws: int = 2000
    seed: int = 0


def alpaca_eval_rates(
    model: str, annotations: Sequence[Annotation], rules: AlpacaEvalRules
) -> tuple[list[Score], pa.Table, Reading]:
    """Raw and length-controlled win rate; the per-instruction table with the column `model`; how it was read."""
    preferences = preferences_of(annotations)
    raw = raw_win_rate(preferences, draws=rules.draws, seed=rules.seed)
    controlled, own, estimator, note = _length_controlled(annotations, preferences, rules)
    common: dict[str, Any] = {"unit": "%", "rows": raw.rows, "unread": raw.unread}
    asked = instructions_digest([a.instruction for a in annotations])
    vouched = asked if rules.published_instructions else None
    methods = [said.method for a in annotations for said in a.asked.values() if said.method is not None]

    def protocol(metric: Any) -> Protocol:
        made = alpaca_eval_protocol(
            metric,
            rules.judge.identity,
            rules.prompt,
            rules.asking,
            rules.order,
            rules.reference,
            [len(a.instruction.reference) for a in annotations],
            methods,
            instructions=asked,
            seed=rules.order_seed,
            estimator=estimator,
        )
        return dataclasses.replace(rules.judge.marked(made), answers=rules.answers)

    scores = [
        _score(
            model,
            "alpaca_eval",
            "WR",
            protocol("WR"),
            published_alpaca_eval("WR", vouched),
            raw.win_rate,
            low=raw.interval.low,
            high=raw.interval.high,
            worst=raw.worst,
            best=raw.best,
            note=f"standard error {raw.standard_error:.2f}" if raw.standard_error is not None else "",
            **common,
        ),
        _score(
            model,
            "alpaca_eval",
            "LC",
            protocol("LC"),
            published_alpaca_eval("LC", vouched),
            own[0],
            low=own[1],
            high=own[2],
            worst=None,
            best=None,
            note=note,
            **common,
        ),
    ]
    table = instruction_table(annotations, controlled)
    table = table.add_column(0, pa.field("model", pa.string(), False), pa.array([model] * len(table), pa.string()))
    statuses = _count(said.parse_status for a in annotations for said in a.asked.values())
    if unanswered := sum(a.output is None for a in annotations):
        statuses["unanswered"] = unanswered
    lengths = [len(a.output) for a in annotations if a.output is not None]
    mean_chars = sum(lengths) / len(lengths) if lengths else None
    return scores, table, Reading(model, "alpaca_eval", statuses, 0, flip_rate(annotations), mean_chars)


_Figures = tuple[float | None, float | None, float | None]


def _length_controlled(
    annotations: Sequence[Annotation], preferences: np.ndarray, rules: AlpacaEvalRules
) -> tuple[LengthControlled | None, _Figures, str, str]:
    """The fit, its percentages with interval, the estimator's name, and a note."""
    reference = np.array([len(a.instruction.reference) for a in annotations], dtype=np.float64)
    model = np.array([np.nan if a.output is None else len(a.output) for a in annotations], dtype=np.float64)
    read = ~np.isnan(preferences)
    if rules.length_data is None:
        score, _ = at_equal_length(
            preferences[read],
            (reference - model)[read],
            [str(a.instruction.index) for a, known in zip(annotations, read, strict=True) if known],
            draws=rules.draws,
            seed=rules.seed,
        )
        figures = _percent(score.mean), _percent(score.low), _percent(score.high)
        note = "length alone is controlled for: no difficulties, no gamed rows"
        return None, figures, "two weights (model, length)", note
    gamed, difficulties = rules.length_data
    surrogate = ", surrogate of the gamed rows" if gamed.surrogate else ""
    try:
        places = [a.instruction.index for a in annotations]
        found = fit_length_controlled(preferences, reference, model, difficulties[places], gamed)
    except IndexError:
        note = f"no difficulty is known of an instruction at place {max(places)}: {len(difficulties)} are given"
        return None, (None, None, None), f"re-fit{surrogate}", note
    except ValueError as error:
        return None, (None, None, None), f"re-fit{surrogate}", str(error)
    half = None if found.standard_error is None else _Z95 * found.standard_error
    low, high = (None, None) if half is None else (found.win_rate - half, found.win_rate + half)
    note = f"standard error {found.standard_error:.2f}" if found.standard_error is not None else ""
    return found, (found.win_rate, low, high), found.estimator, note + surrogate


# --- IFEval -----------------------------------------------------------------------------------------------------------


def ifeval_accuracies(
    model: str,
    prompts: Sequence[ifeval.IfevalPrompt],
    verdicts: Sequence[ifeval.IfevalVerdict],
    answers: str,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[list[Score], list[dict[str, Any]], Reading]:
    """The four accuracies; rows of the table of types; and how many prompts have no response."""
    found = ifeval.scores(prompts, verdicts, draws=draws, seed=seed)
    scores = []
    for field, words in _ACCURACIES.items():
        accuracy: ifeval.Accuracy = getattr(found, field)
        scores.append(
            _score(
                model,
                "ifeval",
                words,
                ifeval.ifeval_protocol(prompts, words, answers),
                ifeval.published_ifeval(words),
                _percent(accuracy.interval.mean),
                low=_percent(accuracy.interval.low),
                high=_percent(accuracy.interval.high),
                unit="%",
                rows=accuracy.total,
                unread=found.unanswered,
                worst=_percent(accuracy.interval.mean),
                best=_percent(accuracy.best),
            )
        )
    rows = [{"model": model, **dataclasses.asdict(one)} for one in (*found.families, *found.types)]
    statuses = {"answered": len(verdicts) - found.unanswered, "unanswered": found.unanswered}
    return scores, rows, Reading(model, "ifeval", statuses, chance=found.chance)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _count(statuses: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for status in statuses:
        counts[status] = counts.get(status, 0) + 1
    return dict(sorted(counts.items()))
