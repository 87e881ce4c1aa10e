"""The files of a comparison of training methods: the page, metrics.json, and its table as CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.evaluate.comparison import Comparison
from ray_pipeline.evaluate.method_stats import Difference, MethodStats, OverSeeds, PolicyStats, equal_policies
from ray_pipeline.evaluate.methods_page import methods_page
from ray_pipeline.report.csv_tables import as_csv
from ray_pipeline.report.write import write_page


def build_comparison(page: Comparison, out_dir: Path) -> list[Path]:
    """Write the page and its numbers into `out_dir`; returns all paths.

    The numbers are metrics.json, methods.csv (a row for each method, dataset and reading), policies.csv (a row for each
    policy) and, where datasets are compared, differences.csv (a row for each measure of a dataset).
    """
    same = equal_policies(page.policies)
    numbers = {
        "methods.csv": as_csv(*(_method_row(method) for method in page.methods)),
        "policies.csv": as_csv(*(_policy_row(policy, same) for policy in page.policies)),
        **({"differences.csv": as_csv(*map(_difference_row, page.differences))} if page.differences else {}),
        "metrics.json": {name: value for name, value in dataclasses.asdict(page).items() if name != "config"},
    }
    return write_page(methods_page(page), numbers, out_dir)


def _method_row(method: MethodStats) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(method, name) for name in ("method", "data", "reading", "rows", "steps")}
    seeded: dict[str, OverSeeds | None] = {
        "win_rate": method.win_rate,
        "tie_rate": method.tie_rate,
        "flip_rate": method.flip_rate,
        "equal_length": method.equal_length,
        **{f"score_{judge}": score for judge, score in method.scores.items()},
        "mean_score": method.mean_score,
        **{f"accuracy_{mode}": share for mode, share in method.accuracy.items()},
        **{score.replace(" ", "_"): value for score, value in method.benchmarks.items()},
        "completion_tokens": method.tokens,
        "train_seconds": method.train_seconds,
    }
    row["seeds"] = method.train_seconds.seeds
    for name, value in seeded.items():
        row[name] = None if value is None else value.mean
        row[f"{name}_error"] = None if value is None else value.error
    return row | {"win_low": method.win_interval.low, "win_high": method.win_interval.high, "unread": method.unread}


def _difference_row(one: Difference) -> dict[str, Any]:
    row = {name: getattr(one, name) for name in ("method", "data", "over", "reading", "measure")}
    row |= {"gain": one.gain.mean, "error": one.gain.error, "seeds": one.gain.seeds, "same_rows": one.same_rows}
    return row | {"low": one.interval.low, "high": one.interval.high, "prompts": one.interval.groups}


def _policy_row(policy: PolicyStats, same: Mapping[str, str]) -> dict[str, Any]:
    run = policy.run
    row: dict[str, Any] = {"policy": "base" if run is None else run.label}
    for name in ("method", "data", "reading", "seed", "rows", "steps", "train_seconds"):
        row[name] = None if run is None else getattr(run, name)
    row["same_as"] = None if run is None else same.get(run.label)
    for name in ("win_rate", "tie_rate", "loss_rate", "flip_rate", "unread", "equal_length"):
        row[name] = getattr(policy, name)
    row |= {f"score_{judge}": score for judge, score in policy.scores.items()} | {"mean_score": policy.mean_score}
    row |= {f"accuracy_{mode}": share for mode, share in policy.accuracy.items()} | {"tokens": policy.tokens}
    return row | {score.replace(" ", "_"): value for score, value in policy.benchmarks.items()}
