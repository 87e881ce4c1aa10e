"""Runs submitted to a real cluster: a head with its dashboard, nodes that join and that are killed in mid-stage.

Models sit behind an endpoint on loopback, so that every process is real and none is heavy.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from ray_pipeline.submit.package import package
from tests.dags.conftest import Quorum, wait_until
from tests.endpoint import Answer, Endpoint, said
from tests.hosts import hosts_can_be_made
from tests.ray_nodes import RayNodes

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
JUDGE = {"quorum-role": "judge"}
RUBRICS = ("helpfulness", "factuality")
SECONDS = 400.0


class Replies:
    """Replies that depend on what is asked and on nothing else; a score takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, body: dict[str, Any], number: int) -> Answer:
        asked = json.dumps([body["messages"], body.get("seed")])
        value = int(hashlib.sha256(asked.encode()).hexdigest(), 16)
        if "response_format" not in body:
            return said(f"answer {value % 1000}")
        reply = said(json.dumps({"reason": "because", "score": 1 + value % 10}))
        reply.delay = self.seconds
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


def command(nodes: RayNodes, tree: Path, *arguments: str) -> Quorum:
    """`quorum` as a user types it, in a working directory that was packed as for a cluster."""
    return Quorum(*arguments, cwd=tree, env={**nodes.env, "PYTHONPATH": str(tree), "RAY_ADDRESS": nodes.address})


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
    (tree / "job.yaml").write_text(yaml.safe_dump(config("http://127.0.0.1:9/v1")))
    with RayNodes(cpus=2) as nodes:
        # The head has no key: a label keeps engines off it, so it needs none.
        nodes.add(labels=JUDGE, env={"QUORUM_TEST_KEY": "x"})
        submit = ["submit", "dmapo", "-c", "job.yaml", "--address", nodes.dashboard, "--to", "prompts"]
        refused = command(nodes, tree, *submit)
        first = command(nodes, tree, *submit, "--run-dir", str(run))
        # The job's own exit code and words come back.
        assert re.search(r"run.root is 'runs'.*absolute path.*s3://", refused.ends(2, SECONDS))
        output = first.ends(0, SECONDS)
        assert "2 nodes read and write in" in output and "24 prompts" in output
        assert not list(run.glob("_probe*"))

        (tree / "job.yaml").write_text(yaml.safe_dump(config("http://127.0.0.1:9/v1", tau=1.0)))
        (tree / "note.py").write_text("changed = True\n")
        assert re.search(r"prompts +done before", command(nodes, tree, *submit, "--run-dir", str(run)).ends(0, SECONDS))


def test_a_node_that_joins_gets_actors_and_one_that_dies_costs_no_row(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    key = {"QUORUM_TEST_KEY": "sk-only-on-judging-nodes"}
    # So slow that the stage is not over before another node is there; then as fast as it can.
    replies = Replies(seconds=3.0)
    # Each judging node is a host with an address of its own, where that can be had here.
    own = hosts_can_be_made()
    with (
        RayNodes(cpus=2, dashboard=False, own_addresses=own) as nodes,
        Endpoint(replies, host=nodes.ip) as server,
    ):

        def asks() -> list[str]:
            return [json.dumps(body["messages"]) for body in list(server.asked) if body["model"] == "judge"]

        (tree / "job.yaml").write_text(yaml.safe_dump(config(server.url)))
        judging = command(nodes, tree, "run", "dmapo", "-c", "job.yaml", "--run-dir", str(run), "--to", "gate")
        # A driver sits on a node of its host, and without addresses of their own here all are: while there is one
        # alone it is the head, which lives.
        wait_until(judging, lambda: "prompts: done" in judging.output, seconds=300)
        first = nodes.add(resources={"engine": 1}, labels=JUDGE, env=key)
        wait_until(judging, lambda: len(asks()) >= 2, seconds=300)
        server.most_at_once = 0
        nodes.add(resources={"engine": 1}, labels=JUDGE, env=key, wait=False)
        # An actor has one call under way at a time here, so two at once are two actors.
        wait_until(judging, lambda: server.most_at_once >= 2, seconds=300)
        replies.seconds = 0.2
        first.kill()
        when = len(asks())
        judging.ends(0, SECONDS)
        asked = asks()

    assert when < 24 * len(RUBRICS) <= len(asked), "the node died in the middle of the stage"
    assert len(server.clients) >= (2 if own else 1)
    assert all(h["Authorization"] == "Bearer " + key["QUORUM_TEST_KEY"] for h in server.headers)
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert {stages[name]["status"] for name in ("prompts", "candidates", "judge", "gate")} == {"done"}
    verdicts = pq.read_table(run / stages["judge"]["path"]).to_pylist()
    assert len({(v["candidate_id"], v["judge"]) for v in verdicts}) == len(verdicts) == 24 * len(RUBRICS)
    assert {v["parse_status"] for v in verdicts} == {"ok"}
    # What the dead node had not flushed (2 s of one call at a time) is asked again, and nothing else.
    assert len(asked) - len(set(asked)) <= 8
