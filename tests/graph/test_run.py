"""Which finished stages still count when an earlier one has to be made again, and which may begin."""

from __future__ import annotations

from ray_pipeline.graph.ray_executor import _may_start
from ray_pipeline.graph.resume import drop_stale
from ray_pipeline.graph.stage import Stage, StageResult, WholeWork


def stage(name: str, *parents: Stage, repeatable: bool = True) -> Stage:
    inputs = {parent.name: parent for parent in parents}
    return Stage(name, WholeWork(lambda given: {}), {}, inputs, repeatable=repeatable)


def done(*stages: Stage) -> dict[str, StageResult]:
    return {s.name: StageResult(s.name, s.fingerprint, "", 1, (), {}, {}) for s in stages}


def test_what_was_made_from_a_lost_policy_is_made_again() -> None:
    data = stage("data")
    train = stage("train", data, repeatable=False)
    answers, report = stage("answers", train), stage("report", stage("other"), train)
    judged = stage("judged", answers)
    results = done(data, answers, judged, report)
    assert drop_stale([data, train, answers, judged, report], results) == [answers, judged, report]
    assert set(results) == {"data"}


def test_what_was_made_from_a_lost_but_repeatable_table_still_counts() -> None:
    prompts = stage("prompts")
    candidates = stage("candidates", prompts)
    results = done(candidates)
    assert drop_stale([prompts, candidates], results) == []
    assert set(results) == {"candidates"}


def test_with_a_limit_only_stages_that_can_begin_are_submitted() -> None:
    data = stage("data")
    first, second = stage("first", data), stage("second", data)
    last = stage("last", first, second)
    everything = [(data,), (first,), (second,), (last,)]
    assert _may_start(everything, {}, 0, None) == everything
    assert _may_start(everything, {}, 0, 2) == [(data,)]
    assert _may_start([(first,), (second,), (last,)], done(data), 0, 1) == [(first,)]
    assert _may_start([(second,), (last,)], done(data), 1, 1) == []
    assert _may_start([(second,), (last,)], done(data), 1, 2) == [(second,)]
    # `first` failed: its place is free, and `last` never begins.
    assert _may_start([(last,)], done(data, second), 0, 2) == []
    # Those that share a pool take one place, and wait for each other's inputs.
    assert _may_start([(first, second), (last,)], done(data), 0, 1) == [(first, second)]
    assert _may_start([(first, last)], done(data), 0, 1) == []
