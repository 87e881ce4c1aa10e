"""Critic: one process critique per candidate, stating whether the way to the answer is flawed and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import Critique, JudgeAsking, SamplingSettings, columns_of, critique
from ray_pipeline.agents.templates import Layout, RoleTemplate
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.answers import Answer, answers_of
from ray_pipeline.data.early_exit import SKIPPED, ExitRule, outside_slice
from ray_pipeline.data.judging import by_role
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, ShardTables, count_by, reply_status
from ray_pipeline.graph.stage import Stage
from ray_pipeline.store.schemas import CRITIQUES


class CriticSettings(Settings):
    """The `critic` block: how the process critic judges."""

    model: str = Field("judge", description="a key of `models`")
    layout: Layout = Field("rubric_first", description="one call per candidate: only its own texts can be shared")
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=512)
    asking: JudgeAsking = JudgeAsking()

    @model_validator(mode="after")
    def _no_score(self) -> CriticSettings:
        if self.asking.expected_score:
            raise ValueError("critic.asking.expected_score has no effect: a critic gives no score; remove it")
        return self


class _Critic(Settings):
    template: RoleTemplate
    layout: Layout
    sampling: SamplingSettings
    asking: JudgeAsking
    exit_rule: ExitRule | None = None


class _Item(NamedTuple):
    """`settled`: the judges' verdicts leave nothing to the critic."""

    prompt_id: str
    answer: Answer
    settled: bool


def _candidates(shard: ShardTables, settings: _Critic) -> list[_Item]:
    candidates, rule = shard.tables["candidates"], settings.exit_rule
    known = {} if rule is None else outside_slice(candidates, shard.under("verdicts/"))
    return [
        _Item(answer.prompt_id, answer, rule is not None and answer.id in known and rule.settled(known[answer.id]))
        for answer in answers_of(shard.tables["prompts"], candidates)
    ]


async def _critique(engine: ChatEngine, settings: _Critic, item: _Item) -> Outcome:
    answer = item.answer
    ids = {"candidate_id": answer.id, "prompt_id": answer.prompt_id}
    if answer.missing is not None:
        return Outcome({"critiques": [{**ids, "parse_status": answer.missing}]})
    if item.settled:
        result = Critique(None, None, None, SKIPPED, None)
    else:
        result = await critique(
            engine,
            answer.messages,
            answer.response,
            settings.template,
            settings.sampling,
            settings.asking,
            settings.layout,
        )
    return Outcome({"critiques": [{**ids, **columns_of(result)}]}, reply_status("the critic", result.parse_status))


CRITIC = Asking(
    tables={"critiques": CRITIQUES},
    items=_candidates,
    ask=_critique,
    role="critic",
    counts=count_by("critiques", "parse_status"),
)


def critic(
    settings: CriticSettings,
    model: ModelSettings,
    template: RoleTemplate,
    prompts: Stage,
    candidates: Stage,
    verdicts: Sequence[Stage] = (),
    exit_rule: ExitRule | None = None,
    name: str = "critic",
) -> Stage:
    """One critique per candidate, ordered by candidate.

    Args:
        verdicts: stages of the judges; they are read with `exit_rule` alone.
        exit_rule: when a candidate needs no critique.
    """
    inputs = {"prompts": prompts, "candidates": candidates, **(by_role(verdicts) if exit_rule is not None else {})}
    return CRITIC.stage(name, _Critic.part_of(settings, template=template, exit_rule=exit_rule), model, inputs)
