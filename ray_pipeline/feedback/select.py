"""Selection: judges score the responses of each prompt, the best one is accepted and the others are rejected.

The judges are the rubric judges of the `judge` block, or any number of judges that compare the responses by a strategy
or in a debate. Either way their scores are verdicts on candidates, a named rule pools them into one jury, and the
selection is a table of decisions, from which training rows are made by the same code as from a gate's.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ray_pipeline.agents.debate import DebateSettings, DebateTemplates, load_debate_templates
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jurors import MEAN, JuryRule, jury_scores
from ray_pipeline.agents.ranking import Ranking, rank, rank_by_debate
from ray_pipeline.agents.strategies import Strategy, StrategyAsking, StrategyTemplates, load_strategy_templates
from ray_pipeline.agents.templates import Layout, LayoutKey
from ray_pipeline.agreement.ask import LiveJudge
from ray_pipeline.config.settings import Settings, refuse_repeated
from ray_pipeline.data.gate import CUT_RULES, Cut, cut_text, label_counts
from ray_pipeline.data.mean_rank import MeanRank, mean_rank
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, count_by, reply_status
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.schemas import VERDICTS


class SelectSettings(Settings):
    """The `select` block: how the best response of a prompt is chosen."""

    strategy: Strategy | None = Field(
        None,
        description="how several answers are judged. With neither strategy nor debate, the rubric judges of "
        "the `judge` block score each answer by itself",
    )
    debate: DebateSettings | None = Field(
        None,
        description="instead of a strategy, all roles of `debate_templates` debate the answers, and their "
        "final scores count. Each judge runs its own debate",
    )
    judges: tuple[LiveJudge, ...] = Field((), description="the judges that use the strategy, or debate")
    jury: JuryRule = Field(MEAN, description="how the judges' scores are pooled")
    pairs: Literal["every_rejected", "best_worst"] = Field(
        "every_rejected",
        description="a prompt's DPO pairs: the accepted response with every rejected one, or only with the worst",
    )
    cut: Cut = Field("exclude", description=CUT_RULES)
    templates: str = Field("default", description="built-in name or YAML file of a strategy's texts")
    debate_templates: str = Field("default", description="built-in name or YAML file of a debate's roles and texts")
    layout: LayoutKey = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    asking: StrategyAsking = StrategyAsking()

    @model_validator(mode="after")
    def _consistent(self) -> SelectSettings:
        if self.strategy is not None and self.debate is not None:
            raise ValueError("strategy and debate exclude each other; keep one of them")
        if self.compares != bool(self.judges):
            raise ValueError(
                "set strategy and judges together (or debate and judges), or neither to use the rubric judges"
            )
        refuse_repeated((judge.name for judge in self.judges), "judges")
        if self.debate is not None and any(j.rubric is not None for j in self.judges):
            raise ValueError("a judge in a debate has no rubric; remove it and edit the roles in debate_templates")
        if self.jury.votes and self.pairs == "best_worst":
            raise ValueError(
                f"jury.pool {self.jury.pool} picks the best response but not the worst; "
                "set pairs: every_rejected, or pool scores (mean, median, weighted_mean)"
            )
        for reader, there, keys in (
            ("a strategy", self.strategy, {"templates", "layout"}),
            ("a debate", self.debate, {"debate_templates"}),
            ("a strategy or a debate", self.strategy or self.debate, {"sampling", "asking"}),
        ):
            if there is None and (idle := sorted(self.model_fields_set & keys)):
                raise ValueError(f"{idle[0]} has no effect without {reader}; remove it or set one")
        return self

    @property
    def compares(self) -> bool:
        """Whether its own judges compare the responses; if not, the rubric judges score them."""
        return self.strategy is not None or self.debate is not None

    @property
    def how(self) -> str:
        """How the judges compare, as text for reports; empty for rubric judges."""
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
    models: Mapping[str, ModelSettings],
    prompts: Stage,
    answers: Mapping[str, Stage],
    name: str = "judge",
    holds: str = "",
) -> list[Stage]:
    """Verdicts by a strategy or by debates, ordered by prompt, judge and answer; one stage per model.

    Args:
        answers: stages of candidates by role; all answers to a prompt are judged together.
        holds: role of the verdicts, see `Stage.role`.
    """
    stages = []
    for key in settings.models:
        own = name if len(settings.models) == 1 else f"{name}-{key}"
        judging = _judging(settings, tuple(answers), tuple(j for j in settings.judges if j.model == key))
        stages.append(RANK.stage(own, judging, models[key], {"prompts": prompts, **answers}, group=name, holds=holds))
    return stages


def _judging(settings: SelectSettings, answers: tuple[str, ...], judges: tuple[LiveJudge, ...]) -> _Rank | _Debates:
    who = {"answers": answers, "judges": judges}
    if settings.debate is not None:
        return _Debates.part_of(settings, **who, rules=settings.debate, templates=settings.debate_texts())
    return _Rank.part_of(settings, **who, templates=settings.texts())


class _Group(NamedTuple):
    """All answers to a prompt and the judge that compares them; answers are rows of schema CANDIDATES."""

    prompt_id: str
    messages: list[Message]
    answers: list[Row]
    judge: LiveJudge


def _groups(shard: ShardTables, settings: _Rank | _Debates) -> Iterator[_Group]:
    answers: dict[str, list[Row]] = collections.defaultdict(list)
    for role in settings.answers:
        for row in shard.rows(role):
            answers[row["prompt_id"]].append(row)
    for prompt, messages in shard.messages().items():
        if prompt in answers:
            for judge in settings.judges:
                yield _Group(prompt, messages, answers[prompt], judge)


async def _rank(engine: ChatEngine, settings: _Rank | _Debates, group: _Group) -> Outcome:
    shown = [answer for answer in group.answers if answer["response"] is not None]
    ranking = await _ranked(engine, settings, group, [answer["response"] for answer in shown])
    scores = dict(zip((a["candidate_id"] for a in shown), ranking.scores or (), strict=False))
    rows = [
        {
            "candidate_id": answer["candidate_id"],
            "prompt_id": answer["prompt_id"],
            "judge": group.judge.name,
            "score": scores.get(answer["candidate_id"]),
            "reason": ranking.reason,
            "parse_status": "error" if answer["response"] is None else ranking.parse_status,
            "raw": ranking.raw,
        }
        for answer in group.answers
    ]
    return Outcome({"verdicts": rows}, reply_status(f"judge {group.judge.name}", ranking.parse_status))


async def _ranked(engine: ChatEngine, settings: _Rank | _Debates, group: _Group, texts: list[str]) -> Ranking:
    messages, judge = group.messages, group.judge
    sampling = judge.sampling or settings.sampling
    if isinstance(settings, _Debates):
        rules, templates = settings.rules, settings.templates
        return await rank_by_debate(engine, messages, texts, rules, templates, sampling, settings.asking)
    strategy = settings.strategy
    if judge.rubric is not None:
        strategy = strategy.model_copy(update={"rubric": judge.rubric})
    return await rank(engine, messages, texts, strategy, settings.templates, sampling, settings.asking, settings.layout)


RANK = Asking(
    tables={"verdicts": VERDICTS},
    items=_groups,
    ask=_rank,
    role=lambda settings, group: f"judge/{group.judge.name}",
    counts=count_by("verdicts", "judge", "parse_status"),
)


# --- the pick ---------------------------------------------------------------------------------------------------------


class _Pick(Settings):
    judges: tuple[str, ...]
    jury: JuryRule
    cut: Cut = "exclude"


def select(
    judges: Sequence[str],
    candidates: Stage,
    verdicts: Sequence[Stage],
    jury: JuryRule = MEAN,
    name: str = "select",
    cut: Cut = "exclude",
) -> Stage:
    """One decision per candidate: accepted, rejected, or neither.

    Args:
        cut: rule for candidates whose text is not whole.
    """
    given = _Pick(judges=tuple(judges), jury=jury, cut=cut)
    return Stage(
        name=name,
        version=2,  # 2: candidates that were cut off are left out
        work=ShardWork(function=select_shard, tables=("decisions",), settings=given),
        config=given.decisive(),
        inputs={"candidates": candidates, **{f"verdicts/{stage.name}": stage for stage in verdicts}},
    )


def select_shard(given: ShardInput) -> ShardOutput:
    settings: _Pick = given.settings
    verdicts = pa.concat_tables(ShardTables(given.tables, given.facts).under("verdicts/"))
    table = accept_best(given.tables["candidates"], verdicts, settings.judges, settings.jury, settings.cut)
    given.tick(table.num_rows)
    return ShardOutput({"decisions": table}, label_counts(table))


def accept_best(
    candidates: pa.Table, verdicts: pa.Table, judges: Sequence[str], jury: JuryRule = MEAN, cut: Cut = "exclude"
) -> pa.Table:
    """The response that the jury scores highest is accepted, those of a lower score are rejected.

    Args:
        candidates: columns candidate_id, prompt_id, k and, if it is there, finish_reason are read; all candidates of
            each prompt.
        verdicts: columns candidate_id, judge, score, parse_status; rows of other judges are left out.
        judges: who sits on the jury.
        jury: how their scores become one. Under a rule of votes a judge votes among the candidates that all could
            score.
        cut: rule for candidates whose text is not whole: they are `incomplete`, never accepted, or like others.

    Returns:
        A table of schema DECISIONS, in the order of `candidates`; the final score is the jury's. The accepted one is
        `desirable`, the rejected ones are `undesirable`. Of several with the highest score the first response is
        accepted and the others are discarded, since no judge called them worse; where all scores of a prompt are equal,
        or only one was read, all are discarded. A candidate with an unread score is `incomplete`.

    Raises:
        KeyMismatch: as `gate.decide`.
        ValueError: there are no judges, one occurs twice, or one has no weight where the rule weighs.
    """
    ranked = mean_rank(candidates, verdicts, judges, "a selection needs", cut)
    final, names, turn = _final(ranked, judges, jury), ranked.ids.to_pylist(), candidates["k"].to_pylist()
    label = ranked.texts("discard", "incomplete")
    why = ranked.why("the only response with a score")
    for scored in ranked.of_prompt.values():
        whole = ranked.whole(scored)
        top = max((final[row] for row in whole), default=-np.inf)
        barred = [row for row in scored if ranked.cut[row] and final[row] >= top]
        for row in barred:
            label[row], why[row] = "incomplete", cut_text(ranked.cut[row])
        rows = [row for row in scored if row not in barred]
        if len(rows) < 2:
            continue
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
