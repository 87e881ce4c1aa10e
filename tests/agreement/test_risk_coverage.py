"""The confidence gate as a classifier: against the gate itself, against loops, and on recorded judgements."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_pipeline.agreement.risk_coverage import CURVE, risk_coverage
from ray_pipeline.data.gate import GateConfig, decide
from tests.published import NUMBERS, json_lines

LABELS = ("A", "tie", "B")


def some_pairs(judges: int = 3, pairs: int = 400, seed: int = 0) -> tuple[Any, Any, list[str | None]]:
    rng = np.random.default_rng(seed)
    # Judges that mostly agree, on answers of every quality.
    a, b = (
        np.clip(rng.integers(1, 11, size=pairs) + rng.integers(-2, 3, size=(judges, pairs)), 1, 10).astype(float)
        for _ in range(2)
    )
    a[rng.random(a.shape) < 0.02] = math.nan
    return a, b, [None if rng.random() < 0.05 else LABELS[i] for i in rng.integers(0, 3, pairs)]


def gate_labels(scores: Any, tau: float, high: float, low: float) -> list[str]:
    ids = [f"c{i:04d}" for i in range(scores.shape[1])]
    judges = [f"j{i}" for i in range(len(scores))]
    rows = [
        {"candidate_id": c, "judge": j, "score": None if math.isnan(s) else s, "parse_status": "ok"}
        for (j, row) in zip(judges, scores, strict=True)
        for c, s in zip(ids, row, strict=True)
    ]
    verdicts = pa.Table.from_pylist(rows)
    candidates = pa.table({"candidate_id": ids, "prompt_id": ids})
    config = GateConfig(tau=tau, desirable_at=high, undesirable_at=low, use_critic=False)
    return decide(candidates, verdicts, None, judges, config)["label"].to_pylist()


@pytest.mark.parametrize(("tau", "high", "low"), [(2.5, 7.0, 4.0), (1.0, 6.0, 5.0), (7.0, 8.0, 3.0)])
def test_what_is_kept_is_what_the_gate_labels(tau: float, high: float, low: float) -> None:
    a, b, labels = some_pairs()
    of_a, of_b = gate_labels(a, tau, high, low), gate_labels(b, tau, high, low)
    votes = {("desirable", "undesirable"): "A", ("undesirable", "desirable"): "B"}
    kept = [(votes[x, y], z) for x, y, z in zip(of_a, of_b, labels, strict=True) if (x, y) in votes and z is not None]
    (row,) = risk_coverage(a, b, labels, [tau], [(high, low)], draws=20).table.to_pylist()
    labelled = sum(z is not None for z in labels)
    assert kept and (row["pairs"], row["kept"]) == (labelled, len(kept))
    assert row["coverage"] == pytest.approx(len(kept) / labelled)
    assert row["agreement"] == pytest.approx(sum(v == z for v, z in kept) / len(kept))
    assert row["risk"] == pytest.approx(1 - row["agreement"])
    plain = [v == z for v, z in kept if z != "tie"]
    assert row["kept_without_ties"] == len(plain)
    assert row["agreement_without_ties"] == pytest.approx(sum(plain) / len(plain))


def test_the_curve_widens_with_tau() -> None:
    a, b, labels = some_pairs()
    taus = [0, 0.5, 1, 2.5, 5, 10, math.inf]
    found = risk_coverage(a, b, labels, taus, [None, (7.0, 4.0)], draws=50)
    assert found.table.schema == CURVE and len(found.table) == 14
    rows = found.table.to_pylist()
    for part in (rows[:7], rows[7:]):
        assert [r["tau"] for r in part] == taus
        assert all(x["kept"] <= y["kept"] for x, y in itertools.pairwise(part))
    incomplete = rows[0]["incomplete"]
    assert incomplete > 0 and rows[6]["kept"] == rows[6]["pairs"] - incomplete  # unread pairs are never kept
    assert all(r["kept"] <= s["kept"] for r, s in zip(rows[7:], rows[:7], strict=True))
    for r in rows:
        if r["kept"] > 1:
            assert r["agreement_low"] <= r["agreement"] <= r["agreement_high"]
    assert found.areas.keys() == {None, (7.0, 4.0)}


def test_confident_judges_that_are_right_make_a_falling_curve() -> None:
    rng = np.random.default_rng(2)
    truth = rng.choice([-1, 1], 300)
    noise = rng.choice([0.2, 3.0], 300)  # on some pairs the judges see clearly, on others they guess
    centre = np.array([6.0, 6.0])[:, None] + np.array([1, -1])[:, None] * truth * 0.8
    a, b = (centre[i] + rng.normal(0, 1, (3, 300)) * noise for i in range(2))
    labels = ["A" if t > 0 else "B" for t in truth]
    found = risk_coverage(a, b, labels, [0.3, math.inf], draws=20)
    sure, everyone = found.table["agreement"].to_pylist()
    assert sure > 0.97 > 0.9 > everyone
    assert found.areas[None] < 1 - everyone  # type: ignore[operator]


def test_pairs_of_a_question_are_resampled_together() -> None:
    a, b, labels = some_pairs(pairs=60)
    labels = [label or "A" for label in labels]
    once = risk_coverage(a, b, labels, [2.5], draws=200).table.to_pylist()[0]
    thrice = [np.repeat(scores, 3, axis=1) for scores in (a, b)]
    again = [label for label in labels for _ in range(3)]
    questions = [f"q{n}" for n in range(60) for _ in range(3)]
    together, apart = (
        risk_coverage(*thrice, again, [2.5], (None,), by, draws=200).table.to_pylist()[0] for by in (questions, None)
    )
    for name in ("agreement", "agreement_low", "agreement_high"):
        assert together[name] == pytest.approx(once[name])
    assert apart["agreement_high"] - apart["agreement_low"] < 0.8 * (once["agreement_high"] - once["agreement_low"])


def test_the_area_under_the_curve() -> None:
    # Variances 0, 2, 2, 8; right, wrong, right, wrong: equal variances share their risk.
    a = np.array([[9.0, 3, 9, 1], [9, 5, 7, 5]])
    b = np.array([[2.0, 5, 2, 5], [2, 5, 2, 5]])
    found = risk_coverage(a, b, ["A"] * 4, [math.inf], draws=5)
    assert found.areas[None] == pytest.approx((0 + 0.5 / 2 + 1 / 3 + 2 / 4) / 4)
    assert risk_coverage(a, b, ["A"] * 4, [1.0], [(10.5, 0.5)], draws=5).areas[10.5, 0.5] is None


def test_the_gate_on_recorded_judgements() -> None:
    items = json_lines(NUMBERS / "fair_eval.jsonl.gz")
    judges = sorted(items[0]["combined_10"])
    a, b = (
        np.array([[float(item["combined_10"][judge][side]) for item in items] for judge in judges])
        for side in ("stored_a", "stored_b")
    )
    labels = [item["human_label"] for item in items]
    rows = risk_coverage(a, b, labels, [0.5, 1, 2, 5, math.inf], draws=100).table.to_pylist()
    # All pairs are kept at the end, and the vote is that of the mean score.
    votes = ["tie" if abs(x - y) < 1e-9 else "A" if x > y else "B" for x, y in zip(a.mean(0), b.mean(0), strict=True)]
    assert rows[-1]["coverage"] == 1 and rows[-1]["pairs"] == 80
    assert rows[-1]["agreement"] == pytest.approx(sum(v == z for v, z in zip(votes, labels, strict=True)) / 80)
    assert 0 < rows[0]["coverage"] < 1


def test_bad_input_is_refused() -> None:
    a, b, labels = some_pairs(pairs=4)
    for args, says in (
        ((a, b[:, :3], labels), "shapes"),
        ((a, b, labels[:3]), "3 labels"),
        ((a[:1], b[:1], labels), "two or more"),
        ((a, b, ["A", "B", "C", "tie"]), "not C"),
    ):
        with pytest.raises(ValueError, match=says):
            risk_coverage(*args, [1.0])
    with pytest.raises(ValueError, match="must be below"):
        risk_coverage(a, b, labels, [1.0], [(4.0, 7.0)])
    empty = risk_coverage(a, b, [None] * 4, [1.0], draws=5).table.to_pylist()[0]
    assert (empty["pairs"], empty["coverage"], empty["agreement"]) == (0, None, None)
