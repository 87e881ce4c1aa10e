"""Panels of known accuracy and known correlation of errors, and the latent class model against its paper."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.stats.judge_errors import (
    GROUPS,
    VoteCounts,
    at_accuracy,
    count_votes,
    effective_number,
    errors_against_truth,
    estimated_errors,
    total,
)
from ray_pipeline.stats.latent_class import MISSING, fit

NAMES = ["a", "b", "c", "d", "e"]


def panel(
    rows: int, accuracies: list[float], correlation: float, *, classes: int = 2, missing: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Votes and truth. Each judge takes its error from a shared draw with probability √correlation, which gives two
    judges of equal accuracy that correlation of errors."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, rows)
    shared, own = rng.random(rows), rng.random((rows, len(accuracies)))
    draws = np.where(rng.random(own.shape) < np.sqrt(correlation), shared[:, None], own)
    wrong = (truth[:, None] + rng.integers(1, classes, own.shape)) % classes
    votes = np.where(draws < 1 - np.array(accuracies), wrong, truth[:, None])
    votes[rng.random(votes.shape) < missing] = MISSING
    return votes.astype(np.int8), truth.astype(np.int8)


def counted(votes: np.ndarray, truth: np.ndarray | None = None) -> VoteCounts:
    known = np.full(len(votes), MISSING, np.int8) if truth is None else truth
    return count_votes(votes, known, np.arange(len(votes)) // 4 % GROUPS)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_planted_correlation_against_the_truth(correlation: float, missing: float) -> None:
    votes, truth = panel(10_000, [0.8] * 4, correlation, missing=missing)
    found = errors_against_truth(NAMES[:4], counted(votes, truth))
    assert found is not None and found.basis == "truth"
    assert found.correlation.mean == pytest.approx(correlation, abs=0.03)
    assert found.effective.mean == pytest.approx(4 / (1 + 3 * correlation), abs=0.25)
    for judge in found.judges:
        assert judge.accuracy.low < 0.8 < judge.accuracy.high or judge.accuracy.mean == pytest.approx(0.8, abs=0.01)
        assert judge.accuracy.rows == (votes[:, NAMES.index(judge.judge)] != MISSING).sum()
    for pair in found.pairs:
        a, b = NAMES.index(pair.judge_a), NAMES.index(pair.judge_b)
        both = (votes[:, a] != MISSING) & (votes[:, b] != MISSING)
        plain = np.corrcoef(votes[both, a] != truth[both], votes[both, b] != truth[both])[0, 1]
        assert pair.correlation.mean == pytest.approx(plain) and pair.correlation.rows == both.sum()
        assert pair.correlation.low < plain < pair.correlation.high


def test_intervals_cover() -> None:
    inside = 0
    for seed in range(60):
        votes, truth = panel(1_500, [0.8, 0.8], 0.3, seed=seed)
        found = errors_against_truth(NAMES[:2], counted(votes, truth))
        assert found is not None
        inside += found.correlation.low < 0.3 < found.correlation.high
    assert 0.86 <= inside / 60 <= 1


def test_the_effective_number() -> None:
    assert effective_number(3, 0.0) == 3 and effective_number(3, 1.0) == 1
    assert effective_number(5, 0.25) == 2.5 and effective_number(3, None) is None
    assert effective_number(2, -1.0) is None  # two judges of whom always exactly one errs
    votes, truth = panel(20_000, [0.8] * 5, 0.4)
    found = errors_against_truth(NAMES, counted(votes, truth))
    assert found is not None
    # By its meaning: the share of right votes varies as it would among so many independent judges.
    share = (votes == truth[:, None]).mean(axis=1)
    accuracy = (votes == truth[:, None]).mean()
    assert found.effective.mean == pytest.approx(accuracy * (1 - accuracy) / share.var(), rel=0.02)
    assert found.effective.low < found.effective.mean < found.effective.high < 5


@settings(max_examples=10, deadline=None)
@given(
    accuracies=st.lists(st.floats(0.7, 0.95), min_size=4, max_size=5),
    classes=st.sampled_from([2, 3]),
    missing=st.sampled_from([0.0, 0.15]),
    seed=st.integers(0, 10_000),
)
def test_the_estimate_recovers_independent_judges(
    accuracies: list[float], classes: int, missing: float, seed: int
) -> None:
    votes, _ = panel(12_000, accuracies, 0.0, classes=classes, missing=missing, seed=seed)
    found = estimated_errors(NAMES[: len(accuracies)], counted(votes))
    assert found is not None and found.basis == "estimate"
    for judge, accuracy in zip(found.judges, accuracies, strict=True):
        assert judge.accuracy.mean == pytest.approx(accuracy, abs=0.05)
        assert judge.accuracy.low is None
    assert found.correlation.mean == pytest.approx(0.0, abs=0.05)


def test_shared_errors_are_not_seen_by_the_estimate_but_by_the_assumed_accuracies() -> None:
    votes, truth = panel(20_000, [0.8] * 5, 0.5)
    estimate, exact = estimated_errors(NAMES, counted(votes)), errors_against_truth(NAMES, counted(votes, truth))
    assert estimate is not None and exact is not None
    assert exact.correlation.mean == pytest.approx(0.5, abs=0.03)
    assert estimate.correlation.mean < 0.1 and estimate.judges[0].accuracy.mean > 0.85
    line = {found.accuracy: found for found in estimate.assumed}[0.8]
    assert line.correlation == pytest.approx(0.5, abs=0.03)
    assert line.effective == pytest.approx(exact.effective.mean, rel=0.05)
    independent, _ = panel(20_000, [0.7] * 3, 0.0)
    too_right = at_accuracy(counted(independent))
    assert too_right[0].correlation is None and too_right[-1].correlation == pytest.approx(0.0, abs=0.03)


def test_panels_that_have_no_estimate() -> None:
    votes, truth = panel(500, [0.8] * 3, 0.3)
    assert estimated_errors(NAMES[:1], counted(votes[:, :1])) is None
    two = estimated_errors(NAMES[:2], counted(votes[:, :2]))
    assert two is not None and two.judges == [] and two.correlation.mean is None and two.assumed
    three = estimated_errors(NAMES[:3], counted(votes))
    assert three is not None and len(three.judges) == 3 and three.pairs == []
    assert three.correlation.mean is None and "two classes" in str(three.reason)
    assert errors_against_truth(NAMES[:3], counted(votes)) is None
    nothing = np.full((5, 3), MISSING, np.int8)
    assert estimated_errors(NAMES[:3], counted(nothing)) is None
    assert errors_against_truth(NAMES[:3], counted(nothing, truth[:5])) is None


def test_judges_without_errors_have_no_correlation() -> None:
    votes, truth = panel(400, [1.0, 0.8, 0.8], 0.0)
    found = errors_against_truth(NAMES[:3], counted(votes, truth))
    assert found is not None
    assert [pair.correlation.mean is None for pair in found.pairs] == [True, True, False]
    assert found.pairs[0].reason == "a always or never wrong"
    assert found.correlation.mean == found.pairs[2].correlation.mean
    perfect = errors_against_truth(NAMES[:3], counted(np.repeat(truth[:, None], 3, axis=1), truth))
    assert perfect is not None and perfect.correlation.mean is None and perfect.reason == "no pair has errors of both"
    alone = errors_against_truth(["a"], counted(votes[:, 1:2], truth))
    assert alone is not None and alone.reason == "there is one judge" and alone.pairs == []


def test_two_judges_that_are_one() -> None:
    votes, truth = panel(3_000, [0.8, 0.8, 0.8], 0.0)
    votes[:, 1] = votes[:, 0]
    found = errors_against_truth(NAMES[:3], counted(votes, truth))
    assert found is not None and found.pairs[0].correlation.mean == pytest.approx(1.0)
    assert found.effective.mean == pytest.approx(3 / (1 + 2 / 3), abs=0.15)


def test_missing_votes_are_in_no_figure() -> None:
    votes, truth = panel(2_000, [0.8] * 3, 0.3)
    more = np.concatenate([votes, np.full((700, 3), MISSING, np.int8)])
    longer = np.concatenate([truth, np.zeros(700, np.int8)])
    for with_truth in (True, False):
        find = errors_against_truth if with_truth else estimated_errors
        one = find(NAMES[:3], counted(votes, truth if with_truth else None))
        other = find(NAMES[:3], counted(more, longer if with_truth else None))
        assert one is not None and other is not None and one.rows == other.rows == 2_000
        assert [j.accuracy.mean for j in one.judges] == pytest.approx([j.accuracy.mean for j in other.judges])


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 600), max_size=4), seed=st.integers(0, 100))
def test_counts_of_shards_are_those_of_the_whole(cuts: list[int], seed: int) -> None:
    votes, truth = panel(600, [0.8, 0.7, 0.9], 0.3, classes=3, missing=0.1, seed=seed)
    truth[::5] = MISSING
    groups = np.arange(600) % GROUPS
    edges = [0, *sorted(cuts), 600]
    parts = [count_votes(votes[a:b], truth[a:b], groups[a:b]) for a, b in itertools.pairwise(edges)]
    whole, summed = count_votes(votes, truth, groups), total(reversed(parts), 3)
    for name in ("votes", "truth", "counts"):
        assert np.array_equal(getattr(whole, name), getattr(summed, name))
    assert len(whole.votes) <= 4**3 * 4 and whole.counts.sum() == 600


def test_the_latent_class_model_is_that_of_dawid_and_skene() -> None:
    """Against EM on single rows: products of probabilities as in the paper and in crowd-kit, and neither logarithms nor
    counts."""
    votes, _ = panel(300, [0.9, 0.7, 0.8, 0.6], 0.1, classes=3, missing=0.1, seed=7)
    votes = votes[(votes != MISSING).any(axis=1)]
    counts = counted(votes)
    model = fit(counts.votes, counts.counts.sum(axis=1), tolerance=1e-12, iterations=20_000)
    posterior = model.posterior(counts.votes)
    found = {row.tobytes(): p for row, p in zip(counts.votes, posterior, strict=True)}
    by_row = np.array([found[row.tobytes()] for row in votes])

    given_class = (votes[:, :, None] == np.arange(3)).astype(float)  # n_ijl of the paper
    truth = given_class.sum(axis=1) / given_class.sum(axis=(1, 2))[:, None]
    for _ in range(20_000):
        prior = truth.mean(axis=0)
        confusion = np.einsum("iz,ijl->jzl", truth, given_class)
        confusion /= confusion.sum(axis=2, keepdims=True)
        likelihood = prior * np.prod(confusion[None] ** given_class[:, :, None, :], axis=(1, 3))
        newer = likelihood / likelihood.sum(axis=1, keepdims=True)
        if np.abs(newer - truth).max() < 1e-12:
            break
        truth = newer
    assert by_row == pytest.approx(truth, abs=1e-6)
