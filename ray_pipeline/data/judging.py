"""Judges: every rubric judge scores every candidate; all judgements of a candidate run together on one replica."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, model_validator

from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings, judge
from ray_pipeline.agents.templates import ANY_FENCE, Layout, RoleTemplate, best_layout, part_lengths, transcript
from ray_pipeline.config.settings import Settings, refuse_repeated
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, ShardTables, count_by, reply_status
from ray_pipeline.graph.stage import Stage, WholeInput, WholeWork
from ray_pipeline.store.keys import digest
from ray_pipeline.store.schemas import VERDICTS

#: Candidates whose lengths decide the layout: those of the smallest ids, so that more prompts hardly change it.
_LAYOUT_SAMPLE = 256


class JudgeSettings(Settings):
    """The `judge` block: the rubric judges and their calls."""

    model: str = Field("judge", description="a key of `models`, for rubrics that name no model")
    rubrics: tuple[Rubric, ...] = Field(description="the judges: name, text and scale of each")
    layout: Literal["auto", "shared_first", "rubric_first"] = Field(
        "auto",
        description="which part of the prompt comes first: what the calls about one response share, or the rubric",
    )
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=512)
    asking: JudgeAsking = JudgeAsking()

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
        names = [r.name for r in self.rubrics]
        if not names:
            raise ValueError("judge.rubrics is empty; a consensus needs at least one judge")
        refuse_repeated(names, "judges")
        scales = sorted({(r.low, r.high) for r in self.rubrics})
        if len(scales) > 1:
            shown = " and ".join(f"{low} to {high}" for low, high in scales)
            raise ValueError(f"judges score on different scales ({shown}), but the gate averages them; choose one")
        return self

    @property
    def names(self) -> list[str]:
        return [r.name for r in self.rubrics]

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


class Answer(NamedTuple):
    """A candidate, or a response of an evaluated model, as the answer to judge.

    Attributes:
        missing: why there is no answer, as a parse status; `response` is "" then.
    """

    prompt_id: str
    id: str
    messages: list[Message]
    response: str
    missing: str | None


def answers_of(prompts: pa.Table, *tables: pa.Table) -> list[Answer]:
    """Rows of candidates or evaluation responses, joined to their prompts by id; table after table."""
    messages = {row["prompt_id"]: row["messages"] for row in prompts.to_pylist()}
    return [
        Answer(
            row["prompt_id"],
            row.get("candidate_id") or row["response_id"],
            messages[row["prompt_id"]],
            row["response"] or "",
            unanswered(row),
        )
        for table in tables
        for row in table.to_pylist()
    ]


def unanswered(row: Mapping[str, Any]) -> str | None:
    """Why a row of candidates or responses holds no answer, as a parse status; None when it holds one."""
    if row["response"] is not None:
        return None
    return "too_long" if row["finish_reason"] == "too_long" else "error"


class _Judging(Settings):
    """What the verdicts depend on. `answers` are the input roles whose rows are judged."""

    answers: tuple[str, ...]
    rubrics: tuple[Rubric, ...]
    template: RoleTemplate
    layout: Layout | None
    sampling: SamplingSettings
    asking: JudgeAsking


class _Judgement(NamedTuple):
    prompt_id: str
    answer: Answer
    rubric: Rubric
    layout: Layout


def _judgements(shard: ShardTables, settings: _Judging) -> list[_Judgement]:
    """All judgements of an answer follow each other, so that they can share its part of the prompt."""
    layout: Layout = settings.layout or shard.facts["layout"]["layout"]
    answers = answers_of(shard.tables["prompts"], *(shard.tables[role] for role in settings.answers))
    return [_Judgement(answer.prompt_id, answer, rubric, layout) for answer in answers for rubric in settings.rubrics]


async def _judge(engine: ChatEngine, settings: _Judging, item: _Judgement) -> Outcome:
    answer, rubric = item.answer, item.rubric
    ids = {"candidate_id": answer.id, "prompt_id": answer.prompt_id, "judge": rubric.name}
    if answer.missing is not None:
        return Outcome({"verdicts": [{**ids, "parse_status": answer.missing}]})
    verdict = await judge(
        engine,
        answer.messages,
        answer.response,
        rubric,
        settings.template,
        settings.sampling,
        settings.asking,
        item.layout,
    )
    return Outcome({"verdicts": [{**ids, **vars(verdict)}]}, reply_status(f"judge {rubric.name}", verdict.parse_status))


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
    template: RoleTemplate,
    prompts: Stage,
    answers: Mapping[str, Stage],
    name: str = "judge",
    group: str = "",
    holds: str = "",
) -> list[Stage]:
    """One stage per judge model, each with the verdicts of its own judges, ordered by candidate and judge.

    Args:
        answers: stages of candidates or responses by role; all of their rows are judged.
        holds: role of the verdicts, see `Stage.role`.
    """
    stages = []
    for key in settings.models:
        own, inputs = name if len(settings.models) == 1 else f"{name}-{key}", {"prompts": prompts, **answers}
        judging = _Judging.part_of(
            settings,
            answers=tuple(answers),
            rubrics=settings.on_model(key),
            template=template,
            layout=None if settings.layout == "auto" else settings.layout,
        )
        if judging.layout is None:
            inputs["layout"] = _layout(f"{own}-layout", group or name, judging, models[key], inputs)
        stages.append(JUDGES.stage(own, judging, models[key], inputs, group=group or name, holds=holds))
    return stages


# --- which part of a judge's prompt comes first -----------------------------------------------------------------------


class _Layout(Settings):
    answers: tuple[str, ...]
    rubrics: tuple[Rubric, ...]
    template: RoleTemplate
    weights: dict[str, str]


def _layout(name: str, group: str, judging: _Judging, model: ModelSettings, inputs: Mapping[str, Stage]) -> Stage:
    settings = _Layout.part_of(judging, weights=model.weights())
    return Stage(
        name=name,
        group=group,
        work=WholeWork(function=choose_layout, settings=settings),
        config=settings.decisive(),
        inputs=dict(inputs),
    )


def choose_layout(given: WholeInput) -> dict[str, Any]:
    """Choose the layout once for the whole stage, from mean lengths over a sample of candidates.

    The choice is kept beside the call log: another judge or more prompts must still find the calls that were made
    under it, even where the rule would now choose the other one.
    """
    settings: _Layout = given.settings
    name = f"layout-{digest([settings.template.model_dump(mode='json'), settings.weights], size=8)}.json"
    if before := given.calls_root.load(name, dict, given.log):
        return {**before, "chosen": "before"}
    sample = []
    prompts = given.inputs["prompts"].table()
    for shard in range(given.num_shards):
        tables = [given.inputs[role].table().read(shard) for role in settings.answers]
        for answer in answers_of(prompts.read(shard), *tables):
            if answer.missing is None:
                sample.append((answer.id, transcript(answer.messages), answer.response))
        sample = sorted(sample)[:_LAYOUT_SAMPLE]
    lengths = [
        part_lengths(
            settings.template,
            instruction=p,
            response=r,
            fence=ANY_FENCE,
            name=x.name,
            rubric=x.text,
            low=x.low,
            high=x.high,
        )
        for _, p, r in sample
        for x in settings.rubrics
    ]
    shared = sum(length[0] for length in lengths) / max(len(lengths), 1)
    rubric = sum(length[1] for length in lengths) / max(len(lengths), 1)
    facts = {
        "layout": best_layout(shared, rubric, len(settings.rubrics)),
        "shared_chars": round(shared, 1),
        "rubric_chars": round(rubric, 1),
    }
    given.calls_root.write_json(name, facts)
    return {**facts, "chosen": "now"}
