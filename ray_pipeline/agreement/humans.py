"""How far human annotators agree with each other: the ceiling for every evaluator."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from ray_pipeline.agents.jury import MISSING, TIE, VOTES, Codes
from ray_pipeline.agreement.vote_agreement import statistics, tables
from ray_pipeline.stats.alpha import nominal_alpha
from ray_pipeline.stats.bootstrap import Counts, Estimate, Floats, estimate, ratio


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """How far human annotators agree with each other.

    Attributes:
        pairs: pairs of annotators with at least one item in common.
        kappa: mean over these pairs, weighted by their items; pairs whose kappa is undefined are left out. In a
            bootstrap sample of the items both the kappas and the weights are that sample's.
        alpha: Krippendorff's, nominal, over all annotators.
        one_against_rest: share of annotations that equal the unique mode of the item's others, a tie if there is none.
    """

    annotators: int
    items: int
    pairs: int
    kappa: Estimate
    alpha: Estimate
    one_against_rest: Estimate


def human_ceiling(codes: Codes, counts: Counts, confidence: float = 0.95) -> Ceiling | None:
    """Agreement among annotators; `codes` has shape (annotators, items). None unless an item has two of them."""
    several = (codes != MISSING).sum(axis=0) >= 2
    if not several.any():
        return None
    pairs, kappa = _mean_kappa(codes, counts, confidence)
    rest_right, rest_total = _one_against_rest(codes)
    return Ceiling(
        annotators=int((codes != MISSING).any(axis=1).sum()),
        items=int(several.sum()),
        pairs=pairs,
        kappa=kappa,
        alpha=alpha_of_many(codes, counts, confidence),
        one_against_rest=ratio(rest_right, rest_total, counts, confidence),
    )


def _one_against_rest(codes: Codes) -> tuple[Floats, Floats]:
    """Per item: annotations that equal the mode of the item's others, and annotations that have others."""
    support = np.stack([(codes == code).sum(axis=0) for code in range(len(VOTES))])
    right, total = np.zeros(codes.shape[1]), np.zeros(codes.shape[1])
    for own in codes:
        others = support.copy()
        for code in range(len(VOTES)):
            others[code] -= own == code
        usable = (own != MISSING) & (others.sum(axis=0) > 0)
        leaders = others == others.max(axis=0)
        mode = np.where(leaders.sum(axis=0) == 1, leaders.argmax(axis=0), TIE)
        right += usable & (mode == own)
        total += usable
    return right, total


def _mean_kappa(codes: Codes, counts: Counts, confidence: float) -> tuple[int, Estimate]:
    """Pairs of raters with an item in common, and the mean of their kappas, weighted by these items."""
    pairs, weighted, weights = 0, np.zeros(len(counts) + 1), np.zeros(len(counts) + 1)
    for one, other in itertools.combinations(codes, 2):
        common = np.flatnonzero((one != MISSING) & (other != MISSING))
        if not len(common):
            continue
        pairs += 1
        # The items themselves first, then each bootstrap sample of them.
        samples = np.concatenate([np.ones((1, len(common)), dtype=np.float32), counts[:, common]])
        found = statistics(tables(one[None, common], other[common], samples), ("kappa",))["kappa"][0]
        known = ~np.isnan(found)
        share = np.where(known, samples.sum(axis=1), 0.0)
        weighted += share * np.where(known, found, 0.0)
        weights += share
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(weights > 0, weighted / weights, np.nan)
    return pairs, estimate(means[0], means[1:], confidence)


def alpha_of_many(codes: Codes, counts: Counts, confidence: float = 0.95) -> Estimate:
    """Krippendorff's alpha, nominal, over any number of raters, shape (raters, items).

    Coincidences add up over units, so draws are one product.
    """
    support = np.stack([(codes == code).sum(axis=0) for code in range(len(VOTES))]).astype(np.float64)
    units = support.sum(axis=0)
    usable = units >= 2
    scale = np.where(usable, 1 / np.maximum(units - 1, 1), 0.0)
    same = (support * (support - 1)).sum(axis=0) * scale
    parts = np.stack([same, *(np.where(usable, s, 0.0) for s in support)])

    drawn = parts @ counts.T.astype(np.float64)
    return estimate(
        float(nominal_alpha(same.sum(), parts[1:].sum(axis=1))), nominal_alpha(drawn[0], drawn[1:]), confidence
    )
