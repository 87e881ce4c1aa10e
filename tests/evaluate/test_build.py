import csv
import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from ray_pipeline.evaluate.build import build_report
from ray_pipeline.evaluate.data import ReportData, RunIdentity
from tests.evaluate.example_run import comparisons, whole_run


def build(data: ReportData, folder: Path) -> tuple[str, dict, dict]:
    """(report.md, metrics.json, the row of summary.csv)"""
    build_report(data, folder)
    (row,) = csv.DictReader((folder / "summary.csv").open())
    return (folder / "report.md").read_text(), json.loads((folder / "metrics.json").read_text()), row


def test_a_whole_run(tmp_path: Path) -> None:
    data = whole_run()
    paths = build_report(data, tmp_path / "report")
    names = {p.relative_to(tmp_path / "report").as_posix() for p in paths}
    drawn = {"labels": 3, "judges": 4, "training": 3, "evaluation": 3}
    plots = {f"charts/{section}-{n + 1}.svg" for section, count in drawn.items() for n in range(count)}
    assert names == {"report.md", "report.html", "metrics.json", "summary.csv"} | plots
    page, metrics, row = build(data, tmp_path / "report")
    for plot in plots:
        assert f"]({plot})" in page
    assert metrics["missing_stages"] == [] and metrics["headline"]["verdict"] == "better"
    labels = data.decisions.column("label").to_pylist()  # type: ignore[union-attr]
    for label in set(labels):
        assert metrics["gate"]["labels"][label]["count"] == labels.count(label) == int(row[label])
    assert row["kto_rows"] == "126" and row["dpo_pairs"] == "33"
    rate = metrics["evaluation"]["win_rates"][0]
    assert float(row["win_score"]) == pytest.approx((rate["wins"] + rate["ties"] / 2) / rate["decided"])
    assert float(row["perplexity_policy"]) == 2.9


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (build_report(whole_run(), tmp_path / name) for name in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    for path in one:
        if path.suffix == ".svg":  # a file of its own: no date, nothing from elsewhere, well formed
            assert ElementTree.parse(path).getroot().tag.endswith("svg") and b"url(" not in path.read_bytes()


def test_a_run_that_stopped_after_datasets(tmp_path: Path) -> None:
    data = whole_run(
        train_metrics=None, train_settings=None, comparisons=None, responses=None, response_verdicts=None,
        perplexity=None, evaluating_models={},
    )  # fmt: skip
    page, metrics, row = build(data, tmp_path)
    assert metrics["missing_stages"] == ["train", "evaluate"] and row["missing_stages"] == "train evaluate"
    assert metrics["headline"]["verdict"] == "unknown" and metrics["evaluation"] is None
    assert "not known: the run has no train, evaluate yet" in page
    labels = pa.array(["desirable"] * data.decisions.num_rows)  # type: ignore[union-attr]
    useless = dataclasses.replace(data, decisions=data.decisions.set_column(1, "label", labels))  # type: ignore[union-attr]
    assert build(useless, tmp_path)[1]["headline"]["text"].startswith("One class is empty: 240 desirable and 0 undes")
    assert "## Labels" in page and "## Evaluation" not in page and "## Training" not in page
    assert not list((tmp_path / "charts").glob("training-*.svg"))


@pytest.mark.parametrize(
    "part",
    [
        "prompt_counts", "prompts", "candidates", "verdicts", "critiques", "decisions", "dataset_counts",
        "dataset_guards", "kto_weights", "train_settings", "train_metrics", "comparisons", "responses",
        "response_verdicts", "perplexity", "stage_use",
    ],
)  # fmt: skip
def test_any_one_part_may_be_missing(part: str, tmp_path: Path) -> None:
    build(whole_run(12, **{part: None}), tmp_path)


def test_nothing_but_the_run(tmp_path: Path) -> None:
    page, metrics, _ = build(ReportData(RunIdentity(name="just started")), tmp_path)
    assert page.startswith("# Run just started") and "No stage has left anything yet." in page
    assert len(metrics["missing_stages"]) == 8


def test_empty_tables(tmp_path: Path) -> None:
    data = whole_run(12)
    tables = {k: v.slice(0, 0) for k, v in vars(data).items() if isinstance(v, pa.Table)}
    _, metrics, row = build(whole_run(12, **tables), tmp_path)
    assert metrics["headline"]["verdict"] == "unknown"
    assert row["win_rate"] == "" and row["acceptance"] == ""


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    steps = pa.table({"step": [1, 2], "split": ["train"] * 2, "loss": [0.5, np.nan], "kl": [np.nan, np.inf]})
    page, metrics, _ = build(whole_run(12, train_metrics=steps, kto_weights={"odd": float("nan")}), tmp_path)
    assert metrics["datasets"]["kto_weights"] == {"odd": None}
    assert metrics["training"]["not_finite"] == 1 and "kl" not in metrics["training"]["trends"]
    assert "losses that are not finite" in page


def test_metrics_are_sorted_and_plain(tmp_path: Path) -> None:
    build_report(whole_run(12), tmp_path)
    text = (tmp_path / "metrics.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert "NaN" not in text and "Infinity" not in text


def test_long_examples_are_cut(tmp_path: Path) -> None:
    data = whole_run(12)
    column = pa.array(["y" * 100_000] * len(data.candidates))  # type: ignore[arg-type]
    candidates = data.candidates.set_column(2, "response", column)  # type: ignore[union-attr]
    page, _, _ = build(whole_run(12, candidates=candidates), tmp_path)
    assert len(page) < 20_000 and "99,400" not in page and "(99400 more characters)" in page


def test_examples_take_both_labels(tmp_path: Path) -> None:
    page, _, _ = build(whole_run(), tmp_path)
    assert page.count("### desirable") == 2 and page.count("### undesirable") == 1
    assert page.count("](report.html#c0") == 3


def test_one_pair_only(tmp_path: Path) -> None:
    _, metrics, _ = build(whole_run(12, comparisons=comparisons(["A"], ["p0"]), responses=None), tmp_path)
    assert metrics["headline"]["verdict"] == "unclear"
