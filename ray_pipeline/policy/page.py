"""Sections of a run's page about its policy: the training, and the policy against its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ray_pipeline.policy.evaluation import Evaluation
from ray_pipeline.policy.training_curve import TrainingSummary, curve
from ray_pipeline.report.charts import Chart, Dot, Series, dots, lines, stacked
from ray_pipeline.report.figures import number, percent, percent_interval, signed
from ray_pipeline.report.page import Block, Rows, Section, Table, Text, folded, panels
from ray_pipeline.stats.bootstrap import Interval
from ray_pipeline.stats.length_control import MIN_OVERLAP
from ray_pipeline.stats.protocol import fixed_fields

_CURVES = {
    "loss": "loss",
    "rewards_margins": "reward margin (chosen − rejected)",
    "kl": "KL to the reference",
    "rewards_accuracies": "reward accuracy",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}


def training_section(
    training: TrainingSummary | None, metrics: pa.Table | None, settings: Mapping[str, Any] | None
) -> Section | None:
    """Curves and trends of the training and its effective settings; None without any of them."""
    blocks: list[Block] = []
    if training is not None and metrics is not None:
        rows: Rows = [
            [measure, number(trend.first, 4), number(trend.last, 4), number(trend.validation, 4)]
            for measure, trend in training.trends.items()
        ]
        blocks = [
            Text(
                f"{number(training.steps)} optimiser steps. First and last are means over the first and last tenth "
                "of the logged steps."
            ),
            *panels(*(_curve(metrics, measure, title) for measure, title in _CURVES.items())),
            Table(["measure", "first", "last", "validation"], rows),
        ]
    blocks += folded("Training settings, as they took effect", settings)
    return Section("training", "Training", blocks) if blocks else None


def _curve(metrics: pa.Table, measure: str, title: str) -> Chart | None:
    series = [
        Series(name, colour, xs.tolist(), ys.tolist(), dashed)
        for name, colour, dashed, (xs, ys) in (
            ("train", "blue", False, curve(metrics, measure, train=True)),
            ("validation", "vermilion", True, curve(metrics, measure, train=False)),
        )
        if len(xs)
    ]
    return lines(title, series, "optimiser step")


def evaluation_section(evaluation: Evaluation) -> Section:
    """Win rates, answers, rubric scores and perplexities of policy and base."""
    blocks = [*panels(*_charts(evaluation)), *_win_rates(evaluation)]
    if evaluation.responses:
        rows: Rows = [
            [
                r.model,
                r.mode,
                number(r.rows),
                number(r.chars.mean, 0),
                number(r.tokens.mean, 1),
                number(r.truncated),
                percent(r.accuracy.mean) if r.accuracy else "not known",
                percent_interval(r.accuracy) if r.accuracy else "–",
            ]
            for r in evaluation.responses
        ]
        columns = ["model", "decoding", "responses", "characters", "tokens", "cut at the limit", "true accuracy"]
        columns.append("interval")
        if any(r.followed for r in evaluation.responses):
            columns += ["requirements met", "interval"]
            rows = [[*row, *_met(r.followed)] for row, r in zip(rows, evaluation.responses, strict=True)]
        blocks.append(Table(columns, rows, text_columns=2, title="Answers"))
    for mode, gain in evaluation.accuracy_gains.items():
        blocks.append(Text(f"True accuracy, {mode}: changed by {_points(gain)} over {gain.groups:,} prompts."))
    if evaluation.rubrics:
        rows = [
            [
                r.judge,
                r.mode,
                number(r.base.mean),
                number(r.policy.mean),
                signed(r.gain.mean),
                _bounds(r.gain),
                number(r.base_unread),
                number(r.policy_unread),
            ]
            for r in evaluation.rubrics
        ]
        columns = ["rubric judge", "decoding", "base", "policy", "change", "interval", "unread (base)"]
        blocks.append(Table([*columns, "unread (policy)"], rows, text_columns=2, title="Rubric scores"))
    if evaluation.perplexity:
        rows = [
            [model, number(p.ppl, 3), number(p.tokens), number(p.rows)]
            for model, p in sorted(evaluation.perplexity.items())
        ]
        blocks.append(Table(["model", "perplexity", "tokens", "rows"], rows, title="Perplexity of held-out answers"))
        blocks.append(
            Text("Perplexity measures how likely the held-out answers are to a model, not which model is better.")
        )
    return Section("evaluation", "Evaluation: policy against base", blocks)


def _win_rates(evaluation: Evaluation) -> list[Block]:
    if not evaluation.win_rates:
        return []
    rows: Rows = [
        [
            rate.judge,
            f"{rate.wins:,} ({percent(rate.win_rate)})",
            f"{rate.ties:,} ({percent(rate.tie_rate)})",
            f"{rate.losses:,} ({percent(rate.loss_rate)})",
            percent(rate.score.mean),
            percent_interval(rate.score),
            percent(rate.flip_rate),
            f"{rate.unread:,} of {rate.pairs:,}",
            f"{percent(rate.score_worst)} to {percent(rate.score_best)}",
            evaluation.fingerprint(rate.judge),
        ]
        for rate in evaluation.win_rates
    ]
    columns = ["judge", "wins", "ties", "losses", "score", "95 %", "flips", "unread", "bounds with unread", "protocol"]
    text = (
        "A win counts only if both orders of the answers agree; score = wins + half the ties. Intervals: 95 %, "
        "bootstrap over prompts. A flip is a pair on which the two orders name different models. The bounds are the "
        "score if all unread pairs went against the policy, or for it."
    )
    protocols: Rows = [
        [
            measured.fingerprint,
            measured.name,
            "; ".join(f"{field} {value}" for field, value in fixed_fields(measured.protocol).items()),
        ]
        for of_judge in evaluation.protocols.values()
        for measured in of_judge.values()
    ]
    blocks = [Text(text), Table(columns, rows, title="Win rates"), *_length_controlled(evaluation)]
    if protocols:
        title = "Protocols of the win rates"
        columns = ["protocol", "what it is", "what it fixes"]
        blocks.append(Table(columns, protocols, text_columns=3, title=title, folded=True))
    return blocks


def _length_controlled(evaluation: Evaluation) -> list[Block]:
    """The win rates once more, at equal length; a judge without a pair of known lengths is not in the table."""
    if not evaluation.length_controlled:
        return []
    rows: Rows = [
        [
            judge,
            percent(found.score.mean),
            percent_interval(found.score),
            percent(found.raw.mean),
            signed(found.mean_difference, 0),
            signed(found.length_weight),
            number(found.pairs),
            number(found.unread + found.unmeasured),
            evaluation.fingerprint(judge, "length_controlled"),
        ]
        for judge, found in evaluation.length_controlled.items()
    ]
    columns = ["judge", "score at equal length", "95 %", "score as it was", "policy longer by, characters"]
    columns += ["weight of length", "pairs", "left out", "protocol"]
    return [
        Table(columns, rows, title="Win rates, length-controlled"),
        Text(
            "At equal length: a logistic model of the verdicts on the difference in length, read where that is zero. A "
            "negative weight means that longer answers win. Pairs without both verdicts or both lengths are left out. "
            f"There is no score where fewer than {percent(MIN_OVERLAP)} of the pairs are on one side of equal length."
        ),
    ]


def _charts(evaluation: Evaluation) -> list[Chart | None]:
    rates = [
        (
            rate.judge,
            [("blue", rate.win_rate or 0.0), ("tie", rate.tie_rate or 0.0), ("vermilion", rate.loss_rate or 0.0)],
            rate.score,
        )
        for rate in evaluation.win_rates
        if rate.decided
    ]
    names = [
        ("blue", "policy wins"),
        ("tie", "tie"),
        ("vermilion", "base wins"),
        ("ink", "score, 95 %"),
        ("mark", "no change"),
    ]
    by_mode: dict[str, list[Dot]] = {}
    for r in evaluation.responses:
        if r.accuracy is not None:
            by_mode.setdefault(r.mode or "decoding not named", []).append(Dot(r.model, _colour(r.model), r.accuracy))
    several = len({r.mode for r in evaluation.rubrics}) > 1
    rubrics = [
        (
            f"{r.judge}, {r.mode}" if several else r.judge,
            [Dot("base", _colour("base"), r.base), Dot("policy", _colour("policy"), r.policy)],
        )
        for r in evaluation.rubrics
    ]
    means = [d.estimate.mean for _, found in rubrics for d in found if d.estimate.mean is not None]
    return [
        stacked("Pairwise, both orders", rates, names),
        dots("True accuracy", list(by_mode.items()), (0.0, 1.0)),
        dots("Mean rubric score", rubrics, (0.0, max([10.0, *means])), shares=False),
    ]


def _met(followed: Interval | None) -> tuple[str, str]:
    return ("–", "–") if followed is None else (percent(followed.mean), percent_interval(followed))


def _colour(model: str) -> str:
    return {"base": "grey", "policy": "blue"}.get(model, "green")


def _points(gain: Interval) -> str:
    mean = f"{signed(100 * (gain.mean or 0.0), 1)} points"
    if gain.low is None or gain.high is None:
        return f"{mean} (no interval)"
    return f"{mean} (95 % interval {signed(100 * gain.low, 1)} to {signed(100 * gain.high, 1)})"


def _bounds(gain: Interval) -> str:
    return "–" if gain.low is None or gain.high is None else f"{signed(gain.low)} to {signed(gain.high)}"
