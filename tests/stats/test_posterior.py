"""Posteriors of panels of known accuracy whose judges share errors, or are one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.stats.judge_errors import GROUPS, VoteCounts, count_votes
from ray_pipeline.stats.latent_class import MISSING, fit
from ray_pipeline.stats.posterior import PanelPosterior, fit_posterior

NAMES = list("abcdefghij")


def panel(rows: int, judges: int, *, right: float, shared: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Votes of three classes and a truth of the outer two. Judges see the truth with normal noise, a part of it shared
    by all, and are right with probability `right` where they do not vote for the class between."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 2], rows, p=[0.45, 0.55])
    own = rng.normal(size=(rows, judges))
    noise = np.sqrt(shared) * rng.normal(size=(rows, 1)) + np.sqrt(1 - shared) * own
    seen = (truth[:, None] - 1) * {0.8: 0.84, 0.75: 0.67}[right] + noise
    return np.select([seen > 0.2, seen < -0.2], [2, 0], 1).astype(np.int8), truth


def counted(votes: np.ndarray) -> VoteCounts:
    return count_votes(votes, np.full(len(votes), MISSING, np.int8), np.arange(len(votes)) // 4 % GROUPS)


def fitted(votes: np.ndarray, one_coin: bool = True) -> PanelPosterior:
    return fit_posterior(NAMES[: votes.shape[1]], counted(votes), 3, one_coin=one_coin)


def calibration_error(posterior: np.ndarray, truth: np.ndarray) -> float:
    """Mean probability of the most probable class, less how often that is the truth."""
    return float(posterior.max(axis=1).mean() - (posterior.argmax(axis=1) == truth).mean())


@pytest.mark.parametrize(("judges", "left"), [(4, 0.95), (6, 0.85), (10, 0.8)])
@pytest.mark.parametrize("shared", [0.3, 0.5])
def test_shared_errors_are_corrected_in_part(judges: int, left: float, shared: float) -> None:
    """Few judges who share errors show less of it."""
    for seed in range(3):
        votes, truth = panel(4000, judges, right=0.8, shared=shared, seed=seed)
        found = fitted(votes)
        plain = calibration_error(found.model.posterior(votes), truth)
        corrected = calibration_error(found.posterior(votes), truth)
        assert 0 < corrected < left * plain
        assert 1 < found.effective < left * judges and found.power == found.effective / judges


def test_independent_judges_lose_nothing_and_are_not_called_dependent() -> None:
    for seed in range(20):
        votes, truth = panel(3000, 5, right=0.75, shared=0.0, seed=seed)
        found = fitted(votes)
        assert found.effective > 4.6 and found.dependent == []
        assert abs(calibration_error(found.posterior(votes), truth)) < 0.03


def test_a_pair_that_errs_together_is_found_and_no_other() -> None:
    """Judges f and g share most of their noise; the others are independent."""
    for seed in range(10):
        votes, truth = panel(4000, 7, right=0.75, shared=0.0, seed=seed)
        rng = np.random.default_rng(seed)
        seen = (truth - 1) * 0.67 + rng.normal(size=len(truth))
        for place in (5, 6):
            own = seen + 0.5 * rng.normal(size=len(truth))
            votes[:, place] = np.select([own > 0.2, own < -0.2], [2, 0], 1)
        assert [(p.judge_a, p.judge_b) for p in fitted(votes).dependent] == [("f", "g")], seed


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_votes_that_are_missing_by_what_others_voted(shared: float) -> None:
    """Three judges vote on all rows, three more where those leave it open, and on a slice. If judges err on their own,
    accuracies are as with all votes, where the rows on which all voted give others; if they share errors, later judges
    seem worse than they are. The slice has the correlation of all rows; rows on which two voted have less of it."""
    for seed in range(3):
        votes, _ = panel(20_000, 6, right=0.75, shared=shared, seed=seed)
        sliced = np.random.default_rng(seed).random(len(votes)) < 0.05
        asked = sliced | (fitted(votes[:, :3]).posterior(votes[:, :3]).max(axis=1) < 0.9)
        partly = votes.copy()
        partly[~asked, 3:] = MISSING
        every, hard, selected = (fitted(some) for some in (votes, votes[asked], partly))
        found = fit_posterior(NAMES[:6], counted(partly), 3, one_coin=True, whole=counted(partly[sliced]))
        away = right_of(found) - right_of(every)
        assert np.abs(away[:3]).max() < 0.02 and (right_of(every) - right_of(hard))[:3].min() > 0.1
        assert np.abs(away[3:]).max() < 0.02 if shared == 0 else away[3:].max() < -0.08
        assert found.errors.rows == sliced.sum() and found.rows == len(votes)
        r, r_slice, r_selected = (one.errors.correlation.mean or 0.0 for one in (every, found, selected))
        assert abs(r_slice - r) < 0.04 and (shared == 0 or r_selected < 0.5 * r)


def right_of(model: PanelPosterior) -> np.ndarray:
    return model.model.errors[:, 0, 0]


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_copies_of_a_judge_change_nothing(copies: int) -> None:
    votes, _ = panel(2000, 4, right=0.8, shared=0.2, seed=1)
    again = np.concatenate([votes, np.repeat(votes[:, :1], copies - 1, axis=1)], axis=1)
    rng = np.random.default_rng(2)
    few = rng.random(len(votes)) < 0.003  # nearly one is enough
    again[few, -1] = 1
    alone, found = fitted(votes), fitted(again)
    assert found.groups == ((0, *range(4, 3 + copies)), (1,), (2,), (3,))
    assert found.posterior(again) == pytest.approx(alone.posterior(votes), abs=1e-12)
    # Without that, the copies become the truth: every probability is nearly 0 or 1.
    if copies == 5:
        counts = counted(again)
        blind = fit(counts.votes, counts.counts.sum(axis=1), 3, one_coin=True).posterior(again)
        assert blind.max(axis=1).mean() > found.posterior(again).max(axis=1).mean() + 0.02


rows_of_votes = st.lists(
    st.lists(st.integers(-1, 2), min_size=4, max_size=4), min_size=1, max_size=40
).map(lambda rows: np.array(rows, dtype=np.int8))  # fmt: skip


@given(rows_of_votes, st.booleans(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_votes_have_a_posterior_that_order_and_copies_do_not_change(
    votes: np.ndarray, one_coin: bool, rng: random.Random
) -> None:
    found = fitted(votes, one_coin)
    posterior = found.posterior(votes)
    empty = (votes == MISSING).all(axis=1)
    assert np.isnan(posterior[empty]).all()
    assert posterior[~empty].sum(axis=1) == pytest.approx(1) and (posterior[~empty] >= 0).all()
    assert 0 < found.power <= 1 and sorted(j for group in found.groups for j in group) == [0, 1, 2, 3]
    assert (fitted(votes, one_coin).posterior(votes)[~empty] == posterior[~empty]).all()
    order = list(range(len(votes)))
    rng.shuffle(order)
    groups = np.arange(len(votes)) // 4 % GROUPS
    shuffled = count_votes(votes[order], np.full(len(votes), MISSING, np.int8), groups[order])
    other = fit_posterior(NAMES[:4], shuffled, 3, one_coin=one_coin)
    assert (other.posterior(votes)[~empty] == posterior[~empty]).all()


def test_no_votes_at_all() -> None:
    votes = np.full((5, 3), MISSING, np.int8)
    assert np.isnan(fitted(votes).posterior(votes)).all()
