"""The page of a comparison: every name on it escaped, equal results in equal bytes."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pyarrow.compute as pc

from ray_pipeline.data.row_truth import RowTruth
from ray_pipeline.evaluate.comparison import Comparison
from ray_pipeline.evaluate.method_stats import differences, method_stats, policy_stats
from ray_pipeline.evaluate.methods import build_comparison
from tests.evaluate.test_method_stats import RUNS, tables


def page(name: str = "run") -> Comparison:
    responses, comparisons, verdicts = tables()
    policies = policy_stats(RUNS, responses, comparisons, verdicts, "greedy", draws=200)
    return Comparison(
        name=name,
        policies=policies,
        methods=method_stats(policies, comparisons, draws=200),
        differences=differences(policies, "raw", responses, comparisons, verdicts, "greedy", draws=200),
        data={"gated": "the gate", "raw": "rows of | <b>x</b>"},
        truth={"raw": RowTruth(4, 0.25, 1.0, 0.5, 0, None, None)},
        facts={"judge": "a|b", "comparing judge": "c", "protocol 1f": "raw win rate: seed 3"},
        warnings=["Only 2 seed(s)."],
    )


def test_the_same_numbers_in_all_files(tmp_path: Path) -> None:
    files = {path.name: path for path in build_comparison(page(), tmp_path)}
    charts = {"methods-1.svg", "methods-2.svg", "methods-3.svg"}
    numbers = {"methods.csv", "policies.csv", "differences.csv", "metrics.json"}
    assert set(files) == {*numbers, "report.md", "report.html", *charts}
    gated, raw = csv.DictReader(files["methods.csv"].open())
    assert (gated["method"], gated["data"], gated["seeds"]) == ("kto", "gated", "2")
    assert float(gated["win_rate"]) == 0.7 and float(raw["accuracy_greedy"]) == 0.55
    rows = list(csv.DictReader(files["policies.csv"].open()))
    assert [row["policy"] for row in rows] == ["base", *(run.label for run in RUNS)]
    assert rows[0]["win_rate"] == "" and rows[0]["accuracy_greedy"] == "0.4"
    right, *_ = csv.DictReader(files["differences.csv"].open())
    assert (right["data"], right["over"], right["measure"]) == ("gated", "raw", "accuracy greedy")
    low, high = float(right["low"]), float(right["high"])
    assert float(right["gain"]) == 0.25 and round(float(right["error"]), 9) == 0.05 and 0 < low < 0.25 < high
    bounds = f"{100 * low:+.1f} to {100 * high:+.1f}"
    text = files["report.md"].read_text()
    assert "| kto | gated | 100 | 10 | 70.0 ± 10.0 % |" in text
    assert f"| kto | gated − raw | accuracy greedy | +25.0 ± 5.0 points | {bounds} |" in text
    assert "- What: 1 methods on 2 datasets" in text and "- Judges: comparing judge: c" in text
    assert "- How many: 4 policies" in text and "| 1f | raw win rate: seed 3 |" in text
    assert "<details><summary>Protocols of the win rates</summary>" in files["report.html"].read_text()
    assert "| raw | 4 | 25.0 % | 100.0 % | 50.0 % | 0 | – | – |" in text
    assert json.loads(files["metrics.json"].read_text())["methods"][0]["win_rate"]["mean"] == 0.7


def test_equal_rows_and_equal_steps_are_lines_of_their_own(tmp_path: Path) -> None:
    responses, comparisons, verdicts = tables()
    runs = [dataclasses.replace(run, reading="rows" if run.seed else "steps") for run in RUNS]
    policies = policy_stats(runs, responses, comparisons, verdicts, "greedy", draws=200)
    found = differences(policies, "raw", responses, comparisons, verdicts, "greedy", draws=200)
    made = Comparison("r", policies, method_stats(policies, comparisons, draws=200), found, {}, {}, {}, [])
    files = {path.name: path for path in build_comparison(made, tmp_path)}
    lines = [(row["data"], row["reading"], row["seeds"]) for row in csv.DictReader(files["methods.csv"].open())]
    assert lines == [(data, reading, "1") for data in ("gated", "raw") for reading in ("steps", "rows")]
    text = files["report.md"].read_text()
    assert "| kto, equal steps | gated − raw | accuracy greedy | +30.0 points |" in text
    assert "win rate against the base: kto, equal steps on gated, 80.0 %" in text
    assert "| kto, equal rows | gated − raw | accuracy greedy | +20.0 points |" in text


def test_differences_of_equal_trainings_are_named_not_measured(tmp_path: Path) -> None:
    given = tables()
    shown = []
    for digests in (("a", "b", "c", "d"), ("a", "b", "c", "b"), ("a", "b", "a", "b")):
        runs = [dataclasses.replace(run, learnt_from=name) for run, name in zip(RUNS, digests, strict=True)]
        policies = policy_stats(runs, *given, "greedy", draws=200)
        methods = method_stats(policies, given[1], draws=200)
        found = differences(policies, "raw", *given, "greedy", draws=200)
        files = build_comparison(Comparison("r", policies, methods, found, {}, {}, {}, []), tmp_path / digests[-2])
        by_name = {path.name: path for path in files}
        rows = [list(csv.DictReader(by_name[name].open())) for name in ("policies.csv", "differences.csv")]
        same = [row["policy"] for row in rows[0] if row["same_as"]], {row["same_rows"] for row in rows[1]}
        shown.append((same, by_name["report.md"].read_text()))
    (none, _), (some, of_some), (whole, of_all) = shown
    assert none == ([], {"0"}) and not any("same rows" in text for (_, text) in shown[:1])
    assert some == (["kto-raw-s1"], {"1"}) and "+25.0 ± 5.0 points (same rows in 1 of 2 seeds) |" in of_some
    assert whole == (["kto-raw-s0", "kto-raw-s1"], {"2"})
    assert (
        "| kto | gated − raw | accuracy greedy | same rows | – |" in of_all
        and "4 policies, 2 different trainings" in of_all
    )


def test_where_there_are_more_datasets_than_colours_they_are_the_rows_of_a_chart(tmp_path: Path) -> None:
    few, shown = page(), []
    for copies in (1, 4):
        methods = [
            dataclasses.replace(method, data=f"{method.data}{i}", reading=reading)
            for i in range(copies)
            for method in few.methods
            for reading in ("epochs", "rows")
        ]
        build_comparison(dataclasses.replace(few, methods=methods), tmp_path / str(copies))
        shown.append((tmp_path / str(copies) / "charts" / "methods-1.svg").read_text())
    assert [text.count('class="name"') for text in shown] == [2, 8]
    assert "kto, equal rows</text>" in shown[0] and "raw3</text>" in shown[1]


def test_the_page_is_escaped_and_repeats(tmp_path: Path) -> None:
    build_comparison(page("<script>alert(1)</script>"), tmp_path / "a")
    build_comparison(page("<script>alert(1)</script>"), tmp_path / "b")
    text = (tmp_path / "a" / "report.md").read_text()
    assert "<script>" not in text and "<b>" not in text and "rows of \\|" in text
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_every_row_of_the_table_has_its_public_benchmarks(tmp_path: Path) -> None:
    responses, comparisons, verdicts = tables()
    scores = {
        label: {"mt_bench mean": 6.0 + i, "ifeval prompt strict": None if label == "base" else 50.0 + i}
        for i, label in enumerate(["base", *(run.label for run in RUNS)])
    }
    policies = policy_stats(RUNS, responses, comparisons, verdicts, "greedy", benchmarks=scores, draws=200)
    made = Comparison("r", policies, method_stats(policies, comparisons, draws=200), [], {}, {}, {}, [])
    files = {path.name: path for path in build_comparison(made, tmp_path)}
    gated, raw = csv.DictReader(files["methods.csv"].open())
    assert (gated["mt_bench_mean"], raw["mt_bench_mean"], gated["ifeval_prompt_strict"]) == ("7.5", "9.5", "51.5")
    rows = list(csv.DictReader(files["policies.csv"].open()))
    assert [row["mt_bench_mean"] for row in rows] == ["6.0", "7.0", "8.0", "9.0", "10.0"]
    assert rows[0]["ifeval_prompt_strict"] == ""
    text = files["report.md"].read_text()
    assert "| mt_bench mean | ifeval prompt strict |" in text and "| 7.50 ± 0.50 | 51.50 ± 0.50 |" in text


def test_without_a_checker_there_is_no_accuracy(tmp_path: Path) -> None:
    responses, comparisons, verdicts = tables()
    policies = policy_stats(RUNS, responses.drop_columns("correct"), comparisons, verdicts, "greedy", draws=200)
    made = Comparison("r", policies, method_stats(policies, comparisons, draws=200), [], {}, {}, {}, [])
    build_comparison(made, tmp_path)
    assert "right" not in (tmp_path / "report.md").read_text()
    assert pc.all(pc.is_valid(responses["correct"])).as_py()
