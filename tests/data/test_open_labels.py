"""Levels of judges under the gate by posteriors: who is asked, what is decided and what the audit recomputes, on a
scripted panel whose truth is known."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_pipeline.audit.findings import PanelModels
from ray_pipeline.audit.levels import PanelCheck
from ray_pipeline.data.early_exit import in_audit_slice
from ray_pipeline.data.escalation import Escalation, decide_by_level
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.level_stats import escalation_stats, levels_section
from ray_pipeline.data.open_labels import open_labels
from ray_pipeline.data.posterior_gate import posterior_section, posterior_stage
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.asking import ShardTables
from ray_pipeline.graph.stage import Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.stats.latent_class import LatentClasses
from ray_pipeline.store import schemas
from ray_pipeline.store.files import Folder
from tests.planted import Planted, World, by_shard, ended, make_world

SHARDS = 2
#: How often each judge is right.
RIGHT = {"a": 0.75, "b": 0.8, "c": 0.7, "d": 0.9}
CLASSES = ("undesirable", "discard", "desirable")
SCORES = ((2.0, 3.0), (5.0, 6.0), (8.0, 9.0))
THREE = (("a", "b"), ("c",), ("d",))


def panel(prompts: int, seed: int, judges: Mapping[str, float] = RIGHT) -> tuple[World, list[int]]:
    """Two candidates a prompt with scores of judges who err on their own, some unread or cut off, and the true class
    of each candidate."""
    rng, truths = random.Random(seed), list[int]()
    answers: dict[str, list[Planted]] = {}
    for number in range(prompts):
        rows: list[Planted] = []
        for k in range(2):
            truth = rng.choices(range(3), (0.35, 0.1, 0.55))[0]
            votes = [truth if rng.random() < right else (truth + rng.choice((1, 2))) % 3 for right in judges.values()]
            scores = [
                None if rng.random() < 0.01 else rng.choice(((2.0, 3.0), (5.0, 6.0), (8.0, 9.0))[v]) for v in votes
            ]
            rows.append((f"answer {k} to {number}", scores, rng.random() < 0.2))
            truths.append(truth)
        answers[f"question {number}"] = rows
    return ended(make_world(answers, list(judges)), *["stop"] * 30, "length"), truths


def stored(folder: Path, name: str, kind: str, table: pa.Table) -> StageResult:
    found = StageResult(name, "f", str(folder / name), SHARDS, (kind,), rows={}, facts={})
    for shard, part in enumerate(by_shard(table, SHARDS)):
        found.table(kind).write(shard, part)
    return found


def made(folder: Path, stage: Stage, inputs: dict[str, StageResult], said: list[str]) -> StageResult:
    assert isinstance(stage.work, WholeWork)
    place = Folder(str(folder / stage.name))
    given = WholeInput(inputs, place, place, "f", SHARDS, stage.work.settings, said.append, lambda *_: None)
    facts = stage.work.function(given)
    return StageResult(stage.name, "f", place.location, SHARDS, stage.work.tables, rows={}, facts=facts)


@dataclasses.dataclass
class Made:
    """A panel asked level by level: the verdicts with the skipped ones, what was open, and the decisions."""

    world: World
    rule: Escalation
    opened: dict[int, StageResult]
    decisions: StageResult
    said: list[str]

    def verdicts(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["candidate_id"], row["judge"]): row for row in self.world.verdicts.to_pylist()}


def asked_by_level(folder: Path, world: World, rule: Escalation) -> Made:
    said, opened = list[str](), dict[int, StageResult]()
    source = Stage("verdicts", WholeWork(lambda given: {}, tables=("verdicts",)), None)
    verdicts = world.verdicts.to_pylist()
    for level in range(1, len(rule.levels)):
        before = rule.model_copy(update={"levels": rule.levels[:level]})
        so_far = table_of([row for row in verdicts if row["judge"] in before.judges])
        tables = {"verdicts/verdicts": so_far}
        if rule.over_all:
            inputs = {
                "candidates": stored(folder, f"candidates-{level}", "candidates", world.candidates),
                "verdicts/verdicts": stored(folder, f"verdicts-{level}", "verdicts", so_far),
            }
            opened[level] = made(folder, open_labels(before, source, [source], f"after-{level}", ""), inputs, said)
            tables = {"opened": opened[level].table().read_all()}
        settled = before.settled_in(world.candidates, ShardTables(tables, {}))
        for row in verdicts:
            if row["judge"] in rule.levels[level] and row["candidate_id"] in settled:
                row |= {"score": None, "parse_status": "skipped"}
    world = dataclasses.replace(world, verdicts=table_of(verdicts))
    numbers, lacking = decide_by_level(world.candidates, world.verdicts, world.critiques, rule)
    assert lacking == 0  # nothing skipped is needed
    inputs = {
        "numbers": stored(folder, "numbers", "decisions", numbers),
        "verdicts/verdicts": stored(folder, "verdicts-all", "verdicts", world.verdicts),
    }
    gate = posterior_stage(rule.gate, rule.judges, source, [source], None, name="gate", skipped=True)
    return Made(world, rule, opened, made(folder, gate, inputs, said), said)


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return schemas.to_table(rows, schemas.VERDICTS)


def rule_of(levels: Any = THREE, **gate: Any) -> Escalation:
    return Escalation(gate=GateConfig(**{"kind": "posterior", "pool": "one_coin", **gate}), levels=levels)


def votes_of(scores: list[float | None]) -> list[int]:
    return [-1 if s is None else 0 if s <= 4 else 2 if s >= 7 else 1 for s in scores]


@pytest.mark.parametrize(
    ("levels", "gate"),
    [(THREE, {}), ((("a", "b", "c"), ("d",)), {"pool": "dawid_skene"}), (THREE, {"posterior_at": 0.8, "cut": "keep"})],
)
def test_a_level_is_asked_where_no_label_is_probable_and_the_gate_decides_by_all_that_were_asked(
    tmp_path: Path, levels: Any, gate: dict[str, Any]
) -> None:
    world, truths = panel(500, seed=3)
    run = asked_by_level(tmp_path, world, rule_of(levels, **gate))
    at, rows = run.rule.gate.posterior_at, run.verdicts()
    reasons = dict(
        zip(world.candidates["candidate_id"].to_pylist(), world.candidates["finish_reason"].to_pylist(), strict=True)
    )
    barred = {name for name, reason in reasons.items() if reason == "length" and run.rule.gate.cut == "exclude"}
    asked = {name: [j for j in run.rule.judges if rows[name, j]["parse_status"] != "skipped"] for name in reasons}
    widths = [run.rule.widths[level - 1] for level in run.opened]
    for width, found in zip(widths, run.opened.values(), strict=True):
        for row in found.table().read_all().to_pylist():
            name, judges = row["candidate_id"], run.rule.judges[:width]
            whole = name not in barred and all(rows[name, judge]["score"] is not None for judge in judges)
            assert row["open"] == (whole and max(row[f"posterior_{c}"] for c in CLASSES) < at)
            went_on = len(asked[name]) > width
            assert went_on == (in_audit_slice(name) or (row["open"] and asked[name][:width] == judges))
    facts = run.decisions.facts["posterior"]
    places = [run.rule.judges.index(group[0]) for group in facts["groups"]]
    assert places == list(range(4))
    model = LatentClasses(np.array(facts["prior"]), np.array(facts["errors"]))
    right, kept, of_all = 0, 0, 0
    flaws = {row["candidate_id"]: row["flawed"] for row in world.critiques.to_pylist()}
    truth_of = dict(zip(reasons, truths, strict=True))
    for row in run.decisions.table().read_all().to_pylist():
        name = row["candidate_id"]
        scores = [rows[name, judge]["score"] for judge in run.rule.judges]
        if name in barred or None in [rows[name, judge]["score"] for judge in asked[name]]:
            assert row["label"] == "incomplete"
            continue
        p = model.posterior(np.array([votes_of(scores)], np.int8), facts["power"])[0]
        assert [row[f"posterior_{c}"] for c in CLASSES] == pytest.approx(p, abs=1e-9)
        likely, good = p[0] >= at, p[2] * (0.85 if flaws[name] else 1.0) >= at
        discard = max(p[1], p[2]) >= at
        assert row["label"] == (
            "undesirable" if likely else "desirable" if good else "discard" if discard else "abstain"
        )
        of_all += len(asked[name]) == 4
        if row["label"] in ("desirable", "undesirable"):
            kept, right = kept + 1, right + (row["label"] == CLASSES[truth_of[name]])
    assert 50 < of_all < 900 and kept > 500 and right / kept > 0.88
    assert audited(run) == []


def audited(run: Made, opened: Any = None, verdicts: Any = None) -> list[str]:
    """What the audit says of who was asked, of posteriors and of the models."""
    rule, rows = run.rule, verdicts or run.verdicts()
    found = opened or {level: result.facts["posterior"] for level, result in run.opened.items()}
    tables: Any = SimpleNamespace(levels=rule.levels, gate=rule.gate, judges=rule.judges)
    models = PanelModels(posterior=run.decisions.facts["posterior"], opened=found)
    check, wrong = PanelCheck(tables, models), list[str]()
    decided = {row["candidate_id"]: row for row in run.decisions.table().read_all().to_pylist()}
    for candidate in run.world.candidates.to_pylist():
        barred = candidate["finish_reason"] == "length" and rule.gate.cut == "exclude"
        _, problems = check.asked(candidate, barred, rows)
        wrong += problems
        for column, p in check.posterior(candidate["candidate_id"], rows).items():
            if p is not None and decided[candidate["candidate_id"]][column] != pytest.approx(p, abs=1e-8):
                wrong.append(column)
    return [*wrong, *check.problems()]


def test_the_audit_finds_calls_and_models_that_do_not_follow(tmp_path: Path) -> None:
    world, _ = panel(300, seed=4)
    run = asked_by_level(tmp_path, world, rule_of())
    facts = {level: result.facts["posterior"] for level, result in run.opened.items()}
    assert audited(run) == []
    for level in facts:
        for change in ({"prior": facts[level]["prior"][::-1]}, {"power": facts[level]["power"] * 0.9}):
            found = audited(run, opened={**facts, level: {**facts[level], **change}})
            assert any(line.startswith(f"after level {level}, ") for line in found)
    rows = run.verdicts()
    skipped = next(name for (name, judge), row in rows.items() if judge == "d" and row["parse_status"] == "skipped")
    rows[skipped, "d"] = {**rows[skipped, "d"], "score": 9.0, "parse_status": "ok"}
    assert "d was asked, but the label was settled without" in audited(run, verdicts=rows)


def test_a_pool_that_decides_nothing_takes_skipped_votes_too(tmp_path: Path) -> None:
    world, _ = panel(300, seed=7)
    run = asked_by_level(tmp_path, world, rule_of(kind="published"))
    assert not run.opened and audited(run) == []
    numbers, _ = decide_by_level(run.world.candidates, run.world.verdicts, run.world.critiques, run.rule)
    decided = {row["candidate_id"]: row for row in run.decisions.table().read_all().to_pylist()}
    for row in numbers.to_pylist():
        assert {name: decided[row["candidate_id"]][name] for name in row} == row
    assert {row["parse_status"] for row in run.verdicts().values()} >= {"ok", "skipped"}


def test_two_judges_count_alike_and_two_who_are_one_leave_all_open(tmp_path: Path) -> None:
    world, _ = panel(400, seed=5)
    run = asked_by_level(tmp_path / "two", world, rule_of((("a", "b"), ("c", "d"))))
    (errors_a, errors_b) = run.opened[1].facts["posterior"]["errors"]
    assert errors_a == errors_b  # else either of them could be always right, and nothing would be open
    assert 0.1 < run.opened[1].facts["counts"]["open"] / 800 < 0.7
    of_a = {row["candidate_id"]: row for row in world.verdicts.to_pylist() if row["judge"] == "a"}
    copied = [
        {**row, **{name: of_a[row["candidate_id"]][name] for name in ("score", "parse_status")}}
        if row["judge"] == "b"
        else row
        for row in world.verdicts.to_pylist()
    ]
    world = dataclasses.replace(world, verdicts=table_of(copied))
    run = asked_by_level(tmp_path / "one", world, rule_of((("a", "b"), ("c", "d"))))
    assert run.opened[1].facts["posterior"]["groups"] == [["a", "b"]]
    assert any("a and b are nearly one" in line for line in run.said)
    unread = {row["candidate_id"] for row in copied if row["judge"] == "a" and row["score"] is None}
    cut = world.candidates["finish_reason"].to_pylist().count("length")
    assert 800 - run.opened[1].facts["counts"]["open"] <= len(unread) + cut
    assert audited(run) == []


def test_the_page_compares_levels_with_all_judges_on_the_slice(tmp_path: Path) -> None:
    world, _ = panel(600, seed=6)
    run = asked_by_level(tmp_path, world, rule_of())
    facts = run.decisions.facts["posterior"]
    opened = pa.concat_tables(result.table().read_all() for result in run.opened.values())
    found = escalation_stats(
        run.rule,
        run.world.candidates,
        run.world.verdicts,
        run.world.critiques,
        {judge: Usage(calls_engine=1) for judge in RIGHT},
        draws=20,
        seed=0,
        opened=opened,
        model=facts,
    )
    sliced = [name for name in world.candidates["candidate_id"].to_pylist() if in_audit_slice(name)]
    assert sum(level.settled for level in found.levels) == len(sliced) == found.same.rows
    assert found.levels[2].same.mean == 1.0 and 0.5 < (found.same.mean or 0.0) < 1.0
    assert found.levels[0].asked == 1200 > found.levels[1].asked > found.levels[2].asked
    section = levels_section(found, run.rule.gate)
    assert section is not None and "none was probable at 0.9" in str(section.blocks[0])
    assert facts["whole"] <= len(sliced) < facts["rows"]
    shown = posterior_section(facts, run.rule.gate)
    assert shown is not None and f"estimated on the {facts['whole']} of the audit slice" in str(shown.blocks[0])


def test_a_run_without_a_candidate_in_the_slice_has_a_model_too(tmp_path: Path) -> None:
    seed = next(seed for seed in range(99) if not any(map(in_audit_slice, names(panel(6, seed)[0]))))
    run = asked_by_level(tmp_path, panel(6, seed)[0], rule_of())
    assert run.decisions.facts["posterior"]["power"] == 1.0 and audited(run) == []


def names(world: World) -> list[str]:
    found: list[str] = world.candidates["candidate_id"].to_pylist()
    return found
