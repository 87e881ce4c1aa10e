"""Which finished stages still count when an earlier one has to be made again."""

from __future__ import annotations

from ray_pipeline.graph.run import _stale
from ray_pipeline.graph.stage import Stage, StageResult, WholeWork


def stage(name: str, *parents: Stage, repeatable: bool = True) -> Stage:
    inputs = {parent.name: parent for parent in parents}
    return Stage(name, WholeWork(lambda given: {}), {}, inputs, repeatable=repeatable)


def done(*stages: Stage) -> dict[str, StageResult]:
    return {s.name: StageResult(s.name, s.fingerprint, "", 1, (), {}, {}, {}) for s in stages}


def test_what_was_made_from_a_lost_policy_is_made_again() -> None:
    data = stage("data")
    train = stage("train", data, repeatable=False)
    answers, report = stage("answers", train), stage("report", stage("other"), train)
    judged = stage("judged", answers)
    results = done(data, answers, judged, report)
    assert _stale([data, train, answers, judged, report], results) == [answers, judged, report]
    assert set(results) == {"data"}


def test_what_was_made_from_a_lost_but_repeatable_table_still_counts() -> None:
    prompts = stage("prompts")
    candidates = stage("candidates", prompts)
    results = done(candidates)
    assert _stale([prompts, candidates], results) == []
    assert set(results) == {"candidates"}
