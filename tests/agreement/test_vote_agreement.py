"""Agreement of many evaluators at once against statistics computed one at a time by other code."""

from __future__ import annotations

import itertools
import math

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from ray_pipeline.stats.bootstrap import ratio, sample_counts

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
    (found,) = agreement(votes[None], np.full(4, MISSING, dtype=np.int8), sample_counts(4, 100, 0))
    assert found.kappa is None and found.estimates["kappa"].low is None and found.labelled == 0
    assert (found.n, found.missing, found.vote_counts) == (4, 1, {"A": 1, "tie": 1, "B": 1})


def test_intervals_are_those_of_resampled_items() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 60).astype(np.int8)
    votes = np.where(rng.random((5, 60)) < 0.6, labels, rng.integers(-1, 3, (5, 60))).astype(np.int8)
    draws = sample_counts(60, 300, 7)
    assert draws.sum(axis=1).tolist() == [60.0] * 300
    found = agreement(votes, labels, draws)
    for row, result in zip(votes, found, strict=True):
        drawn = []
        for counts in draws.astype(int):
            picks = np.repeat(np.arange(60), counts)
            picks = picks[(row[picks] != MISSING) & (labels[picks] != MISSING)]
            drawn.append(cohen_kappa_score(row[picks], labels[picks], labels=[0, 1, 2]))
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert (result.estimates["kappa"].low, result.estimates["kappa"].high) == pytest.approx((low, high), abs=1e-9)


def test_a_seed_gives_the_same_draws() -> None:
    assert np.array_equal(sample_counts(9, 5, 3), sample_counts(9, 5, 3))
    assert not np.array_equal(sample_counts(9, 5, 3), sample_counts(9, 5, 4))


def test_every_jury_of_a_panel_is_that_jury_alone() -> None:
    rng = np.random.default_rng(2)
    codes, labels = rng.integers(-1, 3, (6, 50)).astype(np.int8), rng.integers(0, 3, 50).astype(np.int8)
    members = subsets(6, range(2, 7))
    together = agreement(pool_votes(codes, members), labels, sample_counts(50, 100, 0))
    assert len(together) == 57
    for row in (0, 20, 56):
        (alone,) = agreement(pool_votes(codes, members[row : row + 1]), labels, sample_counts(50, 100, 0))
        assert alone == together[row]


def test_the_mean_kappa_of_annotators_has_an_interval() -> None:
    rng = np.random.default_rng(5)
    truth = rng.integers(0, 3, 120)
    codes = np.stack([np.where(rng.random(120) < 0.8, truth, rng.integers(0, 3, 120)) for _ in range(4)])
    codes[3, 60:] = MISSING  # annotators who saw half of the items count half
    draws = sample_counts(120, 300, 0)
    found = human_ceiling(codes.astype(np.int8), draws)
    assert found is not None and found.pairs == 6 and found.kappa.value is not None
    pairs = list(itertools.combinations(range(4), 2))

    def mean(rows: np.ndarray) -> float:
        shares, kappas = [], []
        for one, other in pairs:
            both = rows[(codes[one][rows] != MISSING) & (codes[other][rows] != MISSING)]
            shares.append(len(both))
            kappas.append(cohen_kappa_score(codes[one][both], codes[other][both]))
        return float(np.average(kappas, weights=shares))

    assert found.kappa.value == pytest.approx(mean(np.arange(120)))
    drawn = [mean(np.repeat(np.arange(120), draw.astype(int))) for draw in draws]
    assert found.kappa.low == pytest.approx(np.quantile(drawn, 0.025))
    assert found.kappa.high == pytest.approx(np.quantile(drawn, 0.975))
    assert human_ceiling(codes.astype(np.int8), draws, 0.5).kappa.low > found.kappa.low  # type: ignore[union-attr]


# --- pairs, held-out choice, humans -----------------------------------------------------------------------------------


def test_a_better_evaluator_is_told_from_a_worse_one() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 300).astype(np.int8)
    good = np.where(rng.random(300) < 0.9, labels, 1).astype(np.int8)
    poor = np.where(rng.random(300) < 0.5, labels, 1).astype(np.int8)
    good[0] = MISSING
    draws = sample_counts(300, 500, 0)
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
    found = held_out_choice({"steady": steady, "lucky": lucky}, labels, on, sample_counts(8, 100, 0))
    assert found is not None and (found.chosen, found.kappa_chosen_on, found.kappa.value) == ("lucky", 1.0, -1.0)
    assert (found.of, found.items_chosen_on, found.items_reported_on) == (2, 4, 4)
    nobody = np.full(8, MISSING, dtype=np.int8)
    assert held_out_choice({"x": lucky}, nobody, on, sample_counts(8, 100, 0)) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(CODE, min_size=3, max_size=3), min_size=1, max_size=15))
def test_humans_among_themselves(items: list[list[int]]) -> None:
    codes = np.array(items, dtype=np.int8).T
    found = human_ceiling(codes, sample_counts(len(items), 50, 0))
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
    found = ratio(top, bottom, sample_counts(4, 2000, 0))
    assert found.value == 0.75 and found.low is not None and 0 <= found.low < 0.75 <= (found.high or 0) <= 1
    assert ratio(np.zeros(3), np.zeros(3), sample_counts(3, 10, 0)).value is None
