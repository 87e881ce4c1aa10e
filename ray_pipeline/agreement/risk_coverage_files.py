"""The gate's risk–coverage curves as risk_coverage.csv and risk_coverage.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.csv

from ray_pipeline.agreement.gate_curves import GateCurve, curves_table
from ray_pipeline.report.markdown import visible


def write_risk_coverage(curves: Sequence[GateCurve], folder: Path) -> Path | None:
    """Both files; returns the path of the plot, or None where there is no curve (and no file is written)."""
    if not curves:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.csv.write_csv(curves_table(curves), folder / "risk_coverage.csv")
    return draw_curves(curves, folder / "risk_coverage.png")


def draw_curves(curves: Sequence[GateCurve], path: Path) -> Path:
    """Agreement with humans over coverage: a panel a strategy, a line a pair of thresholds, a dot at the gate's τ."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"font.family": "DejaVu Sans", "font.size": 9, "figure.dpi": 120, "text.parse_math": False}
        )
        figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, one in zip(panels, curves, strict=True):
            for points in one.points:
                if not points["tau"]:
                    continue
                upper, lower = points["desirable_at"], points["undesirable_at"]
                label = "variance alone" if upper is None else f"≥ {upper:g} and ≤ {lower:g}"
                (line,) = axes.plot(points["coverage"], points["agreement"], label=label, lw=1.4)
                for tau, coverage, agreed in zip(points["tau"], points["coverage"], points["agreement"], strict=True):
                    if tau == one.tau:
                        axes.plot([coverage], [agreed], "o", color=line.get_color(), ms=4)
            axes.set(xlabel="share kept", ylabel="agreement with humans", xlim=(0, 1.02), ylim=(0, 1.02))
            axes.set_title(f"{' '.join(visible(one.strategy).split())}, {len(one.judges)} judges")
            axes.legend(fontsize=8, loc="lower left")
        figure.savefig(path, metadata={"Software": None})
        figure.clear()
    return path
