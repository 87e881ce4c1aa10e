"""AlpacaEval 2's length-controlled win rate: the published GLM, its gamed rows and difficulties.

Source: Dubois et al. 2024, "Length-Controlled AlpacaEval" (arXiv 2404.04475), §3, with the choices of its
published code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ray_pipeline.bench.files import BenchmarkFileError, need
from ray_pipeline.stats.bootstrap import Floats
from ray_pipeline.stats.length_control import sigmoid

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

#: Weight of each row of the two gamed baselines: λ = 0.2, shared between the two (paper, §3.2, and published code).
GAMED_WEIGHT = 0.1
_PENALTIES = np.logspace(-4, 4, 10)
_FOLDS = 5


def checked_preferences(preferences: ArrayLike) -> Floats:
    """Preferences as an array of shape (rows,). Raises ValueError unless they are NaN or between 0 and 1."""
    values = np.asarray(preferences, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"one preference an instruction is needed, got shape {values.shape}")
    outside = (values < 0) | (values > 1)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"preference {values[row]} of row {row} is not between 0 and 1; published files hold 1 + preference"
        )
    return values


@dataclasses.dataclass(frozen=True)
class GlmWeights:
    """Weights of logit P(model is preferred) = length · tanh(Δ/sd) + difficulty · d_i + model; there is no intercept.

    Δ is the reference's length minus the model's, in characters, and sd its sample standard deviation over the
    model's rows; d_i is the difficulty of instruction i. The reference itself has three zeros.
    """

    length: float
    difficulty: float
    model: float


@dataclasses.dataclass(frozen=True)
class GamedRows:
    """Rows of the two gamed baselines (the reference asked to be verbose and concise), which keep the fit honest.

    Arrays of shape (rows,), in the order of the published file: standardised length difference (as Δ/sd above),
    difficulty, preference. `surrogate`: the preferences are stand-ins with the same sufficient statistics.
    """

    length: Floats
    difficulty: Floats
    preference: Floats
    surrogate: bool = False


@dataclasses.dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate: percentages.

    Attributes:
        standard_error: of the predicted preferences over instructions (n − 1), as published; None for one row.
        preferences: predicted at equal length, of each instruction, shape (rows,); between 0 and 1.
        penalty: inverse strength C of the L1 penalty that cross-validation chose; None without a fit.
        estimator: how the weights came about: "published weights", "re-fit" or "re-fit, surrogate of the gamed rows".
    """

    win_rate: float
    standard_error: float | None
    weights: GlmWeights
    preferences: Floats
    penalty: float | None
    estimator: str


def gamed_rows_of(rows: Sequence[Mapping[str, str]], source: str = "gamed rows") -> GamedRows:
    """Rows of the published df_gamed.csv (std_delta_len, instruction_difficulty, preference), or of a surrogate with
    `pseudo_preference` in place of the preferences.

    Raises:
        BenchmarkFileError: there are no rows, or a column is missing or not numeric.
    """
    if not rows:
        raise BenchmarkFileError(f"{source} has no rows")
    surrogate = "preference" not in rows[0]
    columns = ("std_delta_len", "instruction_difficulty", "pseudo_preference" if surrogate else "preference")
    length, difficulty, preference = (_column(rows, name, source) for name in columns)
    return GamedRows(length, difficulty, preference, surrogate)


def difficulties_of(rows: Sequence[Mapping[str, str]], source: str = "instruction difficulties") -> Floats:
    """Difficulty of each instruction by its place in the reference file, shape (instructions,).

    From rows of df_gamed.csv, where each instruction comes once a gamed baseline, or of a file of difficulties alone:
    columns `index` (or `instruction_index`) and `instruction_difficulty`.

    Raises:
        BenchmarkFileError: a column is missing or not numeric, or the indices are not 0, 1, 2, … without a gap.
    """
    name = "instruction_index" if rows and "instruction_index" in rows[0] else "index"
    indices = _column(rows, name, source).astype(int)
    distinct, first = np.unique(indices, return_index=True)
    if not np.array_equal(distinct, np.arange(len(distinct))):
        raise BenchmarkFileError(
            f"{source}: the column {name} does not hold every number from 0 to {len(distinct) - 1}"
        )
    return _column(rows, "instruction_difficulty", source)[first]


def _column(rows: Sequence[Mapping[str, str]], name: str, source: str) -> Floats:
    texts = [need(row, name, source, number) for number, row in enumerate(rows, 1)]
    try:
        return np.array(texts, dtype=np.float64)
    except ValueError as error:
        raise BenchmarkFileError(f"{source}, column {name}: {error}") from error


def at_equal_length(weights: GlmWeights, difficulty: Floats) -> Floats:
    """Preference for the model on each instruction at equal length: σ(model + difficulty · d_i), shape (rows,).

    Models that were published with fewer than all instructions took the difficulties by position: the first ones.
    """
    return sigmoid(weights.model + weights.difficulty * difficulty)


def fit_length_controlled(
    preferences: ArrayLike,
    length_reference: ArrayLike,
    length_model: ArrayLike,
    difficulty: ArrayLike,
    gamed: GamedRows,
) -> LengthControlled:
    """Fit the GLM to a model's preferences and predict its win rate at equal length.

    Each row counts twice, once for a win with weight y·s and once for a loss with weight (1−y)·s; s is 1, and
    `GAMED_WEIGHT` for the gamed rows, whose model term is 0. L1-penalised logistic regression (liblinear), the penalty
    by 5-fold cross-validation over rows on the weighted log-loss.

    Args:
        preferences: between 0 and 1, NaN where unread (left out of the fit, predicted all the same), shape (rows,).
        length_reference, length_model: characters of the outputs, shape (rows,); NaN only where unread.
        difficulty: d_i of each row, shape (rows,).

    Raises:
        ValueError: shapes differ, or fewer rows were read than there are folds.
    """
    y = checked_preferences(preferences)
    d = np.asarray(difficulty, dtype=np.float64)
    delta = np.asarray(length_reference, dtype=np.float64) - np.asarray(length_model, dtype=np.float64)
    if not y.shape == d.shape == delta.shape:
        raise ValueError(f"{len(y)} preferences, {len(d)} difficulties and {len(delta)} lengths: one each is needed")
    read = ~np.isnan(y)
    if read.sum() < _FOLDS:
        raise ValueError(f"{int(read.sum())} preferences were read; the fit needs {_FOLDS} or more")
    if np.isnan(delta[read]).any() or np.isnan(d).any():
        raise ValueError("a length of a row with a preference, or a difficulty, is NaN")
    sd = np.nanstd(delta, ddof=1)
    # Equal lengths everywhere (the reference against itself) leave nothing to control for.
    standardised = delta / sd if sd > 0 else np.zeros(len(delta))
    features = np.concatenate(
        [
            np.stack([np.tanh(gamed.length), gamed.difficulty, np.zeros(len(gamed.length))], axis=1),
            np.stack([np.tanh(standardised), d, np.ones(len(d))], axis=1)[read],
        ]
    )
    labels = np.concatenate([gamed.preference, y[read]])
    strength = np.concatenate([np.full(len(gamed.preference), GAMED_WEIGHT), np.ones(int(read.sum()))])
    penalty = _choose_penalty(features, labels, strength)
    weights = GlmWeights(*(float(w) for w in _fit(features, labels, strength, penalty).coef_[0]))
    predicted = at_equal_length(weights, d)
    return LengthControlled(
        win_rate=100 * float(predicted.mean()),
        standard_error=100 * float(predicted.std(ddof=1)) / len(d) ** 0.5 if len(d) > 1 else None,
        weights=weights,
        preferences=predicted,
        penalty=float(penalty),
        estimator="re-fit, surrogate of the gamed rows" if gamed.surrogate else "re-fit",
    )


def _choose_penalty(features: Floats, labels: Floats, strength: Floats) -> float:
    """The C of the smallest mean weighted log-loss over folds of rows; a row's two copies are never separated."""
    from sklearn.model_selection import GroupKFold

    rows = np.arange(len(labels))
    twice = np.concatenate([rows, rows])
    losses = np.zeros(len(_PENALTIES))
    for train, test in GroupKFold(n_splits=_FOLDS).split(twice[:, None], groups=twice):
        # Both copies of a row are in the same fold, so half of the indices identify the rows.
        inside, outside = train[train < len(rows)], test[test < len(rows)]
        for i, penalty in enumerate(_PENALTIES):
            model = _fit(features[inside], labels[inside], strength[inside], penalty)
            p = np.clip(model.predict_proba(features[outside])[:, 1], 1e-15, 1 - 1e-15)
            y = labels[outside]
            losses[i] -= float(np.mean(strength[outside] * (y * np.log(p) + (1 - y) * np.log(1 - p))))
    return float(_PENALTIES[int(losses.argmin())])


def _fit(features: Floats, labels: Floats, strength: Floats, penalty: float) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=penalty, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=123)
    targets = np.concatenate([np.ones(len(labels)), np.zeros(len(labels))])
    weights = np.concatenate([labels * strength, (1 - labels) * strength])
    return model.fit(np.concatenate([features, features]), targets, sample_weight=weights)
