"""Levels of panels: nobody is asked or left out against the rule, and picks are those of the judges asked."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dags.fellowship import FellowshipConfig, audit, fellowship
from ray_pipeline.agents.jurors import JuryRule
from ray_pipeline.config.loading import load_config
from ray_pipeline.data.early_exit import in_audit_slice
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.level_stats import levels_section, picks_of
from ray_pipeline.engines.usage import Usage
from ray_pipeline.feedback.pick import PanelRule, accept_best, accept_by_level
from ray_pipeline.feedback.select import RANK, SelectSettings, _judging
from ray_pipeline.graph.manifest import stage_entry
from ray_pipeline.graph.results import Run, StageRecord
from ray_pipeline.graph.stage import StageResult
from ray_pipeline.operate.last_lines import last_lines
from ray_pipeline.operate.plan import plan
from ray_pipeline.operate.prices import Rates
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow import training
from tests.dags.test_fellowship_stages import SHARDS, play, worker
from tests.dags.test_fellowship_stages import rows as rows_of
from tests.data.test_llm_stages import Shard
from tests.planted import ended, make_world, skipped_by_panels
from tests.scripted import ScriptedEngine

JUDGES = ["a", "b", "c", "d"]
LEVELS = [(("a",), ("b", "c"), ("d",)), (("a", "b"), ("c", "d")), (("d", "a"), ("c",), ("b",))]
POOLS: list[dict[str, Any]] = [
    {"pool": "mean"},
    {"pool": "median"},
    {"pool": "mode"},
    {"pool": "weighted", "weights": {"a": 1, "b": 2, "c": 3, "d": 4}},
    {"pool": "weighted_mean", "weights": {"a": 4, "b": 3, "c": 2, "d": 1}},
]
RULE = PanelRule(levels=(("a", "b"), ("c", "d")))


def is_open(answers: list[Any], judges: list[str], rule: str) -> bool:
    """Written again, from the planted answers of a prompt: (text, scores of all judges, whether it was cut off)."""
    read = [(text.strip(), cut, [scores[JUDGES.index(judge)] for judge in judges]) for text, scores, cut in answers]
    read = [one for one in read if None not in one[2] and not (rule == "exclude" and one[1])]
    best = [one for one in read for n in range(len(judges)) if one[2][n] == max(other[2][n] for other in read)]
    return len({text for text, *_ in best}) > 1 or (rule == "undesirable" and any(cut for _, cut, _ in best))


score = st.one_of(*[st.integers(1, 4).map(float)] * 12, st.none())
#: Texts, some of which were cut off, and the scores of x, y and z by four judges: equal texts have equal scores.
prompt = st.tuples(
    st.lists(st.tuples(st.sampled_from(["x", "y", "z", " x"]), st.sampled_from([False] * 5 + [True])), max_size=4),
    st.tuples(*[st.tuples(*[score] * 4)] * 3),
).map(lambda drawn: [(text, drawn[1]["xyz".index(text.strip())], cut) for text, cut in drawn[0]])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(prompt.filter(bool), min_size=30, max_size=40),
    st.sampled_from(LEVELS),
    st.sampled_from(POOLS),
    st.sampled_from(["exclude", "undesirable", "keep"]),
)
def test_picks_are_those_of_the_judges_asked_and_nobody_is_asked_in_vain(
    prompts: list[Any], levels: Any, pool: dict[str, Any], cut: Any
) -> None:
    jury, rule = JuryRule.model_validate(pool), PanelRule(levels=levels, cut=cut)
    planted = {f"q{n}": [(text, scores, None) for text, scores, _ in answers] for n, answers in enumerate(prompts)}
    full = ended(make_world(planted, JUDGES), *("length" if cut else "stop" for of in prompts for *_, cut in of))
    world = skipped_by_panels(full, rule)
    found, _ = accept_by_level(world.candidates, world.verdicts, rule, jury)
    assert found["candidate_id"].equals(full.candidates["candidate_id"])
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in found.to_pylist():
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    without = {
        (row["prompt_id"], row["judge"]) for row in world.verdicts.to_pylist() if row["parse_status"] == "skipped"
    }
    settled = set[str]()
    for (name, rows), answers in zip(by_prompt.items(), prompts, strict=True):
        asked = [judge for level in levels for judge in level if (name, judge) not in without]
        reached = [level for level in levels if set(level) <= set(asked)]
        assert asked == [judge for level in reached for judge in level]  # whole levels, the first ones
        if in_audit_slice(name):
            assert len(reached) == len(levels) and rows[0]["why"].endswith("(audit slice: all levels)")
        else:
            assert rows[0]["why"].endswith(f"(level {len(reached)} of {len(levels)})")
            for number in range(1, len(levels)):
                so_far = [judge for level in levels[:number] for judge in level]
                if number <= len(reached):  # nobody was asked in vain, and nothing open was left
                    assert is_open(answers, so_far, cut) == (number < len(reached))
        own = full.candidates.filter(pc.field("prompt_id") == name)
        said = full.verdicts.filter(pc.field("prompt_id") == name)
        expected = accept_best(own, said, asked, jury.among(asked), cut)
        for column in ("candidate_id", "label", "final_score", "mean_score"):
            assert [row[column] for row in rows] == expected[column].to_pylist()
        if len(reached) < len(levels):
            settled |= {row["candidate_id"] for row in rows if row["label"] == "desirable"}
    for other in POOLS:  # judges who agree on one text need no rule to pool them
        picks, _ = accept_by_level(world.candidates, world.verdicts, rule, JuryRule.model_validate(other))
        assert settled <= {row["candidate_id"] for row in picks.to_pylist() if row["label"] == "desirable"}


def test_figures_by_level_are_those_of_the_slice() -> None:
    # a and b agree on x; c and d keep that pick in every second prompt. In the others, a and b disagree.
    kept, lost = (9.0, 8.0, 7.0, 7.0), (9.0, 8.0, 1.0, 1.0)
    agreed = {f"q{n}": [("x", kept if n % 2 else lost, None), ("y", (2.0, 2.0, 6.0, 9.0), None)] for n in range(600)}
    split = {f"r{n}": [("x", (9.0, 2.0, 7.0, 7.0), None), ("y", (2.0, 8.0, 3.0, 3.0), None)] for n in range(200)}
    full = make_world(agreed | split | {f"s{n}": [("x", (None,) * 4, None)] for n in range(50)}, JUDGES)
    world = skipped_by_panels(full, RULE)
    table, counts = accept_by_level(world.candidates, world.verdicts, RULE)
    names = list(dict.fromkeys(full.candidates["prompt_id"].to_pylist()))
    inside = [n for n in range(800) if in_audit_slice(names[n])]
    first, same = [n for n in inside if n < 600], len([n for n in inside if n < 600 and n % 2])
    assert counts == {  # nobody is asked about a prompt with one response
        "slice_level_1_same": same, "slice_level_1_other": len(first) - same,
        "slice_level_2_same": len(inside) - len(first),
    }  # fmt: skip
    usage = Usage(calls_engine=5, prompt_tokens=70, cost=0.5)

    def done(role: str, counts: dict[str, int], rows: int) -> StageResult:
        return StageResult(role, "f", "/nowhere", 1, (role,), {role: rows}, {"counts": counts}, usage, role=role)

    statuses = {"a.ok": 1600, "b.ok": 1590, "b.unparsed": 10, "c.ok": 400, "c.skipped": 1200, "d.ok": 400}
    made = [done("verdicts", statuses, 3000), done("decisions", {"desirable": 7} | counts, table.num_rows)]
    found = picks_of({one.name: one for one in made}, RULE.levels, draws=20, seed=0)
    assert found is not None and found.candidates == 1650
    assert [level.asked for level in found.levels] == [1600, 400]
    assert [level.settled for level in found.levels] == [len(first), len(inside) - len(first)]
    assert found.levels[0].same.mean == pytest.approx(same / len(first)) and found.levels[1].same.mean == 1.0
    assert found.same.mean == pytest.approx((same + len(inside) - len(first)) / len(inside))
    assert (found.levels[0].calls, found.levels[0].tokens, found.levels[0].cost) == (5, 70, 0.5)
    section = levels_section(found, GateConfig())
    assert section is not None and "prompts the pick of all judges" in str(section.blocks[0])
    assert picks_of({}, RULE.levels, 20, 0) is None


BLOCK: dict[str, Any] = {
    "strategy": {"kind": "combined"},
    "judges": [{"name": "fast"}, {"name": "second", "rubric": "brevity"}, {"name": "expert"}],
    "escalate": [
        {"judges": ["fast", "second"]},
        {"judges": ["expert"], "debate": {"rounds": 0, "speech": {"max_tokens": 64}}},
    ],
}


def test_a_debate_is_held_only_where_the_judges_before_disagree(tmp_path: Path) -> None:
    outside = [n for n in range(40) if not in_audit_slice(make_world({f"q{n}": []}).prompts["prompt_id"][0].as_py())][
        :2
    ]
    texts = [f"q{n}" for n in outside]
    world = make_world({text: [(f"left of {text}", [], None), (f"right of {text}", [], None)] for text in texts}, [])
    tables = {"prompts": world.prompts, "candidates": world.candidates}

    def reply(messages: Any, _: Any) -> str:
        text = messages[-1]["content"]
        shown = re.findall(r"<answer_([A-Z]) \w+>\n(.*?)\n</answer", text, re.DOTALL)
        # The judge of brevity disagrees on the second prompt.
        other = "brevity" in text and texts[1] in text
        return json.dumps(
            {f"score_{label.lower()}": 9 if ("left" in shown_text) != other else 2 for label, shown_text in shown}
        )

    block = SelectSettings.model_validate(BLOCK)
    first, second = block.panels
    engine = ScriptedEngine(reply)
    verdicts = (
        Shard(tables, _judging(first, ("candidates",), first.judges)).run(RANK, engine, tmp_path).tables["verdicts"]
    )
    assert engine.calls == 4
    rule = PanelRule(levels=block.levels[:1])
    debaters = Shard({**tables, "verdicts/judge": verdicts}, _judging(second, ("candidates",), second.judges, rule))
    debated = debaters.run(RANK, engine, tmp_path).tables["verdicts"]
    assert engine.calls == 4 + 3  # three roles, about one prompt
    statuses = dict(zip(debated["prompt_id"].to_pylist(), debated["parse_status"].to_pylist(), strict=True))
    prompts = dict(zip(world.prompts["prompt_id"].to_pylist(), texts, strict=True))
    assert {prompts[name]: status for name, status in statuses.items()} == {texts[0]: "skipped", texts[1]: "ok"}
    assert len(debaters.watched) == 1  # a judge that was not asked gave no reply to watch
    whole = PanelRule(levels=block.levels)
    found, _ = accept_by_level(world.candidates, pa.concat_tables([verdicts, debated]), whole, JuryRule())
    rows = dict(zip(found["candidate_id"].to_pylist(), found.to_pylist(), strict=True))
    for row in world.candidates.to_pylist():
        label = rows[row["candidate_id"]]["label"]
        assert label == ("desirable" if row["response"].startswith("left") else "undesirable")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"escalate": [{"judges": ["fast", "second", "expert"]}]}, "escalate needs two levels or more"),
        ({"escalate": [{"judges": ["fast", "second", "expert"]}, {"judges": []}]}, "escalate needs two levels or more"),
        ({"escalate": [{"judges": ["fast"]}, {"judges": ["second"]}]}, "judge 'expert' is in no level"),
        ({"escalate": [{"judges": ["fast", "second"]}, {"judges": ["nobody"]}]}, "unknown judge 'nobody'"),
        (
            {
                "escalate": [
                    {"judges": ["fast", "second"]},
                    {"judges": ["expert"], "debate": {}, "strategy": {"kind": "best"}},
                ]
            },
            "strategy and debate of a level exclude each other",
        ),
        (
            {"escalate": [{"judges": ["fast", "second"], "debate": {}}, {"judges": ["expert"], "debate": {}}]},
            "select.strategy has no effect: every level",
        ),
        (
            {"escalate": [{"judges": ["fast", "second"]}, {"judges": ["expert"], "debate": {"pool": "vote"}}]},
            r"different scales \(0 to 10, 0 to 1\)",
        ),
        (
            {"escalate": [{"judges": ["fast", "expert"]}, {"judges": ["second"], "debate": {}}]},
            "in a debate has no rubric",
        ),
        ({"strategy": None, "judges": []}, "escalate has levels of select.judges"),
    ],
)
def test_levels_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SelectSettings.model_validate({**BLOCK, **changes})


def test_levels_on_different_scales_can_vote() -> None:
    levels = [{"judges": ["fast", "second"]}, {"judges": ["expert"], "debate": {"pool": "vote"}}]
    block = SelectSettings.model_validate({**BLOCK, "escalate": levels, "jury": {"pool": "mode"}})
    assert block.panels[1].scale == (0, 1)


# --- the whole workflow -----------------------------------------------------------------------------------------------


def judge(messages: Any, sampling: Any) -> str:
    """Judges of a third of all answers by mood, so that they often agree, often tie, and often do not."""
    text = messages[-1]["content"]
    if not (shown := re.findall(r"<answer_([A-Z]) \w+>\n(.*?)\n</answer", text, re.DOTALL)):
        return worker(messages, sampling)
    mood = 7 if "brevity" in text else 5 if "You are" in text else 1
    return json.dumps({f"score_{label.lower()}": sum(map(ord, answer)) * mood % 11 for label, answer in shown})


def test_a_run_by_levels_says_what_they_took_and_is_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)
    block = json.dumps({**BLOCK, "sampling": {"max_tokens": 64}})
    changes = [
        "models.generator.model=pocket:policy", "models.reviewer.model=pocket:judge", "prompts.sources.0.count=80",
        f"prompts.num_shards={SHARDS}", "improve=null", "judge=null", "train=null", f"select={block}",
    ]  # fmt: skip
    config = load_config(FellowshipConfig, "pocket_fellowship", changes)
    dag = fellowship(config, str(tmp_path))
    waits = {stage.name: sorted(set(stage.inputs) - {"prompts", "candidates"}) for stage in dag.stages}
    assert waits["judge-level-1"] == [] and waits["judge-level-2"] == ["verdicts/judge-level-1"]
    assert "by fast, second by combined_10, and while the pick is open expert by a debate" in config.origin().text
    planned = plan(config, dag, Rates.model_validate({}), lambda key, model: lambda messages: 1)
    calls = {stage.stage: stage.calls for stage in planned.stages}
    assert calls["judge-level-1"] == 2 * 80 and calls["judge-level-2"] == 3 * 80  # three roles speak in a debate
    assert any(n.startswith("calls of judge-level-2 are upper bounds: select.escalate asks") for n in planned.notes)
    engine = ScriptedEngine(judge)
    played = play(dag, tmp_path, lambda stage: engine)
    rows = rows_of(played, "judge-level-2")
    late = {row["prompt_id"] for row in rows if row["parse_status"] == "skipped"}
    asked = {row["prompt_id"] for row in rows if row["parse_status"] == "ok"}
    assert late and asked and not late & asked
    levels = json.loads(Path(Folder(played["report"].folder).path("metrics.json")).read_text())["escalation"]
    first, second = levels["levels"]
    assert 0 < second["asked"] < first["asked"] and levels["outcome"] == "pick"
    of_slice = {row["prompt_id"] for row in rows_of(played, "judge-level-1") if row["parse_status"] == "ok"}
    assert first["settled"] + second["settled"] == sum(map(in_audit_slice, of_slice)) == levels["same"]["rows"] > 0
    page = Path(Folder(played["report"].folder).path("report.md")).read_text()
    assert "## Levels of judges" in page and "whose pick the levels before left open" in page
    lines = [line for line in last_lines(dag, counted(played), str(tmp_path), "USD") if line.startswith("skipped")]
    assert len(lines) == 1 and "of judge-level-2 (select.escalate: their picks were settled before)" in lines[0]
    stages = {s.name: StageRecord.read(s.name, stage_entry(s)) for s in dag.stages}
    run = Run(
        Folder(str(tmp_path)), "fellowship", "fellowship", stages, played, SHARDS, config=config.model_dump(mode="json")
    )
    (report,) = audit(run, config).reports.values()
    assert report.ok, report.problems[:3]


def counted(played: dict[str, Any]) -> dict[str, Any]:
    """Results with the numbers of rows and calls that Ray's driver would add."""
    return {
        name: dataclasses.replace(
            result,
            rows={kind: result.table(kind).read_all().num_rows for kind in result.tables},
            usage=Usage(calls_engine=1),
        )
        for name, result in played.items()
    }
