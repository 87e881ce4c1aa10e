import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.stats.alpha import krippendorff_alpha
from ray_pipeline.stats.kappa import (
    BETWEEN,
    DESIRABLE,
    UNDESIRABLE,
    cohen_kappa,
    pairwise_kappas,
    score_class,
)
from tests.published import NUMBERS, json_lines

VOTES = st.sampled_from(["A", "B", "tie"])


def kappa_by_hand(a: list[str], b: list[str]) -> float:
    n = len(a)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    chance = sum(a.count(label) * b.count(label) for label in set(a) | set(b)) / n**2
    return (observed - chance) / (1 - chance)


def alpha_by_hand(ratings: np.ndarray) -> float:
    """Krippendorff's alpha, interval, from all ordered pairs: within units (observed) and over all (expected)."""
    units = [unit[~np.isnan(unit)] for unit in ratings.T]
    units = [unit for unit in units if len(unit) >= 2]
    everything = np.concatenate(units)
    n = len(everything)
    observed = sum(((u[:, None] - u[None, :]) ** 2).sum() / (len(u) - 1) for u in units) / n
    expected = ((everything[:, None] - everything[None, :]) ** 2).sum() / (n * (n - 1))
    return float(1 - observed / expected)


def test_classes_take_the_thresholds_in() -> None:
    scores = [1, 4, 4.01, 5, 6.99, 7, 10]
    expected = [UNDESIRABLE, UNDESIRABLE, BETWEEN, BETWEEN, BETWEEN, DESIRABLE, DESIRABLE]
    assert score_class(scores).tolist() == expected
    assert score_class(scores).dtype == np.int8
    assert score_class([[5.0, 2.0]], desirable_from=5, undesirable_to=2).tolist() == [[DESIRABLE, UNDESIRABLE]]


def test_an_unread_score_has_no_class() -> None:
    with pytest.raises(ValueError, match="NaN"):
        score_class([7.0, np.nan])
    with pytest.raises(ValueError, match="less than"):
        score_class([7.0], desirable_from=4, undesirable_to=4)


@settings(deadline=None)
@given(st.lists(st.tuples(VOTES, VOTES), min_size=1, max_size=60))
def test_kappa_is_what_the_formula_says_and_symmetric(rows: list[tuple[str, str]]) -> None:
    a, b = [r[0] for r in rows], [r[1] for r in rows]
    found, mirrored = cohen_kappa(a, b, ["A", "B", "tie"]), cohen_kappa(b, a, ["A", "B", "tie"])
    assert found.rows == len(rows)
    if len(set(a) | set(b)) == 1:
        assert found.value is None and "one class" in (found.reason or "")
        return
    assert found.value == pytest.approx(kappa_by_hand(a, b), abs=1e-12)
    assert mirrored.value == pytest.approx(found.value, abs=1e-12)


def test_kappa_without_rows_is_undefined_with_a_reason() -> None:
    empty = cohen_kappa([], [], ["A", "B"])
    assert (empty.value, empty.rows) == (None, 0) and empty.reason


def test_kappa_refuses_labels_it_would_drop() -> None:
    with pytest.raises(ValueError, match="unknown labels"):
        cohen_kappa(["A", "D"], ["A", "A"], ["A", "B"])
    with pytest.raises(ValueError, match="same shape"):
        cohen_kappa(["A"], ["A", "B"], ["A", "B"])


def test_pairs_use_only_the_rows_that_both_read() -> None:
    nan = np.nan
    scores = {"z": np.array([8, 2, 5, nan, 9.0]), "a": np.array([8, 3, nan, 1, 5.0]), "m": np.full(5, nan)}
    pairs = {(p.judge_a, p.judge_b): p for p in pairwise_kappas(scores)}
    assert list(pairs) == [("a", "m"), ("a", "z"), ("m", "z")]
    assert pairs["a", "z"].rows == 3
    assert pairs["a", "z"].value == pytest.approx(kappa_by_hand(["d", "u", "b"], ["d", "u", "d"]))
    assert pairs["a", "m"].value is None and pairs["a", "m"].reason
    with pytest.raises(ValueError, match="same candidates"):
        pairwise_kappas({"a": np.zeros(2), "b": np.zeros(3)})


@settings(deadline=None)
@given(st.lists(st.lists(st.one_of(st.integers(1, 10), st.none()), min_size=3, max_size=3), min_size=1, max_size=25))
def test_alpha_is_what_the_formula_says(rows: list[list[int | None]]) -> None:
    ratings = np.array(rows, dtype=np.float64).T
    pairable = [row for row in rows if sum(x is not None for x in row) >= 2]
    found = krippendorff_alpha(ratings)
    if len({x for row in pairable for x in row if x is not None}) < 2:
        assert found is None
    else:
        assert found == pytest.approx(alpha_by_hand(ratings), abs=1e-9)


def test_alpha_wants_judges_by_rows() -> None:
    with pytest.raises(ValueError, match="judges, rows"):
        krippendorff_alpha([1.0, 2.0])


def test_published_kappas_from_recorded_scores() -> None:
    items = json_lines(NUMBERS / "fair_eval.jsonl.gz")
    published = json.loads((NUMBERS / "agreement.json").read_text())
    human = [item["human_label"] for item in items]

    def votes(judge: str) -> list[str]:
        scores = [(i["combined_10"][judge]["stored_a"], i["combined_10"][judge]["stored_b"]) for i in items]
        return ["A" if a > b else "B" if a < b else "tie" for a, b in scores]

    def jury(judges: list[str]) -> list[str]:
        ballots = [sorted(ballot) for ballot in zip(*map(votes, judges), strict=True)]
        most = [max(ballot.count(v) for v in ballot) for ballot in ballots]
        leaders = [{v for v in b if b.count(v) == m} for b, m in zip(ballots, most, strict=True)]
        return [leader.pop() if len(leader) == 1 else "tie" for leader in leaders]

    labels = ["A", "B", "tie"]
    assert len(published["table3_judge"]) == 6
    for row in published["table3_judge"]:
        assert cohen_kappa(votes(row["judge"]), human, labels).value == pytest.approx(row["reproduced"], abs=1e-9)
    for row in published["juries"]:
        assert cohen_kappa(jury(row["jury"]), human, labels).value == pytest.approx(row["reproduced"], abs=1e-9)
