"""Errors of judges over the tables of a run: joined by id, counted by shard, and what the page and warnings show."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_pipeline.data import judge_votes
from ray_pipeline.data.errors_page import errors_section
from ray_pipeline.data.judge_votes import BETWEEN, DESIRABLE, UNDESIRABLE, ErrorsOfJudges, judge_errors, votes_of
from ray_pipeline.evaluate.build import build_report
from ray_pipeline.evaluate.cautions import cautions
from ray_pipeline.evaluate.metrics import collect_metrics
from ray_pipeline.graph.stage import StageResult
from ray_pipeline.report.markdown import render_markdown
from ray_pipeline.report.page import Page
from ray_pipeline.stats.latent_class import MISSING
from ray_pipeline.store.tables import ShardedTable
from tests.evaluate.example_run import whole_run
from tests.planted import JUDGES, World, by_shard, make_world

CHECKER = "examples/my_checker.py"
SCORES = {UNDESIRABLE: [1.0, 4.0], BETWEEN: [4.5, 6.9], DESIRABLE: [7.0, 10.0]}


def sums(prompts: int, seed: int = 0) -> tuple[World, np.ndarray, np.ndarray]:
    """Sums with right and wrong answers, the planted votes (rows by judges), and which answers are right.

    Judges err on a fifth of the answers; the third repeats the second; the first is unread now and then.
    """
    rng = random.Random(seed)
    answers: dict[str, list[Any]] = {}
    votes, truth = [], []
    for i in range(prompts):
        rows = []
        for k in range(4):
            right = rng.random() < 0.5
            first, second = (
                BETWEEN if rng.random() < 0.05 else DESIRABLE if right ^ (rng.random() < 0.2) else UNDESIRABLE
                for _ in range(2)
            )
            own = [MISSING if rng.random() < 0.1 else first, second, second]
            scores = [None if vote == MISSING else rng.choice(SCORES[vote]) for vote in own]
            rows.append((f"It is {i + 1 if right else i + 90 + k}.", scores, False))
            votes.append(own)
            truth.append(right)
        answers[f"What is {i} + 1?"] = rows
    return make_world(answers), np.array(votes), np.array(truth)


def stored(folder: Path, world: World, num_shards: int = 4) -> dict[str, StageResult]:
    """The world's tables as stages of a run; verdicts in a stage for each judge."""
    results = {}
    of_judge = {f"judge-{j}": world.verdicts.filter(pc.equal(world.verdicts["judge"], j)) for j in JUDGES}
    tables = {"prompts": world.prompts, "candidates": world.candidates, **of_judge}
    for name, table in tables.items():
        kind = "verdicts" if name.startswith("judge") else name
        written = ShardedTable(str(folder / name), kind, num_shards, "f1")
        for shard, part in enumerate(by_shard(table, num_shards)):
            written.write(shard, part)
        results[name] = StageResult(
            name, "f1", str(folder / name), num_shards, (kind,), role=kind, rows={kind: len(table)}, facts={}
        )
    return results


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ErrorsOfJudges, np.ndarray, np.ndarray]:
    world, votes, truth = sums(150)
    found = judge_errors(stored(tmp_path_factory.mktemp("run"), world.shuffled(1)), CHECKER)
    assert found is not None
    return found, votes, truth


def test_against_a_checker(planted: tuple[ErrorsOfJudges, np.ndarray, np.ndarray]) -> None:
    found, votes, truth = planted
    assert found.truth is not None and found.best is found.truth and found.truth.rows == 600
    wrong = votes != np.where(truth, DESIRABLE, UNDESIRABLE)[:, None]
    order = sorted(JUDGES)
    for judge in found.truth.judges:
        place = JUDGES.index(judge.judge)
        read = votes[:, place] != MISSING
        assert judge.accuracy.mean == pytest.approx(1 - wrong[read, place].mean()) and judge.accuracy.rows == read.sum()
    for pair in found.truth.pairs:
        a, b = JUDGES.index(pair.judge_a), JUDGES.index(pair.judge_b)
        both = (votes[:, [a, b]] != MISSING).all(axis=1)
        assert pair.correlation.mean == pytest.approx(np.corrcoef(wrong[both][:, [a, b]].T)[0, 1])
    assert [(p.judge_a, p.judge_b) for p in found.truth.pairs] == [
        (order[0], order[1]),
        (order[0], order[2]),
        (order[1], order[2]),
    ]
    assert 1.5 < found.truth.effective.mean < 2.2  # two are one  # type: ignore[operator]
    assert found.estimate is not None and found.estimate.rows == 600


def test_without_a_checker_it_is_an_estimate_and_the_same_for_any_shards(tmp_path: Path) -> None:
    world, _, _ = sums(40)
    few, many = (judge_errors(stored(tmp_path / str(n), world, n)) for n in (1, 8))
    assert few is not None and few == many and few.truth is None and few.checked == 0
    assert few.best is few.estimate
    assert judge_errors({}) is None
    results = stored(tmp_path / "one", world)
    del results[f"judge-{JUDGES[0]}"], results[f"judge-{JUDGES[1]}"]
    assert judge_errors(results) is None  # one judge alone
    alone = judge_errors(results, CHECKER)
    assert alone is not None and alone.truth is not None and alone.truth.reason == "there is one judge"
    assert errors_section(alone, (7, 4)) is not None


def test_a_slow_checker_decides_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, _, _ = sums(60)
    monkeypatch.setattr(judge_votes, "MOST_CHECKED", 100)
    found = judge_errors(stored(tmp_path, world), CHECKER)
    assert found is not None and found.truth is not None and found.estimate is not None
    assert found.checked == pytest.approx(100 / 240) and 40 < found.truth.rows < 170 and found.truth.rows % 4 == 0
    assert found.estimate.rows == 240


def test_classes_are_those_of_the_gate() -> None:
    scores = [4.0, 4.1, 6.9, 7.0, None]
    ids = [f"c{i}" for i in range(6)]
    verdicts = pa.table({"candidate_id": ids[:5], "judge": ["j"] * 5, "score": pa.array(scores, pa.float64())})
    votes = votes_of(pa.array(ids), verdicts, ["j", "absent"], (4.0, 7.0))
    assert votes[:, 0].tolist() == [UNDESIRABLE, BETWEEN, BETWEEN, DESIRABLE, MISSING, MISSING]
    assert (votes[:, 1] == MISSING).all()
    with pytest.raises(ValueError, match="duplicate"):
        votes_of(pa.array(ids), pa.concat_tables([verdicts, verdicts]), ["j"], (4.0, 7.0))


def test_page_metrics_and_warning(planted: tuple[ErrorsOfJudges, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    found = planted[0]
    build_report(whole_run(12, judge_errors=found), tmp_path)
    page, metrics = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "metrics.json").read_text())
    truth = metrics["judge_errors"]["truth"]
    assert truth["basis"] == "truth" and truth["effective"]["mean"] == found.truth.effective.mean  # type: ignore[union-attr]
    assert "## Judges' errors" in page and "against the truth of 600 candidates" in page
    assert f"effective number of judges {truth['effective']['mean']:.1f} (" in page and "Without the truth:" in page
    assert "effective judges: " in page and "charts/errors-1.svg" in page
    (warning,) = (line for line in metrics["warnings"] if "nearly interchangeable" in line)
    assert "factuality" in warning and "conciseness" in warning and "(correlation of errors 1.00)" in warning

    guess = ErrorsOfJudges(None, found.estimate)
    section = errors_section(guess, (7, 4))
    assert section is not None
    text = render_markdown(Page("t", "s", "h", [section]))
    assert "Estimate, because no truth is known" in text and "right (estimate)" in text
    assert "| if each judge were right on |" in text and "| 80 % |" in text

    build_report(whole_run(12), tmp_path / "none")
    assert "Judges' errors" not in (tmp_path / "none" / "report.md").read_text()
    assert json.loads((tmp_path / "none" / "metrics.json").read_text())["judge_errors"] is None


def test_equal_scores_are_a_warning_where_no_truth_is_known() -> None:
    verdicts = whole_run(12).verdicts
    assert verdicts is not None
    rows = verdicts.to_pylist()
    scores = {row["candidate_id"]: row["score"] for row in rows if row["judge"] == "helpfulness"}
    copied = [{**row, "score": scores[row["candidate_id"]]} if row["judge"] == "conciseness" else row for row in rows]
    data = whole_run(12, verdicts=pa.Table.from_pylist(copied))
    lines = [line for line in cautions(data, collect_metrics(data)) if "nearly interchangeable" in line]
    assert len(lines) == 1 and "(kappa 1.000 over 48 rows)" in lines[0]
    plain = whole_run(12)
    assert not any("nearly one" in line for line in cautions(plain, collect_metrics(plain)))
