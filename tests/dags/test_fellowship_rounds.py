"""Rounds of the feedback loop: the wiring that it shares with dmapo, what it refuses, and rows over two rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dags.fellowship import FellowshipConfig, audit, fellowship
from ray_pipeline.config.loading import load_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.evaluate.rounds import round_stats
from ray_pipeline.feedback.page import rewrite_page
from ray_pipeline.graph.results import of_final_round
from ray_pipeline.graph.stage import Dag
from ray_pipeline.operate.estimate import calls_model
from ray_pipeline.workflow import training
from tests.dags.played_rounds import known, of, play_rounds
from tests.dags.test_fellowship_stages import worker

STRATEGY = "select={strategy: {kind: combined, high: 10}, judges: [{name: x, model: judge}]}"


@pytest.fixture(autouse=True)
def _no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes many seconds to import, and its names are tested beside its trainers."""
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)


def config(*overrides: str) -> FellowshipConfig:
    small = ["prompts.sources.0.count=40", "prompts.num_shards=4"]
    return load_config(FellowshipConfig, "pocket_fellowship", [*small, *overrides])


def dag(*overrides: str) -> Dag:
    return fellowship(config(*overrides), "/run")


def test_one_round_is_a_run_without_rounds_and_a_longer_run_remakes_the_last_page_alone() -> None:
    plain, one, same = dag(), dag("rounds.n=1"), dag("rounds.n=2", "rounds.prompts=same")
    assert [(s.folder_name, s.group_name, s.round) for s in one.stages] == [
        (s.folder_name, s.group_name, 0) for s in plain.stages
    ]
    assert {name for name, key in known(plain).items() if known(same)[name] != key} == {"evaluate"}
    for how in ("data=all", "stop={metric: accuracy}"):
        two, three = (dag(f"rounds.n={n}", f"rounds.{how}") for n in (2, 3))
        assert {name for name, key in known(two).items() if known(three)[name] != key} == {"evaluate"}
        assert {"generate-1-3", "review-2-3", "select-3", "loop-3", "train-3"} <= known(three).keys()


def test_the_policy_generates_and_everybody_else_is_who_it_was() -> None:
    reviewers = "loop.reviewers=[{name: one, model: reviewer}, {name: two, model: generator}]"
    made = dag("rounds.n=2", "rounds.data=all", "loop.responses=2", reviewers)
    engine = {stage.name: stage.work.engine.args for stage in made.stages if calls_model(stage)}
    assert engine["generate-1-2"] == engine["generate-2-2"] != engine["generate-1"]
    assert engine["review-1-2-generator"] == engine["review-1-generator"] == engine["generate-1"]
    read = {role: parent.name for role, parent in of(made, "generate-2-2").inputs.items()}
    assert read == {
        "prompts": "prompts-2",
        "last": "generate-1-2",
        "reviews/review-1-2-reviewer": "review-1-2-reviewer",
        "reviews/review-1-2-generator": "review-1-2-generator",
        "train": "train",
    }
    rows = {parent.name for parent in of(made, "dataset-rows-2").inputs.values()}
    assert rows == {"prompts", *(f"{name}{n}" for name in ("candidates", "judge", "select") for n in ("", "-2"))}
    assert {stage.round for stage in made.stages if "improve" in stage.group_name} == {0}
    assert {stage.view for stage in made.stages if stage.name.startswith("loop")} == {"loop"}
    shown = {parent.name for parent in of(made, "evaluate").inputs.values()}
    assert {"candidates-2", "train-2"} <= shown and not any(name.startswith(("loop", "datasets-re")) for name in shown)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["train=null"], "but train is null"),
        (["train.model=judge"], r"set loop\.generator to judge"),
        (["train.save=merged"], r"set train\.save to adapter or both"),
        (["rounds.data=all", "rounds.prompts=same"], r"set rounds\.data to last"),
        (["rounds.data=all", "rounds.parts=2"], r"rounds\.parts of 3 or more"),
        (["rounds.stop={}", STRATEGY], r"remove judge or rounds\.stop"),
    ],
)
def test_rounds_that_cannot_follow(given: list[str], words: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=words):
        config("rounds.n=3", *given)


def test_rows_over_two_rounds_are_walked_back_and_each_round_has_its_page(tmp_path: Path) -> None:
    models = ["models.generator.model=pocket:policy", "models.reviewer.model=pocket:judge", "improve=null"]
    given = config("rounds.n=2", "rounds.data=all", "rounds.parts=2", *models)
    run = play_rounds(tmp_path, given, fellowship(given, str(tmp_path)), worker)
    reports = audit(run, given).reports
    assert {name: report.found for name, report in reports.items()} == {"datasets": {}, "datasets-2": {}}
    first, second = (report.rows for report in reports.values())
    assert first["candidates"] > 20 and second["candidates"] > first["candidates"] and second["dpo"] > first["dpo"] > 0
    used = {row["prompt_id"] for row in _rows(tmp_path / run.stages["datasets-2"].path)}
    parts = [set(run.results[f"prompts-{n}"].table().read_all()["prompt_id"].to_pylist()) for n in (1, 2)]
    assert used & parts[0] and used & parts[1]

    pages = [json.loads((tmp_path / run.stages[name].path / "loop.json").read_bytes()) for name in ("loop", "loop-2")]
    assert [page["prompts"] for page in pages] == [len(part) for part in parts]
    curves = round_stats(run.results, None)
    assert [one.candidates for one in curves] == [
        len(run.results[f"candidates{n}"].table().read_all()) for n in ("", "-2")
    ]
    page = tmp_path / run.stages["loop-2"].path / "report.md"
    page.unlink()
    report = rewrite_page(run)
    assert page.exists() and "Data by round" in report.read_bytes("report.md").decode()
    assert "loop" in of_final_round(run.results)  # no second policy yet
    assert (tmp_path / "loop").resolve() == tmp_path / run.stages["loop"].path

    decisions = run.results["select"].table()
    kept = decisions.read(0)
    changed = ["discard" if label == "desirable" else label for label in kept["label"].to_pylist()]
    decisions.write(0, kept.set_column(kept.schema.get_field_index("label"), kept.schema.field("label"), [changed]))
    assert all("label" in report.found for report in audit(run, given).reports.values())


def _rows(folder: Path) -> list[dict[str, str]]:
    return [row for file in (folder / "dpo").rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
