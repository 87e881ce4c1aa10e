"""A plan beside what a run took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_pipeline.evaluate.build import build_report
from ray_pipeline.evaluate.planned import PlannedUse, compare_with_plan
from tests.evaluate.example_run import whole_run


def planned(stage: str, calls: int, device_seconds: float | None, devices: float = 1) -> dict[str, Any]:
    return {
        "stage": stage, "model": "judge", "calls": calls, "prompt_tokens": 1000.0, "completion_tokens": 200.0,
        "devices": devices, "device_seconds": device_seconds,
    }  # fmt: skip


USAGE = {
    "judge": {"calls_engine": 700.0, "calls_log": 20.0, "prompt_tokens": 900.0, "completion_tokens": 90.0,
              "device_seconds": 3600.0},
    "train": {"wall_seconds": 1800.0},
}  # fmt: skip


def planned_run() -> list[PlannedUse]:
    """Of judge and train; critic did not run."""
    plan = {"stages": [planned("judge", 720, 7200.0), planned("critic", 9, None), planned("train", 0, 3600.0, 4)]}
    return compare_with_plan(plan, USAGE)


def test_a_plan_and_what_it_became(tmp_path: Path) -> None:
    judge, train = planned_run()
    assert (judge.planned_calls, judge.calls, judge.log_hits) == (720, 700, 20)
    assert (judge.planned_tokens, judge.tokens, judge.planned_hours, judge.hours) == (1200, 990, 2.0, 1.0)
    assert (train.calls, train.tokens, train.planned_hours, train.hours) == (None, None, 1.0, 2.0)

    build_report(whole_run(planned=[judge, train]), tmp_path / "with")
    page = (tmp_path / "with" / "report.md").read_text()
    assert "| judge | 720 | 700 | 20 | 1200 | 990 | 2.0000 | 1.0000 |" in page
    assert "| train | – | – | – | 1200 | – | 1.0000 | 2.0000 |" in page
    build_report(whole_run(), tmp_path / "without")
    assert "Plan and actual" not in (tmp_path / "without" / "report.md").read_text()
    assert compare_with_plan({}, USAGE) == []
