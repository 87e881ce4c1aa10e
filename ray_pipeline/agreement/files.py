"""The files of agreement and win-rate runs: the page, its figures as JSON, and the gate's curves as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_pipeline.agreement.gate_curves import GateCurve, curves_table
from ray_pipeline.agreement.page import agreement_page, winrate_page
from ray_pipeline.agreement.recorded_winrate import VersusRate
from ray_pipeline.report.csv_tables import arrow_csv
from ray_pipeline.report.documents import as_json
from ray_pipeline.report.write import write_page


def write_agreement(
    document: Mapping[str, Any],
    folder: Path,
    curves: Sequence[GateCurve] = (),
    answers: Sequence[tuple[str, str]] = (),
    posteriors: Sequence[pa.Table] = (),
) -> list[Path]:
    """Write the page, agreement.json and, where there are any, risk_coverage.csv and posteriors.csv; returns all paths.

    Args:
        answers: `Page.about`.
    """
    numbers: dict[str, Any] = {"agreement.json": document}
    if curves:
        numbers["risk_coverage.csv"] = arrow_csv(curves_table(curves))
    if posteriors:
        numbers["posteriors.csv"] = arrow_csv(pa.concat_tables(posteriors))
    return write_page(agreement_page(as_json(document), answers), numbers, folder)


def write_winrate(
    rates: Sequence[VersusRate], about: Mapping[str, Any], folder: Path, answers: Sequence[tuple[str, str]] = ()
) -> list[Path]:
    """Write the page and winrate.json; returns all paths."""
    rows = as_json(rates)
    return write_page(winrate_page(about, rows, answers), {"winrate.json": {**about, "runs": rows}}, folder)
