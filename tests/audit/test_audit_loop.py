"""The audit of a feedback loop's data: nothing to find in what the real stages made, and every planted fault found."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ray_pipeline.agents.jurors import MEAN, JuryRule
from ray_pipeline.audit.findings import AuditReport
from ray_pipeline.audit.loop import audit_loop
from ray_pipeline.data.dataset_files import write_dataset_files
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.data.escalation import Levels
from ray_pipeline.data.gate import Cut
from ray_pipeline.data.rows import add_counts
from ray_pipeline.feedback.pick import PanelRule, accept_best, accept_by_level
from ray_pipeline.store.tables import ShardedTable
from tests.planted import by_shard, count_words, ended, make_world, skipped_by_panels

LIMITS = DatasetsConfig(max_length=60, max_prompt_length=20, min_gap=1)
ANSWERS = {
    f"question {n}": [("bad", [2 + n % 2], None), ("best", [9], None), ("good", [7], None), ("unread", [None], None)]
    for n in range(6)
} | {"tied": [("x", [5], None), ("y", [5], None)]}

Change = Callable[[str, list[dict[str, Any]]], list[dict[str, Any]]]


def audit(
    folder: Path,
    change: Change = lambda kind, rows: rows,
    answers: dict[str, Any] = ANSWERS,
    judges: tuple[str, ...] = ("j",),
    rule: JuryRule = MEAN,
    limits: DatasetsConfig = LIMITS,
    reasons: tuple[str, ...] = ("stop",),
    cut: Cut = "exclude",
    levels: Levels = (),
) -> AuditReport:
    """Two shards made by the real functions; `change` may damage the rows of a table after they were made."""
    world, panels = ended(make_world(answers, judges, val=["question 0"]), *reasons), PanelRule(levels=levels, cut=cut)
    world = skipped_by_panels(world, panels) if levels else world
    kinds = ("prompts", "candidates", "verdicts", "decisions")
    tables = {kind: ShardedTable(str(folder / kind), kind, 2, "f1") for kind in kinds}
    made: dict[str, list[pa.Table]] = {"kto": [], "dpo": []}
    counts: dict[str, list[dict]] = {"kto": [], "dpo": []}

    def changed(kind: str, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(change(kind, table.to_pylist()), schema=table.schema)

    parts = {kind: by_shard(getattr(world, kind), 2) for kind in kinds[:3]}
    for shard in range(2):
        prompts, candidates, verdicts = (parts[kind][shard] for kind in kinds[:3])
        if levels:
            decisions, _ = accept_by_level(candidates, verdicts, panels, rule)
        else:
            decisions = accept_best(candidates, verdicts, judges, rule, cut)
        arguments = (prompts, candidates, verdicts, decisions, limits, count_words)
        for kind, (table, found) in (("kto", kto_rows(*arguments)), ("dpo", dpo_rows(*arguments, True))):
            made[kind].append(changed(kind, table))
            counts[kind].append(found)
        for kind, table in zip(kinds, (prompts, candidates, verdicts, decisions), strict=True):
            tables[kind].write(shard, changed(kind, table))
    write_dataset_files(
        str(folder / "datasets"),
        made,
        limits,
        fingerprint="f2",
        counts={kind: add_counts(found) for kind, found in counts.items()},
        gate=None,
        judges=judges,
    )
    return audit_loop(
        tables["prompts"], tables["candidates"], [tables["verdicts"]], tables["decisions"], str(folder / "datasets"),
        judges, limits.min_gap, rule, cut, levels=levels,
    )  # fmt: skip


def test_nothing_is_found_in_what_the_stages_made(tmp_path: Path) -> None:
    found = audit(tmp_path)
    assert found.ok and found.rows == {"prompts": 7, "candidates": 26, "kto": 18, "dpo": 12}
    assert "18 KTO and 12 DPO rows walked back to 7 prompts: no problem" in found.summary()


@pytest.mark.parametrize("cut", ["exclude", "undesirable", "keep"])
@pytest.mark.parametrize("rule", [{"pool": "mean"}, {"pool": "median"}, {"pool": "mode"}])
def test_texts_that_were_cut_off_are_not_accepted(tmp_path: Path, cut: Cut, rule: dict[str, Any]) -> None:
    """K4.1: every second answer, also the best ones, was cut off."""
    found = audit(tmp_path, rule=JuryRule.model_validate(rule), reasons=("stop", "length", "stop"), cut=cut)
    assert found.ok, found.problems
    if rule["pool"] == "mean":
        assert found.rows["kto"] == {"exclude": 12, "undesirable": 16, "keep": 18}[cut]


def test_equal_answers_are_one_row_with_their_number(tmp_path: Path) -> None:
    """K5.4"""
    same: dict[str, Any] = {
        f"question {n}": [("best", [9], None), ("bad", [2], None), ("bad ", [3], None), ("bad", [2], None)]
        for n in range(4)
    }
    found = audit(tmp_path, answers=same)
    assert found.ok and (found.rows["kto"], found.rows["dpo"]) == (8, 4), found.problems
    for kind in ("kto", "dpo"):
        damaged = audit(tmp_path / kind, first(kind, copies=7), same)
        assert set(damaged.found) == {"repeated"}, damaged.problems


JURY = {
    f"question {n}": [("a", [9, 1, 1], None), ("b", [5 + n % 2, 6, 2], None), ("c", [4, 6, 3], None)] for n in range(4)
}


@pytest.mark.parametrize(
    "rule",
    [
        {"pool": "median"},
        {"pool": "mode"},
        {"pool": "weighted", "weights": {"x": 1, "y": 1, "z": 5}},
        {"pool": "weighted_mean", "weights": {"x": 4, "y": 1, "z": 1}},
    ],
)
def test_the_rule_of_a_jury_is_audited_too(tmp_path: Path, rule: dict[str, Any]) -> None:
    one, limits = JuryRule.model_validate(rule), LIMITS.model_copy(update={"min_gap": 0})
    found = audit(tmp_path, answers=JURY, judges=("x", "y", "z"), rule=one, limits=limits)
    assert found.ok, found.problems[:3]
    assert found.rows["candidates"] == 12


def drawn(seed: int) -> dict[str, Any]:
    """Answers of 60 prompts, some of them equal or unread, with scores on which three judges agree, tie or differ."""
    rng = random.Random(seed)
    return {
        f"question {n}": [
            (
                text,
                [rng.choice([1, 2, 3, 4, 4, None] if n % 9 == 0 else [1, 2, 3, 4]) for _ in "xyz"],
                None,
            )
            for text in ("a", rng.choice("ab"), "c")
        ]
        for n in range(60)
    }


LEVELS = (("x", "y"), ("z",))


@pytest.mark.parametrize("rule", [{"pool": "mean"}, {"pool": "mode"}, {"pool": "median"}])
@pytest.mark.parametrize("cut", ["exclude", "undesirable", "keep"])
def test_levels_of_judges_are_audited(tmp_path: Path, rule: dict[str, Any], cut: Cut) -> None:
    one, limits = JuryRule.model_validate(rule), LIMITS.model_copy(update={"min_gap": 0})
    reasons = ("stop", "stop", "stop", "length")
    found = audit(tmp_path, answers=drawn(1), judges=("x", "y", "z"), rule=one, limits=limits, reasons=reasons, cut=cut,
                  levels=LEVELS)  # fmt: skip
    assert found.ok, found.problems[:3]


@pytest.mark.parametrize("late", [True, False])
def test_a_judge_who_was_asked_or_skipped_against_the_levels_is_found(tmp_path: Path, late: bool) -> None:
    def change(kind: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if kind != "verdicts":
            return rows
        of_z = {row["prompt_id"] for row in rows if row["judge"] == "z" and (row["parse_status"] == "skipped") == late}
        values = {"score": 3.0, "parse_status": "ok"} if late else {"score": None, "parse_status": "skipped"}
        return [{**row, **values} if row["judge"] == "z" and row["prompt_id"] == min(of_z) else row for row in rows]

    found = audit(tmp_path, change, drawn(2), ("x", "y", "z"), levels=LEVELS)
    assert "level" in found.found, found.found
    assert found.problems[0].message.startswith("z was asked, but the pick" if late else "z was skipped, but ")


def first(kind: str, **values: Any) -> Change:
    """Change the first row of a table (of each shard)."""

    def change(of: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if of != kind or not rows:
            return rows
        new = {name: value(rows[0]) if callable(value) else value for name, value in values.items()}
        return [{**rows[0], **new}, *rows[1:]]

    return change


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (first("kto", label=lambda row: not row["label"]), "label"),
        (first("kto", completion=[{"role": "assistant", "content": "other"}]), "completion"),
        (first("kto", prompt=[{"role": "user", "content": "other"}]), "messages"),
        (first("kto", candidate_id=lambda row: row["candidate_id"][::-1]), "orphan"),
        (first("kto", split=lambda row: "val" if row["split"] == "train" else "train"), "split"),
        (first("dpo", chosen_id=lambda row: row["rejected_id"], chosen=lambda row: row["rejected"]), "pair"),
        (first("dpo", prompt_id="0" * 32), "orphan"),
        (first("kto", copies=2), "repeated"),
        (first("dpo", copies=None), "repeated"),
        (first("decisions", label="abstain"), "label"),
        (first("decisions", final_score=1.5), "numbers"),
        (first("verdicts", score=10.0), "label"),
        (lambda kind, rows: rows[1:] if kind == "decisions" else rows, "missing"),
    ],
)
def test_every_planted_fault_is_found(tmp_path: Path, change: Change, kind: str) -> None:
    found = audit(tmp_path, change)
    assert kind in found.found, found.found
    assert found.problems and not found.ok
