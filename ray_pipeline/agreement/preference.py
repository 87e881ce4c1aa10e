"""Bias of an evaluator: how much more often than humans it prefers the longer, the first or its own family's answer."""

from __future__ import annotations

import dataclasses

import numpy as np

from ray_pipeline.agents.jury import MISSING, TIE, A, B, Codes
from ray_pipeline.stats.bootstrap import Estimate, Samples, drawn_ratio, estimate, ratio


@dataclasses.dataclass(frozen=True)
class Preference:
    """Share of decided votes (no ties) that go to one side, over the items that have such a side.

    Attributes:
        items: that have the side and a decided vote of the evaluator.
        share: of the evaluator.
        human: the same share of the human labels; None without labels.
        bias: share − human, resampled together.
    """

    items: int
    share: Estimate
    human: Estimate
    bias: Estimate


def preference(votes: Codes, labels: Codes, side: Codes, samples: Samples) -> Preference | None:
    """The preference for `side` (a vote code an item, `MISSING` where there is none); None where no vote is decided."""
    has = side != MISSING
    decided, human_decided = (has & (v != MISSING) & (v != TIE) for v in (votes, labels))
    if not decided.any():
        return None
    to_side, human_to_side = ((d & (v == side)).astype(float) for d, v in ((decided, votes), (human_decided, labels)))
    counts = decided.astype(float), human_decided.astype(float)
    share, human = (ratio(to, n, samples) for to, n in zip((to_side, human_to_side), counts, strict=True))
    bias = Estimate(None)
    if share.value is not None and human.value is not None:
        drawn = drawn_ratio(to_side, counts[0], samples.counts) - drawn_ratio(human_to_side, counts[1], samples.counts)
        bias = estimate(share.value - human.value, drawn, samples.confidence)
    return Preference(int(decided.sum()), share, human, bias)


def first_place(ab: Codes | None, ba: Codes | None, labels: Codes, samples: Samples) -> Preference | None:
    """The preference for the answer that was shown first.

    With one order the humans' share of that side is the reference; with both it is one half, whatever the labels are.
    """
    if ab is None or ba is None:
        votes, first = (ab, A) if ab is not None else (ba, B)
        if votes is None:
            return None
        return preference(votes, labels, np.full(len(labels), first, dtype=np.int8), samples)
    to_first, decided = np.zeros(len(labels)), np.zeros(len(labels))
    for votes, first in ((ab, A), (ba, B)):
        to_first += votes == first
        decided += (votes == A) | (votes == B)
    if not decided.any():
        return None
    share = ratio(to_first, decided, samples)
    assert share.value is not None
    ends = (None if end is None else end - 0.5 for end in (share.low, share.high))
    return Preference(int((decided > 0).sum()), share, Estimate(0.5), Estimate(share.value - 0.5, *ends))
