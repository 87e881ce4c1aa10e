"""DMAPO: three judges, a process critic and a confidence gate make the data; KTO aligns the policy with it.

prompts → candidates → judges ─┐
                    └→ critic ─┴→ gate → datasets → train (→ public benchmarks) → evaluate

With `rounds`, the policy answers the prompts of the next round, from candidates on, and is trained on.

With `train: null` only the data is made, and the report is about it: … → gate → datasets → report.
"""

from __future__ import annotations

import functools

from ray_pipeline.audit.run import Audit, audit_gated
from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config.starters import Starter
from ray_pipeline.data.candidates import candidates as candidates_stage
from ray_pipeline.data.candidates import drawn
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.critic import critic as critic_stage
from ray_pipeline.data.datasets import Judged
from ray_pipeline.data.judging import judges as judge_stages
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.evaluate.stage import write_report
from ray_pipeline.extensions import register
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from ray_pipeline.workflow.registry import Workflow
from ray_pipeline.workflow.stages import Curated, Start, ending_of, in_rounds


def dmapo(config: DmapoConfig, run_folder: str) -> Dag:
    """The whole method as a DAG; the evaluation loads the policy from `run_folder`."""
    stages = in_rounds(
        config,
        run_folder,
        prompts_stage(config.prompt_settings),
        functools.partial(_gated, config),
        config.judge.live,
        more=functools.partial(_benchmarks, config, run_folder),
    )
    return Dag("dmapo", [*stages, config.report_stage(stages)])


def _gated(config: DmapoConfig, start: Start) -> Curated:
    """A round from its candidates over judges, critic and gate to its datasets."""
    texts, models, asked, ending = config.templates(), config.models, start.asked, start.ending
    if start.policy is not None:
        candidates = drawn(config.candidates, start.policy, asked, f"candidates{ending}", start.train)
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
            None if rule is None else rule.for_critic,
            f"critic{ending}",
        )
    dataset = scored(config)[start.number - 1]
    decisions = dataset.decide(candidates, verdicts, critiques)
    judged = Judged(candidates, verdicts, decisions)
    _, datasets = dataset.write(start.prompts, *judged, earlier=start.earlier)
    return Curated(judged, [candidates, *verdicts, *([critiques] if critiques else []), decisions, datasets], datasets)


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
