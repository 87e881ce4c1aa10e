"""The report of a run: report.md with plots, metrics.json, summary.csv."""

from ray_pipeline.report.build import build_report
from ray_pipeline.report.data import ReportData, RunIdentity, StageUse

__all__ = ["ReportData", "RunIdentity", "StageUse", "build_report"]
