"""Picture and table of a comparison at equal steps: what each dataset changes in the share of right answers.

    python perf/gains_picture.py runs/pocket_ablations docs/pocket_ablations.svg

Read are methods.csv and differences.csv of the run's report. A gain is paired: the same seed on both datasets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from ray_pipeline.report.charts import Chart, Dot, dots, standalone
from ray_pipeline.report.markdown import markdown_table
from ray_pipeline.stats.bootstrap import Interval

_COLOURS = ("blue", "orange", "green", "purple")
#: Gains beyond it are in the table alone.
_WIDEST = 0.3


def chart(gains: pd.DataFrame, over: str) -> Chart:
    """Gains in points, with their standard errors over seeds."""
    colours = dict(zip(gains["method"].unique(), _COLOURS, strict=False))
    rows = []
    for data, group in gains[gains["gain"].abs() <= _WIDEST].groupby("data", sort=False):
        marks = [
            Dot(
                one.method,
                colours[one.method],
                Interval(100 * one.gain, 100 * (one.gain - one.error), 100 * (one.gain + one.error)),
            )
            for one in group.itertuples()
        ]
        rows.append((str(data), marks))
    ends = (-100 * _WIDEST, 100 * _WIDEST / 3)
    note = "± standard error over seeds, equal optimiser steps"
    drawn = dots(f"Right answers, points above {over}", rows, ends, shares=False, line=(0.0, over), note=note)
    assert drawn is not None
    return drawn


def table(methods: pd.DataFrame, gains: pd.DataFrame) -> str:
    """One line a dataset: for each method rows, right answers and the gain."""
    names = methods["method"].unique()
    gain = {(one.method, one.data): f"{100 * one.gain:+.1f} ± {100 * one.error:.1f}" for one in gains.itertuples()}
    lines = []
    for data, group in methods.groupby("data", sort=False):
        line = [str(data)]
        for one in group.itertuples():
            right = f"{100 * one.accuracy_greedy:.1f} ± {100 * one.accuracy_greedy_error:.1f} %"
            line += [f"{one.rows:,}", right, gain.get((one.method, data), "")]
        lines.append(line)
    columns = ["data", *(f"{name}: {part}" for name in names for part in ("rows", "right", "gain"))]
    return markdown_table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of `quorum run baselines`")
    parser.add_argument("file", type=Path, help="SVG file to write")
    given = parser.parse_args()
    methods, gains = (pd.read_csv(given.run / "report" / f"{name}.csv") for name in ("methods", "differences"))
    methods = methods[methods["reading"] == "steps"]
    gains = gains[(gains["reading"] == "steps") & (gains["measure"] == "accuracy greedy")]
    given.file.write_text(standalone(chart(gains, gains["over"].iloc[0])), encoding="utf-8")
    print(table(methods, gains))


if __name__ == "__main__":
    main()
