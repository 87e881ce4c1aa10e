"""MT-Bench, AlpacaEval and IFEval on the pocket models: one run that is killed while it judges, and goes on."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from tests.dags.conftest import Quorum, calls_of, contradictions, engine_calls, manifest, wait_until
from tests.dags.in_process import here
from tests.published import nltk_data

pytestmark = pytest.mark.e2e

#: Few calls in flight, so that the judge can be killed in its middle.
SMALL = [
    "models=[{name: base, model: 'pocket:policy'}, 'pocket:judge']",
    "benchmarks.mt_bench.limit=3",
    "benchmarks.alpaca_eval.limit=4",
    "benchmarks.floors=[x]",
    "benchmarks.draws=200",
    "judges.judge.placement.concurrency=1",
    "failure.max_error_rate=1",
    "num_shards=2",
]


def judged(calls: Path) -> int:
    return calls_of(calls, "benchmark-judge/")


def test_all_three_benchmarks_survive_a_killed_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    nltk = nltk_data() if importlib.util.find_spec("lm_eval") else None
    checked = nltk is not None
    more = [] if checked else ["benchmarks.ifeval=null"]
    command = ["run", "benchmarks", "-c", "configs/pocket_benchmarks.yaml", "--run-dir", str(folder), *SMALL, *more]
    env = {"NLTK_DATA": nltk} if nltk else {}
    calls = folder / "calls"
    first = Quorum(*command, env=env, warm=True)
    wait_until(first, lambda: calls.exists() and judged(calls) > 5)
    first.kill()
    assert first.living_engines() == []
    assert not list(folder.glob("benchmarks-*/benchmarks.csv")), "the run was over before it was killed"
    kept = judged(calls)
    answers = {f: f.stat().st_mtime_ns for f in folder.glob("bench-answers-*/*.parquet")}
    assert answers

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    second = here(*command)
    assert "taking the run over" in second.output
    assert {f: f.stat().st_mtime_ns for f in answers} == answers
    assert contradictions(calls) == []
    assert judged(calls) > kept

    document = json.loads((folder / "report" / "benchmarks.json").read_text())
    models = {"base", "judge", "floor:x"}
    assert set(document["models"]) == models
    measured = {(s["benchmark"], s["model"]) for s in document["scores"] if s["value"] is not None}
    wanted = ["mt_bench", "alpaca_eval"] + ["ifeval"] * checked
    assert measured == {(benchmark, model) for benchmark in wanted for model in models}
    assert not any(s["exact"] for s in document["scores"])
    assert any(w.startswith("Judge judge is the measured model judge") for w in document["warnings"])
    for name in ("report.md", "benchmarks.csv", "benchmarks.md", "benchmarks.tex", "alpaca_eval_instructions.csv"):
        assert (folder / "report" / name).stat().st_size > 0
    with open(folder / "report" / "benchmarks.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(document["scores"])
    stages = manifest(folder)["stages"]
    assert stages["bench-judge-judge"]["rows"] == {
        "bench_ratings": 3 * 2 * 3, "bench_comparisons": 3 * 4 * 2, "bench_preferences": 4 * 2 * 3
    }  # fmt: skip
    assert set(engine_calls(folder)) == {"bench-answers-base", "bench-answers-judge", "bench-judge-judge"}
