"""How far human annotators agree with each other: the ceiling for every evaluator."""

from __future__ import annotations

import dataclasses

import numpy as np

from ray_pipeline.agents.jury import MISSING, TIE, VOTES, Codes
from ray_pipeline.stats.alpha import nominal_alpha
from ray_pipeline.stats.bootstrap import Estimate, Floats, Samples, estimate, ratio
from ray_pipeline.stats.kappa import kappa_of_tables


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """How far human annotators agree with each other.

    Attributes:
        pairs: pairs of annotators with at least one item in common.
        kappa: Cohen's, of all these pairs together (`pooled_kappa`).
        alpha: Krippendorff's, nominal, over all annotators.
        one_against_rest: share of annotations that equal the unique mode of the item's others, a tie if there is none.
    """

    annotators: int
    items: int
    pairs: int
    kappa: Estimate
    alpha: Estimate
    one_against_rest: Estimate


def human_ceiling(codes: Codes, samples: Samples) -> Ceiling | None:
    """Agreement among annotators; `codes` has shape (annotators, items). None unless an item has two of them."""
    seen = codes != MISSING
    several = seen.sum(axis=0) >= 2
    if not several.any():
        return None
    rest_right, rest_total = _one_against_rest(codes)
    common = seen.astype(np.int64) @ seen.T
    return Ceiling(
        annotators=int(seen.any(axis=1).sum()),
        items=int(several.sum()),
        pairs=int((np.triu(common, 1) > 0).sum()),
        kappa=pooled_kappa(codes, samples),
        alpha=alpha_of_many(codes, samples),
        one_against_rest=ratio(rest_right, rest_total, samples),
    )


def pooled_kappa(codes: Codes, samples: Samples) -> Estimate:
    """Cohen's kappa of one table of all pairs of annotations of an item, each pair both ways round.

    Annotators who share few items have a kappa of 0/0 where they agree and of 0 or less where they do not, so that a
    mean over pairs of annotators would leave the agreement out. With the same number of annotators on every item this
    is Fleiss' kappa (1971). `codes` has shape (annotators, items).
    """
    support = _support(codes)
    # Ordered pairs by (one, other) value: every annotation with every other one of its item.
    tables = support[:, None] * support[None, :] - np.eye(len(VOTES))[:, :, None] * support
    tables = tables.reshape(-1, support.shape[1])
    drawn = (tables @ samples.counts.T.astype(np.float64)).T
    value, kappas = (kappa_of_tables(t.reshape(-1, len(VOTES), len(VOTES))) for t in (tables.sum(axis=1), drawn))
    return estimate(float(value[0]), kappas, samples.confidence)


def _support(codes: Codes) -> Floats:
    """Annotations by value and item, shape (votes, items)."""
    return np.stack([(codes == code).sum(axis=0) for code in range(len(VOTES))]).astype(np.float64)


def _one_against_rest(codes: Codes) -> tuple[Floats, Floats]:
    """Per item: annotations that equal the mode of the item's others, and annotations that have others."""
    support = _support(codes)
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


def alpha_of_many(codes: Codes, samples: Samples) -> Estimate:
    """Krippendorff's alpha, nominal, over any number of raters, shape (raters, items).

    Coincidences add up over units, so draws are one product.
    """
    support = _support(codes)
    units = support.sum(axis=0)
    usable = units >= 2
    scale = np.where(usable, 1 / np.maximum(units - 1, 1), 0.0)
    same = (support * (support - 1)).sum(axis=0) * scale
    parts = np.stack([same, *(np.where(usable, s, 0.0) for s in support)])

    drawn = parts @ samples.counts.T.astype(np.float64)
    return estimate(
        float(nominal_alpha(same.sum(), parts[1:].sum(axis=1))), nominal_alpha(drawn[0], drawn[1:]), samples.confidence
    )
