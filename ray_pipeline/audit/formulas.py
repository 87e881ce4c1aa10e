"""The formulas of gate and reward judges, written again for the audit, independently of `data/gate.py`,
`data/early_exit.py` and `data/rewards.py`.

Means and variances come from the standard library's exact `statistics`.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from ray_pipeline.audit.findings import Row
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.rewards import RewardJudge
from ray_pipeline.store.schemas import READ_STATUSES

#: Differences of scores up to this are rounding.
_ROUNDING = 1e-9
#: Stands for a verdict that was skipped.
OPEN = "open"


def is_skipped(row: Row | None) -> bool:
    """Whether a verdict or critique was not asked for, as it could change nothing."""
    return row is not None and row["parse_status"] == "skipped"


@functools.lru_cache(maxsize=1 << 16)
def label_without(scores: tuple[Any, ...], flawed: Any, gate: GateConfig, scale: tuple[int, int]) -> str:
    """The label that every reply in place of the skipped ones would give; incomplete where there are several.

    Args:
        scores: by judge; None: unread, OPEN: skipped. `flawed` likewise.
        scale: lowest and highest score of a judge.
    """
    labels = set()
    levels = [float(score) for score in range(scale[0], scale[1] + 1)]
    replies = [levels if score == OPEN else [score] for score in scores]
    for *judged, flaw in itertools.product(*replies, [True, False] if flawed == OPEN else [flawed]):
        decision = gate_numbers(judged, flaw, gate)
        labels.add(gate_label(None not in judged, flaw is not None, decision, gate))
    return labels.pop() if len(labels) == 1 else "incomplete"


def row_weight(sides: Sequence[tuple[Sequence[float | None], bool]], scale: tuple[int, int]) -> float:
    """The probability that a row is as labelled: all its sides, against all of them the other way round.

    Args:
        sides: of each response the judges' scores (None: unread) and whether it is the one to prefer.
        scale: lowest and highest score of a judge.
    """
    low, high = scale
    own = [
        (share if good else 1 - share)
        for scores, good in sides
        for share in (min(max((score - low) / (high - low), 0.05), 0.95) for score in scores if score is not None)
    ]
    right, wrong = math.prod(own), math.prod(1 - share for share in own)
    return right / (right + wrong)


def read_score(row: Row | None, column: str) -> Any:
    """The value of a verdict or critique; None if missing or unread."""
    if row is None or row["parse_status"] not in READ_STATUSES:
        return None
    value = row[column]
    return None if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def gate_numbers(scores: Sequence[float | None], flawed: bool | None, gate: GateConfig) -> dict[str, float | None]:
    """Mean, variance, penalty and final score of a candidate; each is None where a score or the critique is unread."""
    known = [score for score in scores if score is not None]
    whole = len(known) == len(scores)
    mean = statistics.mean(known) if whole else None
    variance = (statistics.variance(known) if len(known) > 1 else 0.0) if whole else None
    penalty = None if flawed is None else gate.alpha * flawed
    final = None if mean is None or penalty is None else mean * (1 - penalty)
    return {"mean_score": mean, "score_variance": variance, "penalty": penalty, "final_score": final}


def gate_label(scores_read: bool, critique_read: bool, decision: Row, gate: GateConfig) -> str:
    """The label that follows from the numbers of a stored decision."""
    if not scores_read:
        return "incomplete"
    if gate.use_variance and (decision["score_variance"] or 0) > gate.tau:
        return "abstain"
    if not critique_read or decision["final_score"] is None:
        return "incomplete"
    if decision["final_score"] >= gate.desirable_at:
        return "desirable"
    return "undesirable" if decision["final_score"] <= gate.undesirable_at else "discard"


def certified_label(label: str, decision: Row, gate: GateConfig, threshold: float | None) -> str:
    """The label of a certified gate, from that of the published one and the numbers of a stored decision."""
    if label == "incomplete" or decision["final_score"] is None:
        return label
    away = decision["final_score"] - (gate.desirable_at + gate.undesirable_at) / 2
    spread = decision["score_variance"] if gate.use_variance else 0.0
    if threshold is None or round(abs(away) / math.sqrt(1 + spread), 9) < threshold:
        return "abstain"
    return "desirable" if away >= 0 else "undesirable"


def close(found: float | None, expected: float | None) -> bool:
    """Whether two numbers are equal up to rounding; None equals only None."""
    if found is None or expected is None:
        return found is expected
    return abs(found - expected) <= _ROUNDING


def is_empty(response: str | None) -> bool:
    """Whether a response holds nothing but blanks."""
    return not (response or "").strip()


def reward_score(judge: RewardJudge, reward: float, others: Sequence[float]) -> float | None:
    """The score of a reward, from those of the prompt's other candidates."""
    if isinstance(judge.scale, str):
        worse = sum(1.0 if other < reward else 0.5 if other == reward else 0.0 for other in others)
        return judge.low + (judge.high - judge.low) * worse / len(others) if others else None
    (left, low), *rest = judge.scale
    if reward <= left:
        return low
    for right, high in rest:
        if reward <= right:
            return low + (high - low) * (reward - left) / (right - left)
        left, low = right, high
    return low
