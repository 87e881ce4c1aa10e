"""The certified gate through the real stages on scripted verdicts, with its page and its audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_pipeline.data.certified_gate import certified_section, statement
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.graph.stage import StageStop
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.data.gated_again import MADE, audited, gated_again
from tests.golden.scripted_run import ScriptedRun, scripted_run
from tests.operate.planted_run import planted_dag

MIDDLE = 5.5


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> ScriptedRun:
    return scripted_run(tmp_path_factory.mktemp("published"))


def label_file(path: Path, rows: list[dict[str, Any]], right: float, chosen_as: str = "chance") -> Path:
    """Labels by people who agree with the side of the final score in a share of the candidates."""
    rng = np.random.default_rng(5)
    known = [row for row in rows if row["final_score"] is not None]
    with path.open("w") as file:
        for row in known:
            side = (row["final_score"] >= MIDDLE) == (rng.random() < right)
            label = "desirable" if side else "undesirable"
            file.write(json.dumps({"candidate_id": row["candidate_id"], "label": label, "chosen_as": chosen_as}) + "\n")
    return path


def certified(run: ScriptedRun, labels: Path, made: tuple[str, ...] = MADE) -> tuple[ScriptedRun, DmapoConfig]:
    return gated_again(run, "gate.kind=certified", f"gate.labels={labels}", made=made)[:2]


def test_labels_follow_from_the_certified_threshold(published: ScriptedRun, tmp_path: Path) -> None:
    rows = published.results["gate"].table().read_all().to_pylist()
    run, config = certified(published, label_file(tmp_path / "labels.jsonl", rows, right=0.98))
    facts = run.results["gate"].facts["certified"]
    threshold = facts["threshold"]
    assert threshold is not None and facts["labels"] == sum(row["final_score"] is not None for row in rows)
    before = {row["candidate_id"]: row for row in rows}
    kept = 0
    for row in run.results["gate"].table().read_all().to_pylist():
        old, f, v = before[row["candidate_id"]], row["final_score"], row["score_variance"]
        assert all(row[name] == old[name] for name in ("mean_score", "score_variance", "penalty", "final_score"))
        if old["label"] == "incomplete" or f is None:
            assert (row["label"], row["why"]) == (old["label"], old["why"])
            continue
        side = "desirable" if f >= MIDDLE else "undesirable"
        sure = abs(f - MIDDLE) / (1 + v) ** 0.5 >= threshold - 1e-9
        assert row["label"] == (side if sure else "abstain") and ("≥" in row["why"]) == sure
        kept += sure
    assert kept == sum(run.results["gate"].facts["counts"][label] for label in ("desirable", "undesirable"))
    assert audited(run, config, threshold=threshold) == {}
    assert "label" in audited(run, config, threshold=threshold + 1)  # the audit would notice another threshold
    text = statement(facts, run.results["gate"].facts["counts"])
    assert f"people agree with at least 90 % of the {kept} labels given" in text
    section = certified_section(facts, run.results["gate"].facts["counts"])
    assert section is not None and certified_section(None, {}) is None
    # Stages before the gate, and the published gate's own, keep their fingerprints.
    for name in ("prompts", "candidates", "judge", "critic"):
        assert run.stages[name].fingerprint == published.stages[name].fingerprint


def test_without_proof_every_candidate_abstains(published: ScriptedRun, tmp_path: Path) -> None:
    rows = published.results["gate"].table().read_all().to_pylist()
    known = sum(row["final_score"] is not None for row in rows)
    for name, right, chosen_as, labels in (("wrong", 0.6, "chance", known), ("chosen", 1.0, "threshold", 0)):
        file = label_file(tmp_path / f"{name}.jsonl", rows, right, chosen_as)
        run, _ = certified(published, file, MADE[:2])
        facts, counts = run.results["gate"].facts["certified"], run.results["gate"].facts["counts"]
        assert facts["threshold"] is None and counts["desirable"] == counts["undesirable"] == 0
        assert statement(facts, counts).startswith("Nothing is certified") and "22 labels" in statement(facts, counts)
        # Labels that were not drawn by chance certify nothing, however many agree.
        assert (facts["labels"], facts["not_drawn"]) == (labels, known - labels)
    with pytest.raises(StageStop, match="nothing to train on"):
        certified(published, file)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate.kind=certified"], "needs labels, a file"),
        (["gate.labels=x.jsonl"], "labels is read by kind: certified alone"),
        (["gate.kind=certified", "gate.labels=x", "gate.cut=undesirable"], "cut: undesirable has no meaning"),
        (["gate.kind=certified", "gate.labels=x", "judge.early_exit=scores"], "early_exit skips calls"),
        (
            ["gate.kind=certified", "gate.labels=x", "human_labels={path: y, use: gate}"],
            "labels that gate.kind certified promises",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        planted_dag(tmp_path, *overrides)


def test_the_fingerprint_goes_with_every_setting_and_the_content_of_the_labels(tmp_path: Path) -> None:
    def fingerprint(name: str, text: str, *overrides: str) -> str:
        (tmp_path / name).write_text(text)
        dag, _ = planted_dag(tmp_path, "gate.kind=certified", f"gate.labels={tmp_path / name}", *overrides)
        return {stage.name: stage.fingerprint for stage in dag.stages}["gate"]

    one, other = (json.dumps({"candidate_id": "x", "label": label}) + "\n" for label in ("desirable", "unsure"))
    found = [fingerprint("a.jsonl", one), fingerprint("a.jsonl", other)]
    found += [fingerprint("a.jsonl", one, f"gate.{key}=0.8") for key in ("agree_with_humans", "confidence")]
    found += [fingerprint("a.jsonl", one, "gate.desirable_at=8")]
    assert len(set(found)) == len(found)


def test_no_fingerprint_goes_with_the_place_of_the_labels(tmp_path: Path) -> None:
    found = []
    for name in ("a/labels.jsonl", "b/labels.jsonl", "b/renamed.jsonl"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"candidate_id": "x", "label": "desirable"}) + "\n")
        for keys in (["gate.kind=certified", f"gate.labels={file}"], [f"human_labels={{path: '{file}', use: gate}}"]):
            dag, _ = planted_dag(tmp_path / "run", *keys)
            found.append({stage.name: stage.fingerprint for stage in dag.stages})
    assert found[0] == found[2] == found[4] and found[1] == found[3] == found[5]


def test_one_table_alone_is_not_certified(published: ScriptedRun) -> None:
    gate = GateConfig(kind="certified", labels="x.jsonl")
    results = published.results
    tables = [results[name].table().read_all() for name in ("candidates", "judge", "critic")]
    with pytest.raises(ValueError, match="needs all candidates of a run"):
        decide(*tables, ["helpfulness"], gate)
    assert gate.numbers == GateConfig()
