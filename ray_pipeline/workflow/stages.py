"""Stages that several workflows share: rounds, and the policy with its evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ray_pipeline.data.datasets import Judged
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.judging import judges as judge_stages
from ray_pipeline.data.prompt_parts import prompt_part
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.evaluate.early_stop import decision_stage
from ray_pipeline.graph.resume import stage_folder, stored
from ray_pipeline.graph.stage import Stage
from ray_pipeline.policy.comparisons import comparisons as comparisons_stage
from ray_pipeline.policy.comparisons import responses as responses_stage
from ray_pipeline.policy.train import train as train_stage
from ray_pipeline.training.spec import Reference
from ray_pipeline.workflow.rounds import RoundsConfig
from ray_pipeline.workflow.training import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Start:
    """What a round starts from.

    Attributes:
        number: of the round, from 1.
        prompts: all of the run, and `asked`, those of the round.
        policy: who answers, made by the stage `train`; None in the first round, where the base does.
        earlier: the rounds whose rows are used, too.
    """

    number: int
    prompts: Stage
    asked: Stage
    policy: ModelSettings | None = None
    train: Stage | None = None
    earlier: Sequence[Judged] = ()

    @property
    def ending(self) -> str:
        return ending_of(self.number)


class Curated(NamedTuple):
    """A round up to its datasets; `stages` are all of it that a report or a user looks for, in order."""

    judged: Judged
    stages: Sequence[Stage]
    datasets: Stage


@dataclasses.dataclass(frozen=True)
class _Round:
    """One round.

    Attributes:
        stages: its own, each after those that it reads.
        policy: the stage that trains; None where nothing is trained.
        base: responses of the base to the held-out prompts, which all rounds share.
        decision: whether the next round is made; None where no round stops the run.
    """

    judged: Judged
    stages: Sequence[Stage]
    policy: Stage | None = None
    base: Stage | None = None
    decision: Stage | None = None


def ending_of(number: int) -> str:
    """What the names of a round's stages and of its policy end with; the first has the names of a run without rounds,
    which it continues."""
    return "" if number == 1 else f"-{number}"


def in_rounds(
    config: RoundsConfig,
    run_folder: str,
    prompts: Stage,
    curate: Callable[[Start], Curated],
    judge: JudgeSettings | None,
    *,
    beside: Sequence[Stage] = (),
    more: Callable[[Stage], list[Stage]] | None = None,
) -> list[Stage]:
    """All stages of a workflow but its report: the prompts, then every round from the candidates to the evaluation of
    its policy. The first round is the whole of a run without rounds.

    Args:
        curate: the workflow's own part of a round, up to the datasets.
        judge: rubric judges of the responses to held-out prompts; None: none.
        beside: stages of no round, which come after the first datasets.
        more: see `trained`; for the last round.
    """
    rounds, made = config.rounds, list[_Round]()
    for number in config.numbers:
        start = _start(config, run_folder, prompts, made)
        judged, stages, datasets = curate(start)
        one = _Round(judged, [*stages, *([] if made else beside)])
        if config.train is not None:
            train = config.train if rounds is None else rounds.training(config.train, number)
            after = trained(
                config.model_copy(update={"train": train}),
                run_folder,
                prompts,
                datasets,
                judge,
                more if number == config.numbers[-1] else None,
                ending=start.ending,
                start=start.train if rounds is not None and rounds.continues else None,
                reference=rounds.reference if rounds is not None and made else "base",
                base=made[0].base if made else None,
            )
            named = {stage.name: stage for stage in after}
            decision = None
            if rounds is not None and rounds.stop is not None and rounds.n > 1:
                before = made[-1].decision if made else None
                decision = decision_stage(rounds.stop, config.evaluate, number, [prompts, *after], before)
                after.append(decision)
            policy, base = named.get(f"train{start.ending}"), named.get("responses-base")
            one = _Round(judged, [*one.stages, *after], policy, base, decision)
        made.append(one)
    return [prompts, *made[0].stages] if len(made) == 1 else _numbered(prompts, beside, made)


def _start(config: RoundsConfig, run_folder: str, prompts: Stage, before: Sequence[_Round]) -> Start:
    rounds, number = config.rounds, len(before) + 1
    asked = prompts
    if rounds is not None and rounds.splits:
        asked = prompt_part(prompts, (number - 1) % rounds.parts, rounds.parts, f"prompts-{number}")
    if rounds is None or not before:
        return Start(number, prompts, asked)
    train = before[-1].policy
    assert train is not None and config.train is not None
    policy = config.base.trained(stage_folder(run_folder, train).location, config.train.save)
    return Start(number, prompts, asked, policy, train, [one.judged for one in rounds.pooled(before)])


def _numbered(prompts: Stage, beside: Sequence[Stage], rounds: Sequence[_Round]) -> list[Stage]:
    """The stages of all rounds with their number, and from round 2 on in groups of their own (`train-2`). Neither is in
    a fingerprint. The prompts, stages beside the rounds, and what the base responds are of no round."""
    made: dict[Stage, Stage] = {}

    def make(stage: Stage, number: int) -> Stage:
        if stage not in made:  # parents of an earlier round, or of none, are there already
            inputs = {role: make(parent, number) for role, parent in stage.inputs.items()}
            ending = ending_of(number)
            group = f"{stage.group_name.removesuffix(ending)}{ending}" if number else stage.group
            made[stage] = dataclasses.replace(stage, inputs=inputs, group=group, round=number)
        return made[stage]

    stages = [make(prompts, 0)]
    for stage in (*beside, *(one.base for one in rounds if one.base is not None)):
        make(stage, 0)
    stages += [make(stage, number) for number, one in enumerate(rounds, 1) for stage in one.stages]
    return list(dict.fromkeys(stages))


def trained(
    config: TrainingConfig,
    run_folder: str,
    prompts: Stage,
    datasets: Stage,
    judge: JudgeSettings | None,
    more: Callable[[Stage], list[Stage]] | None = None,
    *,
    ending: str = "",
    start: Stage | None = None,
    reference: Reference = "base",
    base: Stage | None = None,
) -> list[Stage]:
    """The policy, and responses of base and policy to held-out prompts; one judge compares them in both orders, rubric
    judges score. With `evaluate.skip_generation`, as they are stored. A reward model alone: held-out pairs measure it.

    Args:
        more: further stages, by that of the policy.
        ending: of the stages' names and of the policy's name in tables.
        start, reference: see `policy.train`.
        base: the base's responses, if they are there.
    """
    assert config.train is not None
    texts, models = config.templates(), config.models
    if not config.trains_policy:
        return [train_stage(config.train, config.base, config.datasets.max_length, datasets, view="reward_model")]
    policy = train_stage(
        config.train,
        config.base,
        config.datasets.max_length,
        datasets,
        name=f"train{ending}",
        start=start,
        reference=reference,
    )
    after_training = config.base.trained(stage_folder(run_folder, policy).location, config.train.save)
    label = f"policy{ending}"
    responses = {"base": base or responses_stage("base", config.evaluate, config.base, prompts)}
    responses[label] = responses_stage(label, config.evaluate, after_training, prompts, policy)
    compared = comparisons_stage(
        config.evaluate,
        models[config.evaluate.judge],
        texts.pairwise,
        prompts,
        responses["base"],
        {label: responses[label]},
        f"comparisons{ending}",
    )
    stages = [policy, *responses.values(), compared]
    if judge is not None:
        stages += judge_stages(
            judge,
            models,
            texts,
            prompts,
            responses,
            f"score-responses{ending}",
            "evaluate",
            "response verdicts",
        )
    stages += [] if more is None else more(policy)
    return stored(stages, run_folder, config.num_shards) if config.evaluate.skip_generation else stages
