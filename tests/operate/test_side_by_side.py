"""`quorum compare`: what differs between two runs, in the terminal and as a page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.metrics import collect_metrics
from ray_pipeline.operate.side_by_side import Part, Side, compare_page, side_by_side
from ray_pipeline.report.documents import as_json
from tests.evaluate.example_run import whole_run

CONFIG = {
    "run": {"name": "one"},
    "gate": {"tau": 2.5, "alpha": 0.15},
    "judge": {"rubrics": [{"name": "helpfulness", "low": 1}, {"name": "safety", "low": 1}]},
}
OTHER = {
    "run": {"name": "one"},
    "gate": {"tau": 1.5, "alpha": 0.15},
    "judge": {"rubrics": [{"name": "safety", "low": 0}]},
    "train": {"lora": None},
}


def side(data: ReportData, folder: str, **changes: object) -> Side:
    return dataclasses.replace(
        Side(
            name="one",
            folder=folder,
            workflow="dmapo",
            config=CONFIG,
            fingerprints={"prompts": "aa", "gate": "bb"},
            usage={
                "judge": {"calls_engine": 700.0, "calls_log": 20.0, "completion_tokens": 9.0, "wall_seconds": 40.25}
            },
            metrics=as_json(collect_metrics(data)),
        ),
        **changes,  # type: ignore[arg-type]
    )


def pair() -> tuple[Side, Side]:
    """Two runs; the second has one more desirable row, other judges, and another gate."""
    data = whole_run()
    assert data.decisions is not None and data.verdicts is not None
    labels = data.decisions.column("label").to_pylist()
    labels[labels.index("discard")] = "desirable"
    scores = pa.array([None if s is None else min(10.0, s + 1) for s in data.verdicts.column("score").to_pylist()])
    other = whole_run(
        decisions=data.decisions.set_column(1, "label", pa.array(labels)),
        verdicts=data.verdicts.set_column(2, "score", scores),
    )
    second = side(other, "runs/b", config=OTHER, fingerprints={"prompts": "aa", "gate": "cc", "train": "dd"})
    return side(data, "runs/a"), second


def parts_of(a: Side, b: Side) -> dict[str, Part]:
    return {part.kind: part for part in side_by_side(a, b)}


def test_what_differs_is_listed_and_nothing_else() -> None:
    parts = parts_of(*pair())
    assert [(r.name, r.a, r.b) for r in parts["config"].rows] == [
        ("gate.tau", "2.5", "1.5"),
        ("judge.rubrics[helpfulness].name", "helpfulness", "–"),
        ("judge.rubrics[helpfulness].low", "1", "–"),
        ("judge.rubrics[safety].low", "1", "0"),
        ("train.lora", "–", "null"),
    ]
    assert [(r.name, r.a, r.b) for r in parts["stages"].rows] == [("gate", "bb", "cc"), ("train", "–", "dd")]
    assert parts["stages"].title == "Stages that differ (1 are the same)"
    counts = {row.name: row for row in parts["counts"].rows}
    assert counts["labelled, desirable"].difference == "+1" and counts["labelled, discard"].difference == "-1"
    assert counts["prompts kept"].difference == "+0"
    scores = {row.name: row for row in parts["scores"].rows}
    a, b = (float(x) for x in (scores["helpfulness: mean"].a, scores["helpfulness: mean"].b))
    assert float(scores["helpfulness: mean"].difference) == pytest.approx(b - a, abs=0.011) and b > a
    kappa = parts["agreement"].rows[0]
    assert kappa.name == "kappa conciseness, factuality" and " to " in kappa.a and kappa.a != kappa.b
    rates = {row.name: row for row in parts["rates"].rows}
    assert rates["score against base, pairwise"].difference == "+0.0"
    cost = {row.name: row for row in parts["cost"].rows}
    assert cost["judge: calls made"].a == "700" and cost["all stages: seconds"].a == "40.2"


def test_a_run_with_itself_and_with_one_that_is_not_done() -> None:
    one, _ = pair()
    same = parts_of(one, one)
    assert "config" not in same and "stages" not in same
    assert not any(row.differs for part in same.values() for row in part.rows)
    young = side(ReportData(whole_run().run), "runs/young", fingerprints={}, usage={})
    parts = parts_of(one, young)
    assert all(row.b == "–" and row.difference == "" for row in parts["counts"].rows)
    assert "<svg" in compare_page(one, young)


def test_errors_of_judges_are_compared_and_old_reports_have_none() -> None:
    one, _ = pair()
    panel = {"correlation": {"mean": 0.25, "low": 0.125, "high": 0.375}, "effective": {"mean": 2.0}}
    old = {key: value for key, value in one.metrics.items() if key != "judge_errors"}
    new = dataclasses.replace(one, metrics={**old, "judge_errors": {"truth": None, "estimate": panel, "checked": 0.0}})
    parts = parts_of(dataclasses.replace(one, metrics=old), new)
    (row,) = (row for row in parts["agreement"].rows if row.name.startswith("correlation"))
    assert (row.name, row.a, row.b) == ("correlation of errors (estimate)", "–", "0.250 (0.125 to 0.375)")
    assert [r.b for r in parts["scores"].rows if r.name == "effective judges (estimate)"] == ["2.00"]


def test_the_page_has_both_runs_and_is_escaped() -> None:
    a, b = pair()
    bad = dataclasses.replace(b, name="<script>x</script>", config={"<b>": "<img src=x>"})
    html = compare_page(a, bad)
    assert "<script" not in html and "<img" not in html and "&lt;img src=x&gt;" in html
    assert html.count("<figure>") == 5 and "1 of 3 stages are the same" in html
    assert html == compare_page(a, bad)


def run_folder(folder: Path, given: Side) -> str:
    """What `compare` reads of a run folder."""
    (folder / "report").mkdir(parents=True)
    stages = {
        name: {"status": "done", "fingerprint": found, "path": name, "tables": [], "rows": {}, "facts": {}, "usage": {}}
        for name, found in given.fingerprints.items()
    }
    manifest = {"dag": given.workflow, "config": given.config, "report": {}, "num_shards": 8, "stages": stages}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "report" / "metrics.json").write_text(json.dumps(given.metrics))
    return str(folder)


def test_the_command(tmp_path: Path) -> None:
    a, b = (run_folder(tmp_path / name, given) for name, given in zip("ab", pair(), strict=True))
    page = tmp_path / "compare.html"
    found = CliRunner().invoke(app, ["compare", a, b, "--out", str(page)], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    assert "gate.tau" in found.output and "labelled, desirable" in found.output and page.read_text().startswith("<!d")
    # Errors are one line that says what to do.
    (tmp_path / "b" / "report" / "metrics.json").unlink()
    for arguments, told in (
        ([a, b], f"`quorum report {b}` to write it"),
        ([a, str(tmp_path / "none")], "holds no run"),
        ([a, run_folder(tmp_path / "c", dataclasses.replace(pair()[0], workflow="baselines"))], "one workflow"),
        ([a, a, "--out", str(tmp_path / "no" / "x.html")], "an existing folder"),
    ):
        refused = CliRunner().invoke(app, ["compare", *arguments])
        assert refused.exit_code == 2 and told in " ".join(refused.output.split()), (arguments, refused.output)


def test_methods_are_compared_by_name() -> None:
    method = {
        "method": "kto", "data": "gated", "rows": 10, "mean_score": {"mean": 8.0}, "win_rate": {"mean": 0.5},
        "win_interval": {"low": 0.4, "high": 0.6}, "accuracy": {"greedy": {"mean": 0.9}},
    }  # fmt: skip
    one = Side("m", "a", "baselines", {}, {}, {}, {"methods": [method]})
    better = {**method, "win_rate": {"mean": np.float64(0.75).item()}}
    two = dataclasses.replace(one, folder="b", metrics={"methods": [better, {**method, "method": "dpo"}]})
    rates = {row.name: row for row in parts_of(one, two)["rates"].rows}
    assert rates["kto on gated: wins"].a == "50.0 (40.0 to 60.0)" and rates["kto on gated: wins"].difference == "+25.0"
    assert rates["dpo on gated: wins"].a == "–" and rates["kto on gated: right, greedy"].difference == "+0.0"
