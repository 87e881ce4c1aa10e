import statistics

import numpy as np
import pyarrow as pa
import pytest

from ray_pipeline.data.critic_stats import critic_stats
from ray_pipeline.data.gate_stats import gate_stats
from ray_pipeline.data.judge_stats import judging_stats
from ray_pipeline.data.page import judges_section

DECISIONS = pa.table(
    {
        "candidate_id": ["c1", "c2", "c3", "c4", "c5"],
        "label": ["desirable", "undesirable", "desirable", "incomplete", "abstain"],
        "final_score": [8.0, 2.0, 9.0, None, 5.0],
        "score_variance": [1.0, 0.0, 0.5, None, 4.0],
    }
)
# Another order than the decisions', and a candidate that no decision knows: joins go by key.
CANDIDATES = pa.table(
    {
        "candidate_id": ["c5", "c4", "c3", "c2", "c1", "c9"],
        "response": ["eeeee", None, "ccc", "bé", "a", "never"],
        "completion_tokens": pa.array([50, None, 30, 20, 10, 90], pa.int32()),
    }
)
VERDICTS = pa.table(
    {
        "candidate_id": ["c3", "c1", "c2", "c4", "c5", "c5", "c1", "c2", "c3", "c4"],
        "judge": ["help"] * 5 + ["fact"] * 5,
        "score": [9.0, 8.0, 2.0, None, 3.0, 7.0, 8.0, 2.0, 9.0, None],
        "parse_status": ["ok"] * 3 + ["unparsed", "repaired"] + ["ok"] * 4 + ["skipped"],
    }
)


def test_labels_scores_and_lengths() -> None:
    stats = gate_stats(DECISIONS, CANDIDATES)
    assert stats.rows == 5 and stats.acceptance == pytest.approx(3 / 5)
    assert {label: s.count for label, s in stats.labels.items()} == {
        "desirable": 2, "undesirable": 1, "discard": 0, "abstain": 1, "incomplete": 1,
    }  # fmt: skip
    assert sum(s.share or 0 for s in stats.labels.values()) == pytest.approx(1)
    assert (stats.desirable.mean, stats.desirable.sd) == pytest.approx((8.5, statistics.stdev([8, 9])))
    assert (stats.undesirable.mean, stats.undesirable.sd) == (2.0, None)
    assert stats.gap == pytest.approx(6.5)
    assert stats.score_variance.mean == pytest.approx(5.5 / 4)
    assert (stats.labels["desirable"].chars.mean, stats.labels["desirable"].tokens.mean) == (2, 20)
    assert stats.labels["undesirable"].chars.mean == 2  # characters, not bytes
    assert stats.labels["incomplete"].chars.n == 0


def test_lengths_without_the_texts() -> None:
    slim = CANDIDATES.drop_columns(["response"]).append_column("response_chars", pa.array([5, None, 3, 2, 1, 5]))
    assert gate_stats(DECISIONS, slim) == gate_stats(DECISIONS, CANDIDATES)


def test_row_order_does_not_matter() -> None:
    assert gate_stats(DECISIONS.take([4, 2, 0, 1, 3]), CANDIDATES) == gate_stats(DECISIONS, CANDIDATES)


def test_broken_joins_are_refused() -> None:
    with pytest.raises(ValueError, match="not in candidates, such as c1"):
        gate_stats(DECISIONS, CANDIDATES.slice(0, 4))
    with pytest.raises(ValueError, match="duplicate candidate_id"):
        gate_stats(pa.concat_tables([DECISIONS, DECISIONS]), CANDIDATES)
    with pytest.raises(ValueError, match="labels outside"):
        gate_stats(DECISIONS.set_column(1, "label", pa.array(["good"] * 5)), CANDIDATES)


def test_judges_unread_skipped_and_missing() -> None:
    stats = judging_stats(VERDICTS, DECISIONS.column("candidate_id"))
    help_, fact = stats.judges["help"], stats.judges["fact"]
    assert (help_.rows, help_.read, help_.unread, help_.skipped, help_.missing) == (5, 4, 1, 0, 0)
    assert (fact.read, fact.unread, fact.skipped) == (4, 0, 1)
    assert help_.parse_status == {"ok": 3, "repaired": 1, "unparsed": 1}
    assert help_.histogram == {2: 1, 3: 1, 8: 1, 9: 1}
    assert help_.score.mean == pytest.approx(5.5)
    assert help_.score.sd == pytest.approx(statistics.stdev([9, 8, 2, 3]))
    assert (stats.judged, stats.agreement_rows) == (4, 4)
    # classes by hand: help d d u u, fact d d u d over c1 c3 c2 c5
    assert stats.kappas[0].value == pytest.approx((3 / 4 - (2 * 3 + 2 * 1) / 16) / (1 - (2 * 3 + 2 * 1) / 16))
    assert judging_stats(VERDICTS.slice(0, 9), DECISIONS.column("candidate_id")).judges["fact"].missing == 1


def test_unread_replies_are_counted_by_reason() -> None:
    reasons = pa.array(["good", "unread: quoted", "unread: absent", "unread: quoted"])
    verdicts = pa.table(
        {
            "candidate_id": ["c1", "c2", "c3", "c4"],
            "judge": ["help"] * 4,
            "score": [7.0, None, None, None],
            "parse_status": ["ok", "unparsed", "unparsed", "unparsed"],
            "reason": reasons,
        }
    )
    stats = judging_stats(verdicts, pa.array(["c1", "c2", "c3", "c4"]))
    assert stats.judges["help"].unread_by == {"absent": 1, "quoted": 2}
    section = judges_section(stats, [], (7.0, 4.0), audit_slice=False)
    assert "unparsed 3 (absent 1, quoted 2)" in str(section)
    assert judging_stats(VERDICTS, DECISIONS.column("candidate_id")).judges["help"].unread_by == {}


def test_agreement_on_an_audit_slice_only() -> None:
    ids = DECISIONS.column("candidate_id")
    stats = judging_stats(VERDICTS, ids, agreement_on=["c1", "c2", "c3"])
    assert stats.kappas[0].value == pytest.approx(1.0)
    assert stats.alpha == pytest.approx(1.0)
    assert (stats.agreement_rows, stats.judged) == (3, 4)


def test_no_verdicts_at_all() -> None:
    stats = judging_stats(VERDICTS.slice(0, 0), DECISIONS.column("candidate_id"))
    assert (stats.judged, stats.judges, stats.kappas, stats.alpha) == (0, {}, [], None)
    gate = gate_stats(DECISIONS.slice(0, 0), CANDIDATES.slice(0, 0))
    assert gate.acceptance is None and gate.gap is None


def test_two_verdicts_on_one_candidate_are_refused() -> None:
    with pytest.raises(ValueError, match="verdicts of judge"):
        judging_stats(pa.concat_tables([VERDICTS, VERDICTS]), DECISIONS.column("candidate_id"))


def test_critic_counts() -> None:
    stats = critic_stats(
        pa.table(
            {
                "flawed": [True, False, None, None, True],
                "failure_type": ["circular", "none", None, None, "unsupported"],
                "parse_status": ["ok", "ok", "truncated", "skipped", "repaired"],
            }
        )
    )
    assert (stats.rows, stats.flawed, stats.sound, stats.unread, stats.skipped) == (5, 2, 1, 1, 1)
    assert stats.flawed_share == pytest.approx(2 / 3)
    assert stats.failure_types == {"circular": 1, "none": 1, "unsupported": 1}


def test_a_large_gate_is_quick() -> None:
    rng = np.random.default_rng(0)
    ids = [f"c{i}" for i in range(100_000)]
    verdicts = pa.table(
        {
            "candidate_id": ids * 3,
            "judge": np.repeat(["a", "b", "c"], len(ids)),
            "score": rng.integers(1, 11, 3 * len(ids)).astype(float),
            "parse_status": ["ok"] * (3 * len(ids)),
        }
    )
    stats = judging_stats(verdicts, pa.array(ids))
    assert stats.judged == len(ids) and abs(stats.alpha or 1) < 0.01
