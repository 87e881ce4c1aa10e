"""Every number of a run's report, computed once: metrics.json is this, and the page and its warnings only show it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.checklist_stats import ChecklistStats
from ray_pipeline.data.critic_stats import CriticStats, critic_stats
from ray_pipeline.data.gate_stats import (
    GateStats,
    GeneratorStats,
    SourceAgreement,
    gate_stats,
    generator_stats,
    source_agreement,
)
from ray_pipeline.data.judge_stats import JudgingStats, judging_stats, scores_by_judge
from ray_pipeline.data.judge_votes import ErrorsOfJudges
from ray_pipeline.evaluate.data import ReportData, StageUse
from ray_pipeline.evaluate.people import GateAndPeople, gate_and_people
from ray_pipeline.policy.evaluation import Evaluation, evaluation_stats
from ray_pipeline.policy.training_curve import TrainingSummary, summarise_training
from ray_pipeline.stats.columns import chunk
from ray_pipeline.stats.kappa import KappaInterval, kappa_intervals
from ray_pipeline.store.schemas import cut_off

_SPLITS = {"train": "for training", "val": "for validation"}


@dataclass(frozen=True)
class Step:
    """One line of the funnel: `rows` counts things of a `unit`."""

    name: str
    rows: int
    note: str = ""
    unit: str = "prompts"


@dataclass(frozen=True)
class RunMetrics:
    """All numbers of a run; a part is None when its stage left nothing."""

    funnel: list[Step]
    gate: GateStats | None
    generators: list[GeneratorStats]
    source_agreement: SourceAgreement | None
    judging: JudgingStats | None
    kappa_intervals: list[KappaInterval]
    judge_errors: ErrorsOfJudges | None
    checklists: list[ChecklistStats]
    critic: CriticStats | None
    people: GateAndPeople | None
    training: TrainingSummary | None
    evaluation: Evaluation | None


def collect_metrics(data: ReportData) -> RunMetrics:
    """Compute every statistic that the given parts allow."""
    gate, generators, agreement = None, list[GeneratorStats](), None
    if data.decisions is not None and data.candidates is not None:
        gate = gate_stats(data.decisions, data.candidates)
        generators = generator_stats(data.decisions, data.candidates)
        agreement = source_agreement(data.decisions, data.candidates)
    judging = _judging(data)
    return RunMetrics(
        funnel=_funnel(data, gate, judging),
        gate=gate,
        generators=generators,
        source_agreement=agreement,
        judging=judging,
        kappa_intervals=_kappa_intervals(data),
        judge_errors=data.judge_errors,
        checklists=list(data.checklists),
        critic=None if data.critiques is None else critic_stats(data.critiques),
        people=gate_and_people(data),
        training=None if data.train_metrics is None else summarise_training(data.train_metrics),
        evaluation=evaluation_stats(
            data.comparisons,
            data.responses,
            data.response_verdicts,
            data.perplexity,
            data.compared,
            draws=data.bootstrap_draws,
            seed=data.bootstrap_seed,
        ),
    )


def dataset_rows(counts: Mapping[str, int]) -> int:
    """Rows of a dataset over its splits."""
    return counts.get("train", 0) + counts.get("val", 0)


def prefix_hit_rate(use: StageUse) -> float | None:
    """Share of prompt tokens that the engine had in its prefix cache."""
    if not use.prompt_tokens or use.cached_tokens is None:
        return None
    return use.cached_tokens / use.prompt_tokens


def total_use(stages: Sequence[StageUse]) -> StageUse:
    """The sum over stages; a column that no stage reports stays None."""

    def total(column: str) -> Any:
        known = [value for use in stages if (value := getattr(use, column)) is not None]
        return sum(known) if known else None

    columns = [f.name for f in dataclasses.fields(StageUse) if f.name != "stage"]
    return StageUse(stage="all", **{column: total(column) for column in columns})


def _judging(data: ReportData) -> JudgingStats | None:
    source = data.decisions if data.decisions is not None else data.candidates
    if data.verdicts is None or source is None:
        return None
    return judging_stats(
        data.verdicts,
        source.column("candidate_id"),
        desirable_from=data.desirable_from,
        undesirable_to=data.undesirable_to,
        agreement_on=data.agreement_on,
    )


def _kappa_intervals(data: ReportData) -> list[KappaInterval]:
    """Of the rows that kappas are over. Candidates without a prompt (there are none in a run) cannot be resampled."""
    if data.verdicts is None or data.candidates is None:
        return []
    rows = data.candidates if data.decisions is None else _in_order_of(data.decisions, data.candidates)
    if data.agreement_on is not None:
        rows = rows.filter(pc.is_in(rows.column("candidate_id"), value_set=pa.array(data.agreement_on, pa.string())))
    return kappa_intervals(
        scores_by_judge(data.verdicts, chunk(rows.column("candidate_id"))),
        np.asarray(rows.column("prompt_id").to_pylist(), dtype=np.str_),
        desirable_from=data.desirable_from,
        undesirable_to=data.undesirable_to,
        draws=data.bootstrap_draws,
        seed=data.bootstrap_seed,
    )


def _in_order_of(decisions: pa.Table, candidates: pa.Table) -> pa.Table:
    place = pc.index_in(chunk(decisions.column("candidate_id")), value_set=chunk(candidates.column("candidate_id")))
    return candidates.select(["candidate_id", "prompt_id"]).take(place)


def _funnel(data: ReportData, gate: GateStats | None, judging: JudgingStats | None) -> list[Step]:
    """From prompts to training rows, as far as the run got."""
    steps: list[Step] = []
    if data.prompt_counts is not None:
        steps.append(Step("prompts read", data.prompt_counts.get("read", 0)))
        for reason, rows in sorted(data.prompt_counts.get("dropped", {}).items()):
            if rows:
                steps.append(Step("prompts dropped", rows, str(reason)))
        steps.append(Step("prompts kept", data.prompt_counts.get("kept", 0)))
    if data.candidates is not None:
        steps.append(Step("candidates", len(data.candidates), unit="candidates"))
        if "finish_reason" in data.candidates.column_names:
            reasons = data.candidates.column("finish_reason")
            for found in pc.value_counts(reasons.filter(cut_off(reasons))).to_pylist():
                steps.append(Step("candidates cut off", found["counts"], found["values"], "candidates"))
    if judging is not None:
        steps.append(Step("candidates judged", judging.judged, "every judge's score was read", "candidates"))
    if gate is not None:
        steps += [Step("labelled", stats.count, label, "candidates") for label, stats in gate.labels.items()]
    for name, unit in (("kto", "KTO rows"), ("dpo", "DPO pairs")):
        sizes = (data.dataset_counts or {}).get(name, {})
        steps += [Step(unit, sizes[split], note, unit) for split, note in _SPLITS.items() if split in sizes]
    return steps
