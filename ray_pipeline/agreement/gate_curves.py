"""The gate's risk–coverage curves on an agreement panel: one for each strategy that scores both answers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.agents.jury import MISSING, VOTES
from ray_pipeline.agreement.panel import Panel
from ray_pipeline.agreement.risk_coverage import RiskCoverage, Thresholds, risk_coverage

#: Desirable from and undesirable to, as shares of a scale's end; the first pair are the gate's defaults.
THRESHOLDS: tuple[tuple[float, float], ...] = ((0.7, 0.4), (0.8, 0.3), (0.6, 0.5))
#: The gate's default τ, of scores that end at 10; on another scale it is as many squares of it (`tau_of`). It is always
#: on the curve.
TAU = 2.5
_MOST_TAUS = 40


@dataclasses.dataclass(frozen=True)
class GateCurve:
    """The curve of the judges of one strategy together."""

    strategy: str
    judges: tuple[str, ...]
    curve: RiskCoverage

    @property
    def tau(self) -> float:
        return tau_of(self.strategy)

    @property
    def points(self) -> list[dict[str, Any]]:
        """By thresholds, every point where a pair is kept: τ, coverage, agreement and its bounds."""
        rows = [row for row in self.curve.table.to_pylist() if row["kept"]]
        return [
            {
                "strategy": self.strategy,
                "desirable_at": None if pair is None else pair[0],
                "undesirable_at": None if pair is None else pair[1],
                **{
                    name: [row[name] for row in rows if _pair_of(row) == pair]
                    for name in ("tau", "coverage", "agreement", "agreement_low", "agreement_high")
                },
            }
            for pair in self.curve.areas
        ]

    @property
    def summary(self) -> list[dict[str, Any]]:
        """By thresholds: the area under the curve, and coverage and agreement at the default τ."""
        at_tau = [row for row in self.curve.table.to_pylist() if row["tau"] == self.tau]
        areas = list(self.curve.areas.items())
        return [
            {
                "strategy": self.strategy,
                "judges": len(self.judges),
                "tau": self.tau,
                "desirable_at": None if pair is None else pair[0],
                "undesirable_at": None if pair is None else pair[1],
                "area": area,
                **{k: row[k] for k in ("pairs", "kept", "coverage", "agreement", "agreement_low", "agreement_high")},
            }
            for (pair, area), row in zip(areas, at_tau, strict=True)
        ]


def scale_end(strategy: str) -> int | None:
    """The maximum of a strategy's scores: the number at the end of its name (`independent_10`, `combined_100`)."""
    end = re.search(r"_(\d+)$", strategy)
    return None if end is None else int(end[1])


def tau_of(strategy: str) -> float:
    """The gate's τ on the scale of a strategy: a variance goes with the square of the scale."""
    return TAU * ((scale_end(strategy) or 10) / 10) ** 2


def _pair_of(row: Mapping[str, Any]) -> Thresholds:
    return None if row["desirable_at"] is None else (row["desirable_at"], row["undesirable_at"])


def gate_curves(
    panel: Panel,
    shares: Sequence[tuple[float, float]] = THRESHOLDS,
    *,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[GateCurve]:
    """Curves over every variance that occurs (at most 40 of them), where two or more judges of a strategy gave scores.

    Args:
        shares: thresholds as shares of the scale's end (`scale_end`). A strategy without one has the curve of τ alone.
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
        if (end := scale_end(strategy)) is not None:
            # Rounded, since 0.7 · 100 is not 70 in binary.
            thresholds += [(round(share * end, 9), round(other * end, 9)) for share, other in shares]
        taus = _taus(a, b, tau_of(strategy))
        curve = risk_coverage(
            a, b, labels, taus, thresholds, panel.questions, draws=draws, seed=seed, confidence=confidence
        )
        found.append(GateCurve(strategy, tuple(judge for judge, _ in scored), curve))
    return found


def _taus(a: np.ndarray, b: np.ndarray, tau: float) -> Sequence[float]:
    variances = np.maximum(a.var(axis=0, ddof=1), b.var(axis=0, ddof=1)).round(9)
    known = np.unique(variances[~np.isnan(variances)])
    if len(known) > _MOST_TAUS:
        known = known[np.linspace(0, len(known) - 1, _MOST_TAUS).round().astype(int)]
    return sorted({*known.tolist(), tau})


def curves_table(curves: Sequence[GateCurve]) -> pa.Table:
    """All curves as one table, with the columns `strategy` and `judges` before those of `risk_coverage.CURVE`."""
    parts = []
    for one in curves:
        table = one.curve.table
        for place, (name, value) in enumerate((("strategy", one.strategy), ("judges", " + ".join(one.judges)))):
            table = table.add_column(place, pa.field(name, pa.string(), False), pa.array([value] * len(table)))
        parts.append(table)
    return pa.concat_tables(parts)
