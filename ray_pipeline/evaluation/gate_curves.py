"""The gate's risk–coverage curves on an agreement panel: one for each strategy that scores both answers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.agents.jury import MISSING, VOTES
from ray_pipeline.evaluation.panel import Panel
from ray_pipeline.evaluation.risk_coverage import RiskCoverage, Thresholds, risk_coverage

#: Desirable from and undesirable to, as shares of a scale's end; the first pair are the gate's defaults.
THRESHOLDS: tuple[tuple[float, float], ...] = ((0.7, 0.4), (0.8, 0.3), (0.6, 0.5))
#: The gate's default τ is always on the curve.
TAU = 2.5
_MOST_TAUS = 40


@dataclasses.dataclass(frozen=True)
class GateCurve:
    """The curve of the judges of one strategy together."""

    strategy: str
    judges: tuple[str, ...]
    curve: RiskCoverage

    @property
    def summary(self) -> list[dict[str, Any]]:
        """By thresholds: the area under the curve, and coverage and agreement at the default τ."""
        at_tau = [row for row in self.curve.table.to_pylist() if row["tau"] == TAU]
        areas = list(self.curve.areas.items())
        return [
            {
                "strategy": self.strategy,
                "judges": len(self.judges),
                "desirable_at": None if pair is None else pair[0],
                "undesirable_at": None if pair is None else pair[1],
                "area": area,
                **{k: row[k] for k in ("pairs", "kept", "coverage", "agreement", "agreement_low", "agreement_high")},
            }
            for (pair, area), row in zip(areas, at_tau, strict=True)
        ]


def gate_curves(
    panel: Panel, shares: Sequence[tuple[float, float]] = THRESHOLDS, *, draws: int = 2000, seed: int = 0
) -> list[GateCurve]:
    """Curves over every variance that occurs (at most 40 of them), where two or more judges of a strategy gave scores.

    Args:
        shares: thresholds as shares of the scale's end, which is the number at the end of the strategy's name
            (`independent_10`, `combined_100`). A strategy without one has the curve of τ alone.
    """
    labels = [None if code == MISSING else VOTES[code] for code in panel.labels.tolist()]
    if not any(labels):
        return []
    found = []
    for strategy in panel.strategies:
        scored = [(e.judge, e.scores) for e in panel.of(strategy) if e.scores is not None]
        if strategy in ("debate", "versus") or len(scored) < 2:
            continue
        scores = np.stack([s for _, s in scored])
        a, b = scores[:, 0], scores[:, 1]
        thresholds: list[Thresholds] = [None]
        if end := re.search(r"_(\d+)$", strategy):
            thresholds += [(share * int(end[1]), other * int(end[1])) for share, other in shares]
        curve = risk_coverage(a, b, labels, _taus(a, b), thresholds, draws=draws, seed=seed)
        found.append(GateCurve(strategy, tuple(judge for judge, _ in scored), curve))
    return found


def _taus(a: np.ndarray, b: np.ndarray) -> Sequence[float]:
    variances = np.maximum(a.var(axis=0, ddof=1), b.var(axis=0, ddof=1)).round(9)
    known = np.unique(variances[~np.isnan(variances)])
    if len(known) > _MOST_TAUS:
        known = known[np.linspace(0, len(known) - 1, _MOST_TAUS).round().astype(int)]
    return sorted({*known.tolist(), TAU})


def curves_table(curves: Sequence[GateCurve]) -> pa.Table:
    """All curves as one table, with the columns `strategy` and `judges` before those of `risk_coverage.CURVE`."""
    parts = []
    for one in curves:
        table = one.curve.table
        for place, (name, value) in enumerate((("strategy", one.strategy), ("judges", " + ".join(one.judges)))):
            table = table.add_column(place, pa.field(name, pa.string(), False), pa.array([value] * len(table)))
        parts.append(table)
    return pa.concat_tables(parts)
