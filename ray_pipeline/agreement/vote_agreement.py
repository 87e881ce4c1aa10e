"""Agreement of evaluators with human labels, for many evaluators at once and with bootstrap intervals.

Everything is a function of the 3 × 3 table of (vote, label) counts, so that one matrix product of indicators with
the bootstrap's item counts gives the tables of all evaluators in all draws. Votes and labels are codes of
`agents.jury.VOTES`. Kappa: Cohen 1960, weighted: Cohen 1968 with |i−j| or (i−j)² on the order A, tie, B. Alpha:
Krippendorff 2011, nominal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.agents.jury import MISSING, TIE, VOTES, Codes

Floats = NDArray[np.float64]

#: Every statistic of `statistics`, in the order of reports.
STATISTICS = ("kappa", "kappa_linear", "kappa_quadratic", "alpha", "accuracy", "accuracy_no_ties")

_K = len(VOTES)
_DISTANCE = np.abs(np.subtract.outer(np.arange(_K), np.arange(_K))).astype(np.float64)
#: Cells of one block of tables: 16 M float64 are 128 MB.
_CELLS_PER_BLOCK = 16_000_000
#: Ways to fill missing verdicts that are tried for the worst case; beyond it, all go to the rarest wrong vote.
_WORST_CASES = 200_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its percentile interval; None where it is undefined (0/0) or was not resampled."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One evaluator against the human labels.

    Attributes:
        n: items, labelled or not.
        labelled: items with a human label.
        missing: items without a readable verdict; they are in no statistic but the bounds.
        vote_counts: over all items, by vote.
        estimates: by name of `STATISTICS`, over items with label and verdict. `accuracy_no_ties` is over the items
            where neither label nor vote is a tie.
        worst: kappa and accuracy had every missing verdict been wrong (for kappa: in the way that lowers it most).
        best: the same had every missing verdict been right.
    """

    n: int
    labelled: int
    missing: int
    vote_counts: dict[str, int]
    estimates: dict[str, Estimate]
    worst: dict[str, float | None]
    best: dict[str, float | None]

    @property
    def kappa(self) -> float | None:
        return self.estimates["kappa"].value


def item_draws(items: int, draws: int, seed: int) -> NDArray[np.float32]:
    """How often each item is in each bootstrap sample of as many items, shape (draws, items).

    float32 is exact here (counts stay far under 2^24) and halves the time of the products.
    """
    if items == 0:
        return np.zeros((draws, 0), dtype=np.float32)
    rng = np.random.default_rng(seed)
    counts = np.empty((draws, items), dtype=np.float32)
    for row in range(draws):
        counts[row] = np.bincount(rng.integers(0, items, items), minlength=items)
    return counts


def tables(votes: Codes, labels: Codes, draws: NDArray[np.float32] | None = None) -> Floats:
    """Counts of (vote, label) over the items that have both.

    Args:
        votes: shape (evaluators, items).
        labels: shape (items,).
        draws: item counts of each bootstrap sample, shape (draws, items); None counts every item once.

    Returns:
        Shape (evaluators, draws, 3, 3), or (evaluators, 3, 3) without draws; rows are votes, columns labels.
    """
    weights = np.ones((1, len(labels)), dtype=np.float32) if draws is None else draws
    found = np.zeros((len(votes), len(weights), _K, _K))
    for label in range(_K):
        columns = np.flatnonzero(labels == label)
        if not len(columns):
            continue
        part = np.ascontiguousarray(weights[:, columns].T)
        for vote in range(_K):
            said = (votes[:, columns] == vote).astype(np.float32)
            if said.any():
                found[:, :, vote, label] = said @ part
    return found[:, 0] if draws is None else found


def statistics(counts: Floats, names: Sequence[str] = STATISTICS) -> dict[str, Floats]:
    """Each statistic of every table; `counts` has shape (…, 3, 3), results (…); NaN where 0/0."""
    total = counts.sum(axis=(-2, -1))
    rows, columns = counts.sum(axis=-1), counts.sum(axis=-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: dict[str, Floats] = {}
        for name, weight in (
            ("kappa", (_DISTANCE > 0).astype(np.float64)),
            ("kappa_linear", _DISTANCE),
            ("kappa_quadratic", _DISTANCE**2),
        ):
            if name in names:
                observed = (counts * weight).sum(axis=(-2, -1)) / total
                chance = np.einsum("...i,ij,...j->...", rows, weight, columns) / total**2
                found[name] = 1 - observed / chance
        if "alpha" in names:
            # Two ratings a unit: a coincidence table is the counts and their transpose.
            both = rows + columns
            disagree = 2 * (total - np.trace(counts, axis1=-2, axis2=-1))
            expected = (2 * total) ** 2 - (both**2).sum(axis=-1)
            found["alpha"] = 1 - (2 * total - 1) * disagree / expected
        if "accuracy" in names:
            found["accuracy"] = np.trace(counts, axis1=-2, axis2=-1) / total
        if "accuracy_no_ties" in names:
            decided = counts[..., ::2, ::2]
            found["accuracy_no_ties"] = np.trace(decided, axis1=-2, axis2=-1) / decided.sum(axis=(-2, -1))
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}


def agreement(
    votes: Codes,
    labels: Codes,
    draws: NDArray[np.float32] | None = None,
    confidence: float = 0.95,
    names: Sequence[str] = STATISTICS,
) -> list[Agreement]:
    """Every evaluator against the labels.

    Args:
        votes: shape (evaluators, items), `MISSING` where unread.
        labels: shape (items,), `MISSING` where there is no label; such items count only as votes.
        draws: from `item_draws` over all items; None gives no intervals.
        names: which statistics; all of them by default.
    """
    labelled = labels != MISSING
    point = tables(votes, labels)
    values = statistics(point, names)
    bands = None if draws is None else _intervals(votes, labels, draws, confidence, names)
    found = []
    for row in range(len(votes)):
        own = votes[row]
        estimates = {
            name: Estimate(
                number(values[name][row]),
                None if bands is None else number(bands[name][0, row]),
                None if bands is None else number(bands[name][1, row]),
            )
            for name in names
        }
        worst, best = _bounds(point[row], labels[labelled & (votes[row] == MISSING)])
        found.append(
            Agreement(
                n=len(labels),
                labelled=int(labelled.sum()),
                missing=int((own == MISSING).sum()),
                vote_counts={vote: int((own == code).sum()) for code, vote in enumerate(VOTES)},
                estimates=estimates,
                worst=worst,
                best=best,
            )
        )
    return found


def number(value: float) -> float | None:
    """A float, or None for NaN."""
    return None if np.isnan(value) else float(value)


def _intervals(
    votes: Codes, labels: Codes, draws: NDArray[np.float32], confidence: float, names: Sequence[str]
) -> dict[str, Floats]:
    """Percentile intervals by statistic, shape (2, evaluators); draws in which it is 0/0 are left out."""
    block = max(1, _CELLS_PER_BLOCK // (len(draws) * _K * _K))
    tail = (1 - confidence) / 2
    parts: dict[str, list[Floats]] = {name: [] for name in names}
    for begin in range(0, len(votes), block):
        drawn = statistics(tables(votes[begin : begin + block], labels, draws), names)
        for name in names:
            parts[name].append(quantiles(drawn[name], (tail, 1 - tail)))
    return {name: np.concatenate(part, axis=1) if part else np.zeros((2, 0)) for name, part in parts.items()}


def quantiles(values: Floats, at: tuple[float, ...]) -> Floats:
    """Quantiles over the last axis without NaN, shape (len(at), …); NaN where fewer than two values are left."""
    missing = np.isnan(values)
    if not missing.any():
        return np.quantile(values, at, axis=-1)
    found = np.full((len(at), *values.shape[:-1]), np.nan)
    enough = (~missing).sum(axis=-1) >= 2
    if enough.any():
        found[:, enough] = np.nanquantile(values[enough], at, axis=-1)
    return found


def _bounds(counts: Floats, lost: Codes) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Kappa and accuracy in the worst and the best case, from the table of the read items and the other labels."""
    names = ("kappa", "accuracy")
    best = counts.copy()
    for label in lost:
        best[label, label] += 1
    lows = {name: np.inf for name in names}
    for filled in _wrong(counts, np.bincount(lost, minlength=_K)):
        for name, value in statistics(filled, names).items():
            lows[name] = min(lows[name], np.nanmin(value, initial=np.inf))
    high = statistics(best, names)
    return (
        {name: None if np.isinf(value) else float(value) for name, value in lows.items()},
        {name: number(float(high[name])) for name in names},
    )


def _wrong(counts: Floats, lost: NDArray[np.int64]) -> Iterator[Floats]:
    """Tables with every missing verdict given one of the two wrong votes of its label, in all ways that differ."""
    ways = int(np.prod(lost + 1))
    splits: Iterator[Sequence[int]] = itertools.product(*(range(int(n) + 1) for n in lost))
    if ways > _WORST_CASES:
        splits = itertools.product(*((0, int(n)) for n in lost))
    while chunk := list(itertools.islice(splits, 10_000)):
        first = np.array(chunk, dtype=np.float64)
        filled = np.broadcast_to(counts, (len(first), _K, _K)).copy()
        for label in range(_K):
            one, other = (vote for vote in range(_K) if vote != label)
            filled[:, one, label] += first[:, label]
            filled[:, other, label] += lost[label] - first[:, label]
        yield filled


# --- two evaluators, and the choice of one ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two evaluators on the items that both read.

    Attributes:
        difference: kappa of the first minus kappa of the second.
        p_bootstrap: two-sided, from the share of bootstrap differences on the other side of 0.
        p_mcnemar: exact, two-sided (McNemar 1947), on who is right where only one of them is; None when nobody is.
    """

    first: str
    second: str
    items: int
    difference: Estimate
    p_bootstrap: float | None
    only_first_right: int
    only_second_right: int
    p_mcnemar: float | None


def paired(
    first: tuple[str, Codes],
    second: tuple[str, Codes],
    labels: Codes,
    draws: NDArray[np.float32],
    confidence: float = 0.95,
) -> Paired:
    """Compare two evaluators on the same items and the same bootstrap samples."""
    from scipy.stats import binomtest

    both = (first[1] != MISSING) & (second[1] != MISSING) & (labels != MISSING)
    votes = np.stack([np.where(both, votes, MISSING) for votes in (first[1], second[1])]).astype(np.int8)
    point = statistics(tables(votes, labels), ("kappa",))["kappa"]
    drawn = statistics(tables(votes, labels, draws), ("kappa",))["kappa"]
    gaps = drawn[0] - drawn[1]
    gaps = gaps[~np.isnan(gaps)]
    low, high = quantiles(gaps, tails(confidence)) if len(gaps) else (np.nan, np.nan)
    right = (votes == labels) & both
    wins, losses = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    side = min((gaps <= 0).sum(), (gaps >= 0).sum())
    return Paired(
        first=first[0],
        second=second[0],
        items=int(both.sum()),
        difference=Estimate(number(point[0] - point[1]), number(low), number(high)),
        p_bootstrap=min(1.0, float(2 * (side + 1) / (len(gaps) + 1))) if len(gaps) else None,
        only_first_right=wins,
        only_second_right=losses,
        p_mcnemar=float(binomtest(wins, wins + losses).pvalue) if wins + losses else None,
    )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """An evaluator that was chosen on one half of the items, and what it reaches on the other."""

    chosen: str
    of: int
    items_chosen_on: int
    kappa_chosen_on: float | None
    items_reported_on: int
    kappa: Estimate


def held_out_choice(
    votes: Mapping[str, Codes],
    labels: Codes,
    choose_on: NDArray[np.bool_],
    draws: NDArray[np.float32],
    confidence: float = 0.95,
) -> HeldOut | None:
    """Choose the evaluator with the highest kappa on `choose_on`; equal ones by their order. None without any kappa."""
    names = list(votes)
    stacked = np.stack(list(votes.values()))
    there = np.where(choose_on, labels, MISSING).astype(np.int8)
    elsewhere = np.where(choose_on, MISSING, labels).astype(np.int8)
    kappas = statistics(tables(stacked, there), ("kappa",))["kappa"]
    if np.isnan(kappas).all():
        return None
    best = int(np.nanargmax(kappas))
    (report,) = agreement(stacked[best : best + 1], elsewhere, draws, confidence, names=("kappa",))
    return HeldOut(
        chosen=names[best],
        of=len(names),
        items_chosen_on=int((there != MISSING).sum()),
        kappa_chosen_on=number(kappas[best]),
        items_reported_on=int((elsewhere != MISSING).sum()),
        kappa=report.estimates["kappa"],
    )


# --- humans among themselves ------------------------------------------------------------------------------------------


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


def human_ceiling(codes: Codes, draws: NDArray[np.float32], confidence: float = 0.95) -> Ceiling | None:
    """Agreement among annotators; `codes` has shape (annotators, items). None unless an item has two of them."""
    several = (codes != MISSING).sum(axis=0) >= 2
    if not several.any():
        return None
    pairs, kappa = _mean_kappa(codes, draws, confidence)
    rest_right, rest_total = _one_against_rest(codes)
    return Ceiling(
        annotators=int((codes != MISSING).any(axis=1).sum()),
        items=int(several.sum()),
        pairs=pairs,
        kappa=kappa,
        alpha=alpha_of_many(codes, draws, confidence),
        one_against_rest=ratio(rest_right, rest_total, draws, confidence),
    )


def _one_against_rest(codes: Codes) -> tuple[Floats, Floats]:
    """Per item: annotations that equal the mode of the item's others, and annotations that have others."""
    support = np.stack([(codes == code).sum(axis=0) for code in range(_K)])
    right, total = np.zeros(codes.shape[1]), np.zeros(codes.shape[1])
    for own in codes:
        others = support.copy()
        for code in range(_K):
            others[code] -= own == code
        usable = (own != MISSING) & (others.sum(axis=0) > 0)
        leaders = others == others.max(axis=0)
        mode = np.where(leaders.sum(axis=0) == 1, leaders.argmax(axis=0), TIE)
        right += usable & (mode == own)
        total += usable
    return right, total


def _mean_kappa(codes: Codes, draws: NDArray[np.float32], confidence: float) -> tuple[int, Estimate]:
    """Pairs of raters with an item in common, and the mean of their kappas, weighted by these items."""
    pairs, weighted, weights = 0, np.zeros(len(draws) + 1), np.zeros(len(draws) + 1)
    for one, other in itertools.combinations(codes, 2):
        common = np.flatnonzero((one != MISSING) & (other != MISSING))
        if not len(common):
            continue
        pairs += 1
        # The items themselves first, then each bootstrap sample of them.
        samples = np.concatenate([np.ones((1, len(common)), dtype=np.float32), draws[:, common]])
        found = statistics(tables(one[None, common], other[common], samples), ("kappa",))["kappa"][0]
        known = ~np.isnan(found)
        share = np.where(known, samples.sum(axis=1), 0.0)
        weighted += share * np.where(known, found, 0.0)
        weights += share
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(weights > 0, weighted / weights, np.nan)
    low, high = quantiles(means[1:], tails(confidence))
    return pairs, Estimate(number(means[0]), number(low), number(high))


def alpha_of_many(codes: Codes, draws: NDArray[np.float32], confidence: float = 0.95) -> Estimate:
    """Krippendorff's alpha, nominal, over any number of raters, shape (raters, items).

    Coincidences add up over units, so draws are one product.
    """
    support = np.stack([(codes == code).sum(axis=0) for code in range(_K)]).astype(np.float64)
    units = support.sum(axis=0)
    usable = units >= 2
    scale = np.where(usable, 1 / np.maximum(units - 1, 1), 0.0)
    same = (support * (support - 1)).sum(axis=0) * scale
    every = np.where(usable, units, 0.0)
    parts = np.stack([same, every, *(np.where(usable, s, 0.0) for s in support)])

    def alpha(sums: Floats) -> Floats:
        agree, n, values = sums[0], sums[1], sums[2:]
        with np.errstate(invalid="ignore", divide="ignore"):
            found = 1 - (n - 1) * (n - agree) / (n**2 - (values**2).sum(axis=0))
        return np.where(np.isfinite(found), found, np.nan)

    value = alpha(parts.sum(axis=1))
    low, high = quantiles(alpha(parts @ draws.T.astype(np.float64)), tails(confidence))
    return Estimate(number(float(value)), number(low), number(high))


def tails(confidence: float) -> tuple[float, float]:
    """The two quantiles of a percentile interval."""
    tail = (1 - confidence) / 2
    return tail, 1 - tail


def ratio(numerator: Floats, denominator: Floats, draws: NDArray[np.float32], confidence: float = 0.95) -> Estimate:
    """Sum of one number an item over the sum of another, with its bootstrap interval by item."""
    total = denominator.sum()
    if not total:
        return Estimate(None)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (draws @ numerator) / (draws @ denominator)
    drawn = np.where(np.isfinite(drawn), drawn, np.nan)
    low, high = quantiles(drawn, tails(confidence))
    return Estimate(float(numerator.sum() / total), number(low), number(high))
