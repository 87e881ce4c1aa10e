"""Write the report of a run."""

from pathlib import Path

from ray_pipeline.evaluate.cautions import cautions, unusable
from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.headline import data_headline, headline
from ray_pipeline.evaluate.metrics import collect_metrics
from ray_pipeline.evaluate.run_page import run_page
from ray_pipeline.evaluate.summary import summary_row
from ray_pipeline.report.csv_tables import as_csv
from ray_pipeline.report.documents import as_json
from ray_pipeline.report.write import write_page


def build_report(data: ReportData, out_dir: Path) -> list[Path]:
    """Write the page of a run, metrics.json and summary.csv into `out_dir` (made if absent); returns all paths."""
    metrics = collect_metrics(data)
    if data.trains:
        first_line = headline(metrics.evaluation, data.missing_stages(), unusable(metrics))
    else:
        first_line = data_headline(data, metrics, unusable(metrics))
    warnings = cautions(data, metrics)
    numbers = as_json(metrics) | {
        "run": data.run,
        "missing_stages": data.missing_stages(),
        "headline": first_line,
        "warnings": warnings,
        "prompts": data.prompt_counts,
        "datasets": {"counts": data.dataset_counts, "guards": data.dataset_guards, "kto_weights": data.kto_weights}
        | ({"lengths": data.lengths} if data.lengths else {}),
        "train_settings": data.train_settings,
        "judge_models": {"curating": data.curating_models, "evaluating": data.evaluating_models},
        "stages": data.stage_use,
        "thresholds": {"desirable_from": data.desirable_from, "undesirable_to": data.undesirable_to},
        "bootstrap": {"draws": data.bootstrap_draws, "seed": data.bootstrap_seed},
    }
    if data.escalation is not None:
        numbers["escalation"] = data.escalation
    if data.rounds:
        numbers["rounds"] = as_json(data.rounds)
    if data.decided:
        numbers["decided"] = data.decided
    if data.contamination:
        numbers["contamination"] = data.contamination
    summary = as_csv(summary_row(data, metrics, first_line, len(warnings)))
    page = run_page(data, metrics, first_line, warnings)
    return write_page(page, {"metrics.json": numbers, "summary.csv": summary}, out_dir)
