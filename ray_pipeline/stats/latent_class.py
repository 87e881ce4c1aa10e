"""The most probable class of an item from the votes of several judges, by a latent class model fitted without labels.

Judges are assumed to err independently given the class. Dawid and Skene (1979, "Maximum likelihood estimation of
observer error-rates using the EM algorithm") give every judge a table of errors; the one-coin model (Zhang, Chen, Zhou
and Jordan 2016, JMLR 17, §2) gives it one accuracy, with errors spread evenly over the other classes: n parameters
instead of n·k·(k − 1), which needs fewer items.

The library crowd-kit has both models, on a pandas frame of single votes and without counts: ten million rows, joined in
every step, where distinct rows of votes with their counts are a few ten thousand. The tests compare the two.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.stats.bootstrap import Floats

if TYPE_CHECKING:
    from scipy.sparse import csr_array

#: A vote that was not read, or a truth that is not known. It is in no figure.
MISSING = -1
#: With fewer judges no votes show who of them is right.
FEWEST = 3

Votes = NDArray[np.int8]


@dataclasses.dataclass(frozen=True)
class LatentClasses:
    """A fitted model.

    Attributes:
        prior: probability of each class, shape (classes,).
        errors: probability of a judge's vote given the true class, shape (judges, votes, classes).
    """

    prior: Floats
    errors: Floats

    def posterior(self, votes: Votes, power: float = 1.0) -> Floats:
        """Probability of each class given each row of votes, shape (rows, classes).

        Args:
            votes: shape (rows, judges). Missing votes are left out of the likelihood.
            power: of the likelihood; below 1 where votes are worth less than as many independent ones.
        """
        return self._given(_cast(votes, len(self.prior)), power)

    def _given(self, cast: csr_array, power: float = 1.0) -> Floats:
        by_vote = np.log(self.errors).reshape(-1, len(self.prior))
        log = np.log(self.prior) + power * (cast @ by_vote)
        found: Floats = np.exp(log - log.max(axis=1, keepdims=True))
        found /= found.sum(axis=1, keepdims=True)
        return found


def _cast(votes: Votes, classes: int) -> csr_array:
    """The votes as indicators, shape (rows, judges · classes)."""
    voted = votes != MISSING
    columns = (votes + np.arange(votes.shape[1]) * classes)[voted]  # (judge, vote) as one number
    starts = np.concatenate([[0], np.cumsum(voted.sum(axis=1))])
    from scipy.sparse import csr_array  # importing it takes a moment

    return csr_array((np.ones(len(columns)), columns, starts), shape=(len(votes), votes.shape[1] * classes))


def fit(
    votes: Votes,
    weight: Floats,
    classes: int | None = None,
    iterations: int = 2000,
    tolerance: float = 1e-7,
    *,
    one_coin: bool = False,
    alike: bool = False,
) -> LatentClasses:
    """The model of greatest likelihood, by EM.

    It starts with the shares of a row's votes, as Dawid and Skene do, so classes keep their names and equal input has
    equal output. Missing votes are left out of the likelihood: where whether a judge votes depends on other votes of
    the row alone, it has the same maximum as with the reason for the gaps in the model (Rubin 1976, "Inference and
    missing data": missing at random).

    Args:
        votes: distinct rows, each with a vote, shape (rows, judges).
        weight: how often each row occurs, shape (rows,).
        classes: default: those up to the last one that has a vote.
        one_coin: one accuracy for each judge instead of a table of errors.
        alike: one accuracy for all judges.
    """
    classes, judges = classes or int(votes.max()) + 1, votes.shape[1]
    cast = _cast(votes, classes)
    share = np.stack([(votes == c).sum(axis=1) for c in range(classes)], axis=1).astype(float)
    found: Floats = share / share.sum(axis=1, keepdims=True)
    for _ in range(iterations):
        weighted = found * weight[:, None]
        prior = np.clip(weighted.sum(axis=0) / weight.sum(), 1e-10, None)
        confusion = np.clip((cast.T @ weighted).reshape(judges, classes, classes), 1e-10, None)  # (judge, vote, truth)
        if one_coin or alike:
            confusion = _one_coin(confusion, alike)
        model = LatentClasses(prior, confusion / confusion.sum(axis=1, keepdims=True))
        posterior = model._given(cast)
        change = np.abs(posterior - found).max()
        found = posterior
        if change < tolerance:
            break
    return model


def _one_coin(confusion: Floats, alike: bool) -> Floats:
    """Expected counts (judge, vote, truth) with a judge's accuracy the same for every truth and its errors uniform."""
    classes = confusion.shape[1]
    counts = np.broadcast_to(confusion.sum(axis=0), confusion.shape) if alike else confusion
    right = np.trace(counts, axis1=1, axis2=2) / counts.sum(axis=(1, 2))
    share = ((1 - right) / max(classes - 1, 1))[:, None, None] + np.zeros_like(confusion)
    share[:, np.arange(classes), np.arange(classes)] = right[:, None]
    clipped: Floats = np.maximum(share, 1e-10)
    return clipped
