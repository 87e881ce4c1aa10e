"""Votes of a whole panel pooled without human labels, by majority and by a latent class model, beside the best judge.

No pool is fitted on human labels. What the labels do choose is chosen on one part of the items and reported on the
others: the best judge, and from which confidence on a pool's votes agree with humans often enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_pipeline.agents.jury import MISSING, TIE, VOTES, Codes, pool_votes
from ray_pipeline.agreement.panel import Evaluator, Panel
from ray_pipeline.agreement.vote_agreement import agreement, held_out_choice
from ray_pipeline.stats.bootstrap import Estimate, Floats, Samples, ratio
from ray_pipeline.stats.judge_errors import dawid_skene

#: Agreement with humans at which the share of covered items is given.
LEVEL = 0.9
#: Probabilities and shares are compared to so many digits: sums differ in the last ones.
_DIGITS = 9


@dataclasses.dataclass(frozen=True)
class Covered:
    """The items of a pool's highest confidence.

    Attributes:
        threshold: lowest confidence at which votes on the choosing part agree with humans in `LEVEL` of the items; None
            where they never do, and nothing is covered.
        coverage: share of the other labelled items with at least that confidence.
        agreement: with the labels, over the covered items.
    """

    threshold: float | None
    coverage: Estimate
    agreement: Estimate


@dataclasses.dataclass(frozen=True)
class PoolLine:
    """One verdict for each item from all judges of a strategy, or from the best of them.

    Attributes:
        pool: majority, Dawid–Skene or best judge.
        judge: the best judge, that of the highest kappa on the choosing part.
        items: labelled ones outside the choosing part.
        held_out: kappa over these.
        kappa: over all labelled items; for the best judge, with those on which it was chosen.
        covered: None for a single judge, which has no confidence.
    """

    strategy: str
    pool: str
    judge: str | None
    items: int
    held_out: Estimate
    kappa: Estimate
    covered: Covered | None


def latent_votes(codes: Codes) -> tuple[Codes, Floats]:
    """The most probable class of each item by the latent class model of Dawid and Skene (1979).

    It is fitted to the votes on all items, labelled or not; missing votes are left out. Items with equal votes are
    counted once, so time and memory go with the number of distinct rows of votes. With two judges nothing shows which
    of them errs, and where they differ the result is hardly more than a convention.

    Args:
        codes: shape (judges, items).

    Returns:
        Votes, shape (items,), a tie where several classes lead; and the probability of each of `VOTES`, shape
        (items, 3). Items without a vote have a missing one, and NaN.
    """
    votes, probabilities = np.full(codes.shape[1], MISSING, np.int8), np.full((codes.shape[1], len(VOTES)), np.nan)
    voted = np.flatnonzero((codes != MISSING).any(axis=0))
    if not len(voted):
        return votes, probabilities
    rows, place = _distinct(codes[:, voted].T)
    found = dawid_skene(rows, np.bincount(place).astype(np.float64), classes=len(VOTES)).round(_DIGITS)
    leaders = found == found.max(axis=1, keepdims=True)
    winner = np.where(leaders.sum(axis=1) == 1, found.argmax(axis=1), TIE).astype(np.int8)
    votes[voted], probabilities[voted] = winner[place], found[place]
    return votes, probabilities


def _distinct(rows: Codes) -> tuple[Codes, NDArray[np.int64]]:
    """Distinct rows in order, and the place of each row among them. They are hashed, since sorting all takes longer."""
    data = pa.py_buffer(np.ascontiguousarray(rows).tobytes())
    hashed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, data]).dictionary_encode()
    words = np.frombuffer(b"".join(hashed.dictionary.to_pylist()), np.int8).reshape(-1, rows.shape[1])
    found, place = np.unique(words, axis=0, return_inverse=True)
    return found, place.reshape(-1)[hashed.indices.to_numpy()]


def compare_pools(
    strategy: str, judges: Sequence[Evaluator], panel: Panel, choose_on: NDArray[np.bool_], samples: Samples
) -> tuple[list[PoolLine], pa.Table]:
    """Both pools of all judges and the best judge, and the latent class model's probabilities.

    Args:
        choose_on: shape (items,); the other items are held out.

    Returns:
        No lines without labels on both parts; and a table with a row for each item: strategy, item_id, vote, and the
        probabilities A, tie, B.
    """
    codes = np.stack([e.votes for e in judges])
    (majority,) = pool_votes(codes, np.ones((1, len(codes)), dtype=bool))
    latent, probabilities = latent_votes(codes)
    table = pa.table(
        {
            "strategy": pa.array([strategy] * len(latent), pa.string()),
            "item_id": pa.array(panel.item_ids, pa.string()),
            "vote": pa.array([None if code == MISSING else VOTES[code] for code in latent.tolist()], pa.string()),
            **{
                vote: pa.array(p, pa.float64(), from_pandas=True)
                for vote, p in zip(VOTES, probabilities.T, strict=True)
            },
        }
    )
    best = held_out_choice({e.judge: e.votes for e in judges}, panel.labels, choose_on, samples)
    held_out = np.where(choose_on, MISSING, panel.labels).astype(np.int8)
    if best is None or not (held_out != MISSING).any():
        return [], table
    read = np.maximum((codes != MISSING).sum(axis=0), 1)
    share = np.max([(codes == code).sum(axis=0) for code in range(len(VOTES))], axis=0) / read
    chosen = next(e.votes for e in judges if e.judge == best.chosen)
    rows = [
        ("majority", None, majority, share.round(_DIGITS)),
        ("Dawid–Skene", None, latent, probabilities.max(axis=1)),
        ("best judge", best.chosen, chosen, None),
    ]
    votes = np.stack([row[2] for row in rows])
    kappas, others = (
        [found.estimates["kappa"] for found in agreement(votes, labels, samples, ("kappa",))]
        for labels in (panel.labels, held_out)
    )
    return [
        PoolLine(
            strategy=strategy,
            pool=pool,
            judge=judge,
            items=int((held_out != MISSING).sum()),
            held_out=other,
            kappa=kappa,
            covered=None if sure is None else _covered(own, sure, panel.labels, choose_on, samples),
        )
        for (pool, judge, own, sure), kappa, other in zip(rows, kappas, others, strict=True)
    ], table


def _covered(votes: Codes, sure: Floats, labels: Codes, choose_on: NDArray[np.bool_], samples: Samples) -> Covered:
    """`sure`: confidence in each vote, shape (items,), NaN where there is none."""
    labelled = labels != MISSING
    right = (votes == labels) & labelled & (votes != MISSING)
    on = labelled & choose_on & (votes != MISSING)
    levels, place = np.unique(-sure[on], return_inverse=True)
    items, agreeing = (np.cumsum(np.bincount(place, weights=w)) for w in (np.ones(len(place)), right[on]))
    enough = np.flatnonzero(agreeing >= LEVEL * items - 1e-9)
    threshold = -float(levels[enough[-1]]) if len(enough) else None
    with np.errstate(invalid="ignore"):
        kept = labelled & ~choose_on & (votes != MISSING) & (sure >= (np.inf if threshold is None else threshold))
    return Covered(
        threshold,
        ratio(kept.astype(float), (labelled & ~choose_on).astype(float), samples),
        ratio((kept & right).astype(float), kept.astype(float), samples),
    )
