"""Agreement of many evaluators at once against statistics computed one at a time by other code."""

from __future__ import annotations

import dataclasses
import itertools
import math

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from sklearn.metrics import cohen_kappa_score

from ray_pipeline.agents.jury import MISSING, VOTES, pool_votes, subsets, vote_codes
from ray_pipeline.agreement.humans import human_ceiling
from ray_pipeline.agreement.vote_agreement import (
    agreement,
    held_out_choice,
    paired,
    statistics,
    tables,
)
from ray_pipeline.stats.bootstrap import picks, ratio, resample

CODE = st.integers(MISSING, 2)
PAIRS = st.lists(st.tuples(CODE, CODE), min_size=1, max_size=40)
WEIGHTS = {"kappa": None, "kappa_linear": "linear", "kappa_quadratic": "quadratic"}


def columns(rows: list[tuple[int, ...]]) -> list[np.ndarray]:
    return [np.array(column, dtype=np.int8) for column in zip(*rows, strict=True)]


def close(found: float | None, expected: float) -> bool:
    return found is None if math.isnan(expected) else found is not None and abs(found - expected) < 1e-9


@settings(deadline=None)
@given(PAIRS)
def test_statistics_are_those_of_other_libraries(rows: list[tuple[int, int]]) -> None:
    votes, labels = columns(rows)
    (found,) = agreement(votes[None], labels)
    both = (votes != MISSING) & (labels != MISSING)
    v, y = votes[both], labels[both]
    assert (found.n, found.labelled, found.missing) == (len(rows), (labels != MISSING).sum(), (votes == MISSING).sum())
    assert found.vote_counts == {name: int((votes == code).sum()) for code, name in enumerate(VOTES)}
    constant = len(set(v) | set(y)) < 2
    for name, weights in WEIGHTS.items():
        expected = math.nan if constant else cohen_kappa_score(v, y, labels=[0, 1, 2], weights=weights)
        assert close(found.estimates[name].value, expected), name
    alpha = math.nan
    if not constant:
        alpha = krippendorff.alpha(np.stack([v, y]).astype(float), level_of_measurement="nominal")
    assert close(found.estimates["alpha"].value, alpha)
    assert close(found.estimates["accuracy"].value, float((v == y).mean()) if len(v) else math.nan)
    decided = (v != 1) & (y != 1)
    no_ties = float((v == y)[decided].mean()) if decided.any() else math.nan
    assert close(found.estimates["accuracy_no_ties"].value, no_ties)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(CODE, CODE), min_size=1, max_size=7))
def test_bounds_are_the_extremes_over_all_ways_to_fill_what_is_missing(rows: list[tuple[int, int]]) -> None:
    votes, labels = columns(rows)
    (found,) = agreement(votes[None], labels)
    lost = np.flatnonzero((votes == MISSING) & (labels != MISSING))
    wrong, right = [], []
    for filling in itertools.product(range(3), repeat=len(lost)):
        filled = votes.copy()
        filled[lost] = filling
        values = statistics(tables(filled[None], labels), ("kappa", "accuracy"))
        if all(filled[lost] == labels[lost]):
            right.append(values)
        if all(filled[lost] != labels[lost]):
            wrong.append(values)
    for name in ("kappa", "accuracy"):
        lows = [float(v[name][0]) for v in wrong if not np.isnan(v[name][0])]
        assert close(found.worst[name], min(lows) if lows else math.nan)
        assert close(found.best[name], float(right[0][name][0]))


def test_no_label_means_no_statistic_but_all_votes_are_counted() -> None:
    votes = vote_codes(["A", "B", None, "tie"])
    (found,) = agreement(votes[None], np.full(4, MISSING, dtype=np.int8), resample(range(4), 100, 0))
    assert found.kappa is None and found.estimates["kappa"].low is None and found.labelled == 0
    assert (found.n, found.missing, found.vote_counts) == (4, 1, {"A": 1, "tie": 1, "B": 1})


def test_intervals_are_those_of_resampled_items() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 60).astype(np.int8)
    votes = np.where(rng.random((5, 60)) < 0.6, labels, rng.integers(-1, 3, (5, 60))).astype(np.int8)
    draws = resample(range(60), 300, 7)
    assert draws.counts.sum(axis=1).tolist() == [60.0] * 300
    found = agreement(votes, labels, draws)
    for row, result in zip(votes, found, strict=True):
        drawn = []
        for counts in draws.counts.astype(int):
            picks = np.repeat(np.arange(60), counts)
            picks = picks[(row[picks] != MISSING) & (labels[picks] != MISSING)]
            drawn.append(cohen_kappa_score(row[picks], labels[picks], labels=[0, 1, 2]))
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert (result.estimates["kappa"].low, result.estimates["kappa"].high) == pytest.approx((low, high), abs=1e-9)


def test_a_seed_gives_the_same_draws() -> None:
    assert np.array_equal(resample(range(9), 5, 3).counts, resample(range(9), 5, 3).counts)
    assert not np.array_equal(resample(range(9), 5, 3).counts, resample(range(9), 5, 4).counts)


def test_every_jury_of_a_panel_is_that_jury_alone() -> None:
    rng = np.random.default_rng(2)
    codes, labels = rng.integers(-1, 3, (6, 50)).astype(np.int8), rng.integers(0, 3, 50).astype(np.int8)
    members = subsets(6, range(2, 7))
    together = agreement(pool_votes(codes, members), labels, resample(range(50), 100, 0))
    assert len(together) == 57
    for row in (0, 20, 56):
        (alone,) = agreement(pool_votes(codes, members[row : row + 1]), labels, resample(range(50), 100, 0))
        assert alone == together[row]


def pooled(codes: np.ndarray, columns: np.ndarray) -> float:
    """scikit-learn's kappa of all ordered pairs of annotations of an item; NaN where it is 0/0."""
    ones, others = [], []
    for column in columns:
        votes = [v for v in codes[:, column] if v != MISSING]
        for one, other in itertools.permutations(votes, 2):
            ones.append(one)
            others.append(other)
    return cohen_kappa_score(ones, others) if len(set(ones)) > 1 else math.nan


def test_the_pooled_kappa_of_annotators_has_an_interval() -> None:
    rng = np.random.default_rng(5)
    truth = rng.integers(0, 3, 120)
    codes = np.stack([np.where(rng.random(120) < 0.8, truth, rng.integers(0, 3, 120)) for _ in range(4)])
    codes[3, 60:] = MISSING  # annotators who saw half of the items count half
    codes = codes.astype(np.int8)
    draws = resample(range(120), 200, 0)
    found = human_ceiling(codes, draws)
    assert found is not None and found.pairs == 6 and found.kappa.value is not None
    assert found.kappa.value == pytest.approx(pooled(codes, np.arange(120)))
    drawn = [pooled(codes, np.repeat(np.arange(120), draw.astype(int))) for draw in draws.counts]
    assert found.kappa.low == pytest.approx(np.quantile(drawn, 0.025))
    assert found.kappa.high == pytest.approx(np.quantile(drawn, 0.975))
    assert human_ceiling(codes, dataclasses.replace(draws, confidence=0.5)).kappa.low > found.kappa.low  # type: ignore[union-attr]


def test_with_as_many_annotators_on_every_item_the_pooled_kappa_is_fleiss() -> None:
    rng = np.random.default_rng(6)
    truth = rng.integers(0, 3, 50)
    codes = np.stack([np.where(rng.random(50) < 0.7, truth, rng.integers(0, 3, 50)) for _ in range(5)]).astype(np.int8)
    found = human_ceiling(codes, resample(range(50), 100, 0))
    assert found is not None
    # Fleiss 1971, eqs. 1 to 7, with n = 5 ratings of each of N = 50 items.
    counts = np.stack([(codes == code).sum(axis=0) for code in range(3)], axis=1)
    observed = ((counts**2).sum() - 50 * 5) / (50 * 5 * 4)
    chance = ((counts.sum(axis=0) / (50 * 5)) ** 2).sum()
    assert found.kappa.value == pytest.approx((observed - chance) / (1 - chance))


def test_annotators_who_agree_on_all_of_their_few_items_count() -> None:
    """Forty annotators with two items each, as in MT-Bench's labels: most pairs have one item in common."""
    rng = np.random.default_rng(7)
    codes = np.full((40, 40), MISSING, dtype=np.int8)
    truth = rng.integers(0, 3, 40)
    for item in range(40):
        for annotator in (item, (item + 1) % 40):
            codes[annotator, item] = truth[item] if rng.random() < 0.8 else rng.integers(0, 3)
    found = human_ceiling(codes, resample(range(40), 500, 0))
    assert found is not None and found.pairs == 40
    alpha = krippendorff.alpha(np.where(codes == MISSING, np.nan, codes.astype(float)), level_of_measurement="nominal")
    assert found.kappa.value == pytest.approx(pooled(codes, np.arange(40)))
    assert found.kappa.value == pytest.approx(alpha, abs=0.02) and alpha > 0.4
    assert found.kappa.low is not None and found.kappa.high is not None
    assert found.kappa.low < found.kappa.value < found.kappa.high
    # A mean of the kappas of the pairs has only those that disagree: every pair that agrees is 0/0.
    assert all(
        one == other or math.isclose(cohen_kappa_score([one], [other]), 0)
        for one, other in (column[column != MISSING] for column in codes.T)
    )


# --- pairs, held-out choice, humans -----------------------------------------------------------------------------------


def test_a_better_evaluator_is_told_from_a_worse_one() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 300).astype(np.int8)
    good = np.where(rng.random(300) < 0.9, labels, 1).astype(np.int8)
    poor = np.where(rng.random(300) < 0.5, labels, 1).astype(np.int8)
    good[0] = MISSING
    draws = resample(range(300), 500, 0)
    found = paired(("good", good), ("poor", poor), labels, draws)
    assert found.items == 299 and found.difference.low is not None and found.difference.low > 0.2
    assert found.p_bootstrap is not None and found.p_bootstrap < 0.01
    assert found.p_mcnemar is not None and found.p_mcnemar < 1e-6 and found.only_first_right > found.only_second_right
    back = paired(("poor", poor), ("good", good), labels, draws)
    assert back.difference.value == pytest.approx(-(found.difference.value or 0)) and back.p_mcnemar == found.p_mcnemar
    same = paired(("poor", poor), ("poor", poor), labels, draws)
    assert (same.difference.value, same.p_bootstrap, same.p_mcnemar) == (0.0, 1.0, None)


def test_the_choice_is_made_on_one_half_and_reported_on_the_other() -> None:
    labels = np.array([0, 2, 0, 2, 0, 2, 0, 2], dtype=np.int8)
    on = np.array([True] * 4 + [False] * 4)
    lucky = np.array([0, 2, 0, 2, 2, 0, 2, 0], dtype=np.int8)  # right where it is chosen, wrong where it is reported
    steady = np.array([0, 2, 0, 0, 0, 2, 0, 2], dtype=np.int8)
    found = held_out_choice({"steady": steady, "lucky": lucky}, labels, on, resample(range(8), 100, 0))
    assert found is not None and (found.chosen, found.kappa_chosen_on, found.kappa.value) == ("lucky", 1.0, -1.0)
    assert (found.of, found.items_chosen_on, found.items_reported_on) == (2, 4, 4)
    nobody = np.full(8, MISSING, dtype=np.int8)
    assert held_out_choice({"x": lucky}, nobody, on, resample(range(8), 100, 0)) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(CODE, min_size=3, max_size=3), min_size=1, max_size=15))
def test_humans_among_themselves(items: list[list[int]]) -> None:
    codes = np.array(items, dtype=np.int8).T
    found = human_ceiling(codes, resample(range(len(items)), 50, 0))
    several = [[v for v in item if v != MISSING] for item in items]
    several = [item for item in several if len(item) >= 2]
    if not several:
        assert found is None
        return
    assert found is not None and found.items == len(several)
    ratings = np.where(codes == MISSING, np.nan, codes.astype(float))
    used = {v for item in several for v in item}
    expected = krippendorff.alpha(ratings, level_of_measurement="nominal") if len(used) > 1 else math.nan
    assert close(found.alpha.value, float(expected))
    right = total = 0
    for item in several:
        for place, own in enumerate(item):
            others = item[:place] + item[place + 1 :]
            top = max(others.count(v) for v in others)
            leaders = {v for v in others if others.count(v) == top}
            right += own == (leaders.pop() if len(leaders) == 1 else 1)
            total += 1
    assert found.one_against_rest.value == pytest.approx(right / total)


def test_a_ratio_is_resampled_as_one() -> None:
    top, bottom = np.array([1.0, 0, 1, 1]), np.array([1.0, 1, 1, 1])
    found = ratio(top, bottom, resample(range(4), 2000, 0))
    assert found.value == 0.75 and found.low is not None and 0 <= found.low < 0.75 <= (found.high or 0) <= 1
    assert ratio(np.zeros(3), np.zeros(3), resample(range(3), 10, 0)).value is None


# --- intervals --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(CODE, CODE, st.integers(0, 4)), min_size=1, max_size=25), st.integers(0, 3))
def test_an_interval_holds_its_estimate_and_has_a_width(rows: list[tuple[int, int, int]], seed: int) -> None:
    votes, labels, questions = columns(rows)
    samples = resample(questions, 40, seed)
    (found,) = agreement(votes[None], labels, samples)
    humans = human_ceiling(np.stack([votes, labels]), samples)
    estimates = [*found.estimates.values()]
    if humans is not None:
        estimates += [humans.kappa, humans.alpha, humans.one_against_rest]
    for one in estimates:
        assert (one.low is None) == (one.high is None)
        if one.low is not None and one.high is not None:
            assert one.value is not None and one.low <= one.value <= one.high and one.low < one.high


def clopper_pearson(n: int) -> tuple[float, float]:
    """Exact interval of a share of n of n: the lower bound is a quantile of a beta distribution."""
    return float(beta.ppf(0.025, n, 1)), 1.0


def test_one_item_has_no_interval_and_few_that_agree_an_exact_one() -> None:
    for n in (1, 2, 3, 12):
        labels = np.array(([0, 2, 1] * n)[:n], dtype=np.int8)
        (found,) = agreement(labels[None], labels, resample(range(n), 200, 0))
        (wrong,) = agreement((labels[None] + 1) % 3, labels, resample(range(n), 200, 0))
        right, kappa = found.estimates["accuracy"], found.estimates["kappa"]
        assert right.value == 1 and (kappa.low, kappa.high) == (None, None)
        assert kappa.value == (1 if n > 1 else None)
        low, high = clopper_pearson(n)
        if n == 1:
            assert (right.low, right.high) == (None, None)
        else:
            assert (right.low, right.high) == pytest.approx((low, high))
        none = wrong.estimates["accuracy"]
        assert none.value == 0 and (n == 1 or (none.low, none.high) == pytest.approx((1 - high, 1 - low)))


def test_an_exact_interval_counts_questions_and_not_items() -> None:
    labels = np.array([0, 2, 1] * 4, dtype=np.int8)
    questions = np.repeat(["p", "q", "r", "s"], 3)
    (found,) = agreement(labels[None], labels, resample(questions, 200, 0))
    right = found.estimates["accuracy"]
    assert (right.low, right.high) == pytest.approx(clopper_pearson(4))
    ones = np.ones(12)
    assert ratio(ones, ones, resample(questions, 200, 0)) == right
    assert ratio(ones, ones, resample(["p"] * 12, 200, 0)).low is None


def test_items_of_a_question_are_drawn_together() -> None:
    rng = np.random.default_rng(8)
    questions = np.repeat(np.arange(30), 10)
    labels = rng.integers(0, 3, 300).astype(np.int8)
    hard = rng.random(30) < 0.5  # whether a judge is right depends on the question
    votes = np.where(hard[questions] & (rng.random(300) < 0.9), (labels + 1) % 3, labels).astype(np.int8)
    samples = resample(questions, 400, 3)
    (found,), (apart,) = (agreement(votes[None], labels, s) for s in (samples, resample(range(300), 400, 3)))
    drawn = []
    for block in picks(30, 400, 3):
        for chosen in block:
            rows = np.concatenate([np.flatnonzero(questions == q) for q in chosen])
            drawn.append((cohen_kappa_score(votes[rows], labels[rows]), (votes[rows] == labels[rows]).mean()))
    for place, name in enumerate(("kappa", "accuracy")):
        own, by_item = found.estimates[name], apart.estimates[name]
        assert (own.low, own.high) == pytest.approx(tuple(np.quantile([d[place] for d in drawn], [0.025, 0.975])))
        assert own.high - own.low > 1.5 * (by_item.high - by_item.low)  # type: ignore[operator]
