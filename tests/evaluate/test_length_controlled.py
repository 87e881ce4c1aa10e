"""The win rate at equal length on the page, and the warning that judge and policy are of one family."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from ray_pipeline.evaluate.build import build_report
from ray_pipeline.evaluate.cautions import cautions
from ray_pipeline.evaluate.metrics import collect_metrics
from ray_pipeline.report.documents import as_json
from ray_pipeline.report.figures import percent, percent_interval
from ray_pipeline.stats.protocol import Protocol
from ray_pipeline.store.keys import digest
from tests.evaluate.example_run import comparisons, whole_run


def compared(shorter: int = -20) -> dict[str, pa.Table]:
    """Twenty prompts; the policy wins in both orders where it is much longer, and is longer by `shorter` elsewhere."""
    prompts = [f"p{n}" for n in range(20)]
    table = comparisons(["A" if n % 4 else "B" for n in range(20)], prompts)
    pairs = {p: digest(["pair", f"policy-{p}", f"base-{p}"]) for p in prompts}
    table = table.set_column(
        table.column_names.index("pair_id"), "pair_id", pa.array([pairs[p] for p in table["prompt_id"].to_pylist()])
    )
    rows = [
        {"response_id": f"{model}-{p}", "prompt_id": p, "model": model, "mode": "greedy", "response": "x" * length,
         "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 5}
        for n, p in enumerate(prompts)
        for model, length in (("base", 40), ("policy", 40 + (shorter, 40, 55, 65)[n % 4]))
    ]  # fmt: skip
    return {"comparisons": table, "responses": pa.Table.from_pylist(rows), "response_verdicts": None}


def test_the_score_at_equal_length_is_beside_the_win_rate() -> None:
    metrics = collect_metrics(whole_run(12, **compared()))
    assert metrics.evaluation is not None
    (judge,) = metrics.evaluation.length_controlled
    found = metrics.evaluation.length_controlled[judge]
    (rate,) = metrics.evaluation.win_rates
    assert rate.judge == judge and found.pairs == rate.decided == 20 and found.unmeasured == 0
    assert found.raw.mean == rate.score.mean
    assert found.mean_difference == 35 and found.overlap == 0.25
    # Longer answers win, so that part of the score is length's.
    assert found.length_weight is not None and found.length_weight < 0
    assert found.score.mean is not None and found.score.mean < rate.score.mean
    assert as_json(metrics.evaluation)["length_controlled"][judge]["score"]["mean"] == found.score.mean


def test_the_score_at_equal_length_is_on_the_html_page_and_in_the_markdown(tmp_path: Path) -> None:
    data = whole_run(12, **compared())
    metrics = collect_metrics(data)
    assert metrics.evaluation is not None
    (found,) = metrics.evaluation.length_controlled.values()
    build_report(data, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "Win rates, length-controlled" in html and "+35" in html
    assert f">{percent(found.score.mean)}<" in html and percent_interval(found.score) in html
    written = (tmp_path / "report.md").read_text()
    assert percent(found.score.mean) in written and "At equal length" in written
    # Without the ids that join lengths to pairs there is nothing to show.
    data = whole_run(12, **{**compared(), "responses": compared()["responses"].drop_columns(["response_id"])})
    build_report(data, tmp_path)
    assert "length-controlled" not in (tmp_path / "report.html").read_text()


def test_there_is_no_score_at_equal_length_where_no_policy_answer_is_shorter(tmp_path: Path) -> None:
    data = whole_run(12, **compared(shorter=20))
    metrics = collect_metrics(data)
    assert metrics.evaluation is not None
    (found,) = metrics.evaluation.length_controlled.values()
    assert found.score.mean is None and found.overlap == 0
    (said,) = [w for w in cautions(data, metrics) if "equal length" in w]
    assert (
        said.startswith("Judge pairwise: no score at equal length") and "longer than the base's in almost all" in said
    )
    even = whole_run(12, **compared())
    assert not [w for w in cautions(even, collect_metrics(even)) if "equal length" in w]
    build_report(data, tmp_path)
    written = (tmp_path / "report.md").read_text()
    assert "no score at equal length" in written
    stored = json.loads((tmp_path / "metrics.json").read_text())["evaluation"]["length_controlled"]["pairwise"]
    assert stored["score"]["mean"] is None and stored["raw"]["mean"] == found.raw.mean


def test_win_rates_carry_the_protocol_that_they_were_measured_with(tmp_path: Path) -> None:
    given = compared()
    (judge,) = set(given["comparisons"]["judge"].to_pylist())
    asked = Protocol("win rate", judge="sha256:" + "ab" * 32, judge_prompts="<blink>", reference="base")
    build_report(whole_run(12, **given, compared={judge: asked}), tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())["evaluation"]["protocols"][judge]
    assert found["score"]["protocol"]["questions"] and found["score"]["protocol"]["reference_answers"]
    assert found["length_controlled"]["protocol"]["metric"] == "LC"
    assert found["score"]["fingerprint"] != found["length_controlled"]["fingerprint"]
    html, written = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    for figure in found.values():
        assert figure["fingerprint"] in html and figure["fingerprint"] in written
    assert "win rate, judge weights abababababab, reference base" in html and "<blink>" not in html
    # A run whose last stage is not done, or was made before there were protocols, says nothing of them.
    build_report(whole_run(12, **given), tmp_path)
    assert "Protocols of the win rates" not in (tmp_path / "report.html").read_text()


def test_a_judge_of_the_policys_family_is_warned_of() -> None:
    given = {**compared(), "curating_models": {}, "evaluating_models": {"judge": "Qwen/Qwen3-8B"}}
    for candidate, warned in (("Qwen/QwQ-32B", True), ("mistralai/Mistral-7B", False), ("", False)):
        data = whole_run(12, **given, candidate_model=candidate)
        told = [w for w in cautions(data, collect_metrics(data)) if "same family" in w]
        assert bool(told) == warned, candidate
