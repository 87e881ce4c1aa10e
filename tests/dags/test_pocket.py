"""The whole method in the pocket world: the policy gets better from data that judges agreed on, and worse from lies.

One full run, a comparison of datasets on its candidates, and a policy from flipped labels; the call log
answers what was asked before.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dags.conftest import engine_calls, manifest, run
from tests.dags.in_process import here

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

CONFIG = "configs/pocket.yaml"
COMPARISON = "configs/pocket_baselines.yaml"
LABELS = ("desirable", "undesirable", "discard", "abstain")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` runs."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    quorum = run("run", "dmapo", "-c", CONFIG, "--run-dir", str(folder))
    assert quorum.living_engines() == []
    return folder


def accuracy(folder: Path) -> dict[tuple[str, str], float]:
    """Share of right answers by (model, mode), by the pocket world's own checker, from the stored responses."""
    from ray_pipeline.pocket.tasks import is_correct

    asked = {row["prompt_id"]: row["messages"][-1]["content"] for row in _rows(folder, "prompts")}
    right: dict[tuple[str, str], list[bool]] = {}
    for stage in ("responses-base", "responses-policy"):
        for row in _rows(folder, stage):
            right.setdefault((row["model"], row["mode"]), []).append(
                is_correct(asked[row["prompt_id"]], row["response"])
            )
    return {key: sum(values) / len(values) for key, values in right.items()}


def _rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    path = folder / manifest(folder)["stages"][stage]["path"]
    return [row for shard in sorted(path.glob("shard-*.parquet")) for row in pq.read_table(shard).to_pylist()]


def assert_better(folder: Path) -> None:
    found = accuracy(folder)
    print(f"\n{folder.name}: " + ", ".join(f"{m} {mode} {value:.3f}" for (m, mode), value in sorted(found.items())))
    for mode in ("greedy", "sampled"):
        assert 0.40 <= found["base", mode] <= 0.65
        assert found["policy", mode] >= found["base", mode] + 0.15


def test_it_has_the_size_that_the_readme_says(demo: Path) -> None:
    counts = manifest(demo)["stages"]["prompts"]["facts"]["counts"]
    assert counts["train"] >= 400 and counts["val"] >= 200


def test_all_labels_occur_and_the_classes_are_of_one_order(demo: Path) -> None:
    counts = manifest(demo)["stages"]["gate"]["facts"]["counts"]
    assert all(counts[label] > 0 for label in LABELS), counts
    assert counts["incomplete"] <= 0.02 * sum(counts.values())
    assert 1 / 3 <= counts["desirable"] / counts["undesirable"] <= 3


def test_the_policy_is_right_more_often(demo: Path) -> None:
    assert_better(demo)


def test_the_judges_err_apart(demo: Path) -> None:
    """What the method rests on, as the report measures it against the truth."""
    found = json.loads((demo / "report" / "metrics.json").read_text())["judge_errors"]["truth"]
    assert all(0.72 <= judge["accuracy"]["mean"] <= 0.9 for judge in found["judges"]), found["judges"]
    assert all(pair["correlation"]["mean"] <= 0.3 for pair in found["pairs"]), found["pairs"]


@pytest.fixture(scope="module")
def compared(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KTO on the demo's own candidates and gate, with two other seeds."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(demo / "calls", folder.parent / "calls")
    quorum = run("run", "baselines", "-c", COMPARISON, "--run-dir", str(folder), *_of(folder))
    assert quorum.living_engines() == []
    return folder


def _of(folder: Path) -> list[str]:
    """One method on the gated data alone: a policy takes a minute to train and ask."""
    calls = f"calls.root={folder.parent / 'calls'}"
    save = "train.save=adapter"
    return ["baselines.methods=[kto]", "baselines.seeds=[1, 2]", "baselines.data={gated: {}}", save, calls]


def test_with_other_seeds_it_is_right_more_often_too(compared: Path) -> None:
    metrics = json.loads((compared / "report" / "metrics.json").read_text())
    base, *policies = metrics["policies"]
    print("\n" + (compared / "report" / "methods.csv").read_text())
    assert len(policies) == 2
    for policy in policies:
        for mode in ("greedy", "sampled"):
            assert 0.40 <= base["accuracy"][mode] <= 0.65
            assert policy["accuracy"][mode] >= base["accuracy"][mode] + 0.10, (policy["run"]["label"], mode)
        assert policy["win_rate"] > policy["loss_rate"]
    # Both are adapters on one engine, which the first of them starts.
    first, second = (manifest(compared)["stages"][f"responses-kto-gated-s{seed}"]["usage"] for seed in (1, 2))
    assert first["start_seconds"] > 1 > second["start_seconds"]
    assert len(list(compared.glob("train-*/adapter"))) == 2 and not list(compared.glob("train-*/merged"))


def test_a_comparison_asks_nothing_twice_and_can_be_audited(compared: Path) -> None:
    calls = engine_calls(compared)
    known = ("candidates", "judge", "critic", "responses-base")  # the demo's call log has them
    assert not [stage for stage in calls if stage.startswith(known)]
    again = here("run", "baselines", "--config", COMPARISON, "--run-dir", str(compared), *_of(compared))
    assert "to do" not in again.output and not again.engines
    output = here("audit", str(compared)).output
    assert output.count("no problem") == 2 and "datasets-gated-s1" in output
    before = (compared / "report" / "report.md").read_bytes()
    here("report", str(compared))
    assert (compared / "report" / "report.md").read_bytes() == before


def test_with_flipped_labels_it_is_right_less_often_than_the_base(demo: Path, tmp_path: Path) -> None:
    """The same rows with the opposite labels: what a wrong sign anywhere between gate and loss would do."""
    folder = tmp_path / "flipped"
    shutil.copytree(demo, folder, symlinks=True, ignore=shutil.ignore_patterns("train-*", "evaluate-*", "policy"))
    data = folder / manifest(folder)["stages"]["datasets"]["path"] / "kto"
    for file in data.rglob("*.parquet"):
        table = pq.read_table(file)
        flipped = [not label for label in table["label"].to_pylist()]
        at = table.schema.get_field_index("label")
        write_changed(table.set_column(at, table.schema.field("label"), [flipped]), file)
    result = folder / manifest(folder)["stages"]["datasets"]["path"] / "_result.json"
    facts = json.loads(result.read_text())
    weights = facts["facts"]["kto_weights"]
    facts["facts"]["kto_weights"] = {
        "desirable_weight": weights["undesirable_weight"],
        "undesirable_weight": weights["desirable_weight"],
    }
    result.write_text(json.dumps(facts))
    run("run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "train", "train.epochs=1")
    instructions = [r["messages"][-1]["content"] for r in _rows(folder, "prompts") if r["split"] == "val"]
    found = greedy_accuracy(folder / "policy" / "merged", instructions)
    print(f"\nflipped: {found}")
    assert found < accuracy(demo)["base", "greedy"]


def write_changed(table: pa.Table, file: Path) -> None:
    """Write a file as an older version did, without a checksum: with the one it had, it would count as damaged."""
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"quorum.checksum"}
    pq.write_table(table.replace_schema_metadata(metadata), file)


def greedy_accuracy(model: Path, instructions: list[str]) -> float:
    """Share of right answers of a model, without an engine: a check of the policy alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ray_pipeline.pocket.tasks import is_correct

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    chats = [[{"role": "user", "content": text}] for text in instructions]
    asked = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        ids = AutoModelForCausalLM.from_pretrained(model).generate(**asked, max_new_tokens=48, do_sample=False)
    replies = tokenizer.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(is_correct, instructions, replies)) / len(instructions)


def test_the_audit_finds_nothing_and_then_what_is_planted(demo: Path, tmp_path: Path) -> None:
    assert "no problem" in here("audit", str(demo)).output
    folder = tmp_path / "run"
    shutil.copytree(demo, folder, symlinks=True)
    file = next((folder / "datasets" / "kto" / "train").glob("*.parquet"))
    table = pq.read_table(file)
    labels = table["label"].to_pylist()
    labels[0] = not labels[0]
    at = table.schema.get_field_index("label")
    write_changed(table.set_column(at, table.schema.field("label"), [labels]), file)
    output = here("audit", str(folder), expect=1).output
    assert "label" in output and "damaged" not in output


def test_the_report_says_what_happened(demo: Path) -> None:
    report = (demo / "report" / "report.md").read_text()
    metrics = json.loads((demo / "report" / "metrics.json").read_text())
    assert metrics["missing_stages"] == []
    assert len(report.splitlines()) > 50
    assert (demo / "report" / "summary.csv").read_text().count("\n") == 2
    assert list((demo / "report" / "charts").glob("*.svg"))


def test_other_tools_open_the_data_sets(demo: Path) -> None:
    import pandas as pd
    from datasets import load_dataset

    kto = load_dataset("parquet", data_dir=str(demo / "datasets" / "kto" / "train"), split="train")
    assert {"prompt", "completion", "label"} <= set(kto.column_names)
    both = load_dataset(str(demo / "datasets" / "dpo"))
    assert {"prompt", "chosen", "rejected"} <= set(both["train"].column_names)
    assert len(pd.read_parquet(demo / "datasets" / "kto" / "train")) == len(kto)


def test_evaluation_without_new_responses(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(demo, folder, symlinks=True)
    shown = here("run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "evaluate", "--skip-generation")
    # Another report of what is stored: nothing is asked, nothing is trained, and what was measured stays in it.
    states = ("starting workers", "loading model", "training")
    assert not shown.engines and not any(f"train: {state}" in shown.output for state in states)
    before, after = (json.loads((f / "report" / "metrics.json").read_text()) for f in (demo, folder))
    for part in ("responses", "win_rates", "rubrics"):
        assert after["evaluation"][part] == before["evaluation"][part]
    assert set(manifest(folder)["stages"]) == set(manifest(demo)["stages"])
    # A threshold that changes no training row makes the datasets again, and the policy that was trained is used.
    again = here("run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "train", "gate.tau=2.500001")
    assert not again.engines and not any(f"train: {state}" in again.output for state in states)
    trained, used = (manifest(f)["stages"]["train"] for f in (demo, folder))
    assert used["fingerprint"] != trained["fingerprint"] and used["facts"]["taken_from"] == trained["path"]
    assert used["facts"]["steps"] == trained["facts"]["steps"] > 0
    weights = [f / manifest(f)["stages"]["train"]["path"] / "adapter/adapter_model.safetensors" for f in (demo, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_stages_that_share_a_pool_start_one_engine(demo: Path) -> None:
    stages = manifest(demo)["stages"]
    panel = ("judge-helpfulness", "critic")  # four adapters of one model
    scores = ("comparisons", "score-responses-factuality")
    for first, second in (("candidates", "responses-base"), panel, scores):
        one, other = stages[first]["usage"], stages[second]["usage"]
        assert one["start_seconds"] > 1 > other["start_seconds"]
        # The time of the pool is told once: what the second took is not the wait for the first.
        assert other["wall_seconds"] < one["wall_seconds"]


def test_status_tells_every_stage(demo: Path) -> None:
    output = here("status", str(demo)).output
    assert all(name in output for name in manifest(demo)["stages"])
