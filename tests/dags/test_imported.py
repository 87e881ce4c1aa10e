"""Preference data that somebody else made, from a file of the hub's shape to training files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dags.conftest import manifest
from tests.dags.in_process import here

pytestmark = pytest.mark.e2e


def test_imported_pairs_become_training_files(tmp_path: Path) -> None:
    from datasets import load_dataset

    from ray_pipeline.pocket.tasks import make_prompts

    rows = []
    for i, prompt in enumerate(make_prompts(60, seed=9)):
        asked = {"role": "user", "content": prompt.instruction}
        sides = {
            name: [asked, {"role": "assistant", "content": text}]
            for name, text in (("chosen", "one two"), ("rejected", "three"))
        }
        rows.append({"prompt": prompt.instruction, **sides, "score_chosen": 8.0, "score_rejected": 8.0 - i % 3})
    file = tmp_path / "train_prefs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{type: jsonl, path: {file}, chosen_score: score_chosen, rejected_score: score_rejected}}"
    folder = tmp_path / "run"
    changes = [f"baselines.data={{others: {{source: {source}}}}}", "baselines.seeds=[0, 1]", "ray.max_stages=null"]
    quorum = here(
        "run",
        "baselines",
        "-c",
        "configs/pocket_baselines.yaml",
        "--run-dir",
        str(folder),
        "--to",
        "datasets",
        *changes,
    )
    assert not quorum.engines
    stages = manifest(folder)["stages"]
    assert stages["rows-others"]["facts"]["source"]["dropped"]["gap_not_positive"] == 20
    assert stages["rows-others"]["rows"] == {"dpo": 40, "kto": 80}
    orders = []
    for seed in (0, 1):
        path = folder / stages[f"datasets-others-s{seed}"]["path"]
        data = {kind: load_dataset(str(path / kind)) for kind in ("sft", "dpo", "kto")}
        assert {kind: sum(len(part) for part in splits.values()) for kind, splits in data.items()} == {
            "sft": 40, "dpo": 40, "kto": 80,
        }  # fmt: skip
        orders.append(data["dpo"]["train"]["prompt_id"])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert "paired rows of" in (path / "README.md").read_text()
