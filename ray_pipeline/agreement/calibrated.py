"""P(human label) of an item from its judges' votes and scores, by a logistic model on the human labels of others.

With few labels a model of all scores is worse than the best single judge. So below `least` labels there is no model,
and the posterior of the one-coin model stands as it is, which uses no label. From there on the features are chosen too:
that posterior alone, or with votes, scores and length, whichever predicts held-out labels better (`fit_logistic`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.agents.jury import MISSING, TIE, VOTES, A, B, Codes
from ray_pipeline.agreement.panel import Evaluator, Panel
from ray_pipeline.stats.bootstrap import Floats
from ray_pipeline.stats.calibration import Features, fit_logistic

#: Probabilities of a posterior are kept this far from 0: the model overstates them where judges share their errors.
_LEAST = 1e-3

UNFITTED = "posterior as it is"


@dataclasses.dataclass(frozen=True)
class Model:
    """Probabilities of all items, shape (items, 3), and where they are from.

    Attributes:
        features: name of the chosen features, or UNFITTED.
        probabilities: of items with a label, by a model without them.
    """

    features: str
    probabilities: Floats


def features_of(judges: Sequence[Evaluator], panel: Panel, posterior: Floats) -> dict[str, Features]:
    """The sets of features to choose from, by name.

    Args:
        posterior: of a latent class model, shape (items, 3), NaN for items without a vote.
    """
    p = np.maximum(np.nan_to_num(posterior, nan=1 / len(VOTES)), _LEAST)
    log = np.log(p / p.sum(axis=1, keepdims=True))
    columns: list[tuple[Floats, bool]] = [
        (log[:, B] - log[:, A], True),
        (log[:, TIE] - np.logaddexp(log[:, A], log[:, B]), False),
    ]
    alone = _features(columns)
    for judge in judges:
        vote = np.select([judge.votes == B, judge.votes == A], [1.0, -1.0], 0.0)
        columns += [(vote, True), ((judge.votes == TIE).astype(float), False)]
        if judge.scores is not None:
            columns.append((np.nan_to_num(judge.scores[1] - judge.scores[0]), True))
    with np.errstate(divide="ignore", invalid="ignore"):
        longer = np.log1p(panel.lengths[1]) - np.log1p(panel.lengths[0])
    columns.append((np.nan_to_num(longer), True))
    return {"posterior": alone, "posterior, votes, scores and length": _features(columns)}


def _features(columns: Sequence[tuple[Floats, bool]]) -> Features:
    return Features(np.stack([column for column, _ in columns], axis=1), np.array([odd for _, odd in columns]))


def calibrate(
    sets: Mapping[str, Features],
    posterior: Floats,
    labels: Codes,
    fold: NDArray[np.int64],
    on: NDArray[np.bool_],
    least: int,
) -> Model:
    """The model that the labels `on` allow.

    Args:
        posterior: what stands with fewer than `least` labels, or with labels in one fold only.
        labels, fold, on: shape (items,).
    """
    if on.sum() < least or len(np.unique(fold[on])) < 2:
        return Model(UNFITTED, posterior)
    found = fit_logistic(sets, labels, fold, on, len(VOTES))
    probabilities = np.where(on[:, None], found.held_out, found.probabilities)
    probabilities[np.asarray(np.isnan(posterior).any(axis=1))] = np.nan
    return Model(found.name, probabilities)


def most_probable(probabilities: Floats) -> Codes:
    """The class of the highest probability, a tie where several lead; missing where there are none."""
    known: NDArray[np.bool_] = np.asarray(~np.isnan(probabilities).any(axis=1))
    leaders = probabilities == np.nanmax(np.where(known[:, None], probabilities, 0.0), axis=1, keepdims=True)
    winner = np.where(leaders.sum(axis=1) == 1, np.nan_to_num(probabilities).argmax(axis=1), TIE)
    return np.where(known, winner, MISSING).astype(np.int8)
