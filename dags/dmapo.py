"""DMAPO: three judges, a process critic and a confidence gate make the data; KTO aligns the policy with it.

prompts → candidates → judges ─┐
                    └→ critic ─┴→ gate → datasets → train (→ public benchmarks) → evaluate

With `rounds`, the policy answers the prompts of the next round, from candidates on, and is trained on.

With `train: null` only the data is made, and the report is about it: … → gate → datasets → report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ray_pipeline.audit.run import Audit, audit_gated
from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config.starters import Starter
from ray_pipeline.data.candidates import candidates as candidates_stage
from ray_pipeline.data.candidates import drawn
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.critic import critic as critic_stage
from ray_pipeline.data.datasets import Judged
from ray_pipeline.data.early_exit import ExitRule
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.judging import judges as judge_stages
from ray_pipeline.data.prompt_parts import prompt_part
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.evaluate.early_stop import decision_stage
from ray_pipeline.evaluate.stage import write_report
from ray_pipeline.extensions import register
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder, stored
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.comparisons import comparisons as comparisons_stage
from ray_pipeline.policy.comparisons import responses as responses_stage
from ray_pipeline.policy.train import train as train_stage
from ray_pipeline.training.spec import Reference
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from ray_pipeline.workflow.registry import Workflow
from ray_pipeline.workflow.rounds import Round, ending_of, numbered
from ray_pipeline.workflow.training import TrainingConfig


def dmapo(config: DmapoConfig, run_folder: str) -> Dag:
    """The whole method as a DAG; the evaluation loads the policy from `run_folder`."""
    prompts = prompts_stage(config.prompt_settings)
    rounds: list[Round] = []
    for number in config.numbers:
        rounds.append(_round(config, run_folder, number, prompts, rounds))
    if len(rounds) > 1:
        stages = numbered([prompts], rounds)
    else:
        stages = [prompts, *rounds[0].stages]
    return Dag("dmapo", [*stages, config.report_stage(stages)])


def _round(config: DmapoConfig, run_folder: str, number: int, prompts: Stage, before: Sequence[Round]) -> Round:
    """From the candidates to the evaluation of a policy. The first is the whole of a run without rounds."""
    texts, models, rounds, ending = config.templates(), config.models, config.rounds, ending_of(number)
    asked, train = prompts, before[-1].policy if before else None
    if rounds is not None and rounds.splits:
        asked = prompt_part(prompts, (number - 1) % rounds.parts, rounds.parts, f"prompts-{number}")
    if train is not None:
        assert config.train is not None
        model = config.base.trained(stage_folder(run_folder, train).location, config.train.save)
        candidates = drawn(config.candidates, model, asked, f"candidates{ending}", train)
    else:
        candidates = candidates_stage(config.candidates, models, asked, config.prompts.decontaminate)
    rule, judge = config.exit_rule, f"judge{ending}"
    verdicts = judge_stages(config.judge, models, texts, asked, {"candidates": candidates}, judge, exit_rule=rule)
    critiques = None
    if config.gate.use_critic:
        assert config.critic is not None
        critiques = critic_stage(
            config.critic,
            models[config.critic.model],
            texts.critic,
            asked,
            candidates,
            verdicts,
            rule if isinstance(rule, ExitRule) else None,
            f"critic{ending}",
        )
    dataset = scored(config)[number - 1]
    decisions = dataset.decide(candidates, verdicts, critiques)
    judged = Judged(candidates, verdicts, decisions)
    pooled = [] if rounds is None else rounds.pooled(before)
    _, datasets = dataset.write(prompts, *judged, earlier=[one.judged for one in pooled])
    stages = [candidates, *verdicts, *([critiques] if critiques else []), decisions, datasets]
    if config.train is None:
        return Round(number, judged, stages, None, None)
    after = trained(
        config if rounds is None else config.model_copy(update={"train": rounds.training(config.train, number)}),
        run_folder,
        prompts,
        datasets,
        config.judge.live,
        functools.partial(_benchmarks, config, run_folder) if number == config.numbers[-1] else None,
        ending=ending,
        start=train if rounds is not None and rounds.continues else None,
        reference=rounds.reference if rounds is not None and before else "base",
        base=before[0].base if before else None,
    )
    decision = None
    if rounds is not None and rounds.stop is not None and rounds.n > 1:
        earlier = before[-1].decision if before else None
        decision = decision_stage(rounds.stop, config.evaluate, number, [prompts, *after], earlier)
        after.append(decision)
    named = {stage.name: stage for stage in after}
    trains, base = named.get(f"train{ending}"), named.get("responses-base")
    return Round(number, judged, [*stages, *after], trains, base, decision)


def scored(config: DmapoConfig) -> list[ScoredDataset]:
    """The datasets that the gate makes, one each round."""
    humans = config.human_labels
    if humans is not None and humans.use == "report":
        humans = None
    return [
        ScoredDataset(
            config.judge.names,
            config.gate,
            config.counting,
            {f"datasets{ending}": config.datasets},
            decisions=f"gate{ending}",
            rows=f"dataset-rows{ending}",
            view="datasets",
            origin=Provenance.of(config),
            humans=humans,
            trained_on=config.train is not None,
            exit_rule=config.exit_rule,
            scale=config.judge.scale,
        )
        for ending in map(ending_of, config.numbers)
    ]


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


def _benchmarks(config: DmapoConfig, run_folder: str, policy: Stage) -> list[Stage]:
    """Base and policy on public benchmarks, if the configuration has any."""
    if config.benchmarks is None:
        return []
    assert config.train is not None
    trained = config.base.trained(stage_folder(run_folder, policy).location, config.train.save)
    measured = {"base": Answering(config.base), "policy": Answering(trained, policy)}
    return benchmark_stages(config.benchmarks, config.benchmarks_page(), config.models, measured, view="benchmarks")


def audit(run: Run, config: DmapoConfig) -> Audit:
    """Walk every training row back, of all rounds that have datasets. Raises StoreError where the run has none yet."""
    first, *later = scored(config)
    made = [first, *(one for one in later if one.files.keys() <= run.results.keys())]
    return audit_gated(run, made, judge=config.judge)


WORKFLOW = register("workflow", "dmapo")(
    Workflow(
        name="dmapo",
        pocket="pocket",
        starters={
            "laptop": Starter("laptop"),
            "gpus": Starter("dmapo"),
            "endpoint": Starter("endpoint", at_endpoint=True),
        },
        config=DmapoConfig,
        wire=dmapo,
        page=write_report,
        numbers="metrics.json",
        audit=audit,
        scored=scored,
    )
)
