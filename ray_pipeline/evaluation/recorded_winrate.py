"""Win rates of configurations against baselines, from ballots on (own answer, baseline's answer)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from ray_pipeline.agents.jury import MISSING, TIE, A, B
from ray_pipeline.agents.strategies import Conflict
from ray_pipeline.evaluation.panel import Evaluator, flips, make_panel
from ray_pipeline.evaluation.vote_agreement import Estimate, item_draws, ratio


@dataclasses.dataclass(frozen=True)
class VersusRate:
    """One configuration against one baseline; rates are percentages of all `n` items, so ties and missing are no wins.

    Attributes:
        win_rate: strict wins / n.
        half_tie_rate: (wins + ties / 2) / n.
        bounds: win rate had every missing verdict been a loss, and had it been a win.
        flip_rate: share (not percentage) of items whose two orders name different winners; None with one order.
    """

    run: str
    configuration: str
    baseline: str | None
    n: int
    wins: int
    ties: int
    losses: int
    missing: int
    win_rate: Estimate
    half_tie_rate: float | None
    bounds: tuple[float | None, float | None]
    flip_rate: Estimate
    parse_status: dict[str, int]


def versus_rates(
    items: pa.Table, ballots: pa.Table, *, conflict: Conflict = "tie", draws: int = 2000, seed: int = 0
) -> list[VersusRate]:
    """The win rate of every judge of strategy `versus`, whose name says the run: `configuration-vs-baseline`.

    An item counts for a run when there is a ballot of it, read or not.
    """
    panel = make_panel(items, ballots, conflict)
    there: dict[str, set[str]] = {}
    for row in ballots.select(["item_id", "strategy", "judge"]).to_pylist():
        if row["strategy"] == "versus":
            there.setdefault(row["judge"], set()).add(row["item_id"])
    counts = item_draws(len(panel.item_ids), draws, seed)
    return [_rate(e, np.array([item in there[e.judge] for item in panel.item_ids]), counts) for e in panel.of("versus")]


def _rate(evaluator: Evaluator, asked: np.ndarray, draws: np.ndarray) -> VersusRate:
    votes, n = evaluator.votes, int(asked.sum())
    wins, ties, losses = (int(((votes == code) & asked).sum()) for code in (A, TIE, B))
    missing = int(((votes == MISSING) & asked).sum())
    flipped = flips(evaluator)
    configuration, _, baseline = evaluator.judge.partition("-vs-")
    rate = ratio(100.0 * (votes == A), asked.astype(float), draws)
    return VersusRate(
        run=evaluator.judge,
        configuration=configuration,
        baseline=baseline or None,
        n=n,
        wins=wins,
        ties=ties,
        losses=losses,
        missing=missing,
        # The quotient itself: the sum of n times 100/n differs from it in the last digits.
        win_rate=dataclasses.replace(rate, value=100 * wins / n if n else None),
        half_tie_rate=100 * (wins + ties / 2) / n if n else None,
        bounds=(100 * wins / n, 100 * (wins + missing) / n) if n else (None, None),
        flip_rate=Estimate(None)
        if flipped is None
        else ratio(flipped[0].astype(float), flipped[1].astype(float), draws),
        parse_status={k: v for k, v in evaluator.statuses.items() if k != "absent"},
    )
