"""The comparison that DMAPO stands on: every training method on gated and on ungated data of the same candidates.

prompts → candidates → judges, critic ─┬→ gate ──────────────┐
                                       └→ best and worst of k ┴→ rows → data sets ─┬→ sft ──┐
                                                                                  ├→ dpo ──┤
                                                                                  ├→ kto ──┼→ answers → judges → table
                                                                                  ├→ orpo ─┤
                                                                                  └→ simpo ┘
"""

from __future__ import annotations

import dataclasses

from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config import BaselinesConfig, DataVariant
from ray_pipeline.data.candidates import candidates
from ray_pipeline.data.columnar import dataset_files, dataset_rows, gate, prompts
from ray_pipeline.data.critic import critic
from ray_pipeline.data.imported import preferences
from ray_pipeline.data.judging import judges
from ray_pipeline.evaluate.method_table import method_table
from ray_pipeline.graph.run import stage_folder
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.comparisons import comparisons, responses
from ray_pipeline.policy.train import train


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Candidates with all that was said of them."""

    answers: Stage
    verdicts: list[Stage]
    critiques: Stage | None


def baselines(config: BaselinesConfig, run_folder: str) -> Dag:
    """Methods × data sets × seeds, all policies asked the same held-out prompts and judged in one go."""
    texts, models, base = config.templates(), config.models, config.models[config.train.model]
    compared = config.baselines
    asked = prompts(config.prompts)
    judged = _judged(config, asked)

    rows = {data: _rows(config, data, variant, asked, judged) for data, variant in compared.data.items()}
    files = {(data, seed): _files(config, data, rows[data], seed) for data in rows for seed in compared.seeds}
    trained: list[Stage] = []
    policies: dict[str, Stage] = {}
    measured = {"base": Answering(base)}
    for name in config.policies():
        settings = config.training(name.method, name.seed)
        length, data = config.datasets.max_length, files[name.data, name.seed]
        policy = train(settings, base, length, data, name=f"train-{name.label}", view="")
        weights = base.trained((stage_folder(run_folder, policy) / "merged").location)
        policies[name.label] = responses(name.label, config.evaluate, weights, asked, policy)
        measured[name.label] = Answering(weights, policy)
        trained.append(policy)

    before = responses("base", config.evaluate, base, asked)
    answers = {"base": before, **policies}
    pairs = comparisons(config.evaluate, models[config.evaluate.judge], texts.pairwise, asked, before, policies)
    scores = judges(config.judge, models, texts.judge, asked, answers, "score-responses", "evaluate")
    table = method_table(config.page(), [asked, *rows.values(), *trained, *answers.values(), pairs, *scores])
    last = [table]
    if config.benchmarks is not None:
        page = config.benchmarks_page()
        last += benchmark_stages(config.benchmarks, page, models, measured, view="benchmarks")
    return Dag("baselines", last)


def _judged(config: BaselinesConfig, asked: Stage) -> _Judged | None:
    """Candidates, verdicts and critiques, as far as some data set is made from them."""
    own = [variant for variant in config.baselines.data.values() if variant.source is None]
    if not own:
        return None
    texts, models = config.templates(), config.models
    answers = candidates(config.candidates, models[config.candidates.model], asked)
    verdicts = judges(config.judge, models, texts.judge, asked, {"candidates": answers})
    critiques = None
    if any((decides := config.gate_of(variant)) is not None and decides.use_critic for variant in own):
        critiques = critic(config.critic, models[config.critic.model], texts.critic, asked, answers)
    return _Judged(answers, verdicts, critiques)


def _rows(config: BaselinesConfig, data: str, variant: DataVariant, asked: Stage, judged: _Judged | None) -> Stage:
    """Training rows of one data set: imported, or made from decisions on the candidates."""
    base, settings = config.models[config.train.model], config.rows_of(variant)
    if variant.source is not None:
        return preferences(
            variant.source,
            settings,
            base,
            seed=config.prompts.seed,
            val_fraction=config.prompts.val_fraction,
            name=f"rows-{data}",
        )
    assert judged is not None
    counted = variant.judges or config.judge.names
    decisions = gate(
        config.gate_of(variant),
        counted,
        judged.answers,
        judged.verdicts,
        judged.critiques,
        name=f"gate-{data}" if variant.gated else f"ranks-{data}",
        first=variant.k,
    )
    return dataset_rows(settings, counted, base, asked, judged.answers, judged.verdicts, decisions, name=f"rows-{data}")


def _files(config: BaselinesConfig, data: str, rows: Stage, seed: int) -> Stage:
    """The same rows, in the order of a seed."""
    variant = config.baselines.data[data]
    return dataset_files(
        config.rows_of(variant, seed),
        config.gate_of(variant),
        variant.judges or config.judge.names,
        rows,
        name=f"datasets-{data}-s{seed}",
        view="",
        origin=None if variant.gated and variant.source is None else config.how(variant),
    )
