"""Audit a run folder: find its tables, and walk every training row back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ray_pipeline.agents.jurors import JuryRule
from ray_pipeline.audit.loop import audit_loop
from ray_pipeline.audit.rows import AuditReport, RunTables, audit_run
from ray_pipeline.data.datasets import DatasetsConfig, TokenCounter
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.engines.models import TokenizerSettings
from ray_pipeline.graph.results import Run
from ray_pipeline.store.files import StoreError

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


def audit_gated(run: Run) -> Audit:
    """Audit the one dataset of a run with a gate.

    Raises:
        StoreError: the run has no datasets yet; names what is missing.
    """
    config = run.manifest["config"]
    made = _Made(
        decisions="gate",
        datasets="datasets",
        judges=[rubric["name"] for rubric in config["judge"]["rubrics"]],
        gate=GateConfig.model_validate(config["gate"]),
        config=DatasetsConfig.model_validate(config["datasets"]),
    )
    _check_done(run, [made.decisions, made.datasets])
    return Audit({made.datasets: _audit(run, made)})


def audit_compared(run: Run) -> Audit:
    """Audit every dataset of a comparison that the gate made from all candidates; ungated, cut or imported rows follow
    other rules.

    Raises:
        StoreError: a dataset is not done yet, or none can be audited.
    """
    made = list(_compared(run))
    if not made:
        raise StoreError(f"{run.folder.location} has no dataset of the gate on all candidates: nothing to audit")
    _check_done(run, list(dict.fromkeys(name for one in made for name in (one.decisions, one.datasets))))
    variants = run.manifest["config"]["baselines"]["data"].items()
    return Audit({one.datasets: _audit(run, one) for one in made}, [n for n, v in variants if not _covered(v)])


def audit_picks(run: Run) -> Audit:
    """Audit the dataset of a feedback loop's picks. Datasets of the second kind lead back by review_id: left out.

    Raises:
        StoreError: the run has no datasets yet; names what is missing.
    """
    _check_done(run, ["select", "datasets"])
    config, results = run.manifest["config"], run.results
    judges = config["select"]["judges"] or config["judge"]["rubrics"]
    verdicts = [n for n in sorted(results) if n.startswith("judge") and results[n].tables == ("verdicts",)]
    report = audit_loop(
        prompts=results["prompts"].table(),
        candidates=results["candidates"].table(),
        verdicts=[results[n].table() for n in verdicts],
        decisions=results["select"].table(),
        datasets=results["datasets"].folder,
        judges=[judge["name"] for judge in judges],
        # Runs from before there was a choice have no such block: they took the mean.
        rule=JuryRule.model_validate(config["select"].get("jury", {})),
        min_gap=config["datasets"]["min_gap"],
    )
    return Audit({"datasets": report})


def _check_done(run: Run, stages: Sequence[str]) -> None:
    missing = [name for name in (*_NEEDED, *stages) if name not in run.results]
    if missing:
        raise StoreError(f"{run.folder.location} cannot be audited yet: {', '.join(missing)} is not done; run it first")


def _covered(variant: dict[str, Any]) -> bool:
    return variant["gated"] and not variant["source"] and not variant["k"]


def _compared(run: Run) -> Iterator[_Made]:
    config = run.manifest["config"]
    names = [rubric["name"] for rubric in config["judge"]["rubrics"]]
    for data, variant in config["baselines"]["data"].items():
        if not _covered(variant):
            continue
        for seed in config["baselines"]["seeds"]:
            stage = f"datasets-{data}-s{seed}"
            settings = run.folder / run.manifest["stages"][stage]["path"]
            yield _Made(
                decisions=f"gate-{data}",
                datasets=stage,
                judges=list(variant["judges"] or names),
                gate=GateConfig.model_validate({**config["gate"], **variant["gate"]}),
                config=DatasetsConfig.model_validate(settings.read_json("stats.json")["settings"]),
            )


def _audit(run: Run, made: _Made) -> AuditReport:
    config, results = run.manifest["config"], run.results
    policy = config["models"][config["train"]["model"]]
    tokenizer = TokenizerSettings(**{name: policy[name] for name in TokenizerSettings.model_fields})
    judges = [n for n in sorted(results) if results[n].tables == ("verdicts",) and not n.startswith("score-")]
    tables = RunTables(
        prompts=results["prompts"].table(),
        candidates=results["candidates"].table(),
        verdicts=[results[n].table() for n in judges],
        critiques=results["critic"].table() if "critic" in results else None,
        decisions=results[made.decisions].table(),
        datasets=results[made.datasets].folder,
        judges=made.judges,
        gate=made.gate,
        config=made.config,
    )
    return audit_run(tables, TokenCounter.load(tokenizer))  # as the rows were measured
