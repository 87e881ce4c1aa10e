"""Win rate of the policy over its base from pairwise verdicts in both orders.

A pair is a win only if both orders name the policy, a loss only if both name the base, else a tie. A pair with an
unread verdict is none of these: it is counted, left out of the rates, and enters bounds on the score.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.stats.bootstrap import Interval, bootstrap_mean
from ray_pipeline.stats.protocol import Protocol
from ray_pipeline.store.keys import digest
from ray_pipeline.store.schemas import READ_STATUSES

Vote = Literal["policy", "base", "tie"]
Outcome = Literal["win", "tie", "loss", "unread"]

#: Points of a decided pair.
POINTS: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}
# Possible votes of an unread order.
_POSSIBLE: tuple[Vote, ...] = ("policy", "base", "tie")


@dataclass(frozen=True)
class PairDecision:
    """One judge's decision on one pair; a vote is None where that order is unread."""

    pair_id: str
    prompt_id: str
    vote_ab: Vote | None
    vote_ba: Vote | None
    outcome: Outcome
    flipped: bool


@dataclass(frozen=True)
class WinRate:
    """Rates are shares of the `decided` pairs (both orders read), None when there is none.

    score = (wins + ties/2) / decided; 0.5 means neither better nor worse. `score_worst` and `score_best` are the score
    over all pairs if every unread verdict had gone against or for the policy (a pair's read order keeps its vote).
    flip_rate = share of decided pairs whose two orders have different winners.
    """

    judge: str
    pairs: int
    decided: int
    wins: int
    ties: int
    losses: int
    unread: int
    flips: int
    win_rate: float | None
    tie_rate: float | None
    loss_rate: float | None
    flip_rate: float | None
    score: Interval
    win_interval: Interval
    score_worst: float | None
    score_best: float | None


def choice_to_vote(choice: str, order: str) -> Vote:
    """The model behind a choice: in order "ab" answer A is the policy's, in "ba" it is the base's; "C" is a tie."""
    if order not in ("ab", "ba"):
        raise ValueError(f'order must be "ab" or "ba", got {order!r}')
    if choice == "C":
        return "tie"
    if choice not in ("A", "B"):
        raise ValueError(f'choice must be "A", "B" or "C", got {choice!r}')
    return "policy" if (choice == "A") == (order == "ab") else "base"


def decide_pairs(comparisons: pa.Table, judge: str) -> list[PairDecision]:
    """The decision of `judge` on each pair, sorted by pair_id.

    A verdict is read when its parse_status is ok or repaired and its choice is not null; an order
    without a row is unread too. Raises ValueError for a second row of the same pair and order, and for a pair
    whose rows have different prompts.
    """
    votes: dict[str, dict[str, Vote | None]] = {}
    prompts: dict[str, str] = {}
    columns = ["pair_id", "prompt_id", "judge", "order", "choice", "parse_status"]
    for row in comparisons.select(columns).to_pylist():
        if row["judge"] != judge:
            continue
        pair_id, order = row["pair_id"], row["order"]
        of_pair = votes.setdefault(pair_id, {})
        if order in of_pair:
            raise ValueError(f"comparisons: pair {pair_id} has two rows of judge {judge} in order {order}")
        if prompts.setdefault(pair_id, row["prompt_id"]) != row["prompt_id"]:
            raise ValueError(f"comparisons: pair {pair_id} has two different prompt_ids")
        read = row["choice"] is not None and row["parse_status"] in READ_STATUSES
        of_pair[order] = choice_to_vote(row["choice"], order) if read else None
    return [_decide(pair_id, prompts[pair_id], votes[pair_id]) for pair_id in sorted(votes)]


def win_rate(comparisons: pa.Table, judge: str | None = None, *, draws: int = 2000, seed: int = 0) -> WinRate:
    """Win rate of the policy by one judge; `judge` may be left out when the table holds only one.

    `comparisons` has columns pair_id, prompt_id, judge, order, choice, parse_status; rows in any order.
    """
    judges = judges_of(comparisons)
    if judge is None:
        if len(judges) != 1:
            raise ValueError(f"several judges {judges}, whose verdicts are not pooled; pass judge=")
        judge = judges[0]
    decisions = decide_pairs(comparisons, judge)
    decided = [d for d in decisions if d.outcome != "unread"]
    counts = {o: sum(d.outcome == o for d in decisions) for o in ("win", "tie", "loss", "unread")}
    flips = sum(d.flipped for d in decided)
    prompts = [d.prompt_id for d in decided]
    bounds = np.array([_bounds(d) for d in decisions], dtype=np.float64).reshape(-1, 2)

    def share(count: int) -> float | None:
        return count / len(decided) if decided else None

    return WinRate(
        judge=judge,
        pairs=len(decisions),
        decided=len(decided),
        wins=counts["win"],
        ties=counts["tie"],
        losses=counts["loss"],
        unread=counts["unread"],
        flips=flips,
        win_rate=share(counts["win"]),
        tie_rate=share(counts["tie"]),
        loss_rate=share(counts["loss"]),
        flip_rate=share(flips),
        score=bootstrap_mean([POINTS[d.outcome] for d in decided], prompts, draws, seed, bounds=(0, 1)),
        win_interval=bootstrap_mean([float(d.outcome == "win") for d in decided], prompts, draws, seed, bounds=(0, 1)),
        score_worst=float(bounds[:, 0].mean()) if decisions else None,
        score_best=float(bounds[:, 1].mean()) if decisions else None,
    )


def win_rates(comparisons: pa.Table, *, draws: int = 2000, seed: int = 0) -> list[WinRate]:
    """Win rate by every judge of the table, sorted by name."""
    return [win_rate(comparisons, judge, draws=draws, seed=seed) for judge in judges_of(comparisons)]


def judges_of(comparisons: pa.Table) -> list[str]:
    """Names of the judges in a comparisons table, sorted."""
    return sorted(comparisons.column("judge").unique().to_pylist())


def completed_protocol(
    asked: Protocol, comparisons: pa.Table, judge: str, responses: pa.Table | None = None, *, controlled: bool = False
) -> Protocol:
    """The protocol of a judge's win rate, completed from the tables: the prompts compared and the base's answers.

    Args:
        asked: the protocol known before the first call (`protocol.win_rate_by`).
        responses: columns prompt_id, model, response and, where there are several, mode; without a table
            `reference_answers` stays None.
        controlled: whether this is the length-controlled variant.
    """
    own = comparisons.filter(pc.equal(comparisons["judge"], judge))
    prompts = sorted(set(own["prompt_id"].to_pylist()))
    answers = None
    if responses is not None:
        wanted = set(prompts)
        answers = digest(
            sorted(
                [row["prompt_id"], str(row.get("mode")), row["response"] or ""]
                for row in responses.to_pylist()
                if row["model"] == "base" and row["prompt_id"] in wanted
            )
        )
    return dataclasses.replace(
        asked,
        metric="LC" if controlled else asked.metric,
        questions=digest(prompts),
        reference_answers=answers,
        estimator="two weights (model, length), read at equal length" if controlled else "wins and half the ties",
    )


def _decide(pair_id: str, prompt_id: str, votes: dict[str, Vote | None]) -> PairDecision:
    ab, ba = votes.get("ab"), votes.get("ba")
    if ab is None or ba is None:
        return PairDecision(pair_id, prompt_id, ab, ba, "unread", False)
    flipped = ab != ba and "tie" not in (ab, ba)
    return PairDecision(pair_id, prompt_id, ab, ba, _outcome(ab, ba), flipped)


def _outcome(ab: Vote, ba: Vote) -> Outcome:
    if ab != ba or ab == "tie":
        return "tie"
    return "win" if ab == "policy" else "loss"


def _bounds(decision: PairDecision) -> tuple[float, float]:
    """Fewest and most points possible for the pair, over all values of its unread votes."""
    options_ab = _POSSIBLE if decision.vote_ab is None else (decision.vote_ab,)
    options_ba = _POSSIBLE if decision.vote_ba is None else (decision.vote_ba,)
    points = [POINTS[_outcome(ab, ba)] for ab in options_ab for ba in options_ba]
    return min(points), max(points)
