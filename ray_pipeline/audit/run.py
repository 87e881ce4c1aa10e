"""Audit a run folder: find its tables, and walk every training row back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ray_pipeline.agents.jurors import JuryRule
from ray_pipeline.audit.findings import AuditReport, RunTables
from ray_pipeline.audit.loop import audit_loop
from ray_pipeline.audit.rows import audit_run
from ray_pipeline.data.datasets import cut_to_size
from ray_pipeline.data.escalation import Escalation
from ray_pipeline.data.gate import Cut
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.data.tokens import token_counter
from ray_pipeline.graph.results import Run, of_role
from ray_pipeline.graph.stage import StageResult
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.tables import JoinedTables, ShardedTable

_NEEDED = ("prompts", "candidates")


@dataclasses.dataclass(frozen=True)
class Audit:
    """A report of each dataset by the name of its stage, the datasets whose rules the audit does not cover, and the
    stages whose files hold a random part of a dataset, which it does not cover either."""

    reports: dict[str, AuditReport]
    skipped: Sequence[str] = ()
    cut: Sequence[str] = ()


def audit_gated(
    run: Run, made: Sequence[ScoredDataset], skipped: Sequence[str] = (), judge: JudgeSettings | None = None
) -> Audit:
    """Audit datasets that a gate made from all candidates.

    Args:
        skipped: names of datasets that follow other rules (ungated, cut or imported rows).
        judge: the judges; verdicts of programs, reward models and checklists are computed again.

    Raises:
        StoreError: a dataset is not done yet, or none can be audited.
    """
    if not made:
        raise StoreError(f"{run.folder.location} has no dataset of the gate on all candidates: nothing to audit")
    _check_done(run, list(dict.fromkeys(name for one in made for name in (one.decisions, *one.files))))
    reports = {name: _audit(run, one, name, judge) for one in made for name in one.files}
    return Audit(reports, skipped, cut_to_size(run))


def audit_picks(
    run: Run, judges: Sequence[str], rule: JuryRule, min_gap: float, cut: Cut, every_rejected: bool
) -> Audit:
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
        judges=judges,
        rule=rule,
        min_gap=min_gap,
        cut=cut,
        every_rejected=every_rejected,
    )
    return Audit({"datasets": report})


def _check_done(run: Run, stages: Sequence[str]) -> None:
    missing = [name for name in (*_NEEDED, *stages) if name not in run.results]
    if missing:
        raise StoreError(f"{run.folder.location} cannot be audited yet: {', '.join(missing)} is not done; run it first")


def _audit(run: Run, made: ScoredDataset, files: str, judge: JudgeSettings | None) -> AuditReport:
    results = _behind(run, made.rows) or run.results  # manifests of early versions have no inputs
    critiques = of_role(results, "critiques")
    assert made.gate is not None
    tables = RunTables(
        prompts=run.results["prompts"].table(),
        candidates=_joined(of_role(results, "candidates")),
        verdicts=[result.table() for result in of_role(results, "verdicts")],
        critiques=_joined(critiques) if critiques else None,
        decisions=_joined(of_role(results, "decisions")),
        datasets=run.results[files].folder,
        judges=list(made.judges),
        gate=made.gate,
        config=made.files[files],
        humans={} if made.humans is None else made.humans.read().labels,
        programs=() if judge is None else judge.programs,
        rewards=() if judge is None else judge.rewards,
        ticked=[] if judge is None else [rubric for rubric in judge.rubrics if rubric.is_checklist],
        checklists=[result.table() for result in of_role(results, "checklists")],
        levels=made.exit_rule.levels if isinstance(made.exit_rule, Escalation) else (),
        scale=made.scale,
        threshold=run.results[made.decisions].facts.get("certified", {}).get("threshold"),
        posterior=run.results[made.decisions].facts.get("posterior"),
    )
    return audit_run(tables, token_counter(None if made.policy is None else made.policy.tokenizer))


def _behind(run: Run, rows: str) -> dict[str, StageResult]:
    """What the rows of a dataset were made from, as far as the candidates: of a run in rounds, whose candidates are
    made from earlier datasets, the rounds that were used."""
    found: dict[str, StageResult] = {}
    todo = list(run.stages[rows].inputs.values())
    while todo:
        if (name := todo.pop()) in run.results and name not in found:
            found[name] = run.results[name]
            todo += run.stages[name].inputs.values() if found[name].role != "candidates" else ()
    return found


def _joined(results: Sequence[StageResult]) -> ShardedTable | JoinedTables:
    first, *others = [result.table() for result in results]
    return JoinedTables((first, *others)) if others else first
