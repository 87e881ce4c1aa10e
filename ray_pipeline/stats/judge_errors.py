"""How far judges err together, and how many independent judges a panel is worth.

A judge errs where its vote is not the truth. Where the truth is unknown, it is estimated from the votes by a latent
class model (Dawid and Skene 1979, EM from the shares of the votes), which assumes that judges err independently: what
most judges share, it takes for the truth, so that its correlations are too low and its accuracies too high. With few
judges that is a property of the data and not of the model, which `at_accuracy` shows: the same agreement is explained
by right judges, or by less accurate ones who share their errors.

The effective number of n judges whose errors have the mean correlation r is n / (1 + (n − 1)·r): the mean of n equally
correlated values has (1 + (n − 1)·r) times the variance of the mean of independent ones (Kish 1965, Survey Sampling:
the design effect of a cluster).

All results are functions of how often each row of votes occurs, so a million candidates of ten judges fit in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.stats.bootstrap import Floats, Interval, number
from ray_pipeline.stats.kappa import JudgePair
from ray_pipeline.stats.latent_class import MISSING, Votes, fit

#: Random groups of prompts; intervals are jackknives that leave out one group at a time.
GROUPS = 64
#: Accuracies for which `at_accuracy` gives the correlation that explains the agreement.
ACCURACIES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclasses.dataclass(frozen=True)
class VoteCounts:
    """How often each row of votes occurs.

    Attributes:
        votes: distinct rows, shape (rows, judges): classes from 0, or MISSING.
        truth: shape (rows,); rows that differ in it alone are distinct.
        counts: shape (rows, GROUPS).
    """

    votes: Votes
    truth: Votes
    counts: Floats

    def take(self, rows: NDArray[np.bool_]) -> VoteCounts:
        return VoteCounts(self.votes[rows], self.truth[rows], self.counts[rows])


@dataclasses.dataclass(frozen=True)
class JudgeErrors:
    """Share of a judge's votes that are right, with a 95 % interval where the truth is known."""

    judge: str
    accuracy: Interval


@dataclasses.dataclass(frozen=True)
class ErrorPair(JudgePair):
    """Correlation (phi) of the errors of two judges, over the rows that both voted on; None where it is 0/0."""

    correlation: Interval
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What the judges' agreement implies if each of them were right with this probability."""

    accuracy: float
    correlation: float | None
    effective: float | None


@dataclasses.dataclass(frozen=True)
class PanelErrors:
    """Errors of all judges.

    Attributes:
        basis: the truth, or the estimate of the latent class model.
        rows: with a vote, and a known truth where that is the basis.
        correlation: mean over the pairs that have one.
        effective: number of independent judges that the panel is worth.
        reason: why there is no correlation.
        assumed: where the basis is the estimate: correlations by assumed accuracy.
    """

    basis: Literal["truth", "estimate"]
    rows: int
    judges: list[JudgeErrors]
    pairs: list[ErrorPair]
    correlation: Interval
    effective: Interval
    reason: str | None = None
    assumed: list[Assumed] = dataclasses.field(default_factory=list)


def count_votes(votes: Votes, truth: Votes, groups: NDArray[np.int64]) -> VoteCounts:
    """Count the distinct rows.

    Args:
        votes: shape (rows, judges).
        truth: shape (rows,).
        groups: from 0 to GROUPS − 1, shape (rows,); the same for all rows of a prompt.
    """
    rows, place = np.unique(np.column_stack([votes, truth]), axis=0, return_inverse=True)
    cells = np.bincount(place.reshape(-1) * GROUPS + groups, minlength=len(rows) * GROUPS)
    return VoteCounts(rows[:, :-1], rows[:, -1], cells.reshape(-1, GROUPS).astype(np.float64))


def total(parts: Iterable[VoteCounts], judges: int) -> VoteCounts:
    """The counts of all parts, one of them in memory at a time."""
    found = VoteCounts(np.zeros((0, judges), np.int8), np.zeros(0, np.int8), np.zeros((0, GROUPS)))
    for part in parts:
        found = _distinct(
            np.concatenate([found.votes, part.votes]),
            np.concatenate([found.truth, part.truth]),
            np.concatenate([found.counts, part.counts]),
        )
    return found


def _distinct(votes: Any, truth: Any, counts: Any) -> VoteCounts:
    rows, place = np.unique(np.column_stack([votes, truth]), axis=0, return_inverse=True)
    summed = np.zeros((len(rows), GROUPS))
    np.add.at(summed, place.reshape(-1), counts)
    return VoteCounts(rows[:, :-1], rows[:, -1], summed)


def effective_number(judges: int, correlation: float | None) -> float | None:
    """n / (1 + (n − 1)·r); None where that is not positive: errors that cancel have no equivalent number."""
    if correlation is None:
        return None
    divisor = 1 + (judges - 1) * correlation
    return judges / divisor if divisor > 1e-9 else None


def errors_against_truth(judges: Sequence[str], counts: VoteCounts) -> PanelErrors | None:
    """Errors over the rows whose truth is known, with jackknife intervals; None without such rows."""
    known = counts.take((counts.truth != MISSING) & (counts.votes != MISSING).any(axis=1))
    if not known.counts.sum():
        return None
    classes = int(max(known.votes.max(), known.truth.max())) + 1
    return panel_errors("truth", judges, known, np.eye(classes)[known.truth], exact=True)


def estimated_errors(judges: Sequence[str], counts: VoteCounts) -> PanelErrors | None:
    """The same by the latent class model, over all rows with a vote; None with fewer than two judges or without rows.

    Two judges have no estimate but `assumed`. Neither have three that use two classes alone a correlation: the model
    then has as many parameters as there are counts, and explains any agreement without one.
    """
    voted = counts.take((counts.votes != MISSING).any(axis=1))
    if len(judges) < 2 or not voted.counts.sum():
        return None
    assumed = at_accuracy(voted)
    used = len(np.unique(voted.votes[voted.votes != MISSING]))
    if len(judges) < 3:
        rows, none = int(voted.counts.sum()), Interval(None, None, None)
        reason = "two judges cannot show who of them is right"
        return PanelErrors("estimate", rows, [], [], none, none, reason, assumed)
    truth = fit(voted.votes, voted.counts.sum(axis=1)).posterior(voted.votes)
    found = panel_errors("estimate", judges, voted, truth, exact=False)
    free = used ** len(judges) - 1 - (used - 1) * (1 + len(judges) * used)
    if free <= 0:
        none = Interval(None, None, None)
        reason = "independent errors explain any agreement of three judges with two classes"
        found = dataclasses.replace(found, pairs=[], correlation=none, effective=none, reason=reason)
    return dataclasses.replace(found, assumed=assumed)


def at_accuracy(counts: VoteCounts, accuracies: Sequence[float] = ACCURACIES) -> list[Assumed]:
    """The mean correlation that explains how often two judges agree, if all were right with the same probability a.

    P(both wrong) = (P(equal votes) − 1 + 2·(1 − a)) / 2 if judges who are both wrong give the same class. With two
    classes they must; with more that is the least that P(both wrong) can be. The correlation is None where the judges
    disagree too often for any to be.
    """
    weight, votes = counts.counts.sum(axis=1), counts.votes
    agreements = []
    for a, b in itertools.combinations(range(votes.shape[1]), 2):
        both = (votes[:, a] != MISSING) & (votes[:, b] != MISSING)
        if weight[both].sum():
            agreements.append(weight[both & (votes[:, a] == votes[:, b])].sum() / weight[both].sum())
    found = []
    for accuracy in accuracies if agreements else ():
        wrong = 1 - accuracy
        both_wrong = (float(np.mean(agreements)) - 1 + 2 * wrong) / 2
        correlation = (both_wrong - wrong**2) / (wrong * accuracy) if both_wrong >= 0 else None
        found.append(Assumed(accuracy, correlation, effective_number(votes.shape[1], correlation)))
    return found


def panel_errors(
    basis: Literal["truth", "estimate"], judges: Sequence[str], counts: VoteCounts, truth: Floats, *, exact: bool
) -> PanelErrors:
    """Errors of all judges against one truth.

    Args:
        truth: probability of each class, shape (rows, classes); errors are expected ones where it is not 0 or 1.
        exact: False gives no intervals: those with an estimated truth leave out the error of the estimate.
    """
    votes = counts.votes
    voted = votes != MISSING
    right = np.where(voted, np.take_along_axis(truth, np.where(voted, votes, 0).astype(np.int64), axis=1), 0.0)
    own = np.stack([_sums(counts, voted[:, j], [right[:, j]]) for j in range(len(judges))])
    pairs = list(itertools.combinations(range(len(judges)), 2))
    sums = np.zeros((len(pairs), GROUPS, 4))
    for place, (a, b) in enumerate(pairs):
        # Both are wrong unless one is right; both are right only where their votes are the same class.
        both_wrong = 1 - right[:, a] - right[:, b] + np.where(votes[:, a] == votes[:, b], right[:, a], 0.0)
        sums[place] = _sums(counts, voted[:, a] & voted[:, b], [1 - right[:, a], 1 - right[:, b], both_wrong])
    filled = counts.counts.sum(axis=0) > 0
    accuracy = _intervals(own, filled, lambda s: _ratio(s[..., 1], s[..., 0]), (0, 1), exact)
    phi = _intervals(sums, filled, _phi, (-1, 1), exact) if pairs else []
    (mean,) = _intervals(sums[None], filled, _mean_phi, (-1, 1), exact) if pairs else (Interval(None, None, None),)
    rows = int(counts.counts.sum())
    mean = dataclasses.replace(mean, rows=rows)
    # The number falls with the correlation, so the bounds change places.
    number_of, high, low = (effective_number(len(judges), r) for r in (mean.mean, mean.low, mean.high))
    effective = Interval(number_of, low, high, rows)
    reason = None if mean.mean is not None else "no pair has errors of both" if pairs else "there is one judge"
    return PanelErrors(
        basis=basis,
        rows=rows,
        judges=[JudgeErrors(judge, interval) for judge, interval in zip(judges, accuracy, strict=True)],
        pairs=[
            ErrorPair(judges[a], judges[b], interval, _undefined(judges[a], judges[b], found.sum(axis=0), interval))
            for (a, b), interval, found in zip(pairs, phi, sums, strict=True)
        ],
        correlation=mean,
        effective=effective,
        reason=reason,
    )


def _sums(counts: VoteCounts, rows: NDArray[np.bool_], values: Sequence[Floats]) -> Floats:
    """Number of rows and sum of each value by group, shape (GROUPS, 1 + values)."""
    columns = np.column_stack([np.ones(len(rows)), *values])
    found: Floats = counts.counts[rows].T @ columns[rows]
    return found


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def _phi(sums: Floats) -> Floats:
    """Correlation of two binary variables from (rows, first, second, both), NaN where one of them never varies."""
    rows, a, b, both = np.moveaxis(sums, -1, 0)
    spread = a * (rows - a) * b * (rows - b)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-9 * np.maximum(rows, 1), (rows * both - a * b) / np.sqrt(spread), np.nan)


def _mean_phi(sums: Floats) -> Floats:
    """Mean over the pairs that have a correlation; `sums` has shape (1, pairs, …, 4)."""
    phi = _phi(sums)
    known = ~np.isnan(phi)
    return _ratio(np.where(known, phi, 0.0).sum(axis=1), known.sum(axis=1).astype(float))


def _intervals(
    sums: Floats, filled: NDArray[np.bool_], statistic: Any, bounds: tuple[float, float], exact: bool
) -> list[Interval]:
    """A statistic of sums over groups with its 95 % interval, by leaving out each group with rows once.

    Args:
        sums: shape (figures, …, GROUPS, columns).
        exact: False gives no interval.
    """
    whole = sums.sum(axis=-2, keepdims=True)
    points = statistic(whole)[..., 0]
    groups = int(filled.sum())
    if not exact or groups < 2:
        return [Interval(number(point), None, None, int(rows), groups) for point, rows in _with_rows(points, whole)]
    left = statistic(whole - sums[..., filled, :])
    away = left - left.mean(axis=-1, keepdims=True)
    from scipy.special import stdtrit  # scipy.stats, which has the distribution, takes a second to import

    margin = stdtrit(groups - 1, 0.975) * np.sqrt((groups - 1) / groups * (away**2).sum(axis=-1))
    found = []
    for (point, rows), wide in zip(_with_rows(points, whole), margin, strict=True):
        known = np.isfinite(wide) and wide > 0
        low, high = (max(bounds[0], point - wide), min(bounds[1], point + wide)) if known else (np.nan, np.nan)
        found.append(Interval(number(point), number(low), number(high), int(rows), groups))
    return found


def _with_rows(points: Floats, whole: Floats) -> list[tuple[float, float]]:
    rows = whole[..., 0].reshape(len(points), -1)[:, 0]
    return list(zip(points.tolist(), rows.tolist(), strict=True))


def _undefined(a: str, b: str, sums: Floats, found: Interval) -> str | None:
    if found.mean is not None:
        return None
    rows, wrong_a, wrong_b, _ = sums
    if not rows:
        return "no row has a vote of both"
    constant = [name for name, wrong in ((a, wrong_a), (b, wrong_b)) if wrong < 1e-9 or rows - wrong < 1e-9]
    return f"{' and '.join(constant)} always or never wrong" if constant else "too few errors"
