"""Early stopping of rounds: what is decided from measurements, and what a decision skips, keeps and shows."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.evaluate.early_stop import Decision, Measured, StopSettings, decide, decision_text
from ray_pipeline.graph.driver import RunOutcome, RunSettings, execute
from ray_pipeline.graph.in_process import InProcessExecutor
from ray_pipeline.graph.results import DECISION, decision, final_round, of_final_round, read_run
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, Stage, StageStop, WholeInput, WholeWork

SHARE = st.none() | st.floats(0, 1)
ROUNDS = st.lists(st.builds(Measured, SHARE, SHARE), min_size=1, max_size=8)


@given(ROUNDS, st.integers(1, 4))
def test_the_best_round_is_the_first_of_the_highest_and_patience_ends_the_run(
    rounds: list[Measured], patience: int
) -> None:
    found = decide(rounds, StopSettings(patience=patience))
    known = [one.metric for one in rounds if one.metric is not None]
    best = rounds[found.best - 1].metric
    assert (best is None) == (not known) and (best is None or best == max(known))
    assert all(one.metric is None or best is None or one.metric < best for one in rounds[: found.best - 1])
    if len(rounds) - found.best >= patience:
        assert found.stop
    if found.best == len(rounds):
        assert not found.stop
    calm = [dataclasses.replace(one, panel=None) for one in rounds]  # without a panel patience alone decides
    assert bool(decide(calm, StopSettings(patience=patience)).stop) == (len(rounds) - found.best >= patience)


@pytest.mark.parametrize(
    ("panel", "metric", "words"),
    [
        ((0.6, 0.7), (0.8, 0.7), "the panel prefers its policy more often than that of round 1 (70.0 %, 60.0 %)"),
        ((0.6, 0.6), (0.8, 0.7), ""),
        ((0.6, 0.5), (0.8, 0.7), ""),
        ((0.6, 0.7), (0.8, 0.8), ""),
        ((0.6, None), (0.8, 0.7), ""),
        ((0.6, 0.7), (0.8, None), ""),
    ],
)
def test_a_panel_that_approves_of_what_gets_worse_stops_at_once(
    panel: tuple[float, float | None], metric: tuple[float, float | None], words: str
) -> None:
    rounds = [Measured(*both) for both in zip(metric, panel, strict=True)]
    found = decide(rounds, StopSettings(metric="accuracy", patience=3))
    assert found.best == 1 and bool(found.stop) == bool(words) and words in found.stop


def test_a_decision_in_words() -> None:
    rounds = [Measured(0.5, None), Measured(0.25, None), Measured(None, None)]
    text = decision_text(rounds, decide(rounds, StopSettings(patience=2)), "score")
    assert text == (
        "The result is the policy of round 1, the best so far by score (50.0 % in round 1, 25.0 % in round 2, – in "
        "round 3). Stopped after round 3: no higher score for 2 rounds."
    )
    assert decision_text(rounds[:1], Decision(1, ""), "score").endswith("(50.0 % in round 1).")


class Rounds:
    """A run whose rounds score as planned, on the real driver: each trains, is measured and decided upon."""

    def __init__(self, folder: Path, scores: list[float]) -> None:
        self.folder, self.scores = folder, scores
        self.made: list[str] = []

    def dag(self, n: int, patience: int | None) -> Dag:
        stages: list[Stage] = []
        before: Stage | None = None
        train: Stage | None = None
        for number in range(1, n + 1):
            inputs = {} if train is None else {"start": train}
            train = self._stage(f"train-{number}", inputs, number, role="policy", view="policy", repeatable=False)
            score = self._stage(f"score-{number}", {"policy": train}, number)
            stages += [train, score]
            if patience is not None:
                read = {"score": score, **({} if before is None else {"before": before})}
                before = self._stage(f"stop-{number}", read, number, role=DECISION, config=patience)
                stages.append(before)
        report = self._stage("report", {stage.name: stage for stage in stages}, 0, role="page", view="report")
        return Dag("rounds", [*stages, report])

    def run(self, n: int, patience: int | None = None, **more: Any) -> RunOutcome:
        self.made.clear()
        settings = RunSettings(Session(str(self.folder), str(self.folder / "calls"), 1), {}, beat_seconds=0.4)
        console = Console(file=io.StringIO())
        return execute(self.dag(n, patience), settings, InProcessExecutor(), console=console, **more)

    def statuses(self) -> dict[str, str]:
        stages = json.loads((self.folder / "manifest.json").read_text())["stages"]
        return {name: entry["status"] for name, entry in stages.items()}

    def skipped(self) -> set[str]:
        return {name for name, status in self.statuses().items() if status == "skipped"}

    def _stage(self, name: str, inputs: dict[str, Stage], round: int, config: Any = None, **more: Any) -> Stage:
        return Stage(name, WholeWork(self._make, settings=config), config, inputs, round=round, **more)

    def _make(self, given: WholeInput) -> dict[str, Any]:
        name = Path(given.folder.location).name.rpartition("-")[0]
        self.made.append(name)
        kind, _, number = name.partition("-")
        if kind == "report":
            if not self.scores:
                raise StageStop("nothing to report")
            return {"policy": next(r.name for r in of_final_round(given.inputs).values() if r.role == "policy")}
        if kind == "score":
            score = self.scores[int(number) - 1]
            if score < 0:
                raise StageStop("the judge is not there")
            return {"score": score}
        if kind == "stop":
            earlier = given.inputs["before"].facts["rounds"] if "before" in given.inputs else []
            rounds = [*earlier, given.inputs["score"].facts["score"]]
            found = decide([Measured(one, None) for one in rounds], StopSettings(patience=given.settings))
            return {"rounds": rounds, "best": found.best, "stop": bool(found.stop), "text": f"best {found.best}"}
        return {}


def names(*numbers: int) -> set[str]:
    return {f"{kind}-{number}" for kind in ("train", "score", "stop") for number in numbers}


def test_rounds_after_the_last_are_skipped_and_the_best_policy_is_the_result(tmp_path: Path) -> None:
    world = Rounds(tmp_path, [0.5, 0.7, 0.6, 0.4, 0.9])
    outcome = world.run(5, 2)
    assert set(world.made) == names(1, 2, 3, 4) | {"report"} and world.skipped() == names(5)
    assert not outcome.failures and not outcome.not_run
    assert outcome.results["report"].facts == {"policy": "train-2"}
    assert (tmp_path / "policy").resolve().name.startswith("train-2-")
    assert final_round(outcome.results) == 2
    inputs = json.loads((tmp_path / "report" / "_result.json").read_text())["inputs"]
    assert set(inputs) == names(1, 2, 3, 4)

    assert not world.run(5, 2).not_run and world.made == []  # the decision is kept
    assert world.skipped() == names(5)
    assert not world.run(5, 2, from_group="report").not_run and world.made == ["report"]
    world.run(6, 2)
    assert world.made == ["report"] and world.skipped() == names(5, 6)


def test_a_failed_page_of_a_stopped_run_is_reported(tmp_path: Path) -> None:
    world = Rounds(tmp_path, [0.5, 0.4, 0.3])
    world.run(3, 1)
    world.scores.clear()
    outcome = world.run(3, 1, from_group="report")
    assert outcome.failures["report"].reason == "nothing to report" and outcome.not_run == []


def test_status_list_and_audit_line_say_which_round_and_why(tmp_path: Path) -> None:
    Rounds(tmp_path, [0.5, 0.4, 0.3]).run(3, 1)
    shown = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "7 of 10 stages done, 3 skipped; not running\nbest 1\n" in shown
    assert sum(" skipped" in line for line in shown.splitlines()[1:]) == 3
    assert json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).output)["decided"] == "best 1"
    assert "done" in CliRunner().invoke(app, ["list", str(tmp_path)]).output
    decided = decision(read_run(str(tmp_path)).results)
    assert decided is not None and decided.name == "stop-2"


def test_more_patience_and_no_stop_go_on_from_what_is_there(tmp_path: Path) -> None:
    world = Rounds(tmp_path, [0.5, 0.4, 0.9, 0.1])
    world.run(4, 1)
    assert world.skipped() == names(3, 4)
    world.run(4, 2)
    assert set(world.made) == {*(f"stop-{n}" for n in (1, 2, 3, 4)), *names(3, 4), "report"}
    assert world.skipped() == set() and (tmp_path / "policy").resolve().name.startswith("train-3-")

    outcome = world.run(4)  # no stop: nothing but the page is made
    assert world.made == ["report"] and outcome.results["report"].facts == {"policy": "train-4"}
    assert (tmp_path / "policy").resolve().name.startswith("train-4-")
    world.run(4, 1)  # a stop set afterwards leaves rounds out that are there, and keeps their files
    assert world.skipped() == names(3, 4) and "train-3" not in world.made
    assert len(list(tmp_path.glob("train-*-*"))) == 4


def test_without_a_decision_no_later_round_begins(tmp_path: Path) -> None:
    world = Rounds(tmp_path, [0.5, -1, 0.9])
    outcome = world.run(3, 2)
    assert list(outcome.failures) == ["score-2"]
    assert set(outcome.not_run) == {"stop-2", *names(3), "report"} and "train-3" not in world.made
    world.scores[1] = 0.6
    assert not world.run(3, 2).failures
    assert world.made == ["score-2", "stop-2", "train-3", "score-3", "stop-3", "report"]


def test_a_lost_policy_is_decided_upon_again(tmp_path: Path) -> None:
    world = Rounds(tmp_path, [0.5, 0.4, 0.3])
    world.run(3, 1)
    (gone,) = tmp_path.glob("train-2-*/_result.json")
    gone.unlink()
    world.run(3, 1)
    assert world.made == ["train-2", "score-2", "stop-2", "report"] and world.skipped() == names(3)
