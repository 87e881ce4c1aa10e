"""Agreement of evaluators with human labels, for many evaluators at once and with bootstrap intervals.

Everything is a function of the 3 × 3 table of (vote, label) counts, so that one matrix product of indicators with
the bootstrap's item counts gives the tables of all evaluators in all draws. Votes and labels are codes of
`agents.jury.VOTES`; weighted kappas take them in the order A, tie, B.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.agents.jury import MISSING, TIE, VOTES, Codes
from ray_pipeline.stats.alpha import nominal_alpha
from ray_pipeline.stats.bootstrap import Counts, Estimate, Floats, Samples, equal_shares, estimate, number, percentiles
from ray_pipeline.stats.kappa import Weighting, kappa_of_tables

#: Every statistic of `statistics`, in the order of reports.
STATISTICS = ("kappa", "kappa_linear", "kappa_quadratic", "alpha", "accuracy", "accuracy_no_ties")

_K = len(VOTES)
_KAPPAS: Mapping[str, Weighting] = {"kappa": "nominal", "kappa_linear": "linear", "kappa_quadratic": "quadratic"}
#: Cells of one block of tables: 16 M float64 are 128 MB.
_CELLS_PER_BLOCK = 16_000_000
#: Ways to fill missing verdicts that are tried for the worst case; beyond it, all go to the rarest wrong vote.
_WORST_CASES = 200_000


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


def tables(votes: Codes, labels: Codes, draws: Counts | None = None) -> Floats:
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
    found = {name: kappa_of_tables(counts, weighting) for name, weighting in _KAPPAS.items() if name in names}
    total, agreeing = counts.sum(axis=(-2, -1)), np.trace(counts, axis1=-2, axis2=-1)
    if "alpha" in names:
        # Two ratings per item: an item where both agree adds 2.
        found["alpha"] = nominal_alpha(2 * agreeing, np.moveaxis(counts.sum(axis=-1) + counts.sum(axis=-2), -1, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        if "accuracy" in names:
            found["accuracy"] = agreeing / total
        if "accuracy_no_ties" in names:
            decided = counts[..., ::2, ::2]
            found["accuracy_no_ties"] = np.trace(decided, axis1=-2, axis2=-1) / decided.sum(axis=(-2, -1))
    return {name: np.where(np.isfinite(found[name]), found[name], np.nan) for name in names}


def agreement(
    votes: Codes,
    labels: Codes,
    samples: Samples | None = None,
    names: Sequence[str] = STATISTICS,
) -> list[Agreement]:
    """Every evaluator against the labels.

    Args:
        votes: shape (evaluators, items), `MISSING` where unread.
        labels: shape (items,), `MISSING` where there is no label; such items count only as votes.
        samples: of all items; None gives no intervals. A kappa or alpha that is the same in all samples has none; an
            accuracy of 0 or 1 has the exact interval of `equal_shares`.
        names: which statistics; all of them by default.
    """
    labelled = labels != MISSING
    point = tables(votes, labels)
    values = statistics(point, names)
    bands = None if samples is None else _intervals(votes, labels, values, samples, names)
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


def _intervals(
    votes: Codes,
    labels: Codes,
    values: Mapping[str, Floats],
    samples: Samples,
    names: Sequence[str],
) -> dict[str, Floats]:
    """Intervals by statistic, shape (2, evaluators); samples in which it is 0/0 are left out."""
    block = max(1, _CELLS_PER_BLOCK // (len(samples.counts) * _K * _K))
    bands = {name: np.zeros((2, len(votes))) for name in names}
    for begin in range(0, len(votes), block):
        part = slice(begin, begin + block)
        drawn = statistics(tables(votes[part], labels, samples.counts), names)
        for name in names:
            bands[name][:, part] = percentiles(drawn[name], values[name][part], samples.confidence)
    both = (votes != MISSING) & (labels != MISSING)
    rows = {"accuracy": both, "accuracy_no_ties": both & (votes != TIE) & (labels != TIE)}
    for name in rows.keys() & set(names):
        for row in np.flatnonzero((values[name] == 0) | (values[name] == 1)):
            ends = equal_shares(values[name][row], samples.clusters(rows[name][row]), samples.confidence)
            bands[name][:, row] = [np.nan if end is None else end for end in ends]
    return bands


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
        p_mcnemar: exact, two-sided (McNemar 1947), on items where only one of them is right, taken as independent even
            where they share a question; None if there are none.
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
    samples: Samples,
) -> Paired:
    """Compare two evaluators on the same items and the same bootstrap samples."""
    from scipy.stats import binomtest

    both = (first[1] != MISSING) & (second[1] != MISSING) & (labels != MISSING)
    votes = np.stack([np.where(both, votes, MISSING) for votes in (first[1], second[1])]).astype(np.int8)
    point = statistics(tables(votes, labels), ("kappa",))["kappa"]
    drawn = statistics(tables(votes, labels, samples.counts), ("kappa",))["kappa"]
    gaps = drawn[0] - drawn[1]
    gaps = gaps[~np.isnan(gaps)]
    right = (votes == labels) & both
    wins, losses = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    side = min((gaps <= 0).sum(), (gaps >= 0).sum())
    return Paired(
        first=first[0],
        second=second[0],
        items=int(both.sum()),
        difference=estimate(point[0] - point[1], gaps, samples.confidence),
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
    samples: Samples,
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
    (report,) = agreement(stacked[best : best + 1], elsewhere, samples, names=("kappa",))
    return HeldOut(
        chosen=names[best],
        of=len(names),
        items_chosen_on=int((there != MISSING).sum()),
        kappa_chosen_on=number(kappas[best]),
        items_reported_on=int((elsewhere != MISSING).sum()),
        kappa=report.estimates["kappa"],
    )
