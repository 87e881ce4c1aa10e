"""Early stopping of a run in rounds: whether the next round is made, and which policy is the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.checkers import CheckerKey
from ray_pipeline.graph.results import DECISION
from ray_pipeline.graph.stage import Stage, WholeInput, WholeWork
from ray_pipeline.policy.comparisons import EvaluateSettings
from ray_pipeline.report.figures import percent

Metric = Literal["score", "accuracy"]
#: Role of the earlier decision among the inputs of a decision.
_BEFORE = "before"
_READ = ("prompts", "responses", "comparisons", "response verdicts")


class StopSettings(Settings):
    """The `rounds.stop` block."""

    metric: Metric = Field(
        "score",
        description="what has to improve on held-out prompts. score: against the base, by the judge that compares "
        "(evaluate.judge); accuracy: true accuracy by a checker, the mean over evaluate.modes",
    )
    patience: int = Field(
        1, ge=1, description="rounds in a row without an improvement over the best one after which the run stops"
    )


class _Given(Settings):
    stop: StopSettings
    checker: CheckerKey


@dataclasses.dataclass(frozen=True)
class Measured:
    """A round on held-out prompts: the metric, and how often the panel that makes the data prefers the policy to the
    base; both are shares, None where they are not known."""

    metric: float | None
    panel: float | None


@dataclasses.dataclass(frozen=True)
class Decision:
    """`best`: the round (from 1) with the highest metric, the first of equal ones. `stop`: why no further round is
    made; "" to go on."""

    best: int
    stop: str


def decide(rounds: Sequence[Measured], settings: StopSettings) -> Decision:
    """Decide by point estimates after the last of the rounds, none of which stopped the run before.

    The run stops after `patience` rounds in a row that are not better than the best; and at once where the panel
    prefers the last policy more often than the best one although the metric is lower: what it approves of is no longer
    what is measured without it. An unknown metric is no improvement.
    """
    metrics = [-1.0 if one.metric is None else one.metric for one in rounds]
    best = metrics.index(max(metrics))
    last, leader, since = rounds[-1], rounds[best], len(rounds) - 1 - best
    falls = last.metric is not None and leader.metric is not None and last.metric < leader.metric
    if falls and last.panel is not None and leader.panel is not None and last.panel > leader.panel:
        return Decision(
            best + 1,
            f"the panel prefers its policy more often than that of round {best + 1} ({percent(last.panel)}, "
            f"{percent(leader.panel)}), but its {settings.metric} is lower",
        )
    if since >= settings.patience:
        return Decision(best + 1, f"no higher {settings.metric} for {since} round{'s' if since > 1 else ''}")
    return Decision(best + 1, "")


def decision_stage(
    settings: StopSettings, evaluate: EvaluateSettings, number: int, stages: Sequence[Stage], before: Stage | None
) -> Stage:
    """The decision after a round. Stages of later rounds do not read it: with another or none, they are what they were.

    Args:
        number: of the round, from 1.
        stages: that round's, and the prompts.
        before: the decision of the round before.
    """
    given = _Given(stop=settings, checker=evaluate.checker)
    read = {stage.name: stage for stage in stages if stage.role_name in _READ}
    return Stage(
        name=f"stop-{number}",
        role=DECISION,
        work=WholeWork(function=decide_round, settings=given),
        config=given.decisive(),
        inputs={**read, **({} if before is None else {_BEFORE: before})},
    )


def decide_round(given: WholeInput) -> dict[str, Any]:
    """Measure the round of the inputs and decide; the facts have every round so far, and the decision in words."""
    from ray_pipeline.evaluate.rounds import held_out

    settings: _Given = given.settings
    stages = dict(given.inputs)
    before = stages.pop(_BEFORE, None)
    found = held_out(stages, settings.checker, draws=1)  # its intervals are not read
    now = Measured(
        found.score if settings.stop.metric == "score" else found.accuracy,
        None if found.panel is None else found.panel.mean,
    )
    rounds = [*(() if before is None else (Measured(**one) for one in before.facts["rounds"])), now]
    decided = decide(rounds, settings.stop)
    text = decision_text(rounds, decided, settings.stop.metric)
    given.log(text)
    return {
        "metric": settings.stop.metric,
        "rounds": [dataclasses.asdict(one) for one in rounds],
        "best": decided.best,
        "stop": bool(decided.stop),
        "text": text,
    }


def decision_text(rounds: Sequence[Measured], decided: Decision, metric: Metric) -> str:
    """A decision in a sentence or two."""
    values = ", ".join(f"{percent(one.metric)} in round {number}" for number, one in enumerate(rounds, 1))
    stopped = f" Stopped after round {len(rounds)}: {decided.stop}." if decided.stop else ""
    return f"The result is the policy of round {decided.best}, the best so far by {metric} ({values}).{stopped}"
