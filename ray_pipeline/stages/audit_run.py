"""Audit a run folder: find its tables by the manifest, and walk every training row back."""

from __future__ import annotations

from ray_pipeline.graph.results import Run
from ray_pipeline.stages.audit import AuditReport, RunTables, audit_run
from ray_pipeline.stages.datasets import DatasetsConfig, TokenCounter
from ray_pipeline.stages.gate import GateConfig
from ray_pipeline.store.files import StoreError

_NEEDED = ("prompts", "candidates", "gate", "datasets")


def audit_folder(run: Run) -> AuditReport:
    """Raises StoreError when the run has not come to its data sets, naming what is missing."""
    missing = [name for name in _NEEDED if name not in run.results]
    if missing:
        raise StoreError(f"{run.folder.location} cannot be audited yet: {', '.join(missing)} is not done; run it first")
    config, results = run.manifest["config"], run.results
    policy = config["models"][config["candidates"]["model"]]
    judges = [n for n in sorted(results) if results[n].tables == ("verdicts",) and not n.startswith("score-")]
    tables = RunTables(
        prompts=results["prompts"].table(),
        candidates=results["candidates"].table(),
        verdicts=[results[n].table() for n in judges],
        critiques=results["critic"].table() if "critic" in results else None,
        decisions=results["gate"].table(),
        datasets=results["datasets"].folder,
        judges=[r["name"] for r in config["judge"]["rubrics"]],
        gate=GateConfig.model_validate(config["gate"]),
        config=DatasetsConfig.model_validate(config["datasets"]),
    )
    return audit_run(tables, TokenCounter.load(policy["model"], policy["revision"]))
