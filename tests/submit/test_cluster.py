"""Runs submitted to a real cluster: a head with its dashboard, nodes that join and that are killed in mid-stage.

Models sit behind an endpoint on loopback, so that every process is real and none is heavy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from ray_pipeline.submit.package import package
from tests.dags.conftest import CONFIG, SMALL, Quorum, manifest, tables, wait_until
from tests.dags.in_process import here
from tests.endpoint import Answer, Endpoint, opinion, said
from tests.hosts import hosts_can_be_made
from tests.ray_nodes import Node, RayNodes

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
JUDGE = {"quorum-role": "judge"}
RUBRICS = ("helpfulness", "factuality")
SECONDS = 400.0


class Replies:
    """Replies that depend on what is asked and on nothing else; a score takes `seconds`, an answer `answering`."""

    def __init__(self, seconds: float, answering: float = 0.0) -> None:
        self.seconds, self.answering = seconds, answering

    def __call__(self, body: dict[str, Any], number: int) -> Answer:
        asked = json.dumps([body["messages"], body.get("seed")])
        value = int(hashlib.sha256(asked.encode()).hexdigest(), 16)
        if "response_format" not in body:
            return dataclasses.replace(said(f"answer {value % 1000}"), delay=self.answering)
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
            "writer": {**asked, "model": "writer", "placement": {**place, "concurrency": 2}},
            "judge": {**asked, "model": "judge", "placement": {**place, "concurrency": 1}},
        },
        "prompts": {"sources": [{"type": "pocket", "count": 24, "seed": 0}], "num_shards": 16},
        "candidates": {"model": "writer", "k": 1},
        "judge": {"rubrics": [{"name": name, "text": f"{name}?"} for name in RUBRICS]},
        "gate": {"tau": tau, "use_critic": False},
        "ray": {"tables": {"label_selector": JUDGE}},
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


def test_a_job_is_submitted_again_from_a_changed_tree_and_after_the_head_was_lost(tree: Path, tmp_path: Path) -> None:
    run, key, replies = tmp_path / "shared" / "run", {"QUORUM_TEST_KEY": "x"}, Replies(seconds=0.3)
    with RayNodes(cpus=2) as nodes, Endpoint(replies) as server:
        (tree / "job.yaml").write_text(yaml.safe_dump(config(server.url)))
        # The head has no key: a label keeps engines off it, so it needs none.
        nodes.add(labels=JUDGE, resources={"engine": 1}, env=key)
        submit = ["submit", "dmapo", "-c", "job.yaml", "--address", nodes.dashboard]
        refused = command(nodes, tree, *submit, "--to", "prompts")
        first = command(nodes, tree, *submit, "--to", "candidates", "--run-dir", str(run))
        # The job's own exit code and words come back.
        assert re.search(r"run.root is 'runs'.*absolute path.*s3://", refused.ends(2, SECONDS))
        output = first.ends(0, SECONDS)
        assert "2 nodes read and write in" in output and "24 prompts" in output
        assert not list(run.glob("_probe*"))

        (tree / "job.yaml").write_text(yaml.safe_dump(config(server.url, tau=1.0)))
        (tree / "note.py").write_text("changed = True\n")
        again = command(nodes, tree, *submit, "--to", "gate", "--run-dir", str(run), "--resubmit", "1")
        wait_until(again, lambda: len(asked(server, "judge")) >= 12)
        wait_until(again, lambda: counted(nodes.metrics()) > 0, seconds=10)
        assert nodes.head is not None
        for node in [nodes.head, *nodes.nodes]:
            node.kill()
        nodes.nodes.clear()
        replies.seconds = 0.0
        nodes.start_head()
        nodes.add(labels=JUDGE, resources={"engine": 1}, env=key)
        output = again.ends(0, SECONDS)

    assert "was interrupted" in output and "resubmitting, 1 of 1" in output
    assert len(re.findall(r"candidates +done before", output)) == 2
    assert len(asked(server, "writer")) == 24
    questions = asked(server, "judge")
    assert len(set(questions)) == 24 * len(RUBRICS)
    # What was not flushed when the machines went (2 s of one call at a time) is asked again, and nothing else.
    assert len(questions) - len(set(questions)) <= 8
    verdicts = pq.read_table(run / manifest(run)["stages"]["judge"]["path"]).to_pylist()
    assert len({(v["candidate_id"], v["judge"]) for v in verdicts}) == len(verdicts) == 24 * len(RUBRICS)


def counted(page: str) -> float:
    """Calls of the judge in this run, as Prometheus reads them."""
    lines = [line for line in page.splitlines() if line.startswith("ray_quorum_calls_total{")]
    own = [line for line in lines if 'run="run"' in line and 'stage="judge"' in line and 'source="engine"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in own)


def asked(server: Endpoint, model: str) -> list[str]:
    """What a model was asked so far."""
    return [json.dumps([b["messages"], b.get("seed")]) for b in list(server.asked) if b["model"] == model]


def test_nodes_that_join_get_actors_and_nodes_that_die_cost_no_row(tree: Path, tmp_path: Path) -> None:
    """One run: a node at work is killed in candidates, judge and dataset-rows, and one joins in the middle of judge."""
    run, key = tmp_path / "run", {"QUORUM_TEST_KEY": "sk-only-on-judging-nodes"}
    replies = Replies(seconds=1.0, answering=0.5)
    # Each judging node is a host with an address of its own, where that can be had here.
    own = hosts_can_be_made()
    with (
        RayNodes(cpus=2, dashboard=False, own_addresses=own) as nodes,
        Endpoint(replies, host=nodes.ip) as server,
    ):
        (tree / "job.yaml").write_text(yaml.safe_dump(config(server.url)))
        arguments = ["run", "dmapo", "-c", "job.yaml", "--to", "datasets"]
        working = command(nodes, tree, *arguments, "--run-dir", str(run))
        # A driver sits on a node of its host, and without addresses of their own here all are: while there is one
        # alone it is the head, which lives.
        wait_until(working, lambda: "prompts: done" in working.output)
        for _ in range(2):
            nodes.add(resources={"engine": 1}, labels=JUDGE, env=key)
        wait_until(working, lambda: len(asked(server, "writer")) >= 4)
        kill(nodes, nodes.at_work("ShardActor"), key)

        # As slow as this, the stage is not over before another node is there.
        wait_until(working, lambda: len(asked(server, "judge")) >= 2)
        assert "judge: actor 3" not in working.output
        nodes.add(resources={"engine": 1}, labels=JUDGE, env=key, wait=False)
        wait_until(
            working, lambda: re.search(r"judge: actor 3 begins on \d+\.\d+\.\d+\.\d+", working.output) is not None
        )
        replies.seconds = 0.1
        kill(nodes, nodes.at_work("ShardActor"), key)
        assert "judge: done" not in working.output

        # `ray.tables` keeps what has no engine on these nodes, too.
        wait_until(working, lambda: "gate: done" in working.output and bool(nodes.at_work("_make_columnar")))
        kill(nodes, nodes.at_work("_make_columnar"), key)
        assert "dataset-rows: done" not in working.output
        working.ends(0, SECONDS)

        replay, number = tmp_path / "replay", len(server.asked)
        settings = [f"calls.root={run / 'calls'}", "calls.replay_only=true"]
        command(nodes, tree, *arguments, "--run-dir", str(replay), *settings).ends(0, SECONDS)
        assert len(server.asked) == number

    stages = ("prompts", "candidates", "judge", "gate", "dataset-rows", "datasets")
    assert tables(replay, stages) == tables(run, stages)
    for model, calls in (("writer", 24), ("judge", 24 * len(RUBRICS))):
        questions = asked(server, model)
        assert len(set(questions)) == calls
        # What a dead node had not flushed (2 s of its calls) is asked again, and nothing else.
        assert len(questions) - calls <= 16
    assert len(server.clients) >= (2 if own else 1)
    assert all(h["Authorization"] == "Bearer " + key["QUORUM_TEST_KEY"] for h in server.headers)
    verdicts = pq.read_table(run / manifest(run)["stages"]["judge"]["path"]).to_pylist()
    assert {v["parse_status"] for v in verdicts} == {"ok"}


def kill(nodes: RayNodes, at_work: Sequence[Node], env: Mapping[str, str]) -> None:
    """The first of these nodes dies, and another joins, as with an autoscaler."""
    at_work[0].kill()
    nodes.nodes.remove(at_work[0])
    nodes.add(resources={"engine": 1}, labels=JUDGE, env=env, wait=False)


def test_a_node_that_dies_in_training_costs_the_steps_since_its_checkpoint(tmp_path: Path) -> None:
    data, run, place = tmp_path / "data", tmp_path / "run", {"quorum-role": "train"}
    with Endpoint(opinion) as server:
        endpoint = f"{{base_url: '{server.url}', api_key_env: null}}"
        asked = ["candidates.model=judge", "prompt_templates=default"]
        asked += [f"judge.rubrics={json.dumps([{'name': name, 'text': f'{name}?'} for name in RUBRICS])}"]
        asked += [f"models.judge={{engine: openai, model: m, canary: false, endpoint: {endpoint}}}"]
        here("run", "dmapo", "-c", CONFIG, *SMALL, *asked, "--to", "datasets", "--run-dir", str(data))
    with RayNodes(cpus=2, dashboard=False) as nodes:
        training = Quorum(
            *["run", "dmapo", "-c", CONFIG, *SMALL, *asked, "--to", "train", "--run-dir", str(run)],
            *[f"calls.root={data / 'calls'}", "calls.replay_only=true"],
            *["train.num_workers=1", "train.global_batch=8", "train.epochs=4", "train.save_steps=3"],
            "train.label_selector.quorum-role=train",
            env={**nodes.env, "RAY_ADDRESS": nodes.address},
        )
        wait_until(training, lambda: "prompts: done" in training.output)  # the driver sits on the head
        nodes.add(labels=place)

        def step() -> int:
            return next((json.loads(f.read_text())["step"] for f in run.glob("train-*/progress.json")), 0)

        wait_until(training, lambda: step() >= 4)
        nodes.nodes[0].kill()
        nodes.nodes.clear()
        nodes.add(labels=place, wait=False)
        training.ends(0, SECONDS)

    stage = manifest(run)["stages"]["train"]
    assert 0 < stage["facts"]["resumed_from"] < stage["facts"]["steps"]
    metrics = pq.read_table(run / stage["path"] / "train_metrics.parquet").to_pylist()
    steps = [row["step"] for row in metrics if row["split"] == "train"]
    assert steps == list(range(1, stage["facts"]["steps"] + 1))
    stages = ("prompts", "candidates", "judge", "critic", "gate", "dataset-rows", "datasets")
    assert tables(run, stages) == tables(data, stages)
