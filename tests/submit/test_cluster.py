"""A run submitted to a real cluster: a head with its dashboard and one more node, each with processes of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_pipeline.submit.package import package
from tests.ray_nodes import RayNodes

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
JUDGE = {"quorum-role": "judge"}


def config(tau: float) -> dict[str, Any]:
    """Prompts of the pocket world; the judges sit behind an endpoint that nobody asks here."""
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "QUORUM_TEST_KEY"}
    judge = {"engine": "openai", "endpoint": endpoint, "canary": False, "model": "judge"}
    return {
        "run": {"name": "job"},
        "models": {
            "policy": {"model": "pocket:policy", "dtype": "float32"},
            "judge": {**judge, "placement": {"label_selector": JUDGE}},
        },
        "prompts": {"sources": [{"type": "pocket", "count": 24, "seed": 0}], "num_shards": 16},
        "candidates": {"model": "judge", "k": 1},
        "judge": {"rubrics": [{"name": "helpfulness", "text": "helpful?"}]},
        "gate": {"tau": tau, "use_critic": False},
    }


class Command:
    """`quorum` as a user types it, in a working directory that was packed as for a cluster."""

    def __init__(self, nodes: RayNodes, tree: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray_pipeline.cli", *arguments],
            cwd=tree,
            env={**os.environ, **nodes.env, "PYTHONPATH": str(tree), "RAY_ADDRESS": nodes.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, expect: int) -> str:
        output, _ = self.process.communicate(timeout=400)
        assert self.process.returncode == expect, f"exit code {self.process.returncode}\n{output}"
        return output


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working directory: what this checkout would submit, with a run folder in the way."""
    folder = tmp_path / "tree"
    package(ROOT).copy_to(folder)
    (folder / "runs/old").mkdir(parents=True)
    (folder / "runs/old/big.parquet").write_bytes(b"x" * 1000)
    return folder


def test_a_job_is_submitted_and_again_from_a_changed_tree(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "shared" / "run"
    (tree / "job.yaml").write_text(yaml.safe_dump(config(tau=2.5)))
    with RayNodes(cpus=2) as nodes:
        # The head has no key: a label keeps engines off it, so it needs none.
        nodes.add(labels=JUDGE, env={"QUORUM_TEST_KEY": "x"})
        submit = ["submit", "dmapo", "-c", "job.yaml", "--address", nodes.dashboard, "--to", "prompts"]
        refused = Command(nodes, tree, *submit)
        first = Command(nodes, tree, *submit, "--run-dir", str(run))
        # The job's own exit code and words come back.
        assert re.search(r"run.root is 'runs'.*absolute path.*s3://", refused.wait(2))
        output = first.wait(0)
        assert "2 nodes read and write in" in output and "24 prompts" in output
        assert not list(run.glob("_probe*"))

        (tree / "job.yaml").write_text(yaml.safe_dump(config(tau=1.0)))
        (tree / "note.py").write_text("changed = True\n")
        assert re.search(r"prompts +done before", Command(nodes, tree, *submit, "--run-dir", str(run)).wait(0))
