"""Pooling of several judges' verdicts on the same answers into one verdict, by a named rule.

Votes are codes so that all juries of a panel are pooled at once: rows of a boolean matrix are juries, columns judges.
A judge without a verdict abstains; a jury whose members all abstain has no verdict.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Votes on two answers in the order of the scale from "A is better" to "B is better"; a code is the position here.
VOTES = ("A", "tie", "B")
A, TIE, B, MISSING = 0, 1, 2, -1

#: mode: the most frequent vote if it is the only one, else a tie. weighted: the same with a weight for each judge.
#: mean, median, weighted_mean: the scores of each answer are pooled and the pooled scores compared.
PoolRule = Literal["mode", "weighted", "mean", "median", "weighted_mean"]
VOTE_RULES: tuple[PoolRule, ...] = ("mode", "weighted")

Codes = NDArray[np.int8]

#: Scores closer than this are equal: a mean of thirds is not exact in binary.
_EQUAL = 1e-9


def vote_code(vote: str | None) -> int:
    """The code of "A", "tie" or "B"; None is `MISSING`. Raises ValueError for anything else."""
    if vote is None:
        return MISSING
    if vote not in VOTES:
        raise ValueError(f"unknown vote {vote!r}; use A, B or tie")
    return VOTES.index(vote)


def vote_codes(votes: Sequence[str | None]) -> Codes:
    return np.array([vote_code(v) for v in votes], dtype=np.int8)


def compare_scores(scores_a: ArrayLike, scores_b: ArrayLike) -> Codes:
    """A where it scored higher, B where lower, tie where equal; missing where a score is NaN. Any shape."""
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        found = np.where(a > b + _EQUAL, A, np.where(a < b - _EQUAL, B, TIE))
    return np.where(np.isnan(a) | np.isnan(b), MISSING, found).astype(np.int8)


def subsets(judges: int, sizes: Sequence[int]) -> NDArray[np.bool_]:
    """All juries of the given sizes, smallest first, shape (juries, judges)."""
    members = [c for size in sizes for c in itertools.combinations(range(judges), size)]
    chosen = np.zeros((len(members), judges), dtype=bool)
    for row, columns in enumerate(members):
        chosen[row, list(columns)] = True
    return chosen


def pool_votes(codes: Codes, members: NDArray[np.bool_], weights: ArrayLike | None = None) -> Codes:
    """The heaviest vote of each jury if it is unique, else a tie.

    Args:
        codes: shape (judges, items).
        members: shape (juries, judges).
        weights: weight of each judge, shape (judges,); default: equal weights.

    Returns:
        Shape (juries, items).
    """
    share = members * (1.0 if weights is None else np.asarray(weights, dtype=np.float64))
    support = np.stack([share @ (codes == code).astype(np.float64) for code in range(len(VOTES))])
    top = support.max(axis=0)
    leaders = support >= top - _EQUAL
    pooled = np.where(leaders.sum(axis=0) == 1, leaders.argmax(axis=0), TIE)
    return np.where(top > 0, pooled, MISSING).astype(np.int8)


def pool_scores(
    scores: NDArray[np.float64], members: NDArray[np.bool_], rule: PoolRule, weights: ArrayLike | None = None
) -> NDArray[np.float64]:
    """The pooled score of each answer by each jury, over the members that scored all answers of the item.

    Args:
        scores: shape (answers, judges, items), NaN where unread.
        members: shape (juries, judges).

    Returns:
        Shape (answers, juries, items), NaN where every member is unread.
    """
    read: NDArray[np.bool_] = np.asarray(~np.isnan(scores).any(axis=0))
    if rule == "median":
        pooled = np.full((len(scores), len(members), scores.shape[2]), np.nan)
        whole = np.where(read, scores, np.nan)
        for row, chosen in enumerate(members):
            some = read[chosen].any(axis=0)
            pooled[:, row, some] = np.nanmedian(whole[:, chosen][:, :, some], axis=1)
        return pooled
    if rule not in ("mean", "weighted_mean"):
        raise ValueError(f"rule {rule} pools votes, not scores; use mean, median or weighted_mean")
    if rule == "weighted_mean" and weights is None:
        raise ValueError("rule weighted_mean needs a weight for every judge")
    share = members * (1.0 if weights is None or rule == "mean" else np.asarray(weights, dtype=np.float64))
    total = share @ read.astype(np.float64)
    sums = np.stack([share @ np.where(read, answer, 0.0) for answer in scores])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, sums / total, np.nan)


def pooled_vote(votes: Sequence[str | None], weights: Sequence[float] | None = None) -> str | None:
    """One jury's vote on one item."""
    codes = vote_codes(votes)[:, None]
    (((code,)),) = pool_votes(codes, np.ones((1, len(votes)), dtype=bool), weights)
    return None if code == MISSING else VOTES[code]


def jury_names(judges: Sequence[str], members: NDArray[np.bool_]) -> Iterator[tuple[str, ...]]:
    """The members of each jury by name."""
    for chosen in members:
        yield tuple(name for name, sits in zip(judges, chosen, strict=True) if sits)
