"""Win rates of configurations against baselines, from ballots on (own answer, baseline's answer)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.agents.jury import MISSING, TIE, A, B
from ray_pipeline.agents.strategies import Conflict
from ray_pipeline.agreement.panel import Evaluator, flips, make_panel
from ray_pipeline.stats.bootstrap import Estimate, Samples, ratio, resample
from ray_pipeline.stats.protocol import Protocol
from ray_pipeline.store.keys import digest

#: Protocol of recorded verdicts: a recorded file contains neither the judge nor its prompt.
RECORDED = Protocol(benchmark="win rate", judge="not named by the recording")


@dataclasses.dataclass(frozen=True)
class VersusRate:
    """One configuration against one baseline; rates are percentages of all `n` items: ties and missing are not wins.

    Attributes:
        win_rate: strict wins / n.
        half_tie_rate: (wins + ties / 2) / n.
        bounds: win rate had every missing verdict been a loss, and had it been a win.
        flip_rate: share (not percentage) of items whose two orders name different winners; None with one order.
        protocol, fingerprint: what the rate was measured with; two runs compare only where all but the reference are
            the same.
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
    protocol: Protocol
    fingerprint: str


def versus_rates(
    items: pa.Table,
    ballots: pa.Table,
    *,
    conflict: Conflict = "tie",
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    asked: Protocol | Mapping[str, Protocol] = RECORDED,
) -> list[VersusRate]:
    """The win rate of every judge of strategy `versus`, whose name is that of the run: `configuration-vs-baseline`.

    An item counts for a run when there is a ballot of it, read or not.

    Args:
        items: columns item_id, prompt_id and those that `panel.make_panel` reads.
        asked: known parts of the verdicts' protocol (judge, its prompt and sampling, reading), of all runs or
            by run; items, orders and reference are filled in here.
    """
    panel = make_panel(items, ballots, conflict)
    there: dict[str, set[str]] = {}
    for row in ballots.select(["item_id", "strategy", "judge"]).to_pylist():
        if row["strategy"] == "versus":
            there.setdefault(row["judge"], set()).add(row["item_id"])
    samples = resample(panel.questions, draws, seed, confidence)
    texts = {row["item_id"]: row for row in items.select(["item_id", "prompt_id", "response_b"]).to_pylist()}
    found = []
    for evaluator in panel.of("versus"):
        shown = [item for item in panel.item_ids if item in there[evaluator.judge]]
        known = asked if isinstance(asked, Protocol) else asked.get(evaluator.judge, RECORDED)
        protocol = _protocol(known, evaluator, [texts[item] for item in shown], conflict)
        places = np.array([item in there[evaluator.judge] for item in panel.item_ids])
        found.append(_rate(evaluator, places, samples, protocol))
    return found


def _protocol(
    asked: Protocol, evaluator: Evaluator, items: Sequence[Mapping[str, Any]], conflict: Conflict
) -> Protocol:
    """What a run was measured with. Without texts of the baseline its answers are named by nothing."""
    orders = [order for order, votes in (("ab", evaluator.ab), ("ba", evaluator.ba)) if votes is not None]
    answers = sorted([item["item_id"], item["response_b"]] for item in items if item["response_b"] is not None)
    return dataclasses.replace(
        asked,
        questions=digest(sorted([item["item_id"], item["prompt_id"]] for item in items)),
        order=f"both orders, conflict: {conflict}" if len(orders) == 2 else f"one order, {orders[0]}",
        reference=evaluator.judge.partition("-vs-")[2] or asked.reference,
        reference_answers=digest(answers) if answers else asked.reference_answers,
        estimator="strict wins over all items",
    )


def _rate(evaluator: Evaluator, asked: np.ndarray, samples: Samples, protocol: Protocol) -> VersusRate:
    votes, n = evaluator.votes, int(asked.sum())
    wins, ties, losses = (int(((votes == code) & asked).sum()) for code in (A, TIE, B))
    missing = int(((votes == MISSING) & asked).sum())
    flipped = flips(evaluator)
    configuration, _, baseline = evaluator.judge.partition("-vs-")
    share = ratio(((votes == A) & asked).astype(float), asked.astype(float), samples)
    low, high = (None if end is None else 100 * end for end in (share.low, share.high))
    return VersusRate(
        run=evaluator.judge,
        configuration=configuration,
        baseline=baseline or None,
        n=n,
        wins=wins,
        ties=ties,
        losses=losses,
        missing=missing,
        win_rate=Estimate(100 * wins / n if n else None, low, high),
        half_tie_rate=100 * (wins + ties / 2) / n if n else None,
        bounds=(100 * wins / n, 100 * (wins + missing) / n) if n else (None, None),
        flip_rate=Estimate(None)
        if flipped is None
        else ratio(flipped[0].astype(float), flipped[1].astype(float), samples),
        parse_status={k: v for k, v in evaluator.statuses.items() if k != "absent"},
        protocol=protocol,
        fingerprint=protocol.fingerprint(),
    )
