import pyarrow as pa
import pytest

from ray_pipeline.policy.response_stats import accuracy_gains, name_models, response_stats, rubric_stats

ROWS = [
    ("r1", "p1", "base", "greedy", "aa", "stop", False),
    ("r2", "p2", "base", "greedy", "bbbb", "length", True),
    ("r3", "p2", "policy", "greedy", "c", "stop", True),
    ("r4", "p1", "policy", "greedy", "ddd", "stop", True),
    ("r5", "p1", "policy", "sampled", "e", "stop", None),
]
COLUMNS = ("response_id", "prompt_id", "model", "mode", "response", "finish_reason", "correct")
RESPONSES = pa.Table.from_pylist([dict(zip(COLUMNS, row, strict=True)) for row in ROWS]).append_column(
    "completion_tokens", pa.array([2, 4, 1, 3, 1], pa.int32())
)


def test_length_truncation_and_accuracy() -> None:
    stats = {(s.mode, s.model): s for s in response_stats(RESPONSES, draws=50)}
    assert list(stats) == [("greedy", "base"), ("greedy", "policy"), ("sampled", "policy")]
    base = stats["greedy", "base"]
    assert (base.rows, base.truncated, base.chars.mean, base.tokens.mean) == (2, 1, 3.0, 3.0)
    assert base.accuracy is not None and base.accuracy.mean == 0.5
    assert stats["sampled", "policy"].accuracy is None  # its truth is not known


def test_the_share_of_requirements_is_shown_where_it_says_more_than_right_and_wrong() -> None:
    shares = RESPONSES.append_column("followed", pa.array([0.25, 1.0, 1.0, 1.0, None], pa.float64()))
    base, policy, sampled = response_stats(shares, draws=50)
    assert base.followed is not None and base.followed.mean == 0.625 and base.accuracy.mean == 0.5  # type: ignore[union-attr]
    assert policy.followed is None and sampled.followed is None
    whole = RESPONSES.append_column("followed", pa.array([0.0, 1.0, 1.0, 1.0, None], pa.float64()))
    assert all(s.followed is None for s in response_stats(whole, draws=50))


def test_accuracy_gain_is_paired() -> None:
    gains = accuracy_gains(RESPONSES, draws=50)
    assert list(gains) == ["greedy"] and gains["greedy"].mean == 0.5
    assert accuracy_gains(RESPONSES.drop_columns(["correct"])) == {}


def test_rubrics_join_their_responses_by_id() -> None:
    verdicts = pa.table(
        {
            "candidate_id": ["r4", "r1", "r3", "r2"],
            "prompt_id": ["p1", "p1", "p2", "p2"],
            "judge": ["help"] * 4,
            "score": [8.0, 4.0, 6.0, None],
        }
    )
    (stats,) = rubric_stats(name_models(verdicts, RESPONSES), draws=50)
    assert (stats.judge, stats.mode, stats.base.mean, stats.policy.mean) == ("help", "greedy", 4.0, 7.0)
    assert (stats.base_unread, stats.policy_unread) == (1, 0)
    assert (stats.gain.mean, stats.gain.groups) == (4.0, 1)  # only p1 was read for both
    with pytest.raises(ValueError, match="not in responses"):
        name_models(verdicts, RESPONSES.slice(0, 2))


def test_each_model_with_equal_weights_has_verdicts_of_its_own() -> None:
    models = ["base", "one", "two"]
    responses = pa.table({"response_id": ["b", "r", "r"], "model": models, "mode": ["greedy"] * 3})
    judged = {"candidate_id": ["b", "b", "r", "r", "r", "r"], "judge": ["x", "y"] * 3}
    assert name_models(pa.table(judged), responses)["model"].to_pylist() == [m for m in models for _ in "xy"]
