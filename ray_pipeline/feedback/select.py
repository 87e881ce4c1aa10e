"""Selection: judges score the responses of each prompt, the best one is accepted and the others are rejected.

The judges are the rubric judges of the `judge` block, or any number of judges that compare the responses, by a strategy
or by a debate. Whoever they are, their scores are verdicts on candidates, a named rule makes one jury of them, and the
selection is a table of decisions, so that the code that makes training rows of a gate's decisions makes them of these.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import model_validator

from ray_pipeline.agents.debate import DebateSettings, DebateTemplates, load_debate_templates
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jurors import MEAN, JuryRule, jury_scores
from ray_pipeline.agents.ranking import Ranking, rank, rank_by_debate
from ray_pipeline.agents.strategies import Strategy, StrategyAsking, StrategyTemplates, load_strategy_templates
from ray_pipeline.agents.templates import Layout
from ray_pipeline.agreement.ask import LiveJudge
from ray_pipeline.data.gate import label_counts
from ray_pipeline.data.mean_rank import MeanRank, mean_rank
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.schemas import READ_STATUSES, VERDICTS, to_table
from ray_pipeline.store.settings import Settings


class SelectSettings(Settings):
    """The `select` block: who says which response is best.

    Attributes:
        strategy: how several answers are judged. Without it and without a debate the rubric judges of the `judge`
            block score each answer by itself.
        debate: instead of a strategy: the answers are debated by all roles of `debate_templates`, and the scores at
            the end count. Each judge holds a debate of its own.
        judges: who judges by the strategy, or debates.
        jury: how the judges' scores become one.
        pairs: of a prompt's DPO data: the accepted response with every rejected one, or with the worst alone.
        templates: built-in name or YAML file of what a strategy asks.
        debate_templates: the same of a debate: its roles, and what they are asked.
    """

    strategy: Strategy | None = None
    debate: DebateSettings | None = None
    judges: tuple[LiveJudge, ...] = ()
    jury: JuryRule = MEAN
    pairs: Literal["every_rejected", "best_worst"] = "every_rejected"
    templates: str = "default"
    debate_templates: str = "default"
    layout: Layout = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    asking: StrategyAsking = StrategyAsking()

    @model_validator(mode="after")
    def _consistent(self) -> SelectSettings:
        if self.strategy is not None and self.debate is not None:
            raise ValueError("strategy and debate are two ways to judge the same responses: keep one of them")
        if self.compares != bool(self.judges):
            raise ValueError(
                "strategy and judges go together (or debate and judges): name both, or neither for the rubric judges"
            )
        names = [j.name for j in self.judges]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two judges have the same name: {', '.join(twice)}")
        if self.debate is not None and any(j.rubric is not None for j in self.judges):
            raise ValueError("a judge that debates has no rubric; its roles and tasks are in debate_templates")
        if self.jury.votes and self.pairs == "best_worst":
            raise ValueError(
                f"jury.pool {self.jury.pool} says which response is best and not which is worst; "
                "set pairs: every_rejected, or pool scores (mean, median, weighted_mean)"
            )
        for reader, there, keys in (
            ("a strategy", self.strategy, {"templates", "layout"}),
            ("a debate", self.debate, {"debate_templates"}),
            ("a strategy or a debate", self.strategy or self.debate, {"sampling", "asking"}),
        ):
            if there is None and (idle := sorted(self.model_fields_set & keys)):
                raise ValueError(f"{idle[0]} is read by {reader} alone, and there is none; remove it or name one")
        return self

    @property
    def compares(self) -> bool:
        """Whether judges of its own compare the responses; if not, the rubric judges score them."""
        return self.strategy is not None or self.debate is not None

    @property
    def how(self) -> str:
        """By what the judges compare, for readers; empty for rubric judges."""
        return "a debate" if self.debate is not None else "" if self.strategy is None else self.strategy.name

    @property
    def names(self) -> list[str]:
        return [j.name for j in self.judges]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(j.model for j in self.judges))

    def texts(self) -> StrategyTemplates:
        return load_strategy_templates(self.templates)

    def debate_texts(self) -> DebateTemplates:
        return load_debate_templates(self.debate_templates)


class _Judges(Settings):
    answers: tuple[str, ...]
    judges: tuple[LiveJudge, ...]
    sampling: SamplingSettings
    asking: StrategyAsking


class _Rank(_Judges):
    strategy: Strategy
    templates: StrategyTemplates
    layout: Layout


class _Debates(_Judges):
    rules: DebateSettings
    templates: DebateTemplates


def ranks(
    settings: SelectSettings,
    failure: FailureSettings,
    models: Mapping[str, ModelSettings],
    prompts: Stage,
    answers: Mapping[str, Stage],
    name: str = "judge",
) -> list[Stage]:
    """Verdicts by a strategy or by debates, one stage a model.

    Args:
        answers: role → stage of candidates; all answers of a prompt are judged together.
    """
    stages = []
    for key in settings.models:
        given = _given(settings, tuple(answers), tuple(j for j in settings.judges if j.model == key))
        own = name if len(settings.models) == 1 else f"{name}-{key}"
        inputs = {"prompts": prompts, **answers}
        stages.append(llm_stage(own, rank_shard, ("verdicts",), given, models[key], failure, inputs, group=name))
    return stages


def _given(settings: SelectSettings, answers: tuple[str, ...], judges: tuple[LiveJudge, ...]) -> _Judges:
    common = {"answers": answers, "judges": judges, "sampling": settings.sampling, "asking": settings.asking}
    if settings.debate is not None:
        return _Debates(**common, rules=settings.debate, templates=settings.debate_texts())
    assert settings.strategy is not None
    return _Rank(**common, strategy=settings.strategy, templates=settings.texts(), layout=settings.layout)


async def rank_shard(given: ShardInput) -> ShardOutput:
    """The verdicts of one shard, ordered by prompt, judge and answer."""
    settings: _Judges = given.settings
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
    settings: _Judges,
    messages: Sequence[Message],
    answers: Sequence[Mapping[str, Any]],
    judge: LiveJudge,
) -> list[dict[str, Any]]:
    assert given.engine is not None
    shown = [answer for answer in answers if answer["response"] is not None]
    engine = given.engine.bound(answers[0]["prompt_id"], f"judge/{judge.name}")
    found = await _compared(engine, settings, messages, [answer["response"] for answer in shown], judge)
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


async def _compared(
    engine: ChatEngine, settings: _Judges, messages: Sequence[Message], texts: Sequence[str], judge: LiveJudge
) -> Ranking:
    sampling = judge.sampling or settings.sampling
    if isinstance(settings, _Debates):
        return await rank_by_debate(
            engine, messages, texts, settings.rules, settings.templates, sampling, settings.asking
        )
    assert isinstance(settings, _Rank)
    strategy = settings.strategy
    if judge.rubric is not None:
        strategy = strategy.model_copy(update={"rubric": judge.rubric})
    return await rank(engine, messages, texts, strategy, settings.templates, sampling, settings.asking, settings.layout)


# --- the pick ---------------------------------------------------------------------------------------------------------


class _Pick(Settings):
    judges: tuple[str, ...]
    jury: JuryRule


def select(
    judges: Sequence[str],
    candidates: Stage,
    verdicts: Sequence[Stage],
    jury: JuryRule = MEAN,
    name: str = "select",
) -> Stage:
    """One decision a candidate: accepted, rejected, or neither."""
    given = _Pick(judges=tuple(judges), jury=jury)
    return Stage(
        name=name,
        work=ShardWork(function=select_shard, tables=("decisions",), settings=given),
        config=given.decisive(),
        inputs={"candidates": candidates, **{f"verdicts/{stage.name}": stage for stage in verdicts}},
    )


def select_shard(given: ShardInput) -> ShardOutput:
    settings: _Pick = given.settings
    verdicts = [given.tables[role] for role in sorted(given.tables) if role.startswith("verdicts/")]
    table = accept_best(given.tables["candidates"], pa.concat_tables(verdicts), settings.judges, settings.jury)
    given.tick(table.num_rows)
    return ShardOutput({"decisions": table}, label_counts(table))


def accept_best(candidates: pa.Table, verdicts: pa.Table, judges: Sequence[str], jury: JuryRule = MEAN) -> pa.Table:
    """The response that the jury scores highest is accepted, those of a lower score are rejected.

    Args:
        candidates: columns candidate_id, prompt_id and k are read; all candidates of each prompt.
        verdicts: columns candidate_id, judge, score, parse_status; rows of other judges are left out.
        judges: who sits on the jury.
        jury: how their scores become one. Under a rule of votes a judge votes among the candidates that all could
            score.

    Returns:
        A table of schema DECISIONS, in the order of `candidates`; the final score is the jury's. The accepted one is
        `desirable`, the rejected ones are `undesirable`. Of several with the highest score the first response is
        accepted and the others are discarded, since nobody called them worse; where all scores of a prompt are equal,
        or only one was read, all are discarded. A candidate with an unread score is `incomplete`.

    Raises:
        KeyMismatch: as `gate.decide`.
        ValueError: there are no judges, one is named twice, or one has no weight where the rule weighs.
    """
    ranked = mean_rank(candidates, verdicts, judges, "a selection needs")
    final, names, turn = _final(ranked, judges, jury), ranked.ids.to_pylist(), candidates["k"].to_pylist()
    label = ranked.texts("discard", "incomplete")
    why = ranked.texts("the only response with a score", "a score was not read")
    for rows in (rows for rows in ranked.of_prompt.values() if len(rows) > 1):
        top = max(final[row] for row in rows)
        best = min((row for row in rows if final[row] == top), key=lambda row: (turn[row], names[row]))
        lower = [row for row in rows if final[row] < top]
        for row in rows:
            why[row] = f"as good as the best: {final[row]:g}" if lower else f"all {len(rows)} have the score {top:g}"
        if lower:
            label[best], why[best] = "desirable", f"best of {len(rows)}: {top:g}"
        for row in lower:
            label[row], why[row] = "undesirable", f"{final[row]:g} is below {top:g}, the best of {len(rows)}"
    return ranked.decisions(label, why, final)


def _final(ranked: MeanRank, judges: Sequence[str], jury: JuryRule) -> NDArray[np.float64]:
    """The jury's score of every candidate; NaN where one of its scores was not read."""
    if jury.pool == "mean":
        return ranked.mean
    final = np.full(len(ranked.mean), np.nan)
    for rows in ranked.of_prompt.values():
        final[rows] = jury_scores(dict(zip(judges, ranked.scores[rows].T.tolist(), strict=True)), jury)
    return final
