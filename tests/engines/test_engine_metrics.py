"""What goes on in an engine, on Ray's Prometheus endpoint: a real engine in a real actor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ray_nodes import RayNodes

pytestmark = pytest.mark.e2e

ANSWERED = r'ray_quorum_engine_finished_total{[^}]*model="qwen3"[^}]*} 7'  # five calls, two of the canary

ACTOR = """
import asyncio, sys
import ray
from ray_pipeline.engines.base import Sampling
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.graph.cluster import connected

@ray.remote(num_cpus=0)
class Actor:
    async def ask(self, model, n):
        engine = VllmEngine(VllmSpec(model, dtype="float32", max_model_len=128, args={"disable_log_stats": False}))
        for i in range(n):
            await engine.chat([{"role": "user", "content": f"say {i}"}], Sampling(max_tokens=8))
        await asyncio.sleep(8)  # Ray reports every second here
        await engine.close()

with connected({"address": sys.argv[1]}):
    ray.get(Actor.remote().ask.remote(sys.argv[2], 5))
"""


def test_an_engine_that_is_told_to_exports_what_vllm_counts(qwen3: Path) -> None:
    with RayNodes(cpus=1, dashboard=False) as nodes:
        command = [sys.executable, "-c", ACTOR, nodes.address, str(qwen3)]
        asking = subprocess.Popen(command, env={**os.environ, **nodes.env})
        seen = ""
        while asking.poll() is None and not re.search(ANSWERED, seen):
            seen += nodes.metrics()  # a gauge that nobody sets is left out of the next page
            time.sleep(0.2)
        asking.kill()
        asking.wait(20)
    assert re.search(ANSWERED, seen), sorted(set(re.findall(r"^ray_quorum\w+", seen, re.M)))
    for name in ("requests", "kv_cache_usage", "latency_seconds_count"):
        assert re.search(rf"^ray_quorum_engine_{name}{{", seen, re.M)
