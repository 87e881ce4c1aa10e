"""Escalation: labels are those of the gate over the judges asked, and nobody is asked or left out against the rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dags.dmapo import dmapo
from ray_pipeline.config.loading import load_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.early_exit import in_audit_slice
from ray_pipeline.data.escalation import Escalation, decide_by_level, rule_of
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.level_stats import escalation_stats, levels_section
from ray_pipeline.engines.usage import Usage
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.data.test_early_exit import gates, label_of
from tests.planted import Planted, World, ended, make_world, skipped_by_levels

JUDGES = ("a", "b", "c", "d")
LEVELS = [(("a",), ("b", "c", "d")), (("b", "a"), ("c",), ("d",)), (("a", "b", "c"), ("d",)), (("d", "b"), ("a", "c"))]


def panel(rows: Sequence[tuple[Sequence[float | None], bool | None]]) -> World:
    answers: list[Planted] = [(f"answer {n}", scores, flawed) for n, (scores, flawed) in enumerate(rows)]
    return make_world({"question": answers}, JUDGES)


def is_open(scores: Sequence[float | None], cut: bool, gate: GateConfig) -> bool:
    """The rule of docs/operating.md in its own words."""
    if None in scores or (cut and gate.cut == "exclude"):
        return False
    known = [score for score in scores if score is not None]
    apart = gate.use_variance and len(known) > 1 and statistics.variance(known) > gate.tau
    return apart or gate.undesirable_at < statistics.mean(known) < gate.desirable_at


scores = st.one_of(*[st.integers(1, 10).map(float)] * 4, st.none())
replies = st.tuples(st.tuples(*[scores] * 4), st.sampled_from([True, False, None]))


@settings(max_examples=60, deadline=None)
@given(st.lists(replies, min_size=40, max_size=60), gates(), st.sampled_from(LEVELS), st.booleans())
def test_labels_are_those_of_the_gate_over_the_judges_asked(
    rows: list[Any], gate: GateConfig, levels: Any, cut: bool
) -> None:
    rule = Escalation(gate=gate, levels=levels)
    full = ended(panel(rows), "length") if cut else panel(rows)
    world = skipped_by_levels(full, rule)
    table, open_labels = decide_by_level(world.candidates, world.verdicts, world.critiques, rule)
    assert open_labels == 0 and table["candidate_id"].equals(full.candidates["candidate_id"])
    verdicts = {(row["candidate_id"], row["judge"]): row for row in world.verdicts.to_pylist()}
    for row, (said, flawed) in zip(table.to_pylist(), rows, strict=True):
        name, by_judge = row["candidate_id"], dict(zip(JUDGES, said, strict=True))
        asked = [judge for judge in rule.judges if verdicts[name, judge]["parse_status"] != "skipped"]
        reached = [level for level in levels if set(level) <= set(asked)]
        assert asked == [judge for level in reached for judge in level]  # whole levels, the first ones
        assert row["label"] == label_of([by_judge[judge] for judge in asked], flawed, cut, gate)
        if in_audit_slice(name):
            assert len(reached) == len(levels) and row["why"].endswith("(audit slice: all levels)")
            continue
        assert row["why"].endswith(f"(level {len(reached)} of {len(levels)})")
        for number in range(1, len(levels)):
            so_far = [by_judge[judge] for level in levels[:number] for judge in level]
            if number < len(reached):
                assert is_open(so_far, cut, gate)  # nobody was asked in vain
            elif number == len(reached):
                assert not is_open(so_far, cut, gate)  # nothing open was left


def test_other_thresholds_find_the_labels_that_need_skipped_verdicts() -> None:
    rule = Escalation(gate=GateConfig(), levels=(("a", "b"), ("c", "d")))
    world = skipped_by_levels(panel([((8.0, 8.0, 2.0, 2.0), False), ((5.0, 5.0, 9.0, 9.0), False)] * 30), rule)
    strict = rule.model_copy(update={"gate": GateConfig(desirable_at=9.0)})
    table, open_labels = decide_by_level(world.candidates, world.verdicts, world.critiques, strict)
    left = [row for row in table.to_pylist() if row["why"].startswith("skipped")]
    assert open_labels == len(left) > 20 and {row["label"] for row in left} == {"incomplete"}
    assert left[0]["why"] == "skipped, but the label depends on it: c, d" and left[0]["final_score"] is None


def test_agreement_with_all_judges_is_that_of_the_slice() -> None:
    gate, levels = GateConfig(), (("a", "b"), ("c", "d"))
    rule = Escalation(gate=gate, levels=levels)
    # Settled as desirable by a and b; of these, c and d would have kept the label of every second one alone.
    rows = [((8.0, 8.0, 7.0, 8.0) if n % 2 else (8.0, 8.0, 2.0, 2.0), False) for n in range(1200)]
    rows += [((8.0, 5.0, 9.0, 9.0), False)] * 300
    full = panel(rows)
    world = skipped_by_levels(full, rule)
    used = Usage(calls_engine=9, calls_log=1, prompt_tokens=70, completion_tokens=30, cost=0.5)
    usage = {"a": used, "b": used, "c": Usage(calls_engine=4), "d": Usage(calls_engine=5)}
    tables = (world.candidates, world.verdicts, world.critiques)
    found = escalation_stats(rule, *tables, usage, draws=20, seed=0)
    names = full.candidates["candidate_id"].to_pylist()
    inside = [n for n, name in enumerate(names) if in_audit_slice(name)]
    first = [n for n in inside if n < 1200]
    assert [level.settled for level in found.levels] == [len(first), len(inside) - len(first)]
    assert found.levels[0].same.mean == pytest.approx(sum(n % 2 for n in first) / len(first))
    assert found.levels[1].same.mean == 1.0
    assert [level.asked for level in found.levels] == [1500, 300 + len(first)]
    assert (found.levels[0].calls, found.levels[0].tokens, found.levels[0].cost) == (10, 100, 0.5)
    assert found.levels[1].calls == 9
    section = levels_section(found)
    assert section is not None and "candidates the label of all judges" in str(section.blocks[0])
    decided, _ = decide_by_level(*tables, rule)
    whole = decide(full.candidates, full.verdicts, full.critiques, rule.judges, gate)
    sliced = pa.array([in_audit_slice(name) for name in names])
    assert decided.filter(sliced)["label"].equals(whole.filter(sliced)["label"])
    assert not decided["label"].equals(whole["label"])
    assert math.isfinite(found.levels[0].alpha or 0.0)


PANEL = "judge.escalate=[[helpfulness, factuality], [conciseness]]"


def test_each_level_waits_for_those_before_in_every_round() -> None:
    dag = dmapo(load_config(DmapoConfig, "pocket_rounds", [PANEL]), "/run")
    waits = {stage.name: sorted(set(stage.inputs) - {"prompts", "candidates"}) for stage in dag.stages}
    for judge in ("judge", "judge-2"):
        first = [f"{judge}-level-1-factuality", f"{judge}-level-1-helpfulness"]
        assert waits[first[0]] == waits[first[1]] == []
        assert waits[f"{judge}-level-2"] == [f"verdicts/{name}" for name in first]
    assert waits["critic"] == []
    responses = next(stage for stage in dag.stages if stage.name == "score-responses-conciseness")
    assert rule_of(responses) is None  # responses of an evaluated policy are scored by all judges


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge.escalate=[[helpfulness, factuality, conciseness]]"], "escalate needs two levels or more"),
        (["judge.escalate=[[helpfulness, factuality, conciseness], []]"], "escalate needs two levels or more"),
        (["judge.escalate=[[helpfulness, factuality], [expert]]"], "unknown judge 'expert'; choose from helpfulness"),
        (["judge.escalate=[[helpfulness, factuality], [factuality, conciseness]]"], "'factuality' is named twice"),
        (["judge.escalate=[[helpfulness], [factuality]]"], "'conciseness' is in no level"),
        (["judge.escalate=[helpfulness, factuality]"], "judge.escalate.0"),
        ([PANEL, "judge.early_exit=scores"], "escalate and early_exit are both set"),
        ([PANEL, "gate.pool=one_coin"], "judge.escalate skips calls.*remove gate.pool"),
        ([PANEL, "gate.kind=certified", "gate.labels=x"], "judge.escalate skips calls.*remove gate.kind"),
        (
            [
                "judge.programs=[{name: form, checker: pocket}]",
                "judge.escalate=[[helpfulness, factuality, conciseness], [form]]",
            ],
            "'form' is a program, a reward model or a file",
        ),
    ],
)
def test_levels_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DmapoConfig, "pocket", overrides)
