"""A whole run whose folder is on an object store: nothing but the bucket is shared between its processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_pipeline.graph.results import read_run
from ray_pipeline.store.files import Folder
from ray_pipeline.store.local import upload
from tests.dags.conftest import CONFIG, SMALL, Quorum, run, wait_until
from tests.dags.in_process import here
from tests.s3 import location, s3_server

pytestmark = pytest.mark.e2e


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("QUORUM_CACHE", str(tmp_path / "cache"))
    with s3_server() as address:
        yield location(address, "runs/whole")


def test_a_run_on_an_object_store_trains_resumes_serves_and_reports(
    small_run: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bucket has a call log already, so that no engine starts before the training; what comes after it is asked.
    upload(small_run / "calls", Folder(bucket) / "calls")
    # Enough steps that the driver is killed among them; each checkpoint goes through the bucket's one slow server.
    steps = [
        "train.epochs=3",
        "train.global_batch=4",
        "train.batch_size=4",
        "train.save_steps=6",
        "train.num_workers=1",
    ]
    command = ["run", "dmapo", "-c", CONFIG, "--run-dir", bucket, *SMALL, "prompts.num_shards=2", *steps]
    killed = Quorum(*command, cwd=tmp_path, warm=True)
    wait_until(killed, lambda: checkpoints(Folder(bucket)))
    killed.kill()
    said = run(*command, cwd=tmp_path).output
    assert f"run folder: {bucket}" in said

    found = read_run(bucket)
    asking = {name for name, result in found.results.items() if result.usage.calls_engine}
    assert {"responses-base", "responses-policy", "comparisons"} <= asking
    assert not {"candidates", "judge", "critic"} & asking
    assert {stage.status for stage in found.stages.values()} == {"done"}
    facts = found.results["train"].facts
    assert facts["resumed_from"] and facts["steps"] > facts["resumed_from"]
    trained = Folder(found.results["train"].folder)
    metrics = trained.read_table("train_metrics.parquet", columns=["step", "split"]).to_pylist()
    assert [row["step"] for row in metrics if row["split"] == "train"] == list(range(1, facts["steps"] + 1))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set((trained / "merged").names())
    assert "adapter_model.safetensors" in (trained / "adapter").names()
    assert found.results["responses-policy"].rows["responses"] > 0
    page = Folder(found.results["evaluate"].folder)
    assert {"report.html", "report.md", "metrics.json", "summary.csv"} <= set(page.names())
    assert (page / "charts").names(".svg")
    assert f"report: {page.uri('report.html')}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]  # nothing of the run lies on a disk

    monkeypatch.chdir(tmp_path)
    again = here(*command).output
    assert "running" not in again and again.count("done before") == len(found.results)
    for command in ("report", "audit"):
        here(command, bucket)


def checkpoints(folder: Folder) -> bool:
    """Whether Ray Train has a checkpoint in the run folder to start again from."""
    for stage in folder.folders():
        if stage.startswith("train-"):
            place = folder / stage / "ray_train"
            return any((place / name).exists("checkpoint_manager_snapshot.json") for name in place.folders())
    return False
