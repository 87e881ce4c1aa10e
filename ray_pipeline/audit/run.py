"""Audit a run folder: find its tables by the manifest, and walk every training row back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

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
class _Made:
    """A data set and the rules that made it, by the names of its stages."""

    decisions: str
    datasets: str
    judges: list[str]
    gate: GateConfig
    config: DatasetsConfig


def audit_folder(run: Run) -> dict[str, AuditReport]:
    """An audit of every data set that the gate or a loop's pick made, by the name of its stage.

    Of a comparison, data sets without a gate, of fewer candidates or of imported rows follow other rules and are left
    out.

    Raises:
        StoreError: the run has not come to its data sets, naming what is missing, or has none that can be audited.
    """
    if run.manifest["dag"] in ("agreement", "winrate"):
        raise StoreError(f"{run.folder.location} is a run of {run.manifest['dag']}: it makes no training rows to audit")
    if run.manifest["dag"] == "fellowship":
        return {"datasets": _loop(run)}
    made = list(_compared(run) if run.manifest["dag"] == "baselines" else _single(run))
    if not made:
        raise StoreError(f"{run.folder.location} has no data set of the gate on all candidates: nothing to audit")
    needed = [*_NEEDED, *dict.fromkeys(name for one in made for name in (one.decisions, one.datasets))]
    missing = [name for name in needed if name not in run.results]
    if missing:
        raise StoreError(f"{run.folder.location} cannot be audited yet: {', '.join(missing)} is not done; run it first")
    return {one.datasets: _audit(run, one) for one in made}


def not_audited(run: Run) -> list[str]:
    """Data sets of a comparison that are not the gate's on all candidates, so that no formula says their labels."""
    if run.manifest["dag"] != "baselines":
        return []
    found = run.manifest["config"]["baselines"]["data"].items()
    return [name for name, variant in found if not variant["gated"] or variant["source"] or variant["k"]]


def _single(run: Run) -> Iterator[_Made]:
    config = run.manifest["config"]
    yield _Made(
        decisions="gate",
        datasets="datasets",
        judges=[rubric["name"] for rubric in config["judge"]["rubrics"]],
        gate=GateConfig.model_validate(config["gate"]),
        config=DatasetsConfig.model_validate(config["datasets"]),
    )


def _compared(run: Run) -> Iterator[_Made]:
    config = run.manifest["config"]
    names = [rubric["name"] for rubric in config["judge"]["rubrics"]]
    for data, variant in config["baselines"]["data"].items():
        if not variant["gated"] or variant["source"] or variant["k"]:
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


def _loop(run: Run) -> AuditReport:
    """The data set of a feedback loop's pick; those of the second kind lead back by review_id and are not audited."""
    needed = (*_NEEDED, "select", "datasets")
    if missing := [name for name in needed if name not in run.results]:
        raise StoreError(f"{run.folder.location} cannot be audited yet: {', '.join(missing)} is not done; run it first")
    config, results = run.manifest["config"], run.results
    judges = config["select"]["judges"] or config["judge"]["rubrics"]
    verdicts = [n for n in sorted(results) if n.startswith("judge") and results[n].tables == ("verdicts",)]
    return audit_loop(
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
