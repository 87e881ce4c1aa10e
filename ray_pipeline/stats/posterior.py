"""The posterior of a panel: the probability of each class given all votes, with what judges share counted once.

A latent class model (`stats.latent_class`) takes votes for independent given the class. Two things are done about
judges who are not:

    nearly one    judges whose votes have a kappa above NEARLY_ONE are one judge, whose vote is that of the first of
                  them that was read. Several copies of a judge would otherwise become the truth itself.
    power         the likelihood of n judges is raised to the power n_eff / n, where n_eff is the effective number of
                  judges (`judge_errors.effective_number`) at the mean correlation of their errors, if that is positive:
                  n votes then weigh as much as n_eff independent ones.

The correlation is estimated with the model's own posterior as the truth. What most judges share is the truth to it, so
that the estimate is low and the posterior still too sure where all judges err together.

With two judges left there is one accuracy for both: two accuracies would fit as well with either of them always right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.stats.bootstrap import Floats
from ray_pipeline.stats.judge_errors import (
    ErrorPair,
    PanelErrors,
    VoteCounts,
    effective_number,
    panel_errors,
    total,
)
from ray_pipeline.stats.kappa import kappa_of_tables
from ray_pipeline.stats.latent_class import FEWEST, MISSING, LatentClasses, Votes, fit

#: Two judges with a kappa above this are hardly two.
NEARLY_ONE = 0.98
#: Two judges err together if the 95 % interval of the correlation of their errors lies above this. Smaller correlations
#: are within the error of the model.
TOGETHER = 0.1


@dataclasses.dataclass(frozen=True)
class PanelPosterior:
    """A fitted model.

    Attributes:
        groups: places of the judges that count as one; a judge like no other is a group by itself.
        model: of the groups.
        errors: of the groups, each under the name of its first judge, by the model's posterior. Intervals leave out the
            error of the model.
        rows: with a vote.
    """

    groups: tuple[tuple[int, ...], ...]
    model: LatentClasses
    errors: PanelErrors
    rows: int

    @property
    def effective(self) -> float:
        """Number of independent judges that the panel is worth."""
        mean = self.errors.correlation.mean
        return effective_number(len(self.groups), max(0.0, mean or 0.0)) or float(len(self.groups))

    @property
    def power(self) -> float:
        """Of the likelihood."""
        return self.effective / len(self.groups)

    @property
    def dependent(self) -> list[ErrorPair]:
        """Groups that err together."""
        return [pair for pair in self.errors.pairs if (pair.correlation.low or 0.0) > TOGETHER]

    def posterior(self, votes: Votes) -> Floats:
        """Probability of each class, shape (rows, classes); NaN in rows without a vote.

        Args:
            votes: shape (rows, judges).
        """
        return posterior_of(votes, self.groups, self.model, self.power)


def posterior_of(votes: Votes, groups: Sequence[Sequence[int]], model: LatentClasses, power: float) -> Floats:
    """As `PanelPosterior.posterior`, from the parts of a model."""
    merged = _merged(votes, groups)
    found = model.posterior(merged, power)
    found[(merged == MISSING).all(axis=1)] = np.nan
    return found


def fit_posterior(
    judges: Sequence[str], counts: VoteCounts, classes: int, *, one_coin: bool, whole: VoteCounts | None = None
) -> PanelPosterior:
    """Fit a model to the votes of all judges. Equal counts give an equal model; no label is used.

    Args:
        counts: of all rows of votes; the truth in them is not used.
        classes: number of classes; votes are 0 to classes − 1.
        one_coin: as of `latent_class.fit`.
        whole: of the rows on which every judge was asked, whatever the others voted; default: all rows. Which judges
            are nearly one, and how far they err together, is taken from these: elsewhere, two judges who both voted
            did so because others disagreed, so that their agreement there is not that on all rows.
    """
    whole = whole or counts
    groups = _nearly_one(whole, classes)
    voted, asked = _voted(counts, groups), _voted(whole, groups)
    if len(voted.votes):
        alike = len(groups) < FEWEST
        model = fit(voted.votes, voted.counts.sum(axis=1), classes, one_coin=one_coin, alike=alike)
    else:
        model = LatentClasses(np.full(classes, 1 / classes), np.full((len(groups), classes, classes), 1 / classes))
    names = [judges[group[0]] for group in groups]
    errors = panel_errors("estimate", names, asked, model.posterior(asked.votes), exact=True)
    return PanelPosterior(groups, model, errors, int(voted.counts.sum()))


def _voted(counts: VoteCounts, groups: Sequence[Sequence[int]]) -> VoteCounts:
    """Votes of groups, where there are any."""
    unlabelled = np.full(len(counts.votes), MISSING, np.int8)
    merged = total([VoteCounts(_merged(counts.votes, groups), unlabelled, counts.counts)], len(groups))
    return merged.take((merged.votes != MISSING).any(axis=1))


def _nearly_one(counts: VoteCounts, classes: int) -> tuple[tuple[int, ...], ...]:
    """Judges by group: each joins the first group whose first judge it is nearly one with."""
    weight, groups = counts.counts.sum(axis=1), list[list[int]]()
    for judge in range(counts.votes.shape[1]):
        for group in groups:
            if _kappa(counts.votes[:, group[0]], counts.votes[:, judge], weight, classes) > NEARLY_ONE:
                group.append(judge)
                break
        else:
            groups.append([judge])
    return tuple(tuple(group) for group in groups)


def _kappa(a: Votes, b: Votes, weight: Floats, classes: int) -> float:
    """Over the rows on which both voted; NaN where it is 0/0."""
    both: NDArray[np.bool_] = (a != MISSING) & (b != MISSING)
    cells = a[both].astype(np.int64) * classes + b[both]
    table = np.bincount(cells, weights=weight[both], minlength=classes**2).astype(np.float64)
    return float(kappa_of_tables(table.reshape(classes, classes)))


def _merged(votes: Votes, groups: Sequence[Sequence[int]]) -> Votes:
    """One vote for each group, that of its first judge who has one, shape (rows, groups)."""
    merged = votes[:, [group[0] for group in groups]].copy()
    for place, group in enumerate(groups):
        for judge in group[1:]:
            merged[:, place] = np.where(merged[:, place] == MISSING, votes[:, judge], merged[:, place])
    return merged
