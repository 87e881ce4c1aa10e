"""The gate with a pool through the real stages on scripted verdicts, with its page, its warnings and its audit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_pipeline.audit.findings import PanelModels
from ray_pipeline.audit.posterior import PosteriorCheck
from ray_pipeline.data.gate import GateConfig, check_pool, decide
from ray_pipeline.data.posterior_gate import effective_text, posterior_section, warnings
from ray_pipeline.operate.check_gate import thresholds
from ray_pipeline.stats.latent_class import LatentClasses
from tests.data.gated_again import MADE, audited, gated_again
from tests.golden.scripted_run import OVERRIDES, ScriptedRun, scripted_run
from tests.operate.planted_run import SHARDS, planted_dag

DECIDES = ("gate.kind=posterior", "gate.pool=one_coin")
CLASSES = ("undesirable", "discard", "desirable")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> ScriptedRun:
    return scripted_run(tmp_path_factory.mktemp("published"))


def rows_of(run: ScriptedRun, table: str = "gate") -> list[dict[str, Any]]:
    return run.results[table].table().read_all().to_pylist()


@pytest.mark.parametrize("pool", ["one_coin", "dawid_skene"])
def test_labels_follow_from_the_posterior_and_the_audit_recomputes_both(published: ScriptedRun, pool: str) -> None:
    run, config, lines = gated_again(published, "gate.kind=posterior", f"gate.pool={pool}", "gate.posterior_at=0.8")
    facts = run.results["gate"].facts["posterior"]
    before = {row["candidate_id"]: row for row in rows_of(published)}
    model = LatentClasses(np.array(facts["prior"]), np.array(facts["errors"]))
    scores: dict[str, dict[str, float | None]] = {}
    for row in rows_of(published, "judge"):
        scores.setdefault(row["candidate_id"], {})[row["judge"]] = row["score"]
    seen, unread = set(), 0
    for row in rows_of(run):
        old, own = before[row["candidate_id"]], scores[row["candidate_id"]]
        assert all(row[name] == old[name] for name in ("mean_score", "score_variance", "penalty", "final_score"))
        votes = [-1 if s is None else 0 if s <= 4 else 2 if s >= 7 else 1 for s in map(own.get, config.judge.names)]
        p = [row[f"posterior_{name}"] for name in CLASSES]
        if set(votes) == {-1}:
            assert p == [None] * 3
        else:  # of the votes that were read, also where one was not
            assert p == pytest.approx(model.posterior(np.array([votes], np.int8), facts["power"])[0], abs=1e-9)
            unread += -1 in votes
        if row["final_score"] is None or row["why"].startswith("cut off"):
            assert row["label"] == "incomplete" and row["why"] == old["why"]
            continue
        kept = p[2] * (1 - row["penalty"])
        flawed_only = p[2] >= 0.8 > kept
        expected = (
            "undesirable" if p[0] >= 0.8
            else "desirable" if kept >= 0.8
            else "discard" if flawed_only or p[1] >= 0.8
            else "abstain"
        )  # fmt: skip
        assert row["label"] == expected and ("critic" in row["why"]) == (flawed_only and p[0] < 0.8), row
        seen.add(expected)
    assert seen >= {"undesirable", "desirable", "discard"} and unread
    assert sum(run.results["gate"].facts["counts"].values()) == len(before)
    assert audited(run, config, models=[PanelModels(posterior=facts)]) == {}
    other = PanelModels(posterior=damaged(facts, "power"))
    assert audited(run, config, models=[other]).keys() == {"posterior"}
    for part in ("", "prior", "errors", "power", "groups"):
        check = PosteriorCheck(damaged(facts, part), config.judge.names, config.gate)
        for name, own in scores.items():
            check.expected(name, [own.get(judge) for judge in config.judge.names])
        assert bool(list(check.problems())) == bool(part), part
    assert any(line.endswith(effective_text(facts)) for line in lines)


def damaged(facts: dict[str, Any], part: str) -> dict[str, Any]:
    other = {
        "prior": [facts["prior"][1], facts["prior"][0], facts["prior"][2]],
        "errors": facts["errors"][::-1],
        "power": facts["power"] * 0.9,
        "groups": facts["groups"][::-1],
    }
    return {**facts, part: other[part]} if part else facts


def test_a_pool_alone_changes_no_label_and_no_training_row(published: ScriptedRun) -> None:
    run, config, _ = gated_again(published, "gate.pool=one_coin")
    for old, row in zip(rows_of(published), rows_of(run), strict=True):
        assert {name: row[name] for name in old} == old
        assert row["final_score"] is None or sum(row[f"posterior_{name}"] for name in CLASSES) == pytest.approx(1)
    for name in ("gate", "dataset-rows"):
        assert run.results[name].facts["counts"] == published.results[name].facts["counts"]
    model = PanelModels(posterior=run.results["gate"].facts["posterior"])
    assert audited(run, config, models=[model]) == {}
    # Stages before the gate keep their fingerprints, and without a pool so does the gate.
    for name in ("prompts", "candidates", "judge", "critic"):
        assert run.stages[name].fingerprint == published.stages[name].fingerprint
    again, _ = planted_dag(published.folder, *OVERRIDES)
    assert {s.name: s.fingerprint for s in again.stages}["gate"] == published.stages["gate"].fingerprint


def test_equal_verdicts_give_equal_bytes(published: ScriptedRun) -> None:
    files = []
    for _ in range(2):
        run, _, _ = gated_again(published, *DECIDES, made=MADE[:2])
        folder = Path(run.results["gate"].folder)
        files.append([path.read_bytes() for path in sorted(folder.glob("shard-*.parquet"))])
        (folder / "_result.json").unlink(missing_ok=True)
        for path in folder.glob("shard-*.parquet"):
            path.unlink()
    assert len(files[0]) == SHARDS and files[0] == files[1]


def test_two_judges_who_are_one_are_said_and_count_once(published: ScriptedRun) -> None:
    verdicts = published.results["judge"].table()
    whole = [verdicts.read(shard) for shard in range(SHARDS)]
    try:
        for shard, table in enumerate(whole):
            rows = table.to_pylist()
            of = {row["candidate_id"]: row for row in rows if row["judge"] == "helpfulness"}
            copied = [
                {**row, **{name: of[row["candidate_id"]][name] for name in ("score", "parse_status")}}
                if row["judge"] == "conciseness"
                else row
                for row in rows
            ]
            verdicts.write(shard, pa.Table.from_pylist(copied, schema=table.schema))
        run, config, lines = gated_again(published, *DECIDES, "gate.alpha=0.2")
        facts = run.results["gate"].facts["posterior"]
        assert ["helpfulness", "conciseness"] in facts["groups"] and len(facts["groups"]) == 2
        assert facts["effective"] <= 2
        said = [line for line in lines if "helpfulness and conciseness are nearly one" in line]
        assert said and any("Only 2 judges are left" in line for line in lines)
        assert audited(run, config, models=[PanelModels(posterior=facts)]) == {}
        section = posterior_section(facts, config.gate)
        assert section is not None and any("helpfulness = conciseness" in str(block) for block in section.blocks)
    finally:
        for shard, table in enumerate(whole):
            verdicts.write(shard, table)
    alone = {**facts, "groups": [["a"], ["b"], ["c"]]}
    assert not list(warnings({**alone, "pairs": [pair("a", "b", 0.09), pair("a", "c", None)]}))
    many = [pair("a", name, low) for name, low in zip("bcdef", (0.2, 0.3, 0.11, 0.4, 0.0), strict=True)]
    (line,) = warnings({**alone, "pairs": many})
    assert "a and e (0.45), a and c (0.35), a and b (0.25) and 1 other pairs" in line
    assert posterior_section(None, GateConfig()) is None


def pair(a: str, b: str, low: float | None) -> dict[str, Any]:
    interval = {"mean": None, "low": None} if low is None else {"mean": low + 0.05, "low": low}
    return {"judge_a": a, "judge_b": b, "correlation": interval}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate.kind=posterior"], "needs pool: one_coin or dawid_skene"),
        (["gate.posterior_at=0.8"], "posterior_at is read by kind: posterior alone"),
        ([*DECIDES, "gate.cut=undesirable"], "cut: undesirable has no meaning"),
        ([*DECIDES, "judge.early_exit=scores"], "early_exit skips calls"),
        (["gate.pool=one_coin", "judge.early_exit=scores"], "early_exit skips calls.*remove gate.pool"),
        (["gate.pool=one_coin", "gate.kind=certified", "gate.labels=x"], "pool has no effect on kind certified"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        planted_dag(tmp_path, *overrides)


@pytest.mark.parametrize("overrides", [DECIDES, ("gate.kind=certified", "gate.labels={labels}")])
def test_thresholds_and_gaps_are_checked_before_a_run(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text(json.dumps({"candidate_id": "x", "label": "desirable"}) + "\n")
    given = [override.format(labels=labels) for override in overrides]
    dag, _ = planted_dag(tmp_path, *OVERRIDES, *given, "gate.desirable_at=11", "datasets.min_gap=20")
    pending: Any = SimpleNamespace(todo=dag.stages)
    found = {finding.what: finding.state for finding in thresholds(pending)}
    assert found == {"thresholds of gate-numbers": "problem", "gap of dataset-rows": "problem"}


def test_two_judges_make_no_pool() -> None:
    gate = GateConfig(pool="one_coin")
    check_pool(gate, ["a", "b", "c"])
    check_pool(GateConfig(), ["a"])
    with pytest.raises(ValueError, match=r"needs 3 judges or more.*there are 2"):
        check_pool(gate, ["a", "b"])


def test_one_table_alone_has_no_posterior(published: ScriptedRun) -> None:
    tables = [published.results[name].table().read_all() for name in ("candidates", "judge", "critic")]
    with pytest.raises(ValueError, match=r"gate\.pool needs all candidates of a run"):
        decide(*tables, ["helpfulness"], GateConfig(pool="one_coin"))
    assert GateConfig(kind="posterior", pool="one_coin").numbers == GateConfig(use_variance=False)
    assert GateConfig(pool="one_coin").decides_by() == GateConfig().decides_by()
