"""Rows for people to label, and their labels read back: report, gate and audit."""

from __future__ import annotations

import collections
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dags.dmapo import dmapo
from ray_pipeline.cli import app
from ray_pipeline.config.loading import load_config
from ray_pipeline.data import reviewed
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.reviewed import Reviewed, overrule, read_labels
from ray_pipeline.data.sources import InputError
from ray_pipeline.evaluate.people import _agreement, gate_label, powered_shares
from ray_pipeline.graph.results import read_run
from ray_pipeline.operate.review import ARGILLA, PAGE, ROWS, choose, review
from ray_pipeline.store.schemas import DECISIONS, LABELS
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.operate.planted_run import SHARDS, plant
from tests.planted import random_world

GATE = GateConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("review") / "run", random_world(60, seed=5))


def written(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ROWS).read_text().splitlines()]


def labels_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_drawn_by_the_value_of_their_label_and_a_fifth_evenly(folder: Path, tmp_path: Path) -> None:
    run = read_run(str(folder))
    counts = review(run, GATE, tmp_path / "a", 40)
    rows = written(tmp_path / "a")
    assert counts == collections.Counter(row["chosen_as"] for row in rows) == {"chance": 8, "value": 32}
    decisions = {row["candidate_id"]: row for row in run.results["gate"].table().read_all().to_pylist()}
    for row in rows:
        decision = decisions[row["candidate_id"]]
        assert (row["label"], row["why"], row["final_score"]) == tuple(
            decision[name] for name in ("label", "why", "final_score")
        )
        assert row["prompt"].startswith("question") and row["response"] and len(row["judges"]) == 3
        assert 0 < row["probability"] < 1
    review(run, GATE, tmp_path / "b", 40)
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in (PAGE, ROWS))
    records = json.loads((tmp_path / "a" / ARGILLA).read_text())
    assert [record["id"] for record in records] == [row["candidate_id"] for row in rows]
    assert records[0]["metadata"]["probability"] == rows[0]["probability"]
    # A larger review contains a smaller one; one drawn evenly gives every candidate the same probability.
    review(run, GATE, tmp_path / "c", 80)
    assert {row["candidate_id"] for row in rows} < {row["candidate_id"] for row in written(tmp_path / "c")}
    assert review(run, GATE, tmp_path / "d", 40, chance=1.0) == {"chance": 40}
    assert len({row["probability"] for row in written(tmp_path / "d")}) == 1


def test_rows_in_doubt_and_rows_that_the_gate_kept_are_drawn_more_often() -> None:
    final, variance = [9.0, 9.0, 5.5, 5.5], [0.0, 2.0, 0.0, 0.0]
    label = ["desirable", "desirable", "discard", "desirable"]
    decisions = pa.table(
        {
            "candidate_id": [f"c{n}" for n in range(4000)],
            **{name: values * 1000 for name, values in
               {"final_score": final, "score_variance": variance, "label": label}.items()},
        }
    )  # fmt: skip
    chosen = choose(decisions, GATE, 400)
    probability = {int(name[1:]) % 4: p for name, (_, p) in chosen.items()}
    sure, disputed, between, kept = (probability[n] for n in range(4))
    assert sure < disputed < kept and between < kept
    # The candidates of the run are drawn as often as their probability says.
    counts = collections.Counter(int(name[1:]) % 4 for name in chosen)
    assert all(abs(counts[n] - 1000 * p) < 4 * (1000 * p) ** 0.5 for n, p in probability.items())
    assert len(chosen) == 400 and sum(1000 * p for p in probability.values()) == pytest.approx(400, rel=0.02)


def test_labels_weigh_by_the_probability_with_which_they_were_drawn() -> None:
    """People disagree with sure labels never and with doubtful ones always; doubtful ones are drawn three times as
    often."""
    count = 3000
    doubtful = np.arange(count) % 2 == 1
    decisions = pa.table(
        {
            "candidate_id": [f"c{n}" for n in range(count)], "prompt_id": [f"p{n}" for n in range(count)],
            "score_variance": doubtful.astype(float), "final_score": np.full(count, 9.0),
            "label": ["desirable"] * count, "why": ["final"] * count,
        }
    )  # fmt: skip
    drawn = [n for n in range(count) if n % 60 in (0, 1, 31, 51)]
    said = {f"c{n}": "undesirable" if doubtful[n] else "desirable" for n in drawn}
    probabilities = {f"c{n}": 0.3 if doubtful[n] else 0.1 for n in drawn}
    weighed = powered_shares(decisions, Reviewed(said, frozenset(), probabilities), GATE)  # type: ignore[arg-type]
    plain = powered_shares(decisions, Reviewed(said, frozenset(said)), GATE)  # type: ignore[arg-type]
    for found in weighed.values():
        assert found.alone.value == pytest.approx(0.5) and found.powered.value == pytest.approx(0.5)
    assert all(found.alone.value == 0.25 for found in plain.values())


@pytest.mark.parametrize("probability", [0, 1.5, "high", True])
def test_a_probability_that_cannot_be_one_is_refused(tmp_path: Path, probability: Any) -> None:
    row = {"candidate_id": "a", "label": "desirable", "probability": probability}
    with pytest.raises(InputError, match=r"line 1 has probability .*above 0 and up to 1"):
        read_labels(str(labels_file(tmp_path / "labels.jsonl", [row])))


def test_the_probability_of_the_largest_review_counts(tmp_path: Path) -> None:
    rows = [{"candidate_id": "a", "label": "desirable", "probability": p} for p in (0.2, 0.5, 0.1)]
    assert read_labels(str(labels_file(tmp_path / "labels.jsonl", rows))).probabilities == {"a": 0.5}


def test_more_rows_than_the_run_has_are_all_of_its_rows(folder: Path, tmp_path: Path) -> None:
    counts = review(read_run(str(folder)), GATE, tmp_path, 10_000)
    read = read_run(str(folder)).results["gate"].table().read_all().to_pylist()
    assert sum(counts.values()) == sum(row["final_score"] is not None for row in read)


def test_labels_go_into_gate_report_and_audit(folder: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["review", str(folder), "-n", "30", "-o", str(tmp_path)])
    assert shown.exit_code == 0 and "30 rows: 6 chance" in shown.output, shown.output
    said = ["desirable", "undesirable", "unsure"]
    rows = [{**row, "label": said[place % 3]} for place, row in enumerate(written(tmp_path))]
    names = [row["candidate_id"] for row in rows]
    again = {"candidate_id": names[0], "label": "undesirable"}  # another person
    path = labels_file(tmp_path / "labels.jsonl", [*rows, again, {"candidate_id": "0" * 32, "label": "desirable"}])
    arguments = ["run", "dmapo", "-c", "tests/one_judge.yaml", f"prompts.num_shards={SHARDS}", "--run-dir", str(folder)]
    arguments += [f"human_labels.path={path}", "human_labels.use=gate", "--to", "datasets", "--executor", "inprocess"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    run = read_run(str(folder))
    decisions = {row["candidate_id"]: row for row in run.results["gate"].table().read_all().to_pylist()}
    expected = {name: row["label"] for name, row in zip(names, rows, strict=True) if row["label"] != "unsure"}
    del expected[names[0]]  # contested
    assert all(decisions[name]["label"] == label for name, label in expected.items())
    assert all(("a person: " in row["why"]) == (name in expected) for name, row in decisions.items())
    changed = sum(row["label"] != old["label"] for row, old in zip(rows, written(tmp_path), strict=True)
                  if row["candidate_id"] in expected)  # fmt: skip
    assert run.results["gate"].facts["counts"]["changed_by_people"] == changed > 0

    audited = CliRunner().invoke(app, ["audit", str(folder)])
    assert audited.exit_code == 0 and "no problem" in audited.output, audited.output
    path.write_text("")
    assert "label" in CliRunner().invoke(app, ["audit", str(folder)]).output  # people's labels are known from the file
    labels_file(path, [*rows, again, {"candidate_id": "0" * 32, "label": "desirable"}])

    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    found = json.loads((folder / "report" / "metrics.json").read_text())["people"]
    assert (found["labelled"], found["unknown"], found["contested"], found["unsure"]) == (len(expected), 1, 1, 10)
    before = {row["candidate_id"]: row["label"] for row in written(tmp_path)}
    table = collections.Counter((before[name], label) for name, label in expected.items())
    assert {(one, other): n for one, row in found["counts"].items() for other, n in row.items()} == dict(table)
    kept = [name for name in expected if before[name] in ("desirable", "undesirable")]
    equal = sum(before[name] == expected[name] for name in kept)
    assert (found["chosen"]["candidates"], found["chosen"]["equal"]) == (len(kept), equal)
    page = (folder / "report" / "report.md").read_text()
    assert "## Agreement with people" in page and "Labels by people: 1 are of candidates of another run" in page


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"label": "desirable"}', "line 2 has no candidate_id"),
        ('{"candidate_id": "a", "label": "good"}', "label 'good'; use desirable, undesirable or unsure"),
        ("{", "line 2"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"candidate_id": "a", "label": "desirable"}\n' + line + "\n")
    with pytest.raises(InputError, match=problem):
        read_labels(str(path))
    path.with_name("empty.jsonl").write_text("")
    with pytest.raises(InputError, match="has no labels"):
        read_labels(str(path.with_name("empty.jsonl")))
    arguments = ["run", "dmapo", "-c", "tests/one_judge.yaml", f"human_labels={path}", "--dry-run"]
    checked = CliRunner().invoke(app, arguments)
    assert checked.exit_code == 2 and problem in checked.output.replace("\n", " "), checked.output


def test_labels_are_read_once_and_go_to_the_workers_with_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = labels_file(tmp_path / "labels.jsonl", [{"candidate_id": "a", "label": "desirable"}])
    reads: list[str] = []
    monkeypatch.setattr(reviewed, "read_labels", lambda name: reads.append(name) or read_labels(name))
    config = load_config(DmapoConfig, "tests/one_judge.yaml", [f"human_labels={{path: '{path}', use: gate}}"])
    stages = {stage.name: stage for stage in dmapo(config, str(tmp_path / "run")).stages}
    path.unlink()
    for settings in (stages["gate"].work.settings, stages["evaluate"].work.settings.report):
        sent = pickle.loads(pickle.dumps(settings))
        humans = getattr(sent, "humans", None) or sent.human_labels
        assert humans.read().labels == {"a": "desirable"}
    assert reads == [str(path)]


@given(
    st.lists(st.tuples(st.sampled_from(LABELS), st.booleans(), st.sampled_from([None, "desirable", "undesirable"]))),
)
def test_people_replace_labels_of_scored_candidates_only(rows: list[tuple[str, bool, Any]]) -> None:
    table = pa.Table.from_pylist(
        [
            {"candidate_id": str(i), "prompt_id": "p", "mean_score": None, "score_variance": None, "penalty": None,
             "final_score": 5.0 if scored else None, "label": label, "why": "because"}
            for i, (label, scored, _) in enumerate(rows)
        ],
        schema=DECISIONS,
    )  # fmt: skip
    given_labels = {str(i): person for i, (_, _, person) in enumerate(rows) if person}
    found, changed = overrule(table, given_labels)
    assert found.schema == DECISIONS
    expected = [person if person and scored else label for label, scored, person in rows]
    assert found["label"].to_pylist() == expected
    assert changed == sum(new != label for new, (label, _, _) in zip(expected, rows, strict=True))


def test_agreement_with_people_resamples_prompts() -> None:
    """K7.3: eight candidates of a prompt on which the gate is right or wrong as a whole say no more than one."""
    rows = [("desirable", "desirable" if prompt % 3 else "undesirable", f"p{prompt}") for prompt in range(30)]
    one, eight = _agreement(rows), _agreement(rows * 8)
    assert (one.share.mean, one.candidates, eight.candidates) == (eight.share.mean, 30, 240)
    assert (eight.share.low, eight.share.high) == pytest.approx((one.share.low, one.share.high))
    alone = _agreement(rows[:1])
    assert (alone.share.mean, alone.share.low, alone.share.high) == (0.0, None, None)
    right = _agreement([row for row in rows if row[0] == row[1]])
    assert right.share.low == pytest.approx(0.025 ** (1 / 20)) and right.share.high == 1  # 20 of 20 prompts


def test_labels_drawn_by_chance_say_something_about_the_whole_run() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(2000) < 0.4
    final = np.clip(np.where(truth, 8.0, 3.0) + rng.normal(0, 2, 2000), 1, 10)
    labels = np.select([final >= 7, final <= 4], ["desirable", "undesirable"], "discard")
    decisions = pa.table(
        {
            "candidate_id": [f"c{n}" for n in range(2000)],
            "prompt_id": [f"p{n // 4}" for n in range(2000)],
            "score_variance": rng.random(2000),
            "final_score": [None if n % 50 == 1 else float(final[n]) for n in range(2000)],
            "label": ["incomplete" if n % 50 == 1 else str(labels[n]) for n in range(2000)],
            "why": ["x"] * 2000,
        }
    )
    said = {f"c{n}": "desirable" if truth[n] else "undesirable" for n in range(0, 2000, 10)}
    found = powered_shares(decisions, Reviewed(said, frozenset(said)), GateConfig())  # type: ignore[arg-type]
    share, right = found.values()
    assert (share.labels, share.unlabelled) == (200, 1760) and share.alone.value == truth[::10].mean()
    assert share.powered.low is not None and share.powered.high is not None and share.alone.low is not None
    assert share.powered.low < truth.mean() < share.powered.high
    assert share.worth is not None and share.worth > 300 and share.weight > 0.5
    kept = labels != "discard"
    agreeing = (labels == np.where(truth, "desirable", "undesirable"))[::10][kept[::10]]
    assert (right.labels, right.alone.value) == (len(agreeing), pytest.approx(agreeing.mean()))
    assert right.weight < 0.2  # the variances are noise
    # Labels that were chosen for their doubt stand for nothing.
    assert powered_shares(decisions, Reviewed(said, frozenset()), GateConfig()) == {}  # type: ignore[arg-type]


def test_the_gates_own_label_is_known_behind_that_of_a_person(folder: Path) -> None:
    table = read_run(str(plant(folder.parent / "again", random_world(60, seed=5)))).results["gate"].table().read_all()
    known = table.to_pylist()
    # Numbers say nothing of a text that was cut off, nor where calls were skipped (`judge.early_exit`).
    cut = {"label": "incomplete", "final_score": 8.0, "score_variance": 0.0, "why": "cut off: length"}
    skipped = {"label": "desirable", "final_score": None, "score_variance": None, "why": "desirable whatever the reply"}
    known += [{**known[0], **one, "candidate_id": f"extra {i}"} for i, one in enumerate((cut, skipped))]
    labels = [row["label"] for row in known]
    decided = pa.Table.from_pylist(known, schema=DECISIONS)
    replaced, changed = overrule(decided, {row["candidate_id"]: "desirable" for row in known})
    assert changed > 0
    for found in (decided, replaced):
        assert [gate_label(row, GATE) for row in found.to_pylist()] == labels
