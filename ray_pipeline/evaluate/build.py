"""Write the report of a run."""

import json
from pathlib import Path

from ray_pipeline.evaluate.cautions import cautions
from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.headline import Headline, headline
from ray_pipeline.evaluate.metrics import RunMetrics, as_json, collect_metrics, prefix_hit_rate, total_use
from ray_pipeline.evaluate.plots import draw_plots
from ray_pipeline.evaluate.run_page import run_page
from ray_pipeline.evaluate.summary import as_csv, summary_row
from ray_pipeline.report.examples import pick_examples
from ray_pipeline.report.markdown import Safe, render
from ray_pipeline.stats.protocol import fixed_fields

PLOT_FOLDER = "plots"


def build_report(data: ReportData, out_dir: Path) -> list[Path]:
    """Write metrics.json, summary.csv, report.md, report.html and plots/*.png into `out_dir` (made if absent).

    Returns their paths.

    Equal data give equal bytes: nothing here reads a clock, a host name or the order of a hash table.
    """
    metrics = collect_metrics(data)
    first_line = headline(metrics.evaluation, data.missing_stages())
    warnings = cautions(data, metrics)
    out_dir.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(metrics, data.train_metrics, out_dir / PLOT_FOLDER)
    texts = {
        "metrics.json": _metrics_json(data, metrics, first_line, warnings),
        "summary.csv": as_csv(summary_row(data, metrics, first_line, len(warnings))),
        "report.md": _page(data, metrics, first_line, warnings, plots),
        "report.html": run_page(data, metrics, first_line, warnings),
    }
    for name, text in texts.items():
        (out_dir / name).write_text(text, encoding="utf-8", newline="\n")
    return [out_dir / name for name in texts] + list(plots.values())


def _metrics_json(data: ReportData, metrics: RunMetrics, first_line: Headline, warnings: list[str]) -> str:
    everything = {
        "run": data.run,
        "missing_stages": data.missing_stages(),
        "headline": first_line,
        "warnings": warnings,
        "prompts": data.prompt_counts,
        "datasets": {"counts": data.dataset_counts, "guards": data.dataset_guards, "kto_weights": data.kto_weights},
        "train_settings": data.train_settings,
        "judge_models": {"curating": data.curating_models, "evaluating": data.evaluating_models},
        "stages": data.stage_use,
        "thresholds": {"desirable_from": data.desirable_from, "undesirable_to": data.undesirable_to},
        "bootstrap": {"draws": data.bootstrap_draws, "seed": data.bootstrap_seed},
    }
    document = {**as_json(metrics), **as_json(everything)}
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _page(
    data: ReportData, metrics: RunMetrics, first_line: Headline, warnings: list[str], plots: dict[str, Path]
) -> str:
    stages = list(data.stage_use or ())
    return render(
        "report.md.j2",
        {
            "run": data.run,
            "data": data,
            "missing": data.missing_stages(),
            "headline": first_line,
            "warnings": warnings,
            "metrics": metrics,
            "examples": pick_examples(data),
            "plots": {name: Safe(f"{PLOT_FOLDER}/{path.name}") for name, path in plots.items()},
            "stages": [*stages, total_use(stages)] if stages else [],
            "prefix_hit_rate": prefix_hit_rate,
            "fixed_fields": fixed_fields,
            "train_settings": as_json(data.train_settings or {}),
        },
    )
