"""Selection: judges score the responses of each prompt, the best one is accepted and the others are rejected.

The judges are the rubric judges of the `judge` block (their mean), or any strategy over several answers. Whoever they
are, their scores are verdicts on candidates and the selection is a table of decisions, so that the code that makes
training rows of a gate's decisions makes them of these.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.ranking import Ranking, rank
from ray_pipeline.agents.strategies import Strategy, StrategyAsking, StrategyTemplates, load_strategy_templates
from ray_pipeline.agents.templates import Layout
from ray_pipeline.engines.base import Message
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.models import ModelSettings
from ray_pipeline.graph.shard_map import all_of
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.stages.ask import LiveJudge
from ray_pipeline.stages.gate import label_counts
from ray_pipeline.stages.llm_stage import llm_stage
from ray_pipeline.stages.mean_rank import mean_rank
from ray_pipeline.store.schemas import READ_STATUSES, VERDICTS, to_table
from ray_pipeline.store.settings import Settings


class SelectSettings(Settings):
    """The `select` block: who says which response is best.

    Attributes:
        strategy: how several answers are judged; none: the mean of the rubric judges of the `judge` block.
        judges: who judges by the strategy; scores are averaged over them.
        pairs: of a prompt's DPO data: the accepted response with every rejected one, or with the worst alone.
        templates: built-in name or YAML file of what a strategy asks.
    """

    strategy: Strategy | None = None
    judges: tuple[LiveJudge, ...] = ()
    pairs: Literal["every_rejected", "best_worst"] = "every_rejected"
    templates: str = "default"
    layout: Layout = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    asking: StrategyAsking = StrategyAsking()

    @model_validator(mode="after")
    def _consistent(self) -> SelectSettings:
        if (self.strategy is None) != (not self.judges):
            raise ValueError("strategy and judges go together: name both, or neither for the rubric judges")
        names = [j.name for j in self.judges]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two judges have the same name: {', '.join(twice)}")
        if self.strategy is None and (idle := sorted(self.model_fields_set - {"strategy", "judges", "pairs"})):
            raise ValueError(f"{idle[0]} is read by a strategy alone, and there is none; remove it or name one")
        return self

    @property
    def names(self) -> list[str]:
        return [j.name for j in self.judges]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(j.model for j in self.judges))

    def texts(self) -> StrategyTemplates:
        return load_strategy_templates(self.templates)


class _Rank(Settings):
    answers: tuple[str, ...]
    judges: tuple[LiveJudge, ...]
    strategy: Strategy
    templates: StrategyTemplates
    layout: Layout
    sampling: SamplingSettings
    asking: StrategyAsking


def ranks(
    settings: SelectSettings,
    failure: FailureSettings,
    models: Mapping[str, ModelSettings],
    prompts: Stage,
    answers: Mapping[str, Stage],
    name: str = "judge",
) -> list[Stage]:
    """Verdicts by a strategy, one stage a model.

    Args:
        answers: role → stage of candidates; all answers of a prompt are judged together.
    """
    assert settings.strategy is not None
    stages = []
    for key in settings.models:
        given = _Rank(
            answers=tuple(answers),
            judges=tuple(j for j in settings.judges if j.model == key),
            strategy=settings.strategy,
            templates=settings.texts(),
            layout=settings.layout,
            sampling=settings.sampling,
            asking=settings.asking,
        )
        own = name if len(settings.models) == 1 else f"{name}-{key}"
        inputs = {"prompts": prompts, **answers}
        stages.append(llm_stage(own, rank_shard, ("verdicts",), given, models[key], failure, inputs, group=name))
    return stages


async def rank_shard(given: ShardInput) -> ShardOutput:
    """The verdicts of one shard, ordered by prompt, judge and answer."""
    settings: _Rank = given.settings
    answers: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for role in settings.answers:
        for row in given.tables[role].to_pylist():
            answers[row["prompt_id"]].append(row)
    groups = await all_of(
        _rank_one(given, settings, row["messages"], answers[row["prompt_id"]], judge)
        for row in given.tables["prompts"].to_pylist()
        if row["prompt_id"] in answers
        for judge in settings.judges
    )
    rows = [row for group in groups for row in group]
    counts = collections.Counter(f"{row['judge']}.{row['parse_status']}" for row in rows)
    return ShardOutput({"verdicts": to_table(rows, VERDICTS)}, dict(counts))


async def _rank_one(
    given: ShardInput,
    settings: _Rank,
    messages: Sequence[Message],
    answers: Sequence[Mapping[str, Any]],
    judge: LiveJudge,
) -> list[dict[str, Any]]:
    assert given.engine is not None
    strategy = settings.strategy
    shown = [answer for answer in answers if answer["response"] is not None]
    found: Ranking = await rank(
        given.engine.bound(answers[0]["prompt_id"], f"judge/{judge.name}"),
        messages,
        [answer["response"] for answer in shown],
        strategy if judge.rubric is None else strategy.model_copy(update={"rubric": judge.rubric}),
        settings.templates,
        judge.sampling or settings.sampling,
        settings.asking,
        settings.layout,
    )
    if found.parse_status not in ("too_long", "skipped"):
        given.watch(f"judge {judge.name}", found.parse_status in READ_STATUSES)
    given.tick(len(answers))
    scores = dict(zip((a["candidate_id"] for a in shown), found.scores or (), strict=False))
    known = {answer["candidate_id"] for answer in shown}
    return [
        {
            "candidate_id": answer["candidate_id"],
            "prompt_id": answer["prompt_id"],
            "judge": judge.name,
            "score": scores.get(answer["candidate_id"]),
            "reason": found.reason,
            "parse_status": found.parse_status if answer["candidate_id"] in known else "error",
            "raw": found.raw,
        }
        for answer in answers
    ]


# --- the pick ---------------------------------------------------------------------------------------------------------


class _Pick(Settings):
    judges: tuple[str, ...]


def select(judges: Sequence[str], candidates: Stage, verdicts: Sequence[Stage], name: str = "select") -> Stage:
    """One decision a candidate: accepted, rejected, or neither."""
    given = _Pick(judges=tuple(judges))
    return Stage(
        name=name,
        work=ShardWork(function=select_shard, tables=("decisions",), settings=given),
        config=given.model_dump(mode="json"),
        inputs={"candidates": candidates, **{f"verdicts/{stage.name}": stage for stage in verdicts}},
    )


def select_shard(given: ShardInput) -> ShardOutput:
    settings: _Pick = given.settings
    verdicts = [given.tables[role] for role in sorted(given.tables) if role.startswith("verdicts/")]
    table = accept_best(given.tables["candidates"], pa.concat_tables(verdicts), settings.judges)
    given.tick(table.num_rows)
    return ShardOutput({"decisions": table}, label_counts(table))


def accept_best(candidates: pa.Table, verdicts: pa.Table, judges: Sequence[str]) -> pa.Table:
    """The response of the highest mean score is accepted, those of a lower one are rejected.

    Args:
        candidates: columns candidate_id, prompt_id and k are read; all candidates of each prompt.
        verdicts: columns candidate_id, judge, score, parse_status; rows of other judges are left out.
        judges: whose mean ranks the candidates.

    Returns:
        A table of schema DECISIONS, in the order of `candidates`: the accepted one is `desirable`, the rejected ones
        are `undesirable`. Of several with the highest score the first response is accepted and the others are
        discarded, since nobody called them worse; where all scores of a prompt are equal, or only one was read, all
        are discarded. A candidate with an unread score is `incomplete`.

    Raises:
        KeyMismatch: as `gate.decide`.
        ValueError: there are no judges, or one is named twice.
    """
    ranked = mean_rank(candidates, verdicts, judges, "a selection needs")
    mean, names, turn = ranked.mean, ranked.ids.to_pylist(), candidates["k"].to_pylist()
    label = ranked.texts("discard", "incomplete")
    why = ranked.texts("the only response with a score", "a score was not read")
    for rows in (rows for rows in ranked.of_prompt.values() if len(rows) > 1):
        top = max(mean[row] for row in rows)
        best = min((row for row in rows if mean[row] == top), key=lambda row: (turn[row], names[row]))
        lower = [row for row in rows if mean[row] < top]
        for row in rows:
            why[row] = f"as good as the best: {mean[row]:g}" if lower else f"all {len(rows)} have the score {top:g}"
        if lower:
            label[best], why[best] = "desirable", f"best of {len(rows)}: {top:g}"
        for row in lower:
            label[row], why[row] = "undesirable", f"{mean[row]:g} is below {top:g}, the best of {len(rows)}"
    return ranked.decisions(label, why)
