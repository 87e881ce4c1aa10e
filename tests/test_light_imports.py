"""What a command imports before it does anything: no Ray, no torch, no tables where none are read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "ray",
    "torch",
    "pandas",
    "transformers",
    "trl",
    "datasets",
    "vllm",
    "openai",
    "scipy",
    "sklearn",
    "matplotlib",
}
TABLES = {"pyarrow", "numpy"}
NETWORK = {"httpx", "aiohttp", "jinja2", "huggingface_hub"}

_COMMAND = """
import json, sys
from typer.testing import CliRunner
from ray_pipeline.cli import app
result = CliRunner().invoke(app, sys.argv[1:])
assert result.exit_code == 0, result.output
print(json.dumps(sorted(sys.modules)))
"""
_STATUS = """
import json, sys
import ray_pipeline.cli, ray_pipeline.operate.status, ray_pipeline.operate.status_page
print(json.dumps(sorted(sys.modules)))
"""
_CONFIG = """
import json, sys
import ray_pipeline.config.loading, ray_pipeline.config.blocks, ray_pipeline.workflow.config
print(json.dumps(sorted(sys.modules)))
"""
_FINISHED = """
import json, sys
import ray_pipeline.cli
from ray_pipeline.graph import driver, ray_executor
from ray_pipeline.operate import check, last_lines, run_settings
ray_executor.RayExecutor()
print(json.dumps(sorted(sys.modules)))
"""


def modules(code: str, *arguments: str) -> set[str]:
    """Modules that a new process has imported at its end."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", [_CONFIG, _STATUS])
def test_imports_nothing_heavy(code: str) -> None:
    assert not modules(code) & (HEAVY | TABLES | NETWORK)


def test_help_imports_nothing_heavy() -> None:
    assert not modules(_COMMAND, "--help") & (HEAVY | TABLES)


def test_a_dry_run_imports_nothing_heavy() -> None:
    assert not modules(_COMMAND, "run", "dmapo", "-c", "configs/pocket.yaml", "--dry-run") & HEAVY


def test_a_run_with_nothing_to_make_imports_nothing_heavy() -> None:
    assert not modules(_FINISHED) & HEAVY


def test_a_plan_counts_tokens_without_torch() -> None:
    plan = ["plan", "dmapo", "-c", "configs/pocket.yaml", "--no-write", "prompts.sources=[{type: pocket, count: 24}]"]
    assert not modules(_COMMAND, *plan) & (HEAVY - {"pandas", "transformers"})  # pyarrow imports pandas


def test_status_of_a_local_run_reads_it_without_tables(tmp_path: Path) -> None:
    manifest = {"dag": "dmapo", "num_shards": 4, "stages": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert not modules(_COMMAND, "status", str(tmp_path)) & (HEAVY | TABLES | NETWORK)


def test_runs_are_listed_without_tables(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    manifest = {"dag": "dmapo", "num_shards": 4, "stages": {}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert not modules(_COMMAND, "list", str(tmp_path)) & (HEAVY | TABLES | {"httpx", "aiohttp", "huggingface_hub"})
