"""Whole runs from Python: configurations and stored tables. Running one is in tests/examples."""

from pathlib import Path

import pytest

import ray_pipeline as quorum
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.store.errors import StoreError
from tests.operate.planted_run import plant


def test_load_config():
    config = quorum.load_config("dmapo", "pocket", ["gate.tau=1.5"])
    assert config.gate.tau == 1.5
    with pytest.raises(ConfigError, match="unknown workflow 'dmapp'; choose from agreement"):
        quorum.load_config("dmapp", "pocket")
    with pytest.raises(ConfigError, match=r"gate\.tua"):
        quorum.load_config("dmapo", "pocket", ["gate.tua=1.5"])


def test_read_run_has_tables_as_attributes(tmp_path: Path):
    run = quorum.read_run(str(plant(tmp_path / "run")))
    assert run.names == ["prompts", "candidates", "verdicts", "critiques", "decisions"]
    assert set(run.names) <= set(dir(run))
    assert set(run.verdicts.to_pandas()["judge"]) == {"helpfulness", "factuality", "conciseness"}
    stored = run.decisions.to_pandas()
    again = quorum.gate(run.candidates, run.verdicts, run.critiques).to_pandas()
    assert again[["candidate_id", "label", "why"]].equals(stored[["candidate_id", "label", "why"]])
    with pytest.raises(AttributeError, match="has no table 'kto'; it has prompts, candidates"):
        _ = run.kto


def test_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(StoreError, match=str(tmp_path)):
        quorum.read_run(str(tmp_path))
