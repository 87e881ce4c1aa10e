"""Which part of a judge's prompt comes first: what the calls about one response share, or the rubric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_pipeline.agents.judges import Rubric
from ray_pipeline.agents.templates import ANY_FENCE, RoleTemplate, best_layout, part_lengths, transcript
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.answers import answers_of
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.stage import Stage, WholeInput, WholeWork
from ray_pipeline.store.keys import digest

#: Candidates whose lengths decide the layout: those of the smallest ids, so that more prompts hardly change it.
_LAYOUT_SAMPLE = 256


class _Layout(Settings):
    answers: tuple[str, ...]
    rubrics: tuple[Rubric, ...]
    template: RoleTemplate
    weights: dict[str, str]


def layout_stage(name: str, group: str, judging: Settings, model: ModelSettings, inputs: Mapping[str, Stage]) -> Stage:
    """The stage that chooses for one judge model; `judging` has the rubrics and the template."""
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
            rubric="\n".join([x.text, *(item.text for item in x.items)]) if x.items else x.text,
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
