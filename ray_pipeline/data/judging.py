"""Judges: every rubric judge scores every candidate, all judgements of a candidate together on one replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import Asking, Rubric, SamplingSettings, Verdict, judge
from ray_pipeline.agents.templates import ANY_FENCE, Layout, RoleTemplate, best_layout, part_lengths, transcript
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, Stage, WholeInput, WholeWork
from ray_pipeline.store.files import StoreError
from ray_pipeline.store.keys import digest
from ray_pipeline.store.schemas import READ_STATUSES, VERDICTS, to_table
from ray_pipeline.store.settings import Settings

#: Candidates whose lengths decide the layout; a sample of the smallest ids, so that more prompts hardly change it.
_LAYOUT_SAMPLE = 256


class JudgeSettings(Settings):
    """The `judge` block."""

    model: str = Field("judge", description="a key of `models`, for rubrics that name none")
    rubrics: tuple[Rubric, ...]
    layout: Literal["auto", "shared_first", "rubric_first"] = "auto"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=512)
    asking: Asking = Asking()

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        """A rubric that sets one key of `sampling` keeps the stage's others."""
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
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two judges have the same name: {', '.join(twice)}")
        scales = sorted({(r.low, r.high) for r in self.rubrics})
        if len(scales) > 1:
            shown = " and ".join(f"{low} to {high}" for low, high in scales)
            raise ValueError(f"judges score on different scales ({shown}), but the gate averages them; choose one")
        return self

    @property
    def names(self) -> list[str]:
        return [r.name for r in self.rubrics]

    def on_model(self, key: str) -> tuple[Rubric, ...]:
        """The rubrics that sit on a model."""
        return tuple(r for r in self.rubrics if (r.model or self.model) == key)

    @property
    def models(self) -> list[str]:
        """Keys of the models that judge, in the order in which rubrics name them."""
        return list(dict.fromkeys(r.model or self.model for r in self.rubrics))


def _over(shared: Mapping[str, Any], rubric: Any) -> Any:
    if not isinstance(rubric, Mapping) or not isinstance(rubric.get("sampling"), Mapping):
        return rubric
    return {**rubric, "sampling": {**shared, **rubric["sampling"]}}


class _Given(Settings):
    """What the shard function needs. `answers` are the input roles whose rows are judged."""

    answers: tuple[str, ...]
    rubrics: tuple[Rubric, ...]
    template: RoleTemplate
    layout: Layout | None
    sampling: SamplingSettings
    asking: Asking


def judges(
    settings: JudgeSettings,
    failure: FailureSettings,
    models: Mapping[str, ModelSettings],
    template: RoleTemplate,
    prompts: Stage,
    answers: Mapping[str, Stage],
    name: str = "judge",
    group: str = "",
) -> list[Stage]:
    """One stage a model that judges sit on; each writes the verdicts of its own judges.

    Args:
        answers: role → stage of candidates or responses; all of their rows are judged.
    """
    stages = []
    for key in settings.models:
        model, rubrics = models[key], settings.on_model(key)
        one = len(settings.models) == 1
        inputs = {"prompts": prompts, **answers}
        if settings.layout == "auto":
            inputs["layout"] = _layout(
                name if one else f"{name}-{key}", group or name, tuple(answers), rubrics, model, template, inputs
            )
        given = _Given(
            answers=tuple(answers),
            rubrics=rubrics,
            template=template,
            layout=None if settings.layout == "auto" else settings.layout,
            sampling=settings.sampling,
            asking=settings.asking,
        )
        stages.append(
            llm_stage(
                name if one else f"{name}-{key}",
                judge_shard,
                ("verdicts",),
                given,
                model,
                failure,
                inputs,
                group=group or name,
            )
        )
    return stages


async def judge_shard(given: ShardInput) -> ShardOutput:
    """The verdicts of one shard, ordered by candidate and judge."""
    settings: _Given = given.settings
    messages = {row["prompt_id"]: row["messages"] for row in given.tables["prompts"].to_pylist()}
    answers = [answer for role in settings.answers for answer in answers_of(given.tables[role].to_pylist())]
    layout: Layout = settings.layout or given.facts["layout"]["layout"]
    rows = await all_of(
        _judge_one(given, settings, layout, answer, messages[answer["prompt_id"]], rubric)
        for answer in answers
        for rubric in settings.rubrics
    )
    counts: dict[str, int] = {}
    for row in rows:
        key = f"{row['judge']}.{row['parse_status']}"
        counts[key] = counts.get(key, 0) + 1
    return ShardOutput({"verdicts": to_table(rows, VERDICTS)}, counts)


def answers_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Candidates or evaluation responses as the answers to judge: id, prompt_id, response, finish_reason."""
    return [
        {
            "id": row.get("candidate_id") or row["response_id"],
            "prompt_id": row["prompt_id"],
            "response": row["response"],
            "finish_reason": row["finish_reason"],
        }
        for row in rows
    ]


def unanswered(answer: Mapping[str, Any]) -> str | None:
    """Why there is nothing to judge (the parse status that says so), or None when there is an answer."""
    if answer["response"] is not None:
        return None
    return "too_long" if answer["finish_reason"] == "too_long" else "error"


async def _judge_one(
    given: ShardInput,
    settings: _Given,
    layout: Layout,
    answer: Mapping[str, Any],
    messages: list[dict[str, str]],
    rubric: Rubric,
) -> dict[str, Any]:
    assert given.engine is not None
    status = unanswered(answer)
    if status is not None:
        verdict = Verdict(None, None, None, status, None)
    else:
        engine = given.engine.bound(answer["prompt_id"], f"judge/{rubric.name}")
        verdict = await judge(
            engine, messages, answer["response"], rubric, settings.template, settings.sampling, settings.asking, layout
        )
        if verdict.parse_status != "too_long":
            given.watch(f"judge {rubric.name}", verdict.parse_status in READ_STATUSES)
    given.tick(1)
    return {
        "candidate_id": answer["id"],
        "prompt_id": answer["prompt_id"],
        "judge": rubric.name,
        "score": verdict.score,
        "expected_score": verdict.expected_score,
        "reason": verdict.reason,
        "parse_status": verdict.parse_status,
        "raw": verdict.raw,
    }


# --- which part of a judge's prompt comes first -----------------------------------------------------------------------


class _LayoutGiven(Settings):
    answers: tuple[str, ...]
    rubrics: tuple[Rubric, ...]
    template: RoleTemplate
    weights: dict[str, str]


def _layout(
    name: str,
    group: str,
    answers: tuple[str, ...],
    rubrics: tuple[Rubric, ...],
    model: ModelSettings,
    template: RoleTemplate,
    inputs: Mapping[str, Stage],
) -> Stage:
    given = _LayoutGiven(answers=answers, rubrics=rubrics, template=template, weights=model.weights())
    return Stage(
        name=f"{name}-layout",
        group=group,
        work=WholeWork(function=choose_layout, settings=given),
        config=given.decisive(),
        inputs=dict(inputs),
    )


def choose_layout(given: WholeInput) -> dict[str, Any]:
    """Choose the layout once for the whole stage, from mean lengths over a sample of candidates.

    The choice is kept beside the call log: another judge or more prompts must still find the calls that were made
    under it, even where the rule would now choose the other one.
    """
    settings: _LayoutGiven = given.settings
    name = f"layout-{digest([settings.template.model_dump(mode='json'), settings.weights], size=8)}.json"
    try:
        return {**given.calls_root.read_json(name), "chosen": "before"}
    except (FileNotFoundError, StoreError):
        pass
    sample = []
    prompts = given.inputs["prompts"].table()
    for shard in range(given.num_shards):
        messages = {row["prompt_id"]: row["messages"] for row in prompts.read(shard).to_pylist()}
        for role in settings.answers:
            for answer in answers_of(given.inputs[role].table().read(shard).to_pylist()):
                if answer["response"] is not None:
                    sample.append((answer["id"], transcript(messages[answer["prompt_id"]]), answer["response"]))
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
