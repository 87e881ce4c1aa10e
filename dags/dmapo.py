"""DMAPO: three judges, a process critic and a confidence gate make the data; KTO aligns the policy with it.

prompts → candidates → judges ─┐
                    └→ critic ─┴→ gate → data sets → train (→ public benchmarks) → evaluate
"""

from __future__ import annotations

from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config import DmapoConfig
from ray_pipeline.data.candidates import candidates
from ray_pipeline.data.columnar import datasets, gate, prompts
from ray_pipeline.data.critic import critic
from ray_pipeline.data.judging import judges
from ray_pipeline.evaluate.stage import evaluate
from ray_pipeline.graph.run import stage_folder, stored
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.comparisons import comparisons, responses
from ray_pipeline.policy.train import train


def dmapo(config: DmapoConfig, run_folder: str) -> Dag:
    """The whole method as a DAG; `run_folder` is where the policy will lie for its own evaluation."""
    texts, models, base = config.templates(), config.models, config.models[config.train.model]

    asked = prompts(config.prompts)
    answers = candidates(config.candidates, models[config.candidates.model], asked)
    verdicts = judges(config.judge, models, texts.judge, asked, {"candidates": answers})
    critiques = None
    if config.gate.use_critic:
        critiques = critic(config.critic, models[config.critic.model], texts.critic, asked, answers)
    decisions = gate(config.gate, config.judge.names, answers, verdicts, critiques)
    data = datasets(config.datasets, config.gate, config.judge.names, base, asked, answers, verdicts, decisions)
    made = [asked, answers, *verdicts, *([critiques] if critiques else []), decisions, data]
    policy = train(config.train, base, config.datasets.max_length, data)
    trained = [policy, *_both_answer(config, run_folder, asked, policy), *_benchmarks(config, run_folder, policy)]
    if config.evaluate.skip_generation:
        trained = stored(trained, run_folder, config.num_shards)
    made += trained
    report = evaluate(config.evaluate, config.report(), base, config.datasets.max_length, made)
    return Dag("dmapo", [*made, report])


def _benchmarks(config: DmapoConfig, run_folder: str, policy: Stage) -> list[Stage]:
    """Base and policy on public benchmarks, where the configuration asks for them."""
    if config.benchmarks is None:
        return []
    base = config.models[config.train.model]
    trained = base.trained((stage_folder(run_folder, policy) / "merged").location)
    measured = {"base": Answering(base), "policy": Answering(trained, policy)}
    return benchmark_stages(config.benchmarks, config.benchmarks_page(), config.models, measured, view="benchmarks")


def _both_answer(config: DmapoConfig, run_folder: str, asked: Stage, policy: Stage) -> list[Stage]:
    """Base and policy answer the held-out prompts; the judges score both, and one compares them in both orders."""
    texts, models, base = config.templates(), config.models, config.models[config.train.model]
    trained = base.trained((stage_folder(run_folder, policy) / "merged").location)
    before = responses("base", config.evaluate, base, asked)
    after = responses("policy", config.evaluate, trained, asked, policy)
    compared = comparisons(
        config.evaluate, models[config.evaluate.judge], texts.pairwise, asked, before, {"policy": after}
    )
    both = {"base": before, "policy": after}
    scored = judges(config.judge, models, texts.judge, asked, both, "score-responses", "evaluate")
    return [before, after, compared, *scored]
