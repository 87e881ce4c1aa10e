"""Base against policy in figures: win rates raw and at equal length, answers, rubric scores, perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ray_pipeline.policy.response_stats import (
    ResponseStats,
    RubricStats,
    accuracy_gains,
    name_models,
    response_stats,
    rubric_stats,
)
from ray_pipeline.stats.bootstrap import Interval
from ray_pipeline.stats.length_control import LengthControlledScore, length_controlled_score, pair_lengths
from ray_pipeline.stats.protocol import Measured, Protocol, measured_by
from ray_pipeline.stats.winrate import WinRate, completed_protocol, decide_pairs, judges_of, win_rates


@dataclass(frozen=True)
class Evaluation:
    """Base against policy; empty parts were not measured. `length_controlled` is by judge.

    `protocols` are those of the win rates, by judge and then by "score" or "length_controlled".
    """

    win_rates: list[WinRate]
    responses: list[ResponseStats]
    accuracy_gains: dict[str, Interval]
    rubrics: list[RubricStats]
    perplexity: dict[str, Any]
    length_controlled: dict[str, LengthControlledScore] = field(default_factory=dict)
    protocols: dict[str, dict[str, Measured]] = field(default_factory=dict)

    def fingerprint(self, judge: str, figure: str = "score") -> str:
        """Of a win rate's protocol; a dash where it is not known (runs that were not finished)."""
        found = self.protocols.get(judge, {}).get(figure)
        return "–" if found is None else found.fingerprint


def evaluation_stats(
    comparisons: pa.Table | None,
    responses: pa.Table | None,
    verdicts: pa.Table | None,
    perplexity: Mapping[str, Any] | None,
    compared: Mapping[str, Protocol],
    *,
    draws: int,
    seed: int,
) -> Evaluation | None:
    """Every figure that the given parts allow, None where there are none.

    Args:
        verdicts: of rubric judges on the responses, with a column model or with responses to join it from.
        compared: judge of the comparisons → protocol of its win rates, as far as settings determine it.

    Raises:
        ValueError: verdicts without a column model, and without responses.
    """
    if comparisons is None and responses is None and verdicts is None and perplexity is None:
        return None
    options: Any = {"draws": draws, "seed": seed}
    if verdicts is not None and "model" not in verdicts.column_names:
        if responses is None:
            raise ValueError("response_verdicts has no column model, and there are no responses to take it from")
        verdicts = name_models(verdicts, responses)
    return Evaluation(
        win_rates=[] if comparisons is None else win_rates(comparisons, **options),
        responses=[] if responses is None else response_stats(responses, **options),
        accuracy_gains={} if responses is None else accuracy_gains(responses, **options),
        rubrics=[] if verdicts is None else rubric_stats(verdicts, **options),
        perplexity=dict(perplexity or {}),
        length_controlled=_length_controlled(comparisons, responses, seed),
        protocols={} if comparisons is None else _protocols(comparisons, responses, compared),
    )


def _protocols(
    comparisons: pa.Table, responses: pa.Table | None, compared: Mapping[str, Protocol]
) -> dict[str, dict[str, Measured]]:
    return {
        judge: {
            figure: measured_by(
                completed_protocol(compared[judge], comparisons, judge, responses, controlled=figure != "score")
            )
            for figure in ("score", "length_controlled")
        }
        for judge in judges_of(comparisons)
        if judge in compared
    }


def _length_controlled(
    comparisons: pa.Table | None, responses: pa.Table | None, seed: int
) -> dict[str, LengthControlledScore]:
    """By judge, the score at equal length; empty without responses, or where those have no ids to join by."""
    if comparisons is None or responses is None or "response_id" not in responses.column_names:
        return {}
    lengths = pair_lengths(responses)
    found = {
        judge: length_controlled_score(decide_pairs(comparisons, judge), *lengths, seed=seed)
        for judge in judges_of(comparisons)
    }
    return {judge: score for judge, score in found.items() if score.pairs}
