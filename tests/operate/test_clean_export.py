"""Leftovers of a run folder, and its datasets as a folder for the hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from ray_pipeline.bench.measured import measured_models
from ray_pipeline.cli import app
from ray_pipeline.graph.heartbeat import Heartbeat, RunBusy
from ray_pipeline.graph.results import read_run
from ray_pipeline.operate import regate as gating
from ray_pipeline.operate.clean import clean, leftovers, size_text
from ray_pipeline.operate.export import export, push
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import DPO, RENAMED
from tests.operate.planted_run import plant

OLD = "0123456789abcdef"


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with datasets; tests that change it copy it."""
    folder = plant(tmp_path_factory.mktemp("gated") / "run")
    gating.write(gating.regate(read_run(str(folder)), ["gate.tau=2.4"]), beat_seconds=0.05)
    return folder


@pytest.fixture
def littered(tmp_path: Path) -> Path:
    """A run with outputs of earlier settings, links that lead out, and folders that are nobody's business."""
    folder = plant(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep me")
    for name in (f"gate-{OLD}", f"judge-{OLD}"):
        (folder / name / "_receipts").mkdir(parents=True)
        (folder / name / "shard-00000.parquet").write_bytes(b"x" * 1000)
    (folder / f"judge-{OLD}" / "way-out").symlink_to(outside)
    (folder / f"critic-{OLD}").symlink_to(outside)
    (folder / f"train-{OLD}").mkdir()
    (folder / "policy").symlink_to(f"train-{OLD}")
    for name in ("calls", "logs", "my notes", f"-{OLD}", "gate-new"):
        (folder / name).mkdir()
    (folder / f".manifest.json.{'a' * 32}.tmp").write_bytes(b"y" * 10)
    (folder / ".hidden.tmp").write_text("somebody's")
    return folder


def test_what_the_manifest_does_not_name_is_left_over(littered: Path) -> None:
    found = leftovers(read_run(str(littered)))
    assert [(left.name, left.is_folder) for left in found] == [
        (f".manifest.json.{'a' * 32}.tmp", False), (f"gate-{OLD}", True), (f"judge-{OLD}", True),
    ]  # fmt: skip
    assert 1000 <= found[1].size < 1100


def test_clean_shows_first_and_deletes_nothing_else(littered: Path) -> None:
    everything = sorted(p for p in littered.rglob("*"))
    shown = CliRunner().invoke(app, ["clean", str(littered)])
    assert shown.exit_code == 0 and f"gate-{OLD}" in shown.output and "pass --yes to delete them" in shown.output
    assert sorted(littered.rglob("*")) == everything

    done = CliRunner().invoke(app, ["clean", str(littered), "--yes"])
    assert done.exit_code == 0 and "3 leftovers" in done.output
    gone = set(everything) - set(littered.rglob("*"))
    assert {p.relative_to(littered).parts[0] for p in gone} == {
        f"gate-{OLD}", f"judge-{OLD}", f".manifest.json.{'a' * 32}.tmp",
    }  # fmt: skip
    assert (littered.parent / "outside" / "precious").read_text() == "keep me"
    assert os.path.islink(littered / f"critic-{OLD}") and (littered / f"train-{OLD}").is_dir()
    assert leftovers(read_run(str(littered))) == []


def test_a_run_at_work_or_without_a_manifest_is_not_cleaned(littered: Path) -> None:
    with Heartbeat(Folder(str(littered)), beat_seconds=0.1), pytest.raises(RunBusy):
        clean(read_run(str(littered)), lambda line: None, beat_seconds=0.1)
    (littered / "manifest.json").write_text("{")
    assert CliRunner().invoke(app, ["clean", str(littered), "--yes"]).exit_code == 2
    assert (littered / f"gate-{OLD}").is_dir()


def test_what_a_regate_leaves_behind_can_be_cleaned(gated: Path) -> None:
    old = [left.name for left in leftovers(read_run(str(gated)))]
    assert len(old) == 1 and old[0].startswith("gate-")  # the gate of before; its datasets were never made


def result(folder: Path, name: str, **inputs: str) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "_result.json").write_text(json.dumps({"inputs": inputs}))


def test_the_data_of_a_policy_that_exists_are_kept(littered: Path) -> None:
    """`policy` is of earlier thresholds: its datasets, and what they were made from, are in no manifest any more."""
    other = "f" * 16
    result(littered, f"train-{OLD}", datasets=f"datasets-{OLD}")
    result(littered, f"datasets-{OLD}", rows=f"dataset-rows-{OLD}")
    result(
        littered, f"dataset-rows-{OLD}", decisions=f"gate-{OLD}", prompts=read_run(str(littered)).stages["prompts"].path
    )
    result(littered, f"datasets-{other}", rows=f"dataset-rows-{other}")
    result(littered, f"train-{other}", datasets=f"datasets-{other}")  # a policy that nothing shows
    found = [left.name for left in leftovers(read_run(str(littered))) if left.is_folder]
    assert found == [f"datasets-{other}", f"judge-{OLD}", f"train-{other}"]

    (littered / "policy").unlink()
    found = [left.name for left in leftovers(read_run(str(littered)))]
    assert {f"train-{OLD}", f"datasets-{OLD}", f"gate-{OLD}"} <= set(found)


def test_a_policy_waiting_after_a_regate_keeps_its_data(littered: Path) -> None:
    manifest = json.loads((littered / "manifest.json").read_text())
    manifest["stages"]["train"]["path"] = f"train-{OLD}"
    (littered / "manifest.json").write_text(json.dumps(manifest))
    (littered / "policy").unlink()
    result(littered, f"train-{OLD}", datasets=f"datasets-{OLD}")
    result(littered, f"datasets-{OLD}")
    assert f"datasets-{OLD}" not in [left.name for left in leftovers(read_run(str(littered)))]


def test_the_card_of_an_older_policy_names_its_data(littered: Path) -> None:
    (littered / f"train-{OLD}" / "merged").mkdir()
    card = "| dataset | abcdabcdabcdabcd |\n| training | " + OLD + " |\n"
    (littered / f"train-{OLD}" / "merged" / "README.md").write_text(card)
    for name in ("datasets-abcdabcdabcdabcd", "datasets-abcdabcdabcdabce"):
        (littered / name).mkdir()
    found = [left.name for left in leftovers(read_run(str(littered)))]
    assert "datasets-abcdabcdabcdabcd" not in found and "datasets-abcdabcdabcdabce" in found


def test_sizes() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 2_500_000)] == ["0 B", "999 B", "1.0 kB", "2.5 MB"]


# --- export -----------------------------------------------------------------------------------------------------------


def test_an_export_opens_with_datasets(gated: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(gated), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "quorum.json").read_text())["rows"]
    for kind in ("kto", "dpo"):
        found = load_dataset(str(out), kind, cache_dir=str(tmp_path / "cache"))
        assert {"train": found["train"].num_rows, "val": found["validation"].num_rows} == rows[kind]
        assert rows[kind]["train"] > 0 and rows[kind]["val"] > 0
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert [c["config_name"] for c in front["configs"]] == ["kto", "dpo"] and front["license"] == "other"
    assert "## KTO data" in card and '"path/to/this/folder", "dpo")' in card and "| tau | 2.4 |" in card
    assert "| candidates.model | pocket:policy |" in card and "synthetic" in front["tags"]
    assert yaml.safe_load((out / "pipeline.yaml").read_text())["gate"] == {"tau": 2.4}
    for file in (p for p in out.rglob("*") if p.suffix in (".md", ".json", ".yaml")):
        assert str(gated) not in file.read_text()


def test_an_export_of_one_kind_replaces_an_earlier_one(gated: Path, tmp_path: Path) -> None:
    run, out = read_run(str(gated)), tmp_path / "out"
    export(run, out, ["dpo"])
    stale = out / "dpo" / "train" / "part-00099.parquet"
    stale.write_bytes(b"old")
    written = export(run, out, ["dpo"])
    assert not stale.exists() and not (out / "kto").exists() and all(path.is_file() for path in written)


def trained(gated: Path, folder: Path) -> Path:
    """A copy of a run with a policy that was trained and evaluated."""
    shutil.copytree(gated, folder, symlinks=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    train, evaluate = manifest["stages"]["train"], manifest["stages"]["evaluate"]
    train |= {"status": "done", "rows": {}, "facts": {}}
    evaluate |= {"status": "done", "rows": {}, "facts": {}}
    for name in ("adapter", "merged"):
        place = folder / train["path"] / name
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(b"weights")
        (place / "README.md").write_text(
            f"---\nlibrary_name: peft\n---\n\n# kto-1 ({name})\n\nA LoRA adapter for `{folder}/base`.\n\n"
            f"| train_files | {folder}/datasets-1/kto/train/*.parquet |\n"
        )
    config = {"base_model_name_or_path": f"{folder}/base", "r": 16}
    (folder / train["path"] / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / evaluate["path"]).mkdir()
    rate = {"judge": "judge", "score": {"mean": 0.6953}}
    right = [
        {"model": model, "mode": "greedy", "accuracy": {"mean": mean}}
        for model, mean in (("base", 0.5), ("policy", 0.88))
    ]
    metrics = {"evaluation": {"win_rates": [rate], "responses": right, "perplexity": {"policy": {"ppl": 1.15}}}}
    (folder / evaluate["path"] / "metrics.json").write_text(json.dumps(metrics))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_datasets_and_policy_are_one_folder(gated: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from huggingface_hub import ModelCard

    run, out = trained(gated, tmp_path / "run"), tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(out), "--policy", "train"])
    assert done.exit_code == 0, done.output
    assert load_dataset(str(out), "kto", cache_dir=str(tmp_path / "cache"))["train"].num_rows > 0
    for name in ("adapter", "merged"):
        assert (out / "policy" / name / "model.safetensors").read_bytes() == b"weights"
        card = ModelCard.load(out / "policy" / name / "README.md")
        found = {r.metric_name: r.metric_value for r in card.data.eval_results}
        assert found == {
            "score against the base, judge judge": 0.6953, "accuracy, greedy": 0.88,
            "perplexity of desirable answers": 1.15,
        }  # fmt: skip
        assert card.data.model_name == f"kto-1 ({name})"
        assert "A LoRA adapter for `base`." in card.text and "| train_files | *.parquet |" in card.text
        assert "| held-out prompts of the run: accuracy, greedy | 0.88 |" in card.text
    assert (
        json.loads((out / "policy" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "base"
    )
    for file in (p for p in out.rglob("*") if p.suffix in (".md", ".json", ".yaml")):
        assert str(tmp_path) not in file.read_text(), file

    alone = tmp_path / "alone"
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(alone), "--policy", "train", "--no-datasets"])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in alone.iterdir()) == ["pipeline.yaml", "policy", "quorum.json"]
    again = export(read_run(str(run)), out, policy="train")  # over an earlier export
    assert out / "policy" / "adapter" / "README.md" in again
    with pytest.raises(StoreError, match="train-dpo is not done; finished policies: train"):
        export(read_run(str(run)), out, policy="train-dpo")


def test_the_card_of_a_stopped_run_names_the_round_of_the_result(gated: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = trained(gated, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    facts = {"best": 1, "stop": True, "text": "The result is the policy of round 1. Stopped after round 2."}
    first = {**manifest["stages"]["train"], "round": 1}
    manifest["stages"] |= {
        "train": first,
        "train-2": {**first, "round": 2},
        "stop-2": {**first, "role": "decision", "round": 2, "facts": facts},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    for number, stage in enumerate(("train", "train-2"), 1):
        export(read_run(str(run)), tmp_path / stage, policy=stage, datasets=False)
        card = ModelCard.load(tmp_path / stage / "policy" / "adapter" / "README.md")
        assert f"## Rounds\n\nThis is the policy of round {number}. {facts['text']}" in card.text
        assert bool(card.data.eval_results) == (number == 1)  # the page is about the result
    blocks, _ = measured_models([{"run": str(run), "name": "policy"}], {})
    assert blocks["policy"] == measured_models([{"run": str(run), "policy": "", "name": "policy"}], {})[0]["policy"]


def test_sft_rows_are_exported_too(tmp_path: Path) -> None:
    from datasets import load_dataset

    folder, kinds = plant(tmp_path / "run"), ["datasets.kinds=[kto,dpo,sft]"]
    gating.write(gating.regate(read_run(str(folder)), kinds), beat_seconds=0.05)
    export(read_run(str(folder)), tmp_path / "out")
    for kind in ("kto", "dpo", "sft"):
        for place in (tmp_path / "out", folder / "datasets"):  # exported, and as it lies in the run
            found = load_dataset(str(place), kind, cache_dir=str(tmp_path / "cache"))
            assert found["train"].num_rows > 0 and found["validation"].num_rows > 0


def test_a_run_of_an_earlier_version_is_exported_with_todays_card_and_names(gated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(gated, folder, symlinks=True)
    datasets = (folder / "datasets").resolve()
    stats = json.loads((datasets / "stats.json").read_text())
    del stats["origin"]
    (datasets / "stats.json").write_text(json.dumps(stats))
    for name in ("README.md", "pipeline.yaml", "kto/.huggingface.yaml", "dpo/.huggingface.yaml"):
        (datasets / name).unlink()
    for kind in ("kto", "dpo"):
        text = f"---\nlicense: other\n---\n\n# Quorum {kind.upper()} data\n\nBest of two, ready for TRL's `Trainer`.\n"
        (datasets / kind / "README.md").write_text(text)
    for file in datasets.glob("dpo/*/*.parquet"):
        place = Folder(str(file.parent))
        table = place.read_table(file.name)
        former = [{v: k for k, v in RENAMED.items()}.get(name, name) for name in table.column_names]
        place.write_table(file.name, table.rename_columns(former), fingerprint=stats["fingerprint"], kind="dpo")
    out = tmp_path / "out"
    export(read_run(str(folder)), out)
    card = (out / "README.md").read_text()
    assert "Best of two, ready for TRL's trainers." in card and "| candidates.model | pocket:policy |" in card
    assert pq.read_table(out / "dpo" / "train").column_names == DPO.names
    assert sorted(p.name for p in (out / "dpo").iterdir()) == [".huggingface.yaml", "train", "val"]


def test_what_cannot_be_exported(gated: Path, tmp_path: Path) -> None:
    run = read_run(str(gated))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for arguments, message in (
        ((tmp_path / "full",), "not an earlier export"),
        ((tmp_path / "out", ["sft"]), "has no sft dataset; it has kto, dpo"),
        ((tmp_path / "out", (), "datasets-raw-s0"), "datasets-raw-s0 is not done; finished datasets: datasets"),
    ):
        with pytest.raises(StoreError, match=message):
            export(run, *arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_torn_file_is_named_and_not_exported(gated: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(gated, copy, symlinks=True)
    part = next((copy / "datasets" / "dpo" / "train").resolve().glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-20])
    shown = CliRunner().invoke(app, ["export", str(copy), "--out", str(tmp_path / "out"), "--kind", "dpo"])
    assert shown.exit_code == 2


def test_push_takes_the_token_from_the_environment_and_says_it_nowhere(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def __init__(self, token: str) -> None:
            calls.append(("token", token))

        def create_repo(self, repo: str, **given: Any) -> None:
            calls.append(("create", (repo, given["repo_type"], given["private"])))

        def upload_folder(self, **given: Any) -> None:
            calls.append(("upload", (given["repo_id"], given["repo_type"], given["folder_path"])))
            if given["repo_id"] == "me/broken":
                raise OSError("no way with secret-token\nand a second line")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    out = tmp_path / "out"
    export(read_run(str(gated)), out, ["dpo"])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(StoreError, match="HF_TOKEN"):
        push(out, "me/data")
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    assert push(out, "me/data") == "https://huggingface.co/datasets/me/data"
    assert calls == [("token", "secret-token"), ("create", ("me/data", "dataset", True)),
                     ("upload", ("me/data", "dataset", str(out)))]  # fmt: skip
    with pytest.raises(StoreError, match="the Hub refused me/broken: no way with …; the folder") as refused:
        push(out, "me/broken")
    assert "secret" not in str(refused.value)
    with pytest.raises(StoreError, match="OWNER/NAME"):
        push(out, "../data")
    assert all("secret-token" not in p.read_text(errors="replace") for p in out.rglob("*") if p.is_file())
