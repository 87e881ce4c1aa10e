"""P(human label) of an item from its judges' votes and scores, by a model on the human labels of others.

With few labels a model of all scores is worse than the best single judge. So below `least` labels there is no model,
and the posterior of the one-coin model stands as it is, which uses no label. From there on the model is chosen too: a
logistic one of that posterior alone, or with votes, scores, length and own families, and from ISOTONIC_LEAST labels on
also isotonic regression of the posterior, whichever predicts held-out labels better (`stats.calibration.fit`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.agents.jury import MISSING, TIE, VOTES, A, B, Codes
from ray_pipeline.agreement.panel import Evaluator, Panel, own_side
from ray_pipeline.stats.bootstrap import Floats
from ray_pipeline.stats.calibration import Features, fit

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


def features_of(
    judges: Sequence[Evaluator], panel: Panel, posterior: Floats, families: Mapping[str, str | None]
) -> dict[str, Features]:
    """The sets of features to choose from, by name.

    Own family: which answer is from a model of the judge's family, where that is A on some items and B on others. If it
    is always the same, nothing tells a preference for it from the merits of the model behind that answer.

    Args:
        posterior: of a latent class model without zeros, shape (items, 3).
        families: model family of each judge, None where it is not known.
    """
    log = np.log(posterior)
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
    own = [own_side(panel, families.get(judge.judge)) for judge in judges]
    known = [side for side in own if (side == A).any() and (side == B).any()]
    columns += [(np.select([side == B, side == A], [1.0, -1.0], 0.0), True) for side in known]
    more = "posterior, votes, scores, length and own family" if known else "posterior, votes, scores and length"
    return {"posterior": alone, more: _features(columns)}


def without_zeros(posterior: Floats) -> Floats:
    """A posterior to fit to: nothing is impossible, and items without a vote have equal probabilities."""
    p = np.maximum(np.nan_to_num(posterior, nan=1 / len(VOTES)), _LEAST)
    found: Floats = p / p.sum(axis=1, keepdims=True)
    return found


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
    found = fit(sets, without_zeros(posterior), labels, fold, on, len(VOTES))
    probabilities = np.where(on[:, None], found.held_out, found.probabilities)
    probabilities[np.asarray(np.isnan(posterior).any(axis=1))] = np.nan
    return Model(found.name, probabilities)


def most_probable(probabilities: Floats) -> Codes:
    """The class of the highest probability, a tie where several lead; missing where there are none."""
    known: NDArray[np.bool_] = np.asarray(~np.isnan(probabilities).any(axis=1))
    leaders = probabilities == np.nanmax(np.where(known[:, None], probabilities, 0.0), axis=1, keepdims=True)
    winner = np.where(leaders.sum(axis=1) == 1, np.nan_to_num(probabilities).argmax(axis=1), TIE)
    return np.where(known, winner, MISSING).astype(np.int8)
