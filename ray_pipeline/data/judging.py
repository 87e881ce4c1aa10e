"""Judges: every rubric judge scores every candidate; all judgements of a candidate run together on one replica, or with
`judge.early_exit` one after another until the rest cannot matter (`data/early_exit.py`). With `judge.escalate`, later
levels of judges see what the earlier ones left open (`data/escalation.py`).

Judges whose verdicts are in a user's file (`judge.source`) make no call: their rows are joined to the candidates.
Programs (`judge.programs`) make none either; reward models (`judge.rewards`) make one, without a text to read.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings, Verdict, columns_of, judge
from ray_pipeline.agents.templates import Layout, RoleTemplate, Templates
from ray_pipeline.agents.ticking import tick
from ray_pipeline.config.settings import Settings, refuse_repeated
from ray_pipeline.data.answers import Answer, answers_of, unanswered
from ray_pipeline.data.checklists import Checklist, checklists, read_checklists
from ray_pipeline.data.early_exit import SKIPPED, EarlyExit, ExitRule, Panel, Scale, outside_slice
from ray_pipeline.data.escalation import CallRule, Escalation, Levels, check_levels
from ray_pipeline.data.judge_layout import layout_stage
from ray_pipeline.data.programs import ProgramJudge, programs
from ray_pipeline.data.rewards import RewardJudge, rewards
from ray_pipeline.data.verdict_sources import VerdictSource, recorded_rows, response_key
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, ShardTables, count_by, reply_status
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.store.schemas import VERDICTS, to_table
from ray_pipeline.store.tables import ShardedTable


class JudgeSettings(Settings):
    """The `judge` block: the judges, by rubrics for models, as programs or reward models, or by a file of verdicts."""

    model: str = Field("judge", description="a key of `models`, for rubrics that name no model")
    rubrics: tuple[Rubric, ...] = Field(
        (),
        description="judges that are models: name, text and scale of each; required without another kind of judges",
    )
    programs: tuple[ProgramJudge, ...] = Field(
        (), description="judges that are programs and make no LLM call, beside those of `rubrics` or alone"
    )
    rewards: tuple[RewardJudge, ...] = Field((), description="judges that are reward models, beside others or alone")
    source: VerdictSource | None = Field(
        None, description="judges whose verdicts are in a file of yours, beside those of `rubrics` or alone"
    )
    layout: Literal["auto", "shared_first", "rubric_first"] = Field(
        "auto",
        description="which part of the prompt comes first: what the calls about one response share, or the rubric",
    )
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=512)
    asking: JudgeAsking = JudgeAsking()
    early_exit: EarlyExit = Field(
        "off",
        description="labels: judges of a candidate are asked one by one, then the critic, and calls that no longer "
        "can change its label are skipped (5 % of the candidates are judged in full); scores: only those that change "
        "no training row either. Changed thresholds may need skipped calls. Only for `dmapo`",
    )
    escalate: Levels = Field(
        (),
        description="names of judges by level, as in [[helpfulness, factuality], [expert]]: judges of a later level "
        "are asked about a candidate only while its label by those before is open (abstain or discard), and the gate "
        "decides by the judges asked (5 % of the candidates are judged by all); default: all judges are asked. Only "
        "for `dmapo`",
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        """A rubric that sets one key of `sampling` keeps the other values of the stage."""
        shared = values.get("sampling") if isinstance(values, Mapping) else None
        rubrics = values.get("rubrics") if isinstance(values, Mapping) else None
        if not isinstance(shared, Mapping) or not isinstance(rubrics, (list, tuple)):
            return values
        return {**values, "rubrics": [_over(shared, rubric) for rubric in rubrics]}

    @model_validator(mode="after")
    def _distinct(self) -> JudgeSettings:
        if not self.names:
            raise ValueError("no judges: set judge.rubrics, judge.programs, judge.rewards or judge.source")
        refuse_repeated(self.names, "judges")
        scales = sorted(self._scales)
        if len(scales) > 1:
            shown = " and ".join(f"{low} to {high}" for low, high in scales)
            raise ValueError(f"judges score on different scales ({shown}), but the gate averages them; choose one")
        if self.escalate:
            if self.early_exit != "off":
                raise ValueError("escalate and early_exit are both set, but skip calls by different rules; choose one")
            asked = {rubric.name for rubric in self.rubrics}
            check_levels(self.escalate, self.names, [name for name in self.names if name not in asked])
        return self

    @property
    def _every(self) -> tuple[Rubric, ...]:
        """Judges of all kinds."""
        programs, rewards = (p.rubric for p in self.programs), (r.rubric for r in self.rewards)
        return (*self.rubrics, *programs, *rewards, *self.recorded)

    @property
    def _scales(self) -> set[Scale]:
        return {(judge.low, judge.high) for judge in self._every}

    @property
    def scale(self) -> Scale:
        """Lowest and highest score of all judges."""
        (scale,) = self._scales
        return scale

    @property
    def recorded(self) -> tuple[Rubric, ...]:
        """Judges of the source."""
        return () if self.source is None else self.source.rubrics

    @property
    def names(self) -> list[str]:
        return [judge.name for judge in self._every]

    @property
    def live(self) -> JudgeSettings | None:
        """The judges that can score what is not in a file; None without any."""
        return None if self._every == self.recorded else self.model_copy(update={"source": None})

    def on_model(self, key: str) -> tuple[Rubric, ...]:
        """Rubrics judged by one model."""
        return tuple(r for r in self.rubrics if (r.model or self.model) == key)

    @property
    def models(self) -> list[str]:
        """Keys of the models that judge, in the order of the rubrics."""
        return list(dict.fromkeys(r.model or self.model for r in self.rubrics))


def _over(shared: Mapping[str, Any], rubric: Any) -> Any:
    if not isinstance(rubric, Mapping) or not isinstance(rubric.get("sampling"), Mapping):
        return rubric
    return {**rubric, "sampling": {**shared, **rubric["sampling"]}}


class _Judging(Settings):
    """What the verdicts depend on. `answers` are the input roles whose rows are judged; `ticks` asks for the ticks of
    checklists, where a rubric is one."""

    answers: tuple[str, ...]
    rubrics: tuple[Rubric, ...]
    template: RoleTemplate
    layout: Layout | None
    sampling: SamplingSettings
    asking: JudgeAsking
    exit_rule: CallRule | None = None
    ticks: RoleTemplate | None = None


class _Judgement(NamedTuple):
    """`settled`: verdicts of other stages leave nothing to this judge. `panel`: of the answer, where its judges take
    turns. `checklist`: where the rubric is one."""

    prompt_id: str
    answer: Answer
    rubric: Rubric
    layout: Layout
    settled: bool
    panel: Panel | None
    checklist: Checklist | None


def _judgements(shard: ShardTables, settings: _Judging) -> list[_Judgement]:
    """All judgements of an answer follow each other, so that they can share its part of the prompt."""
    layout: Layout = settings.layout or shard.facts["layout"]["layout"]
    tables, rule = [shard.tables[role] for role in settings.answers], settings.exit_rule
    settled, panels = set[str](), dict[str, Panel]()
    if rule is not None:
        for table in tables:
            known = outside_slice(table, shard.under("verdicts/"))
            settled |= {name for name, verdicts in known.items() if rule.settled(verdicts)}
            if isinstance(rule, ExitRule):
                panels |= {name: Panel(rule, verdicts) for name, verdicts in known.items()}
    written = read_checklists([row for table in shard.under("checklists/") for row in table.to_pylist()])

    def checklist(answer: Answer, rubric: Rubric) -> Checklist | None:
        if rubric.checklist is not None and answer.missing is None:
            return written[answer.prompt_id, rubric.name]
        return Checklist(rubric.items) if rubric.items else None

    return [
        _Judgement(
            answer.prompt_id,
            answer,
            rubric,
            layout,
            answer.id in settled,
            panels.get(answer.id),
            checklist(answer, rubric),
        )
        for answer in answers_of(shard.tables["prompts"], *tables)
        for rubric in settings.rubrics
    ]


async def _judge(engine: ChatEngine, settings: _Judging, item: _Judgement) -> Outcome:
    answer, rubric = item.answer, item.rubric
    ids = {"candidate_id": answer.id, "prompt_id": answer.prompt_id, "judge": rubric.name}
    if answer.missing is not None:
        return Outcome({"verdicts": [{**ids, "parse_status": answer.missing}]})
    async with item.panel or contextlib.nullcontext():
        if item.settled or (item.panel is not None and item.panel.settled):
            verdict = Verdict(None, None, None, SKIPPED, None)
        elif item.checklist is not None and not item.checklist.items:
            why = f"no checklist: {item.checklist.reason or item.checklist.status}"
            return Outcome({"verdicts": [{**ids, "parse_status": item.checklist.status, "reason": why}]})
        else:
            verdict = await _asked(engine, settings, item)
            if item.panel is not None:
                item.panel.add(rubric.name, verdict.score)
    return Outcome(
        {"verdicts": [{**ids, **columns_of(verdict)}]}, reply_status(f"judge {rubric.name}", verdict.parse_status)
    )


async def _asked(engine: ChatEngine, settings: _Judging, item: _Judgement) -> Verdict:
    answer, rubric, how = item.answer, item.rubric, (settings.sampling, settings.asking, item.layout)
    if item.checklist is None:
        return await judge(engine, answer.messages, answer.response, rubric, settings.template, *how)
    assert settings.ticks is not None
    items = item.checklist.items
    return await tick(engine, answer.messages, answer.response, rubric, items, settings.ticks, *how)


JUDGES = Asking(
    tables={"verdicts": VERDICTS},
    items=_judgements,
    ask=_judge,
    role=lambda settings, item: f"judge/{item.rubric.name}",
    counts=count_by("verdicts", "judge", "parse_status"),
)


def judges(
    settings: JudgeSettings,
    models: Mapping[str, ModelSettings],
    texts: Templates,
    prompts: Stage,
    answers: Mapping[str, Stage],
    name: str = "judge",
    group: str = "",
    holds: str = "",
    exit_rule: CallRule | None = None,
) -> list[Stage]:
    """One stage per judge model (with an escalation, of each level) and per reward model, one for all programs, and one
    for a source, each with the verdicts of its own judges, ordered by candidate and judge. The stages of written
    checklists are among their inputs.

    Args:
        answers: stages of candidates or responses by role; all of their rows are judged.
        holds: role of the verdicts, see `Stage.role`.
        exit_rule: when a candidate's remaining judges are skipped; each model, or level, then waits for the verdicts
            before it.
    """
    free = rewards(settings.rewards, models, prompts, answers, name, group or name, holds)
    if settings.programs:
        free.append(programs(settings.programs, prompts, answers, f"{name}-programs", group or name, holds))
    if settings.source is not None:
        free.append(_recorded(settings.source, answers, group or name, holds))
    stages: list[Stage] = []
    asked = {"prompts": prompts, **answers}
    lists = checklists(
        settings.rubrics, models, texts, settings.asking, asked, f"{name}-checklist", group or "checklist", holds
    )
    for own, key, rubrics, rule in _stages(settings, name, exit_rule):
        inputs = {**asked}
        judging = _Judging.part_of(
            settings,
            answers=tuple(answers),
            rubrics=rubrics,
            template=texts.judge,
            ticks=texts.ticks if any(rubric.is_checklist for rubric in rubrics) else None,
            layout=None if settings.layout == "auto" else settings.layout,
            exit_rule=rule,
        )
        if judging.layout is None:
            inputs["layout"] = layout_stage(f"{own}-layout", group or name, judging, models[key], inputs)
        inputs |= {f"checklists/{lists[r.name].name}": lists[r.name] for r in rubrics if r.name in lists}
        if rule is not None:
            inputs |= by_role([*free, *stages])
        stages.append(JUDGES.stage(own, judging, models[key], inputs, group=group or name, holds=holds))
    return [*stages, *free]


def _stages(
    settings: JudgeSettings, name: str, rule: CallRule | None
) -> Iterator[tuple[str, str, tuple[Rubric, ...], CallRule | None]]:
    """Name, key of the model, rubrics and rule of each stage of models, in the order in which they wait."""
    if not isinstance(rule, Escalation):
        for key in settings.models:
            yield name if len(settings.models) == 1 else f"{name}-{key}", key, settings.on_model(key), rule
        return
    for number, level in enumerate(rule.levels, start=1):
        before = rule.model_copy(update={"levels": rule.levels[: number - 1]}) if number > 1 else None
        of_level = {key: tuple(r for r in settings.on_model(key) if r.name in level) for key in settings.models}
        of_level = {key: rubrics for key, rubrics in of_level.items() if rubrics}
        for key, rubrics in of_level.items():
            own = f"{name}-level-{number}"
            yield own if len(of_level) == 1 else f"{own}-{key}", key, rubrics, before


def by_role(verdicts: Sequence[Stage]) -> dict[str, Stage]:
    """Stages of verdicts as inputs of another stage."""
    return {f"verdicts/{stage.name}": stage for stage in verdicts}


# --- verdicts of a file -----------------------------------------------------------------------------------------------


class _Recorded(Settings):
    answers: tuple[str, ...]
    rubrics: tuple[Rubric, ...]
    source: str


def _recorded(source: VerdictSource, answers: Mapping[str, Stage], group: str, holds: str) -> Stage:
    settings = _Recorded(answers=tuple(answers), rubrics=source.rubrics, source=source.default_label)
    return Stage(
        name="recorded-verdicts",
        group=group,
        role=holds,
        work=WholeWork(function=join_recorded, settings=settings, tables=("verdicts",)),
        config=settings.decisive(exclude={"source"}),
        inputs={"recorded": recorded_rows(source, "verdict-source", group), **answers},
    )


def join_recorded(given: WholeInput) -> dict[str, Any]:
    """One verdict for each candidate and judge of the source: what the source says of the same prompt and text.

    Raises:
        BadInput: no candidate has a row in the source.
    """
    settings: _Recorded = given.settings
    out = ShardedTable(given.folder.location, "verdicts", given.num_shards, given.fingerprint)
    counts: collections.Counter[str] = collections.Counter()
    statuses: collections.Counter[str] = collections.Counter()
    stray = ""
    for shard in range(given.num_shards):
        rows = given.inputs["recorded"].table().read(shard).to_pylist()
        candidates = [row for role in settings.answers for row in given.inputs[role].table().read(shard).to_pylist()]
        cells = {(row["response_key"], row["judge"]): row for row in rows}
        known, prompts = set[str](), {row["prompt_id"] for row in candidates}
        verdicts = []
        for row in candidates:
            key = response_key(row["prompt_id"], row["response"] or "")
            known.add(key)
            own = [_said(row, rubric.name, cells.get((key, rubric.name))) for rubric in settings.rubrics]
            statuses.update(f"{verdict['judge']}.{verdict['parse_status']}" for verdict in own)
            counts["candidates"] += 1
            counts["without a row"] += all(verdict["parse_status"] == "missing" for verdict in own)
            verdicts += own
        out.write(shard, to_table(verdicts, VERDICTS))
        for row in {row["response_key"]: row for row in rows if row["response_key"] not in known}.values():
            stray = stray or row["place"]
            counts["other texts" if row["prompt_id"] in prompts else "other prompts"] += 1
        given.tick(shard + 1, given.num_shards, "")
    missing = {rubric.name: statuses[f"{rubric.name}.missing"] for rubric in settings.rubrics}
    warnings = list(_unmatched(counts, missing, settings.source, stray))
    if counts["candidates"] and counts["without a row"] == counts["candidates"]:
        raise BadInput(
            f"no candidate has a row in judge.source: {'; '.join(warnings)}. A row belongs to a candidate of the same "
            "prompt and response; to use the responses of the file, name it in candidates.source too"
        )
    given.log(", ".join(f"{name.replace('.', ' ')} {count:,}" for name, count in sorted(statuses.items())))
    return {"counts": {**dict(sorted(statuses.items())), "unmatched": dict(counts)}, "warnings": warnings}


def _said(candidate: Mapping[str, Any], judge: str, cell: Mapping[str, Any] | None) -> dict[str, Any]:
    """The verdict on a candidate from the cell of its text."""
    ids = {"candidate_id": candidate["candidate_id"], "prompt_id": candidate["prompt_id"], "judge": judge}
    if status := unanswered(candidate):
        return {**ids, "parse_status": status}
    if cell is None:
        return {**ids, "parse_status": "missing"}
    return {**ids, **{name: cell[name] for name in ("score", "parse_status", "raw")}, "reason": cell["reason"]}


def _unmatched(counts: Mapping[str, int], missing: Mapping[str, int], source: str, stray: str) -> Iterator[str]:
    """What has no counterpart, for the end of the run."""
    if lost := counts["without a row"]:
        yield f"{lost:,} of {counts['candidates']:,} candidates have no verdict in {source}"
    if fewer := {judge: count - lost for judge, count in missing.items() if count > lost}:
        judges = ", ".join(f"{judge} {count:,}" for judge, count in fewer.items())
        yield f"other candidates lack the verdict of one judge in {source}: {judges}; the gate leaves them out"
    if strays := counts["other prompts"] + counts["other texts"]:
        yield (
            f"{strays:,} responses in {source} are no candidates ({counts['other prompts']:,} of other prompts, "
            f"{counts['other texts']:,} other texts of the run's prompts); the first is at {stray}"
        )
