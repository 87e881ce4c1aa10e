"""Draws by the value of a label: their probabilities, and estimates from them that are unbiased and cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from ray_pipeline.stats.bootstrap import Estimate
from ray_pipeline.stats.label_value import deviation, draw, worth
from ray_pipeline.stats.prediction_powered import powered_mean

ITEMS = 1000


def chance_of(odds: np.ndarray, overstated: float) -> np.ndarray:
    return 1 / (1 + np.exp(-odds / overstated))


def true_mean(overstated: float) -> float:
    return float(chance_of(norm.ppf((np.arange(20_000) + 0.5) / 20_000, 1, 2), overstated).mean())


def estimated(rng: np.random.Generator, overstated: float, even: float) -> Estimate:
    """From 100 labels for items whose predicted log-odds are overstated by a factor."""
    odds = rng.normal(1, 2, ITEMS)
    p = chance_of(odds, 1)
    labels = (rng.random(ITEMS) < chance_of(odds, overstated)).astype(float)
    drawn = draw(deviation(np.stack([1 - p, p], axis=1), (0, 1)), 100, even, rng.random(ITEMS), rng.random(ITEMS))
    own, rest = drawn.items, np.setdiff1d(np.arange(ITEMS), drawn.items)
    found = powered_mean(labels[own], p[own], p[rest], probabilities=drawn.probability[own])
    assert found is not None and len(own) == 100
    return found.powered


@pytest.mark.parametrize("overstated", [1.0, 3.0])
def test_estimates_are_unbiased_and_intervals_cover_in_95_percent(overstated: float) -> None:
    rng = np.random.default_rng(3)
    errors, covered, rounds, truth = [], 0, 2000, true_mean(overstated)
    for _ in range(rounds):
        own = estimated(rng, overstated, even=0.2)
        assert own.value is not None and own.low is not None and own.high is not None
        errors.append(own.value - truth)
        covered += own.low <= truth <= own.high
    assert abs(np.mean(errors)) < 4 * np.std(errors) / rounds**0.5
    assert covered / rounds == pytest.approx(0.95, abs=0.015)


def test_labels_by_value_say_more_than_as_many_drawn_evenly() -> None:
    rng = np.random.default_rng(4)

    def variance(even: float) -> float:
        drawn = [estimated(rng, 1.0, even) for _ in range(600)]
        return float(np.mean([((one.high or 0) - (one.low or 0)) ** 2 for one in drawn]))

    assert variance(0.2) < 0.96 * variance(1.0)


def test_items_are_drawn_with_their_probabilities() -> None:
    rng = np.random.default_rng(5)
    sizes = np.array([1.0] * 30 + [3.0] * 20 + [40.0, 60.0])
    counts, rounds = np.zeros(52), 4000
    for _ in range(rounds):
        drawn = draw(sizes, 20, 0.2, rng.random(52), rng.random(52))
        assert len(set(drawn.items.tolist())) == 20 and drawn.even == 4
        counts[drawn.items] += 1
    p = drawn.probability
    assert p[-1] == p[-2] == 1 and p.sum() == pytest.approx(20)
    # Sequential Poisson samples have nearly these probabilities.
    assert np.abs(counts / rounds - p).max() < 0.02 + 4 * 0.5 / rounds**0.5


def test_a_larger_draw_contains_a_smaller_one_and_few_items_are_all_drawn() -> None:
    rng = np.random.default_rng(6)
    sizes, first, second = rng.random(300) + 0.01, rng.random(300), rng.random(300)
    before: set[int] = set()
    for rows in (1, 10, 50, 120, 299):
        found = set(draw(sizes, rows, 0.2, first, second).items.tolist())
        assert len(found) == rows and before <= found
        before = found
    everything = draw(sizes, 1000, 0.2, first, second)
    assert sorted(everything.items.tolist()) == list(range(300)) and everything.probability == pytest.approx(1.0)
    evenly = draw(sizes, 30, 1.0, first, second)
    assert evenly.probability == pytest.approx(0.1) and evenly.even == 30
    nothing = draw(np.zeros(0), 10, 0.2, np.zeros(0), np.zeros(0))
    assert len(nothing.items) == 0 and nothing.even == 0


def test_deviation_of_a_value() -> None:
    sure, open_ = deviation(np.array([[0.0, 1.0], [0.5, 0.5]]), (0, 1))
    assert sure == pytest.approx((0.05 * 0.95) ** 0.5) and open_ == 0.5
    (win,) = deviation(np.array([[1 / 3, 1 / 3, 1 / 3]]), (0, 0.5, 1))
    assert win == pytest.approx((1 / 6) ** 0.5)


def test_an_item_counts_for_every_mean_that_it_is_part_of() -> None:
    first, second = np.array([0.1, 0.1, 0.5, 0.5]), np.array([0.0, 0.3, 0.0, 0.3])
    relative = first**2 / np.mean(first**2) + second**2 / np.mean(second**2)
    assert worth([first, second]) == pytest.approx(np.sqrt(relative))
    assert worth([first, np.zeros(4)]) == pytest.approx(first / np.mean(first**2) ** 0.5)
    assert len(worth([np.zeros(0)])) == 0
