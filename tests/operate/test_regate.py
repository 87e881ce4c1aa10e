"""New thresholds on planted scores: the preview against counts by hand, and files against those of a run."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from dags.baselines import BaselinesConfig, baselines
from ray_pipeline.cli import app
from ray_pipeline.config.loading import read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.dataset_files import kto_weights
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.graph.heartbeat import RunBusy
from ray_pipeline.graph.manifest import stage_entry
from ray_pipeline.graph.results import read_run
from ray_pipeline.graph.resume import load_result
from ray_pipeline.graph.stage import Dag, StageRef, StageStop
from ray_pipeline.operate import regate as gating
from ray_pipeline.store.errors import StoreError
from tests.operate.planted_run import SHARDS, plant, planted_dag
from tests.planted import JUDGES, count_words, random_world

WORLD = random_world(60, seed=5)
NEW = ["gate.tau=1.0", "gate.desirable_at=8"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return plant(tmp_path / "run", WORLD)


def by_hand(gate: GateConfig, min_gap: float = 1.5) -> tuple[collections.Counter, int]:
    """Labels and pairs of the whole world at once, by the rows that the datasets stage makes."""
    decisions = decide(WORLD.candidates, WORLD.verdicts, WORLD.critiques, JUDGES, gate)
    config = DatasetsConfig(max_length=10_000, max_prompt_length=5_000, min_gap=min_gap)
    pairs, _ = dpo_rows(WORLD.prompts, WORLD.candidates, WORLD.verdicts, decisions, config, count_words)
    return collections.Counter(decisions["label"].to_pylist()), pairs.num_rows


def test_a_preview_counts_what_the_stages_would_make(folder: Path) -> None:
    found = gating.preview(gating.regate(read_run(str(folder)), [*NEW, "datasets.min_gap=6"]))["gate"]
    old_labels, old_pairs = by_hand(GateConfig())
    new_labels, new_pairs = by_hand(GateConfig(tau=1.0, desirable_at=8), min_gap=6)
    assert {k: n for k, n in found.old.labels.items() if n} == dict(old_labels) and found.old.pairs == old_pairs
    assert {k: n for k, n in found.new.labels.items() if n} == dict(new_labels) and found.new.pairs == new_pairs
    assert 0 < new_pairs < old_pairs and found.candidates == 240
    for label, number in found.old.labels.items():
        assert sum(n for (a, _), n in found.moved.items() if a == label) == number
    lines = "\n".join(gating.preview_lines({"gate": found}))
    assert f"{found.moved['desirable', 'discard']} candidates desirable → discard" in lines
    kept = [line for line in lines.splitlines() if line.startswith("kept")]
    assert kept[0].split()[1:] == [str(found.old.kept), str(found.new.kept), f"{found.new.kept - found.old.kept:+d}"]


def test_the_previewed_weights_are_those_that_the_files_get(folder: Path) -> None:
    """Counted are the rows of the training split that pass the limits, not all labels."""
    new = ["gate.desirable_at=9", "datasets.max_prompt_length=40"]
    given = gating.regate(read_run(str(folder)), new)
    side = gating.preview(given)["gate"].new
    gating.write(given, beat_seconds=0.05)
    stats = json.loads((folder / "datasets" / "stats.json").read_text())
    rows = stats["rows"]["kto"]
    assert side.classes == (rows["train_desirable"], rows["train_undesirable"])
    assert side.kept > sum(side.classes) > 0 and rows["val"] > 0
    assert side.weights == tuple(stats["kto_weights"].values())
    assert side.weights != kto_weights(side.labels["desirable"], side.labels["undesirable"])
    lines = gating.preview_lines({"gate": gating.Preview(1, side, gating.Side(side.labels, 0, None), {})})
    (line,) = [line for line in lines if line.startswith("KTO weights")]
    assert line.split()[2:] == ["{:.3g}:{:.3g}".format(*side.weights), "–"]


def test_a_preview_writes_nothing(folder: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    shown = CliRunner().invoke(app, ["regate", str(folder), *NEW])
    assert shown.exit_code == 0 and "nothing written" in shown.output, shown.output
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()} == before


def test_written_data_sets_are_those_that_a_run_with_these_thresholds_finds(folder: Path) -> None:
    written = CliRunner().invoke(app, ["regate", str(folder), *NEW, "--write"])
    assert written.exit_code == 0, written.output
    dag, config = planted_dag(folder, *NEW)
    stages = {stage.name: stage for stage in dag.stages}
    for name in ("gate", "dataset-rows", "datasets"):
        assert load_result(StageRef.of(stages[name], str(folder), SHARDS)) is not None, name
    run = read_run(str(folder))
    labels, _ = by_hand(GateConfig(tau=1.0, desirable_at=8))
    assert run.results["gate"].facts["counts"] == {**dict.fromkeys(run.results["gate"].facts["counts"], 0), **labels}
    assert run.config == config.model_dump(mode="json")
    rows = [
        row for f in sorted((folder / "datasets" / "kto").rglob("*.parquet")) for row in pq.read_table(f).to_pylist()
    ]
    assert len(rows) == labels["desirable"] + labels["undesirable"]
    assert (folder / "datasets").resolve().name == stages["datasets"].folder_name
    assert not (folder / "heartbeat.json").exists()

    again = CliRunner().invoke(app, ["regate", str(folder), "gate.tau=1.0"])  # the new thresholds are the old ones now
    assert "no label changes" in again.output


def test_what_was_made_from_the_old_data_sets_waits_and_keeps_its_folder(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("train", "evaluate"):
        manifest["stages"][name] |= {"status": "done", "rows": {}, "facts": {}, "usage": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    gating.write(gating.regate(read_run(str(folder)), NEW), beat_seconds=0.05)
    after = json.loads((folder / "manifest.json").read_text())["stages"]
    assert {name: after[name]["status"] for name in ("judge", "gate", "train", "evaluate")} == {
        "judge": "done", "gate": "done", "train": "waiting", "evaluate": "waiting",
    }  # fmt: skip
    assert after["train"]["path"] == manifest["stages"]["train"]["path"] and "facts" not in after["train"]


def test_what_was_made_from_a_policy_of_the_old_data_sets_waits_too(folder: Path) -> None:
    """Stages that read no dataset themselves, but the policy or what it answered."""
    manifest = json.loads((folder / "manifest.json").read_text())
    later = ("train", "responses-base", "responses-policy", "comparisons", "score-responses", "evaluate")
    for name in later:
        manifest["stages"][name] |= {"status": "done", "rows": {}, "facts": {}, "usage": {}}
    remade = {"gate", "dataset-rows", "datasets"}
    assert not remade & set(manifest["stages"]["responses-policy"]["inputs"].values())
    assert not {"train", *remade} & set(manifest["stages"]["comparisons"]["inputs"].values())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    gating.write(gating.regate(read_run(str(folder)), NEW), beat_seconds=0.05)
    after = json.loads((folder / "manifest.json").read_text())["stages"]
    assert {name for name in later if after[name]["status"] == "done"} == {"responses-base"}
    assert {after[name]["status"] for name in later} == {"done", "waiting"}


def compared(folder: Path, *overrides: str) -> tuple[Dag, BaselinesConfig]:
    """A comparison of datasets from the planted candidates and scores, whose stages have the planted fingerprints."""
    values = yaml.safe_load(Path("tests/one_judge.yaml").read_text())
    del values["train"]["method"], values["evaluate"]
    values["baselines"] = {
        "data": {"raw": {"gated": False}, "gated": {}, "strict": {"gate": {"tau": 0.5}}},
        "seeds": [0, 1],
        "methods": ["kto"],
    }
    config = read_config(BaselinesConfig, values, [f"prompts.num_shards={SHARDS}", *overrides])
    return baselines(config, str(folder)), config


def test_every_dataset_of_a_comparison_is_rebuilt(folder: Path) -> None:
    dag, config = compared(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    planted = {name: manifest["stages"][name] for name in ("prompts", "candidates", "judge", "critic")}
    stages = {stage.name: {**stage_entry(stage), **planted.get(stage.name, {})} for stage in dag.stages}
    assert all(stage.fingerprint == stages[stage.name]["fingerprint"] for stage in dag.stages)
    values = {"config": config.model_dump(mode="json"), "given": config.model_dump(mode="json", exclude_unset=True)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values, "dag": "baselines", "stages": stages}))

    new = ["gate.tau=1.0", "baselines.data.raw.k=2"]
    given = gating.regate(read_run(str(folder)), new)
    found = gating.preview(given)
    assert list(found) == ["ranks-raw", "gate-gated", "gate-strict"] and "ranks-raw:" in gating.preview_lines(found)
    assert found["gate-gated"].new.labels == {
        **dict.fromkeys(found["gate-gated"].new.labels, 0),
        **by_hand(GateConfig(tau=1.0))[0],
    }
    assert found["gate-strict"].old == found["gate-strict"].new and found["gate-strict"].candidates == 240
    unused = sum(n for (_, label), n in found["ranks-raw"].moved.items() if label == "unused")
    assert unused == 120 and sum(found["ranks-raw"].moved.values()) == 240

    gating.write(given, beat_seconds=0.05)
    made = {stage.name: stage for stage in compared(folder, *new)[0].stages}
    after = read_run(str(folder))
    for name in ("ranks-raw", "rows-raw", "datasets-raw-s1", "gate-gated", "datasets-gated-s0", "datasets-strict-s0"):
        assert load_result(StageRef.of(made[name], str(folder), SHARDS)) is not None, name
        assert after.results[name].fingerprint == made[name].fingerprint
    assert list(after.stages) == list(stages) and after.workflow == "baselines"
    with pytest.raises(ConfigError, match="adds and removes none"):
        gating.regate(after, ["baselines.data.gated.gated=false"])


def test_files_that_are_cut_to_a_size_are_named(folder: Path) -> None:
    cut = ["baselines.data.strict.size_of=gated", "baselines.seeds=[0]"]
    dag, config = compared(folder, *cut)
    manifest = json.loads((folder / "manifest.json").read_text())
    planted = {name: manifest["stages"][name] for name in ("prompts", "candidates", "judge", "critic")}
    stages = {stage.name: {**stage_entry(stage), **planted.get(stage.name, {})} for stage in dag.stages}
    values = {"config": config.model_dump(mode="json"), "given": config.model_dump(mode="json", exclude_unset=True)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values, "dag": "baselines", "stages": stages}))
    preview = CliRunner().invoke(app, ["regate", str(folder), "--write"]).output
    assert "counted before rows are drawn at random to the size of another dataset: datasets-strict-cut-s0\n" in preview
    audited = CliRunner().invoke(app, ["audit", str(folder)]).output
    assert "not audited (not made by the gate from all candidates): raw, strict\n" in audited
    assert "not audited (files of rows drawn at random from a dataset): datasets-strict-cut-s0\n" in audited


def test_an_incomplete_input_is_not_made_by_regate(folder: Path) -> None:
    judge = json.loads((folder / "manifest.json").read_text())["stages"]["judge"]["path"]
    (folder / judge / "_result.json").unlink()
    with pytest.raises(StageStop, match=r"judge failed: its output in .* is incomplete; use `quorum run`"):
        gating.write(gating.regate(read_run(str(folder)), NEW), beat_seconds=0.05)


def test_a_gate_without_the_critic_reads_no_critiques(folder: Path) -> None:
    found = gating.preview(gating.regate(read_run(str(folder)), ["gate.use_critic=false"]))["gate"]
    labels, _ = by_hand(GateConfig(use_critic=False))
    assert {k: n for k, n in found.new.labels.items() if n} == dict(labels)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("judge.model=policy", "regate changes keys of gate and datasets alone"),
        ("gate.taw=2", "did you mean 'tau'"),
        ("gate.desirable_at=3", "must be below desirable_at"),
        ("gate.tau=high", "gate.tau"),
    ],
)
def test_what_stored_scores_cannot_answer(folder: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gating.regate(read_run(str(folder)), [override])
    assert CliRunner().invoke(app, ["regate", str(folder), override]).exit_code == 2


def test_runs_that_cannot_be_gated(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["judge"]["status"] = "failed"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="judge is not done yet"):
        gating.regate(read_run(str(folder)), NEW)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "dag": "winrate"}))
    with pytest.raises(ConfigError, match="is a run of winrate"):
        gating.regate(read_run(str(folder)), NEW)


def test_a_run_at_work_is_left_alone(folder: Path) -> None:
    from ray_pipeline.graph.heartbeat import Heartbeat
    from ray_pipeline.store.files import Folder

    with Heartbeat(Folder(str(folder)), beat_seconds=0.1), pytest.raises(RunBusy):
        gating.write(gating.regate(read_run(str(folder)), NEW), beat_seconds=0.1)
    assert not list(folder.glob("datasets*"))
