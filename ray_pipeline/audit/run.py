"""Audit a run folder: find its tables, and walk every training row back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_pipeline.audit.findings import AuditReport, RunTables
from ray_pipeline.audit.loop import audit_loop
from ray_pipeline.audit.rows import audit_run
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.tokens import TokenCounter
from ray_pipeline.graph.results import Run, of_role
from ray_pipeline.store.files import StoreError

if TYPE_CHECKING:  # the modules of `dags` import this one
    from dags.baselines import BaselinesConfig
    from dags.dmapo import DmapoConfig
    from dags.fellowship import FellowshipConfig

_NEEDED = ("prompts", "candidates")


@dataclasses.dataclass(frozen=True)
class Audit:
    """A report of each dataset by the name of its stage, and the datasets whose rules the audit does not cover."""

    reports: dict[str, AuditReport]
    skipped: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class _Made:
    """A dataset and the rules that made it, by the names of its stages."""

    decisions: str
    datasets: str
    judges: list[str]
    gate: GateConfig
    config: DatasetsConfig


def audit_gated(run: Run, config: DmapoConfig) -> Audit:
    """Audit the one dataset of a run with a gate.

    Raises:
        StoreError: the run has no datasets yet; names what is missing.
    """
    made = _Made("gate", "datasets", config.judge.names, config.gate, config.datasets)
    _check_done(run, [made.decisions, made.datasets])
    return Audit({made.datasets: _audit(run, config, made)})


def audit_compared(run: Run, config: BaselinesConfig) -> Audit:
    """Audit every dataset of a comparison that the gate made from all candidates; ungated, cut or imported rows follow
    other rules.

    Raises:
        StoreError: a dataset is not done yet, or none can be audited.
    """
    made, skipped = [], []
    for data, variant in config.baselines.data.items():
        gate = config.gate_of(variant)
        if gate is None or variant.k:
            skipped.append(data)
            continue
        judges = list(variant.judges or config.judge.names)
        made += [
            _Made(f"gate-{data}", f"datasets-{data}-s{seed}", judges, gate, config.rows_of(variant, seed))
            for seed in config.baselines.seeds
        ]
    if not made:
        raise StoreError(f"{run.folder.location} has no dataset of the gate on all candidates: nothing to audit")
    _check_done(run, list(dict.fromkeys(name for one in made for name in (one.decisions, one.datasets))))
    return Audit({one.datasets: _audit(run, config, one) for one in made}, skipped)


def audit_picks(run: Run, config: FellowshipConfig) -> Audit:
    """Audit the dataset of a feedback loop's picks. Datasets of the second kind lead back by review_id: left out.

    Raises:
        StoreError: the run has no datasets yet; names what is missing.
    """
    _check_done(run, ["select", "datasets"])
    results = run.results
    report = audit_loop(
        prompts=results["prompts"].table(),
        candidates=results["candidates"].table(),
        verdicts=[result.table() for result in of_role(results, "verdicts")],
        decisions=results["select"].table(),
        datasets=results["datasets"].folder,
        judges=config.judges,
        rule=config.select.jury,
        min_gap=config.datasets.min_gap,
    )
    return Audit({"datasets": report})


def _check_done(run: Run, stages: Sequence[str]) -> None:
    missing = [name for name in (*_NEEDED, *stages) if name not in run.results]
    if missing:
        raise StoreError(f"{run.folder.location} cannot be audited yet: {', '.join(missing)} is not done; run it first")


def _audit(run: Run, config: DmapoConfig, made: _Made) -> AuditReport:
    results = run.results
    critiques = of_role(results, "critiques")
    tables = RunTables(
        prompts=results["prompts"].table(),
        candidates=results["candidates"].table(),
        verdicts=[result.table() for result in of_role(results, "verdicts")],
        critiques=critiques[0].table() if critiques else None,
        decisions=results[made.decisions].table(),
        datasets=results[made.datasets].folder,
        judges=made.judges,
        gate=made.gate,
        config=made.config,
    )
    return audit_run(tables, TokenCounter.load(config.base.tokenizer))  # as the rows were measured
