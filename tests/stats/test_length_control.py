"""The win rate at equal length, held against planted judges and against scikit-learn's solver."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression

from ray_pipeline.stats.length_control import (
    MIN_OVERLAP,
    PRIOR_LENGTH,
    PRIOR_MODEL,
    at_equal_length,
    fit_two_weights,
    length_controlled_score,
    length_overlap,
    pair_lengths,
    sigmoid,
)
from ray_pipeline.stats.winrate import Outcome, PairDecision
from ray_pipeline.store.keys import digest
from tests.published import table


def decision(pair: int, outcome: Outcome) -> PairDecision:
    return PairDecision(f"x{pair:04d}", f"p{pair // 2}", None, None, outcome, False)


def planted(length_effect: float, better: float, n: int = 600, longer: float = 100.0) -> tuple[list, dict, dict]:
    """Verdicts of a judge that likes length, on a policy that writes `longer` characters more on average."""
    rng = np.random.default_rng(1)
    base = rng.integers(400, 800, n)
    policy = base + rng.normal(longer, 200, n).astype(int)
    x = np.tanh((base - policy) / np.std(base - policy, ddof=1))
    won = rng.random(n) < 1 / (1 + np.exp(-(better - length_effect * x)))
    decisions = [decision(i, "win" if w else "loss") for i, w in enumerate(won)]
    return (
        decisions,
        {d.pair_id: int(c) for d, c in zip(decisions, policy, strict=True)},
        {d.pair_id: int(c) for d, c in zip(decisions, base, strict=True)},
    )


def test_a_judge_that_only_likes_length_finds_equals() -> None:
    decisions, policy, base = planted(length_effect=3.0, better=0.0)
    found = length_controlled_score(decisions, policy, base, draws=200)
    assert found.raw.mean > 0.6  # type: ignore[operator]
    assert found.score.low < 0.5 < found.score.high and abs(found.score.mean - 0.5) < 0.15  # type: ignore[operator]
    assert found.length_weight < -2 and 80 < found.mean_difference < 120  # type: ignore[operator]
    assert found.overlap > MIN_OVERLAP  # type: ignore[operator]
    assert (found.pairs, found.score.groups) == (600, 300)


def test_without_a_length_effect_nothing_is_taken_away() -> None:
    decisions, policy, base = planted(length_effect=0.0, better=1.0)
    found = length_controlled_score(decisions, policy, base, draws=50)
    assert found.score.mean == pytest.approx(found.raw.mean, abs=0.06)


def test_no_score_is_given_where_equal_length_is_outside_the_data() -> None:
    decisions, policy, base = planted(length_effect=3.0, better=0.0, longer=300.0)
    found = length_controlled_score(decisions, policy, base, draws=20)
    assert found.raw.mean > 0.8 and 280 < found.mean_difference < 320  # type: ignore[operator]
    assert found.overlap < MIN_OVERLAP and found.length_weight < -2  # type: ignore[operator]
    assert (found.score.mean, found.score.low, found.score.high) == (None, None, None)
    assert (found.pairs, found.score.groups) == (600, 300)
    assert length_overlap([-1, -2, 0, 5]) == 0.5 and length_overlap([0, 0]) == 1 and length_overlap([3, 4]) == 0


def test_where_lengths_overlap_the_score_is_near_the_published_one() -> None:
    """Fifteen models of AlpacaEval: the own fit against the published length-controlled win rate, in points."""
    official = {row["model"]: float(row["length_controlled_winrate"]) for row in table("alpaca_eval_leaderboard.csv")}
    rows: dict[str, list[tuple[float, float]]] = {}
    for row in table("alpaca_eval_preferences.csv.gz"):
        longer = float(row["len_baseline"]) - float(row["len_model"])
        rows.setdefault(row["model"], []).append((float(row["preference"]) - 1, longer))
    scored, without = set(), 0.0
    for model, own in rows.items():
        y, delta = np.array(own).T
        score, _ = at_equal_length(y, delta, [str(i) for i in range(len(y))], draws=2)
        assert (score.mean is None) == (length_overlap(delta) < MIN_OVERLAP)
        if score.mean is not None:
            scored.add(model)
            error, raw_error = (abs(100 * share - official[model]) for share in (score.mean, y.mean()))
            assert error < 2 and error <= raw_error, model
        else:
            x = np.tanh(delta / delta.std(ddof=1))
            extrapolated = 100 * sigmoid(fit_two_weights(x, y, np.ones((1, len(y))))[0, :1])[0]
            without = max(without, abs(extrapolated - official[model]))
    assert scored == {"FuseChat-Llama-3.1-8B-Instruct", "NullModel", "gpt4_1106_preview"}
    assert without > 20


def test_equal_lengths_give_the_raw_score() -> None:
    decisions = [decision(i, o) for i, o in enumerate(["win"] * 30 + ["tie"] * 20 + ["loss"] * 10)]  # type: ignore[arg-type]
    same = {d.pair_id: 100 for d in decisions}
    found = length_controlled_score(decisions, same, same, draws=50)
    assert found.raw.mean == pytest.approx(40 / 60)
    assert found.score.mean == pytest.approx(40 / 60, abs=1e-3) and found.length_weight == pytest.approx(0)


def test_swapping_the_models_mirrors_the_score() -> None:
    decisions, policy, base = planted(1.5, 0.4, n=120)
    turned = [decision(i, {"win": "loss", "loss": "win"}[d.outcome]) for i, d in enumerate(decisions)]  # type: ignore[index]
    one = length_controlled_score(decisions, policy, base, draws=50)
    other = length_controlled_score(turned, base, policy, draws=50)
    assert one.score.mean == pytest.approx(1 - other.score.mean)  # type: ignore[operator]
    assert one.score.low == pytest.approx(1 - other.score.high)  # type: ignore[operator]


def test_separated_verdicts_stay_finite() -> None:
    decisions = [decision(i, "win") for i in range(20)]
    lengths = {d.pair_id: 100 + i for i, d in enumerate(decisions)}
    found = length_controlled_score(decisions, lengths, dict.fromkeys(lengths, 110), draws=20)
    assert 0.95 < found.score.mean < 1 and np.isfinite(found.length_weight)  # type: ignore[operator, arg-type]


def test_what_cannot_be_fitted_is_counted() -> None:
    decisions = [decision(0, "win"), decision(1, "unread"), decision(2, "loss")]
    found = length_controlled_score(decisions, {"x0000": 5, "x0001": 5}, {"x0000": 6, "x0001": 5, "x0002": 5}, draws=5)
    assert (found.pairs, found.unread, found.unmeasured) == (1, 1, 1)
    assert found.score.low is None and found.overlap == 0  # one pair, whose answers differ in length
    one = length_controlled_score([decision(0, "win")], {"x0000": 5}, {"x0000": 5}, draws=5)
    assert one.score.mean is not None and one.score.low is None  # one prompt has no interval
    nothing = length_controlled_score([], {}, {})
    assert (nothing.score.mean, nothing.length_weight, nothing.pairs) == (None, None, 0)


def test_the_fit_is_that_of_another_solver() -> None:
    rng = np.random.default_rng(3)
    x, y = np.tanh(rng.normal(size=80)), rng.choice([0.0, 0.5, 1.0], size=80)
    times = rng.integers(0, 3, size=(4, 80)).astype(float)
    # Columns scaled by their prior's width turn both priors into one ridge of strength 1.
    design = np.stack([np.full(80, PRIOR_MODEL), x * PRIOR_LENGTH], axis=1)
    for weights, mine in zip(times, fit_two_weights(x, y, times), strict=True):
        other = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=5000).fit(
            np.concatenate([design, design]),
            np.repeat([1, 0], 80),
            sample_weight=np.concatenate([weights * y, weights * (1 - y)]),
        )
        assert mine == pytest.approx(other.coef_[0] * [PRIOR_MODEL, PRIOR_LENGTH], abs=1e-4)


def test_lengths_of_pairs_are_joined_by_the_ids_that_the_comparisons_have() -> None:
    rows = [
        {"response_id": "b1", "prompt_id": "p1", "model": "base", "mode": "greedy", "response": "four"},
        {"response_id": "b2", "prompt_id": "p2", "model": "base", "mode": "greedy", "response": None},
        {"response_id": "p1", "prompt_id": "p1", "model": "policy", "mode": "greedy", "response": "longer one"},
        {"response_id": "p2", "prompt_id": "p2", "model": "policy", "mode": "greedy", "response": "x"},
        {"response_id": "s1", "prompt_id": "p1", "model": "policy", "mode": "sampled", "response": "x"},
    ]
    policy, base = pair_lengths(pa.Table.from_pylist(rows))
    assert policy == {digest(["pair", "p1", "b1"]): 10} and base == {digest(["pair", "p1", "b1"]): 4}
