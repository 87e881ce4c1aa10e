"""871 real instructions and a random-weight model of the Qwen3 architecture, which says anything at all."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_pipeline.store.schemas import PARSE_STATUSES
from tests.dags.conftest import manifest
from tests.dags.in_process import here
from tests.models import make_qwen3
from tests.published import DATA, needs

pytestmark = pytest.mark.e2e

REAL_PROMPTS = DATA / "prompts" / "real_prompts.jsonl"


@needs("prompts")
def test_real_prompts_through_candidates_and_judging(tmp_path: Path) -> None:
    model = tmp_path / "qwen3"
    make_qwen3(model, seed=0)
    config = {
        "models": {"anyone": {"model": str(model), "dtype": "float32", "max_model_len": 2048}},
        "prompts": {
            "sources": [{"type": "jsonl", "path": str(REAL_PROMPTS), "column": "prompt", "source_column": "source"}],
            "num_shards": 8,
        },
        "candidates": {"model": "anyone", "k": 1, "sampling": {"temperature": 0.8, "max_tokens": 4}},
        "judge": {
            "model": "anyone",
            "rubrics": [{"name": "helpfulness", "text": "Is the response helpful?"}],
            "sampling": {"max_tokens": 16},
            "asking": {"reason_chars": 0, "retries": 0},
        },
        "critic": {"model": "anyone"},
        "train": {"model": "anyone"},
        "evaluate": {"judge": "anyone"},
        "failure": {"max_error_rate": 1.0},
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    folder = tmp_path / "run"
    here("run", "dmapo", "-c", str(file), "--run-dir", str(folder), "--to", "judge")

    texts = [json.loads(line)["prompt"] for line in REAL_PROMPTS.read_text().splitlines()]
    stages = manifest(folder)["stages"]
    counts = stages["prompts"]["facts"]["counts"]
    assert counts["read"] == len(texts) == 871
    exact = len(texts) - len(set(texts))
    assert counts["dropped"]["duplicate"] >= exact > 0
    assert counts["kept"] + sum(counts["dropped"].values()) == 871
    assert stages["candidates"]["rows"]["candidates"] == counts["kept"]
    verdicts = pq.read_table(folder / stages["judge"]["path"]).to_pylist()
    assert len(verdicts) == counts["kept"]
    assert {v["parse_status"] for v in verdicts} <= set(PARSE_STATUSES) - {"error"}
    assert all((v["score"] is None) == (v["parse_status"] not in ("ok", "repaired")) for v in verdicts)
