"""Runs submitted to a real cluster: a head with its dashboard, nodes that join and that are killed in mid-stage.

Models sit behind an endpoint on loopback, so that every process is real and none is heavy.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from ray_pipeline.submit.package import package
from tests.endpoint import Answer, Endpoint, said
from tests.ray_nodes import RayNodes

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
JUDGE = {"quorum-role": "judge"}
RUBRICS = ("helpfulness", "factuality")


def script(body: dict[str, Any], number: int) -> Answer:
    """Replies that depend on what is asked and on nothing else; judging takes its time."""
    asked = json.dumps([body["messages"], body.get("seed")])
    value = int(hashlib.sha256(asked.encode()).hexdigest(), 16)
    if "response_format" not in body:
        return said(f"answer {value % 1000}")
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    says: dict[str, Any] = {"reason": "because", "score": 1 + value % 10}
    if "flawed" in fields:
        says = {"reason": "because", "failure_type": "none", "flawed": False}
    reply = said(json.dumps(says))
    reply.delay = 0.4 if "score" in says else 0.0
    return reply


def config(url: str, tau: float = 2.5) -> dict[str, Any]:
    endpoint = {"base_url": url, "api_key_env": "QUORUM_TEST_KEY"}
    asked = {"engine": "openai", "endpoint": endpoint, "canary": False}
    place = {"label_selector": JUDGE, "max_actors": 4, "resources": {"engine": 1}, "shards_in_flight": 2}
    return {
        "run": {"name": "job"},
        "models": {
            "policy": {"model": "pocket:policy", "dtype": "float32"},
            "writer": {**asked, "model": "writer", "placement": place},
            "judge": {**asked, "model": "judge", "placement": {**place, "concurrency": 1}},
        },
        "prompts": {"sources": [{"type": "pocket", "count": 24, "seed": 0}], "num_shards": 16},
        "candidates": {"model": "writer", "k": 1},
        "judge": {"rubrics": [{"name": name, "text": f"{name}?"} for name in RUBRICS]},
        "gate": {"tau": tau, "use_critic": False},
    }


class Submitted:
    """`quorum submit` as a user types it."""

    def __init__(self, nodes: RayNodes, tree: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ray_pipeline.cli",
                "submit",
                "dmapo",
                "-c",
                "job.yaml",
                "--address",
                nodes.dashboard,
                *arguments,
            ],
            cwd=tree,
            env={**nodes.env, "PYTHONPATH": str(tree), "HOME": str(tree.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._lines.extend(self.process.stdout)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait(self, expect: int) -> str:
        code = self.process.wait(400)
        self._thread.join(10)
        assert code == expect, f"exit code {code}\n{self.output}"
        return self.output


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working directory: what this checkout would submit, with a run folder in the way."""
    folder = tmp_path / "tree"
    package(ROOT).copy_to(folder)
    (folder / "runs/old").mkdir(parents=True)
    (folder / "runs/old/big.parquet").write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    # The head has no key: engines are kept off it by a label, so it needs none.
    with RayNodes(cpus=2) as cluster:
        yield cluster


def wait_until(job: Submitted, ready: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert job.process.poll() is None, f"ended before the moment came\n{job.output}"
        assert time.monotonic() < end, f"the moment never came\n{job.output}"
        time.sleep(0.1)


def judge_asks(server: Endpoint) -> list[str]:
    return [json.dumps(body["messages"]) for body in server.asked if body["model"] == "judge"]


def test_a_run_is_submitted_twice_gains_a_node_and_loses_one(nodes: RayNodes, tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "shared" / "run"
    key = {"QUORUM_TEST_KEY": "sk-only-on-judging-nodes"}
    with Endpoint(script) as server:
        first = nodes.add(resources={"engine": 1}, labels=JUDGE, env=key)
        (tree / "job.yaml").write_text(yaml.safe_dump(config(server.url)))

        # Without a run folder that all nodes share: refused by the job, and its exit code comes back.
        refused = Submitted(nodes, tree, "--to", "prompts")
        to_prompts = Submitted(nodes, tree, "--run-dir", str(run), "--to", "prompts")
        assert re.search(r"run.root is 'runs'.*absolute path.*s3://", refused.wait(2))
        output = to_prompts.wait(0)
        assert "2 nodes read and write in" in output
        assert not list(run.glob("_probe*"))

        # The tree has changed: other thresholds, another file. The run goes on.
        (tree / "job.yaml").write_text(yaml.safe_dump(config(server.url, tau=1.0)))
        (tree / "note.py").write_text("changed = True\n")
        job = Submitted(nodes, tree, "--run-dir", str(run), "--to", "gate")
        wait_until(job, lambda: len(judge_asks(server)) >= 4)
        alone = server.most_at_once
        nodes.add(resources={"engine": 1}, labels=JUDGE, env=key, wait=False)
        wait_until(job, lambda: server.most_at_once > alone)  # one call at a time an actor: a second one is at work
        asked = len(judge_asks(server))
        assert asked < 40, "the stage was nearly over when the second actor came"
        first.kill()
        output = job.wait(0)
        asks = judge_asks(server)

    assert re.search(r"prompts +done before", output)
    manifest = json.loads((run / "manifest.json").read_text())["stages"]
    assert {manifest[name]["status"] for name in ("prompts", "candidates", "judge", "gate")} == {"done"}
    verdicts = pq.read_table(run / manifest["judge"]["path"]).to_pylist()
    assert len({(v["candidate_id"], v["judge"]) for v in verdicts}) == len(verdicts) == 24 * len(RUBRICS)
    assert {v["parse_status"] for v in verdicts} == {"ok"}
    # What the dead node had not flushed is asked again, and nothing else: two seconds of one call at a time, twice.
    assert len(asks) - len(set(asks)) <= 12
    files = {p.name for p in run.rglob("*.tmp")}
    assert not files
