"""AlpacaEval's part of the page: raw and length-controlled win rates of all models from the stored tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.bench.alpaca_eval.judge import PairPreference, PreferenceAsking
from ray_pipeline.bench.alpaca_eval.length_controlled import GamedRows, LengthControlled, fit_length_controlled
from ray_pipeline.bench.alpaca_eval.questions import AlpacaEvalSettings, OrderRule, instruction_of
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
from ray_pipeline.bench.judge_prompts import PreferencePrompt
from ray_pipeline.bench.scores import Judge, Measurement, Reading, Score, Scored, count_statuses, make_score, percent
from ray_pipeline.bench.tables import Tables
from ray_pipeline.stats.length_control import at_equal_length
from ray_pipeline.stats.protocol import Protocol, settings_text

#: Two-sided 95 % of a normal distribution, for the published standard errors.
_Z95 = 1.959963984540054


def scored(settings: AlpacaEvalSettings, run: Measurement) -> Scored:
    """Scores of all models, once preferences are stored."""
    result = Scored()
    if (preferences := run.tables.rows("bench_preferences")) is None:
        return result
    rules = AlpacaEvalRules(
        prompt=settings.judge_prompt(),
        asking=settings.asking,
        judge=run.judges[settings.judge],
        order=settings.order,
        order_seed=settings.order_seed,
        reference=settings.reference_name,
        answers=settings_text(**settings.sampling.model_dump()),
        length_data=_length_data(settings.model_dump_json()),
        published_instructions=settings.published_instructions,
        draws=run.draws,
        seed=run.seed,
    )
    for name in run.names:
        scores, table, reading = alpaca_eval_rates(name, _annotations(run.tables, preferences, name), rules)
        result.add(scores, reading, "alpaca_eval_instructions", [table])
    return result


@functools.lru_cache(maxsize=4)
def _length_data(settings_text: str) -> Any:
    return AlpacaEvalSettings.model_validate_json(settings_text).length_data()


def _annotations(tables: Tables, said: Sequence[Mapping[str, Any]], model: str) -> list[Annotation]:
    """Every instruction in the order of the file, with the verdicts on the model's output; none without an output."""
    asked: dict[str, dict[Any, PairPreference]] = {}
    for row in said:
        if row["model"] == model:
            preference = PairPreference(row["first"], row["method"], row["label_mass"], row["parse_status"], row["raw"])
            asked.setdefault(row["question_id"], {})[row["place"]] = preference
    return [
        Annotation(
            instruction_of(question),
            tables.answers["alpaca_eval", question["question_id"], model][0]["answer"],
            asked.get(question["question_id"], {}),
        )
        for question in tables.of("alpaca_eval")
    ]


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
        make_score(
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
        make_score(
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
    statuses = count_statuses(said.parse_status for a in annotations for said in a.asked.values())
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
        figures = percent(score.mean), percent(score.low), percent(score.high)
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
