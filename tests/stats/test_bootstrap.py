import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from ray_pipeline.stats import bootstrap
from ray_pipeline.stats.bootstrap import Interval, bootstrap_gain, bootstrap_mean, percentiles

ROWS = st.lists(
    st.tuples(st.floats(-100, 100), st.sampled_from(["p1", "p2", "p3", "p4", "p5"])), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=50)
@given(ROWS, st.randoms())
def test_the_same_seed_gives_the_same_interval_in_any_row_order(rows: list, random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = (bootstrap_mean([v for v, _ in r], [g for _, g in r], draws=50, seed=7) for r in (rows, shuffled))
    assert one.mean == pytest.approx(float(np.mean([v for v, _ in rows])), abs=1e-9)
    for field in ("mean", "low", "high"):
        a, b = getattr(one, field), getattr(two, field)
        assert (a is None and b is None) or a == pytest.approx(b, abs=1e-9)
    if one.low is not None and one.high is not None:
        values = [v for v, _ in rows]
        assert min(values) - 1e-9 <= one.low <= one.high <= max(values) + 1e-9


def test_against_a_loop_that_resamples_prompts() -> None:
    values, groups = np.array([1.0, 3.0, 4.0, 8.0, 0.0]), np.array(["b", "a", "b", "c", "c"])
    rng, draws = np.random.default_rng(5), 300
    by_group = [values[groups == g] for g in "abc"]
    means = [np.concatenate([by_group[i] for i in rng.integers(0, 3, 3)]).mean() for _ in range(draws)]
    found = bootstrap_mean(values, groups, draws=draws, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert (found.rows, found.groups) == (5, 3)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values, groups = np.arange(20.0), [f"p{i % 7}" for i in range(20)]
    whole = bootstrap_mean(values, groups, draws=101, seed=1)
    monkeypatch.setattr(bootstrap, "_CELLS_PER_BLOCK", 50)
    assert bootstrap_mean(values, groups, draws=101, seed=1) == whole


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        prompts = np.repeat(np.arange(60), 3)
        values = rng.normal(0, 1, 60)[prompts] + rng.normal(0, 0.2, 180)  # rows of a prompt are alike
        found = bootstrap_mean(values, prompts, draws=300, seed=trial)
        assert found.low is not None and found.high is not None
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_one_prompt_has_a_mean_but_no_interval() -> None:
    assert bootstrap_mean([1.0, 2.0], ["p", "p"]) == Interval(1.5, None, None, 2, 1)
    assert bootstrap_mean([], []) == Interval(None, None, None, 0, 0)


def test_values_that_are_all_the_same_have_an_exact_interval_or_none() -> None:
    """Resampling gives the same value each time; an interval without width would claim certainty."""
    groups = [f"p{i // 2}" for i in range(20)]
    assert bootstrap_mean([3.5] * 20, groups) == Interval(3.5, None, None, 20, 10)
    low = float(beta.ppf(0.025, 10, 1))  # Clopper–Pearson for 10 of 10 prompts
    for value, ends in ((1, (low, 1)), (0, (0, 1 - low)), (0.5, (0.5 * low, 1 - 0.5 * low))):
        found = bootstrap_mean([value] * 20, groups, bounds=(0, 1))
        assert (found.low, found.high) == pytest.approx(ends)
    found = bootstrap_mean([10] * 20, groups, bounds=(1, 10))
    assert (found.low, found.high) == pytest.approx((1 + 9 * low, 10))
    assert bootstrap_mean([1.0, 1.0], ["p", "p"], bounds=(0, 1)) == Interval(1.0, None, None, 2, 1)


def test_the_exact_interval_covers_as_often_as_it_says() -> None:
    """With three prompts and a share of 0.6, all three are right in 22 % of the runs: [1, 1] would then miss it."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        found = bootstrap_mean(rng.random(3) < 0.6, range(3), draws=100, seed=trial, bounds=(0, 1))
        assert found.low is not None and found.high is not None and found.mean is not None
        assert found.low <= found.mean <= found.high
        hits += found.low <= 0.6 <= found.high
    assert hits / 300 > 0.93


def test_bounds_hold_the_estimate_and_need_draws_that_vary() -> None:
    drawn = np.array([[0.2, 0.3, 0.4], [0.5, 0.5, 0.5], [np.nan, np.nan, 0.1], [0.2, 0.3, np.nan]])
    found = percentiles(drawn, [0.9, 0.5, 0.1, np.nan])
    assert found[1, 0] == 0.9 and found[0, 0] == pytest.approx(0.205)
    assert np.isnan(found[:, 1:]).all()


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        bootstrap_mean([np.nan], ["p"])
    with pytest.raises(ValueError, match="same shape"):
        bootstrap_mean([1.0, 2.0], ["p"])
    with pytest.raises(ValueError, match="draws"):
        bootstrap_mean([1.0], ["p"], draws=0)


def test_gain_is_paired_by_prompt() -> None:
    found = bootstrap_gain([1, 2, 9], ["a", "b", "only base"], [2, 4, 3], ["a", "a", "b"], draws=100)
    assert found.mean == pytest.approx(((3 - 1) + (3 - 2)) / 2)
    assert found.groups == 2
    assert bootstrap_gain([1], ["a"], [1], ["b"]).mean is None
