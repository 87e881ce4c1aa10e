"""Several policies of one base: win rates, scores and accuracies over seeds, on planted tables."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pyarrow as pa
import pytest

from ray_pipeline.evaluate.method_stats import PolicyRun, differences, method_stats, over_seeds, policy_stats
from ray_pipeline.stats.bootstrap import bootstrap_mean
from ray_pipeline.stats.length_control import at_equal_length
from ray_pipeline.store.keys import digest, unit_hash

PROMPTS = [f"p{i}" for i in range(10)]

#: label → (wins, ties, right answers) of ten prompts.
PLANTED = {
    "kto-gated-s0": (8, 1, 9),
    "kto-gated-s1": (6, 2, 7),
    "kto-raw-s0": (5, 1, 6),
    "kto-raw-s1": (5, 3, 5),
}
RUNS = [
    PolicyRun(
        label, *label.replace("-s", "-").split("-")[:2], seed=int(label[-1]), rows=100, steps=10, train_seconds=2.0
    )
    for label in PLANTED
]


def tables() -> tuple[pa.Table, pa.Table, pa.Table]:
    responses: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    for label, (wins, ties, right) in {"base": (0, 0, 4), **PLANTED}.items():
        for i, prompt in enumerate(PROMPTS):
            name = f"{label}/{prompt}"
            text = "x" * (i + 1 + (2 * (i % 2) if label != "base" else 0))
            responses.append(
                {"response_id": name, "prompt_id": prompt, "model": label, "mode": "greedy", "response": text,
                 "finish_reason": "stop", "completion_tokens": i, "correct": i < right}
            )  # fmt: skip
            scores = {"a": 8.0 if i < right else 2.0, "b": None if i == 9 else 6.0}
            verdicts += [{"candidate_id": name, "prompt_id": prompt, "judge": j, "score": s} for j, s in scores.items()]
            if label != "base":
                pair = digest(["pair", name, f"base/{prompt}"])
                outcome = "AB" if i < wins else "CC" if i < wins + ties else "BA"  # the choice in order ab, then in ba
                for order, choice in zip(("ab", "ba"), outcome, strict=True):
                    names = (label, "base") if order == "ab" else ("base", label)
                    comparisons.append(
                        {"pair_id": pair, "prompt_id": prompt, "judge": "judge", "order": order, "model_a": names[0],
                         "model_b": names[1], "choice": choice, "parse_status": "ok"}
                    )  # fmt: skip
    return tuple(pa.Table.from_pylist(rows) for rows in (responses, comparisons, verdicts))  # type: ignore[return-value]


def test_each_policy_is_measured_on_its_own_rows() -> None:
    base, *policies = policy_stats(RUNS, *tables(), "greedy", draws=200)
    assert base.run is None and base.win_rate is None and base.accuracy == {"greedy": 0.4}
    for policy, (wins, ties, right) in zip(policies, PLANTED.values(), strict=True):
        assert (policy.win_rate, policy.tie_rate, policy.accuracy["greedy"]) == (wins / 10, ties / 10, right / 10)
        assert policy.scores == {"a": pytest.approx(2 + 0.6 * right), "b": 6.0}
        # The answer to p9 has a score that was not read: it has no mean.
        assert policy.mean_score == pytest.approx(statistics.mean([7.0] * min(right, 9) + [4.0] * (9 - min(right, 9))))


def test_the_score_at_equal_length_is_fitted_for_each_policy() -> None:
    """Every second answer of a policy is two characters longer than the base's."""
    _, *policies = policy_stats(RUNS, *tables(), "greedy", draws=200)
    for policy, (wins, ties, _right) in zip(policies, PLANTED.values(), strict=True):
        outcomes = [1.0] * wins + [0.5] * ties + [0.0] * (10 - wins - ties)
        score, _ = at_equal_length(outcomes, [-2 * (i % 2) for i in range(10)], PROMPTS)
        assert policy.equal_length == pytest.approx(score.mean)


def test_seeds_become_a_mean_with_its_error() -> None:
    responses, comparisons, verdicts = tables()
    policies = policy_stats(RUNS, responses, comparisons, verdicts, "greedy", draws=200)
    gated, raw = method_stats(policies, comparisons, draws=200)
    assert (gated.method, gated.data, raw.data, gated.rows) == ("kto", "gated", "raw", 100)
    assert gated.win_rate is not None and gated.win_rate.mean == pytest.approx(0.7)
    assert gated.win_rate.error == pytest.approx(statistics.stdev([0.8, 0.6]) / math.sqrt(2))
    assert gated.win_interval.groups == 10 and gated.win_interval.rows == 20
    assert gated.win_interval.low <= 0.7 <= gated.win_interval.high  # type: ignore[operator]


def test_differences_are_taken_seed_by_seed() -> None:
    given = tables()
    measured = differences(policy_stats(RUNS, *given, "greedy", draws=200), "raw", *given, "greedy", draws=2000)
    found = {d.measure: d for d in measured}
    assert set(found) == {"accuracy greedy", "win rate", "mean score"}
    gain = found["accuracy greedy"].gain
    assert gain.mean == pytest.approx(0.25) and gain.error == pytest.approx(statistics.stdev([0.3, 0.2]) / math.sqrt(2))
    assert (found["win rate"].data, found["win rate"].over, found["win rate"].method) == ("gated", "raw", "kto")
    # Over both seeds, prompts 5 to 8 gain 0.5, 1, 0.5 and 0.5; the others nothing.
    drawn = bootstrap_mean([0, 0, 0, 0, 0, 0.5, 1, 0.5, 0.5, 0], PROMPTS, 2000, bounds=(-1, 1))
    interval = found["accuracy greedy"].interval
    assert (interval.low, interval.high, interval.groups) == (drawn.low, drawn.high, 10)
    for one in measured:
        assert one.interval.mean == one.gain.mean and one.interval.low <= one.gain.mean <= one.interval.high  # type: ignore[operator]


def test_a_known_order_of_datasets_comes_out() -> None:
    """Three seeds, 150 prompts: right on 90 % of them with the gate, 70 % without, 40 % with flipped labels, and with
    an ablation that changes nothing exactly where the gate is."""
    share = {"raw": 0.7, "gated": 0.9, "same": 0.9, "flipped": 0.4}
    prompts = [f"p{i}" for i in range(150)]
    runs = [PolicyRun(f"kto-{data}-s{s}", "kto", data, s, 100, 10, 1.0) for data in share for s in range(3)]
    responses: list[dict[str, Any]] = []
    for label, rate, seed in [("base", 0.5, 0), *((run.label, share[run.data], run.seed) for run in runs)]:
        for prompt in prompts:
            right = unit_hash(prompt) < 0.3 or unit_hash(prompt, seed, "right") < (rate - 0.3) / 0.7
            responses.append(
                {"response_id": f"{label}/{prompt}", "prompt_id": prompt, "model": label, "mode": "greedy",
                 "response": "x", "finish_reason": "stop", "completion_tokens": 1, "correct": right}
            )  # fmt: skip
    ties = [
        {"pair_id": run.label, "prompt_id": "p0", "judge": "judge", "order": order, "model_a": a or run.label,
         "model_b": b or run.label, "choice": "C", "parse_status": "ok"}
        for run in runs
        for order, a, b in (("ab", "", "base"), ("ba", "base", ""))
    ]  # fmt: skip
    given = pa.Table.from_pylist(responses), pa.Table.from_pylist(ties), tables()[2].slice(0, 0)
    policies = policy_stats(runs, *given, "greedy", draws=200)
    found = {
        over: {d.data: d for d in differences(policies, over, *given, "greedy") if d.measure == "accuracy greedy"}
        for over in ("gated", "raw")
    }
    assert list(found["gated"]) == ["raw", "same", "flipped"]
    raw, same, flipped = found["gated"].values()
    assert raw.gain.mean == pytest.approx(-0.2, abs=0.05) and flipped.gain.mean == pytest.approx(-0.5, abs=0.05)
    for one in (raw, flipped):
        assert one.gain.error is not None and one.gain.mean < -3 * one.gain.error
        assert one.interval.high is not None and one.interval.high < 0
    assert (same.gain.mean, same.gain.error) == (0.0, 0.0)
    assert same.interval.low is not None and same.interval.low < 0 < same.interval.high  # type: ignore[operator]
    assert found["raw"]["gated"].gain.mean == pytest.approx(-raw.gain.mean)


def test_one_seed_has_no_error_and_no_value_no_mean() -> None:
    single = over_seeds([0.5, None])
    assert single is not None and (single.mean, single.error, single.seeds) == (0.5, None, 1)
    assert over_seeds([None]) is None


def test_comparisons_of_two_judges_are_refused() -> None:
    responses, comparisons, verdicts = tables()
    other = comparisons.set_column(2, "judge", pa.array(["other"] * len(comparisons)))
    with pytest.raises(ValueError, match="of one judge are needed, not of judge, other"):
        policy_stats(RUNS, responses, pa.concat_tables([comparisons, other]), verdicts, "greedy")
