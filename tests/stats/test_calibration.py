"""Calibration against its definition, and the logistic model against known probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss

from ray_pipeline.stats.bootstrap import resample
from ray_pipeline.stats.calibration import ISOTONIC, ISOTONIC_LEAST, Features, calibration, fit


def test_calibration_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 200)
    labels = rng.integers(0, 3, 200).astype(np.int8)
    labels[:20], p[20:30] = -1, np.nan
    found = calibration(p, labels, resample(np.arange(200), 200, 0))
    assert found is not None and found.items == 170
    known = [(row, label) for row, label in zip(p[30:], labels[30:], strict=True)]
    brier = sum(sum((row[c] - (label == c)) ** 2 for c in range(3)) for row, label in known) / 170
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in known:
        bins.setdefault(int(max(row) * 10), []).append((max(row), int(np.argmax(row)) == label))
    ece = sum(abs(sum(r for _, r in own) - sum(s for s, _ in own)) for own in bins.values()) / 170
    assert (found.brier.value, found.ece.value) == (pytest.approx(brier), pytest.approx(ece))
    assert found.ece.low is not None and found.ece.low <= ece and sum(b.items for b in found.bins) == 170
    assert calibration(p, np.full(200, -1, np.int8), resample(np.arange(200), 100, 0)) is None


def test_true_probabilities_have_a_small_error_and_overstated_ones_a_large_one() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet([1, 1, 1], 20_000)
    labels = (rng.random(20_000)[:, None] > p.cumsum(axis=1)).sum(axis=1).astype(np.int8)
    samples = resample(np.arange(20_000), 100, 0)
    true, overstated = (calibration(q / q.sum(axis=1, keepdims=True), labels, samples) for q in (p, p**4))
    assert true is not None and true.ece.value is not None and true.ece.value < 0.015
    assert overstated is not None and overstated.ece.value is not None and overstated.ece.value > 0.15
    assert true.brier.value == pytest.approx(1 - (p**2).sum(axis=1).mean(), abs=0.01)  # its expectation


def test_the_model_finds_the_features_that_matter_and_no_item_sees_its_label() -> None:
    rng = np.random.default_rng(2)
    signal, noise = rng.normal(size=600), rng.normal(size=(600, 8))
    logits = np.stack([-1.5 * signal, np.full(600, -0.5), 1.5 * signal], axis=1)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random(600)[:, None] > p.cumsum(axis=1)).sum(axis=1).astype(np.int8)
    fold, on = np.arange(600) % 5, np.arange(600) < 500
    sets = {
        "noise": Features(noise, np.ones(8, dtype=bool)),
        "signal": Features(signal[:, None], np.array([True])),
    }
    flat = np.full((600, 3), 1 / 3)
    found = fit(sets, flat, labels, fold, on, 3)
    assert found.name == "signal"
    assert np.abs(found.probabilities[~on] - p[~on]).mean() < 0.06
    assert log_loss(labels[on], found.held_out[on]) < log_loss(labels[on], p[on]) + 0.03
    assert np.isnan(found.held_out[~on]).all() and found.held_out[on].sum(axis=1) == pytest.approx(1)
    # Another label of one item moves its own held-out probabilities by nothing.
    changed = labels.copy()
    changed[7] = (labels[7] + 1) % 3
    other = fit({"signal": sets["signal"]}, flat, changed, fold, on, 3)
    same = fit({"signal": sets["signal"]}, flat, labels, fold, on, 3)
    if other.strength == same.strength:
        assert other.held_out[7] == pytest.approx(same.held_out[7], abs=1e-9)
    assert other.held_out[8] != pytest.approx(same.held_out[8], abs=1e-9)


def test_isotonic_regression_is_tried_with_enough_labels_and_wins_on_a_curve_that_is_not_logistic() -> None:
    rng = np.random.default_rng(6)
    score = rng.random(1200)
    right = np.where(score < 0.4, 0.02, np.where(score < 0.9, 0.5, 0.98))  # of the last class: three steps
    scores = np.stack([1 - score, np.zeros(1200), score], axis=1)
    labels = np.where(rng.random(1200) < right, 2, 0).astype(np.int8)
    sets = {"odds": Features(np.log(score / (1 - score))[:, None], np.array([True]))}
    fold = np.arange(1200) % 5
    found = fit(sets, scores, labels, fold, np.arange(1200) < 1000, 3)
    assert (found.name, found.strength) == (ISOTONIC, None)
    # Each item is seen with its classes reversed, too, so what is learnt is the mean of both ends.
    expected = (right + 1 - np.where(score > 0.6, 0.02, np.where(score > 0.1, 0.5, 0.98))) / 2
    middle = (np.abs(score - 0.5) < 0.38) & (np.abs(np.abs(score - 0.5) - 0.1) > 0.02)
    assert np.abs(found.probabilities[:, 2] - expected)[middle].mean() < 0.05
    assert found.probabilities.sum(axis=1) == pytest.approx(1) and found.probabilities.min() > 0
    mirrored = fit(sets, scores[:, ::-1], (2 - labels).astype(np.int8), fold, np.arange(1200) < 1000, 3)
    assert mirrored.probabilities[:, ::-1] == pytest.approx(found.probabilities)
    few = np.arange(1200) < ISOTONIC_LEAST - 1
    assert fit(sets, scores, labels, fold, few, 3).name == "odds"
