"""The certified threshold: its tests against the binomial distribution, and its promise over many draws of labels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from ray_pipeline.stats.certified import certify

LEVEL, CONFIDENCE = 0.9, 0.9


def population(size: int, seed: int, *, flat: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Confidences in steps, and whether people agree: 60 to 99 %, or with `flat` at a rate just below the level."""
    rng = np.random.default_rng(seed)
    sure = rng.integers(0, 40, size) / 10
    return sure, rng.random(size) < (0.893 if flat else 0.6 + 0.4 * np.minimum(sure / 3.2, 0.98))


def kept_agreement(sure: np.ndarray, right: np.ndarray, labels: int, rng: np.random.Generator) -> float | None:
    at = rng.choice(len(sure), labels, replace=False)
    found = certify(sure, sure[at], right[at], LEVEL, CONFIDENCE)
    kept = sure >= found.threshold
    return float(right[kept].mean()) if kept.any() else None


@pytest.mark.parametrize("flat", [False, True], ids=["surer is better", "confidence says nothing"])
def test_the_promise_holds_in_nine_of_ten_of_a_thousand_draws(flat: bool) -> None:
    sure, right = population(5000, 1, flat=flat)
    rng = np.random.default_rng(2)
    found = [kept_agreement(sure, right, 200, rng) for _ in range(1000)]
    broken = sum(share is not None and share < LEVEL for share in found)
    assert broken <= 100
    if not flat:
        assert sum(share is not None for share in found) > 700  # it certifies something in most of them
    # The uncorrected rule, the lowest threshold with enough agreement among the labels, breaks it far more often.
    naive = 0
    for _ in range(300):
        at = rng.choice(len(sure), 200, replace=False)
        enough = [t for t in np.unique(sure) if (sure[at] >= t).any() and right[at][sure[at] >= t].mean() >= LEVEL]
        naive += bool(enough) and right[sure >= min(enough)].mean() < LEVEL
    assert naive > 60


def test_each_test_is_the_exact_binomial_test_and_the_first_that_fails_ends_the_sequence() -> None:
    sure, right = population(3000, 3)
    at = np.random.default_rng(4).choice(3000, 300, replace=False)
    found = certify(sure, sure[at], right[at], LEVEL, CONFIDENCE)
    thresholds = [one.threshold for one in found.tested]
    assert thresholds == sorted(set(thresholds), reverse=True) and found.certified is not None
    for one in found.tested:
        own = sure[at] >= one.threshold
        assert (one.labelled, one.agreeing) == (own.sum(), (own & right[at]).sum())
        rejected = binom.sf(one.agreeing - 1, one.labelled, LEVEL) <= 1 - CONFIDENCE
        assert rejected == (one.least_agreement >= LEVEL) == (one.threshold >= found.threshold)
        assert one.coverage == pytest.approx((sure >= one.threshold).mean())
    assert found.needed == 22 and 0.9**22 <= 0.1 < 0.9**21


def test_too_few_labels_certify_nothing() -> None:
    sure = np.linspace(0, 1, 500)
    assert certify(sure, sure[:21], np.ones(21, dtype=bool), LEVEL, CONFIDENCE).threshold == np.inf
    whole = certify(sure, sure[::20], np.ones(25, dtype=bool), LEVEL, CONFIDENCE)
    assert whole.threshold == 0.0 and whole.certified is not None and whole.certified.coverage == 1.0
    assert certify(sure, sure[:0], np.ones(0, dtype=bool), LEVEL, CONFIDENCE).threshold == np.inf
    assert certify(np.full(9, np.nan), np.full(3, np.nan), np.ones(3, dtype=bool), LEVEL, CONFIDENCE).tested == []
