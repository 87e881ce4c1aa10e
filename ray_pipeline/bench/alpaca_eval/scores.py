"""AlpacaEval's part of the page: raw and length-controlled win rate of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.bench.alpaca_eval.judge import PreferenceAsking
from ray_pipeline.bench.alpaca_eval.length_controlled import GamedRows, LengthControlled, fit_length_controlled
from ray_pipeline.bench.alpaca_eval.questions import OrderRule
from ray_pipeline.bench.alpaca_eval.score import (
    Annotation,
    alpaca_eval_protocol,
    flip_rate,
    instruction_table,
    instructions_digest,
    preferences_of,
    published_alpaca_eval,
    raw_win_rate,
)
from ray_pipeline.bench.benchmark import Judge, Reading, Score, count_statuses, make_score, percent
from ray_pipeline.bench.judge_prompts import PreferencePrompt
from ray_pipeline.stats.length_control import at_equal_length
from ray_pipeline.stats.protocol import Protocol

#: Two-sided 95 % of a normal distribution, for the published standard errors.
_Z95 = 1.959963984540054


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
    benchmark: str = "alpaca_eval"


def alpaca_eval_rates(
    model: str, annotations: Sequence[Annotation], rules: AlpacaEvalRules
) -> tuple[list[Score], pa.Table, Reading]:
    """Raw and length-controlled win rate; the per-instruction table with the column `model`; how it was read."""
    preferences = preferences_of(annotations)
    raw = raw_win_rate(preferences, draws=rules.draws, seed=rules.seed)
    controlled, own, estimator, note = _length_controlled(annotations, preferences, rules)
    common: dict[str, Any] = {"rows": raw.rows, "unread": raw.unread}
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
        make_score(
            model,
            rules.benchmark,
            "WR",
            protocol("WR"),
            published_alpaca_eval("WR", vouched),
            value=raw.win_rate,
            low=raw.interval.low,
            high=raw.interval.high,
            worst=raw.worst,
            best=raw.best,
            note=f"standard error {raw.standard_error:.2f}" if raw.standard_error is not None else "",
            **common,
        ),
        make_score(
            model,
            rules.benchmark,
            "LC",
            protocol("LC"),
            published_alpaca_eval("LC", vouched),
            value=own[0],
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
    statuses = count_statuses(said.parse_status for a in annotations for said in a.asked.values())
    if unanswered := sum(a.output is None for a in annotations):
        statuses["unanswered"] = unanswered
    lengths = [len(a.output) for a in annotations if a.output is not None]
    mean_chars = sum(lengths) / len(lengths) if lengths else None
    return scores, table, Reading(model, rules.benchmark, statuses, 0, flip_rate(annotations), mean_chars)


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
        figures = percent(score.mean), percent(score.low), percent(score.high)
        note = "length alone is controlled for: no difficulties, no gamed rows"
        if score.rows and score.mean is None:
            note = "none: one model's outputs are almost always longer, and only the fit with `gamed` allows that"
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
