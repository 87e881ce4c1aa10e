"""Fellowship: generator and reviewers improve answers, a judge picks the best, and the policy learns from the pick.

prompts → generate-1 → review-1 → generate-2 → … → generate-N → judge → select → data sets → train → evaluate

The second kind of data (`improve`): of several reviews and revisions, those that the judge says helped.

prompts → responses → reviews → revisions → judge ─┬→ revisions given the feedback → data sets
                                                  └→ reviews ────────────────────→ data sets
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ray_pipeline.data.columnar import dataset_files, dataset_rows, prompts
from ray_pipeline.data.judging import judges
from ray_pipeline.evaluate.stage import evaluate
from ray_pipeline.feedback.improve import branch_stages
from ray_pipeline.feedback.improvement_rows import improvement_rows
from ray_pipeline.feedback.loop import feedback_stages
from ray_pipeline.feedback.page import LoopPage, loop_page
from ray_pipeline.feedback.select import ranks, select
from ray_pipeline.fellowship_config import FellowshipConfig
from ray_pipeline.graph.run import stage_folder, stored
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.comparisons import comparisons, responses
from ray_pipeline.policy.train import train


def fellowship(config: FellowshipConfig, run_folder: str) -> Dag:
    """The whole method as a DAG; `run_folder` is where the policy will lie for its own evaluation."""
    base, limits = config.models[config.train.model], config.datasets
    every = config.select.pairs == "every_rejected"

    asked = prompts(config.prompts)
    answers, made, reviews = feedback_stages(config.loop, config.models, asked)
    verdicts = _judged(config, asked, {"candidates": answers}, "judge")
    decisions = select(config.judges, answers, verdicts, config.select.jury)
    rows = dataset_rows(limits, config.judges, base, asked, answers, verdicts, decisions, every_rejected=every)
    data = dataset_files(limits, None, config.judges, rows, origin=config.origin())
    page = loop_page(
        LoopPage(run_name=config.run.name, reviewers=tuple(config.loop.names)), asked, answers, reviews, decisions
    )
    curated = [asked, answers, *verdicts, decisions, data]
    policy = train(config.train, base, limits.max_length, data)
    trained = [policy, *_both_answer(config, run_folder, asked, policy)]
    if config.evaluate.skip_generation:
        trained = stored(trained, run_folder, config.num_shards)
    report = evaluate(config.evaluate, config.report(), base, limits.max_length, [*curated, *trained])
    improved = [] if config.improve is None else _improvement(config, asked)
    return Dag("fellowship", [*made, *curated, page, *improved, *trained, report])


def _judged(config: FellowshipConfig, asked: Stage, answers: Mapping[str, Stage], name: str) -> list[Stage]:
    """Verdicts on all answers, by the strategy or the debate of `select`, or by the rubric judges."""
    if config.select.compares:
        return ranks(config.select, config.models, asked, answers, name)
    assert config.judge is not None
    return judges(config.judge, config.models, config.templates().judge, asked, answers, name)


def _improvement(config: FellowshipConfig, asked: Stage) -> list[Stage]:
    """Data sets over revisions given the feedback, and over reviews."""
    settings, loop, models = config.improve, config.loop, config.models
    assert settings is not None
    own = asked
    if settings.prompts is not None:
        own = dataclasses.replace(prompts(settings.prompts), name="improve-prompts", group="improve-prompts")
    # The loop's own first responses, asked of these prompts: equal calls are made once.
    _, (first,), _ = feedback_stages(loop.model_copy(update={"responses": 1}), models, own)
    first = dataclasses.replace(first, name="improve-generate")
    branches = branch_stages(settings, loop, models, own, first)
    answers = {"responses": branches.responses, "revisions": branches.revisions}
    verdicts = _judged(config, own, answers, "improve-judge")
    every = config.select.pairs == "every_rejected"
    made = []
    for what, key, origin in (
        ("revisions", loop.generator, "Revisions given the feedback"),
        ("reviews", loop.reviewers[0].model, "Reviews by what their revisions scored"),
    ):
        rows = improvement_rows(
            what, config.datasets, config.judges, config.select.jury, every, loop, models[key], own, branches, verdicts
        )
        made.append(
            dataclasses.replace(
                dataset_files(
                    config.datasets,
                    None,
                    config.judges,
                    rows,
                    name=f"datasets-{what}",
                    view=f"datasets-{what}",
                    origin=config.origin(origin),
                ),
                group="improve",
            )
        )
    return made


def _both_answer(config: FellowshipConfig, run_folder: str, asked: Stage, policy: Stage) -> list[Stage]:
    """Base and policy answer the held-out prompts; a judge compares them in both orders, rubric judges score both."""
    texts, models, base = config.templates(), config.models, config.models[config.train.model]
    trained = base.trained((stage_folder(run_folder, policy) / "merged").location)
    before = responses("base", config.evaluate, base, asked)
    after = responses("policy", config.evaluate, trained, asked, policy)
    compared = comparisons(
        config.evaluate, models[config.evaluate.judge], texts.pairwise, asked, before, {"policy": after}
    )
    both = {"base": before, "policy": after}
    scored = (
        []
        if config.judge is None
        else judges(config.judge, models, texts.judge, asked, both, "score-responses", "evaluate")
    )
    return [before, after, compared, *scored]
