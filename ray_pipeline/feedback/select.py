"""Selection: judges score the responses of each prompt, the best one is accepted and the others are rejected.

The judges are the rubric judges of the `judge` block, or any number of judges that compare the responses by a strategy
or in a debate. Either way their scores are verdicts on candidates, a named rule pools them into one jury, and the
selection is a table of decisions, from which training rows are made by the same code as from a gate's.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, model_validator

from ray_pipeline.agents.debate import DebateSettings, DebateTemplates, load_debate_templates
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jurors import MEAN, JuryRule
from ray_pipeline.agents.ranking import NOT_ASKED, Ranking, rank, rank_by_debate
from ray_pipeline.agents.strategies import Strategy, StrategyAsking, StrategyTemplates, load_strategy_templates
from ray_pipeline.agents.templates import Layout, LayoutKey
from ray_pipeline.agreement.ask import LiveJudge
from ray_pipeline.config.settings import Settings, refuse_repeated
from ray_pipeline.data.escalation import Levels, check_levels
from ray_pipeline.data.gate import CUT_RULES, Cut, label_counts
from ray_pipeline.data.judge_votes import by_role
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.feedback.pick import PanelRule, accept_best, accept_by_level
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, count_by, reply_status
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.schemas import VERDICTS


class PanelSettings(Settings):
    """One level of `select.escalate`. With neither strategy nor debate it has that of the `select` block."""

    judges: tuple[str, ...] = Field(description="names of `select.judges`; each is in one level")
    strategy: Strategy | None = Field(None, description="how the judges of this level compare the responses")
    debate: DebateSettings | None = Field(None, description="instead of a strategy, each of them runs a debate")


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
    escalate: tuple[PanelSettings, ...] = Field(
        (),
        description="levels of judges. Those of the first compare the responses of every prompt, those of a later one "
        "only where the judges so far do not agree on one best response (docs/feedback_loop.md)",
    )
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
        if self.escalate:
            self._check_levels()
        if any(p.debate is not None and any(j.rubric is not None for j in p.judges) for p in self.panels):
            raise ValueError("a judge in a debate has no rubric; remove it and edit the roles in debate_templates")
        if self.jury.votes and self.pairs == "best_worst":
            raise ValueError(
                f"jury.pool {self.jury.pool} picks the best response but not the worst; "
                "set pairs: every_rejected, or pool scores (mean, median, weighted_mean)"
            )
        for reader, there, keys in (
            ("a strategy", any(p.strategy for p in self.panels), {"templates", "layout"}),
            ("a debate", any(p.debate for p in self.panels), {"debate_templates"}),
            ("a strategy or a debate", self.compares, {"sampling", "asking"}),
        ):
            if not there and (idle := sorted(self.model_fields_set & keys)):
                raise ValueError(f"{idle[0]} has no effect without {reader}; remove it or set one")
        return self

    def _check_levels(self) -> None:
        if not self.compares:
            raise ValueError("escalate has levels of select.judges; set strategy (or debate) and judges, or remove it")
        check_levels(self.levels, self.names, [])
        own = [level for level in self.escalate if level.strategy is not None or level.debate is not None]
        if any(level.strategy is not None and level.debate is not None for level in own):
            raise ValueError("escalate: strategy and debate of a level exclude each other; keep one of them")
        if len(own) == len(self.escalate):
            key = "debate" if self.strategy is None else "strategy"
            raise ValueError(
                f"select.{key} has no effect: every level of escalate has a strategy or debate of its own; remove that "
                f"of one level, which then has select.{key}"
            )
        scales = [panel.scale for panel in self.panels]
        if len(set(scales)) > 1 and not self.jury.votes:
            shown = ", ".join(f"{low} to {high}" for low, high in scales)
            raise ValueError(
                f"escalate: jury.pool {self.jury.pool} pools scores, but those of the levels are on different scales "
                f"({shown}); give them one low and high, or pool votes (mode, weighted)"
            )

    @property
    def levels(self) -> Levels:
        """Names of the judges by level; none without `escalate`."""
        return tuple(level.judges for level in self.escalate)

    @property
    def panels(self) -> tuple[SelectSettings, ...]:
        """The block as it holds for each level; without levels, the block itself."""
        return tuple(self._panel(level) for level in self.escalate) or (self,)

    def _panel(self, level: PanelSettings) -> SelectSettings:
        how = level if level.strategy is not None or level.debate is not None else self
        judges = tuple(judge for judge in self.judges if judge.name in level.judges)
        return self.model_copy(
            update={"escalate": (), "judges": judges, "strategy": how.strategy, "debate": how.debate}
        )

    @property
    def scale(self) -> tuple[int, int]:
        """Lowest and highest score of the strategy or debate; 0 and 1 where it gives shares of wins, or votes."""
        if self.debate is not None:
            return (0, 1) if self.debate.pool == "vote" else (self.debate.low, self.debate.high)
        assert self.strategy is not None
        return (self.strategy.low, self.strategy.high) if self.strategy.form.scored else (0, 1)

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
    exit_rule: PanelRule | None = None
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
    """Verdicts by a strategy or by debates, ordered by prompt, judge and answer; one stage per model (with levels, of
    each level, which waits for those before it).

    Args:
        answers: stages of candidates by role; all answers to a prompt are judged together.
        holds: role of the verdicts, see `Stage.role`.
    """
    stages = list[Stage]()
    for number, panel in enumerate(settings.panels, start=1):
        rule = PanelRule(levels=settings.levels[: number - 1], cut=settings.cut) if number > 1 else None
        inputs = {"prompts": prompts, **answers, **({} if rule is None else by_role(stages))}
        level = f"{name}-level-{number}" if settings.escalate else name
        for key in panel.models:
            own = level if len(panel.models) == 1 else f"{level}-{key}"
            judging = _judging(panel, tuple(answers), tuple(j for j in panel.judges if j.model == key), rule)
            stages.append(RANK.stage(own, judging, models[key], inputs, group=name, holds=holds))
    return stages


def _judging(
    settings: SelectSettings,
    answers: tuple[str, ...],
    judges: tuple[LiveJudge, ...],
    rule: PanelRule | None = None,
) -> _Rank | _Debates:
    who = {"answers": answers, "judges": judges, "exit_rule": rule}
    if settings.debate is not None:
        return _Debates.part_of(settings, **who, rules=settings.debate, templates=settings.debate_texts())
    return _Rank.part_of(settings, **who, templates=settings.texts())


class _Group(NamedTuple):
    """All answers to a prompt and the judge that compares them; answers are rows of schema CANDIDATES. `settled`: the
    levels before leave nothing to this judge."""

    prompt_id: str
    messages: list[Message]
    answers: list[Row]
    judge: LiveJudge
    settled: bool


def _groups(shard: ShardTables, settings: _Rank | _Debates) -> Iterator[_Group]:
    answers: dict[str, list[Row]] = collections.defaultdict(list)
    for role in settings.answers:
        for row in shard.rows(role):
            answers[row["prompt_id"]].append(row)
    settled, rule = set[str](), settings.exit_rule
    if rule is not None:
        candidates = pa.concat_tables([shard.tables[role] for role in settings.answers])
        settled = rule.settled_in(candidates, pa.concat_tables(shard.under("verdicts/")))
    for prompt, messages in shard.messages().items():
        if prompt in answers:
            for judge in settings.judges:
                yield _Group(prompt, messages, answers[prompt], judge, prompt in settled)


async def _rank(engine: ChatEngine, settings: _Rank | _Debates, group: _Group) -> Outcome:
    shown = [answer for answer in group.answers if answer["response"] is not None]
    ranking = NOT_ASKED
    if not group.settled:
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
    levels: Levels = ()


def select(
    judges: Sequence[str],
    candidates: Stage,
    verdicts: Sequence[Stage],
    jury: JuryRule = MEAN,
    name: str = "select",
    cut: Cut = "exclude",
    levels: Levels = (),
) -> Stage:
    """One decision per candidate: accepted, rejected, or neither.

    Args:
        cut: rule for candidates whose text is not whole.
        levels: the judges by level (`select.escalate`); none: all were asked.
    """
    given = _Pick(judges=tuple(judges), jury=jury, cut=cut, levels=levels)
    return Stage(
        name=name,
        version=2,  # 2: candidates that were cut off are left out
        work=ShardWork(function=select_shard, tables=("decisions",), settings=given),
        config=given.decisive(),
        inputs={"candidates": candidates, **{f"verdicts/{stage.name}": stage for stage in verdicts}},
    )


def select_shard(given: ShardInput) -> ShardOutput:
    settings: _Pick = given.settings
    candidates, counts = given.tables["candidates"], dict[str, int]()
    verdicts = pa.concat_tables(ShardTables(given.tables, given.facts).under("verdicts/"))
    if settings.levels:
        rule = PanelRule(levels=settings.levels, cut=settings.cut)
        table, counts = accept_by_level(candidates, verdicts, rule, settings.jury)
    else:
        table = accept_best(candidates, verdicts, settings.judges, settings.jury, settings.cut)
    given.tick(table.num_rows)
    return ShardOutput({"decisions": table}, label_counts(table) | counts)
