"""No engine process outlives its owner, and a dead engine is noticed at once. Processes are found by their ids.

That Ray Data replaces actors whose engine or process died is tested with whole runs, in `tests/dags/test_resume.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.interpreter import interpreter
from tests.models import needs_vllm

pytestmark = [pytest.mark.e2e, needs_vllm, pytest.mark.timeout(1200)]

SOON = 20.0  # seconds; an idle machine needs three

OWNER = """
import asyncio, json, os, signal, sys, threading, time
import psutil
from ray_pipeline.engines.base import Sampling
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_spec import VllmSpec

def engine_processes():
    # Everything below this process but Python's own helper, which ends with it.
    return [[p.pid, p.create_time()] for p in psutil.Process().children(recursive=True)
            if p.status() == psutil.STATUS_ZOMBIE or "resource_tracker" not in " ".join(p.cmdline())]

def kill_first_core():
    while True:
        # The core is forked from a server, which is the only child that has children.
        for process in [core for child in psutil.Process().children() for core in child.children()]:
            time.sleep(0.2)  # in the middle of its start
            process.kill()
            return
        time.sleep(0.05)

def ended_by_itself(pid):
    # What vLLM runs into when the core ends between its two looks at it.
    os.kill(pid, signal.SIGKILL)
    raise psutil.NoSuchProcess(pid)

async def main(model, then):
    os.environ.pop("QUORUM_WARM_PYTHON", None)  # its engine has a server of its own, which imports as a user's does
    engine = VllmEngine(VllmSpec(model, dtype="float32", canary=False))
    if then == "start again":
        killer = threading.Thread(target=kill_first_core)
        killer.start()
        await engine.start()
        assert not killer.is_alive(), "nothing was killed"
        import vllm.v1.utils
        vllm.v1.utils.kill_process_tree = ended_by_itself
        then = "close"
    await engine.start()
    await engine.chat([{"role": "user", "content": "x"}], Sampling(max_tokens=2))
    forever = Sampling(max_tokens=1900, extra=(("ignore_eos", True),))
    calls = [asyncio.create_task(engine.chat([{"role": "user", "content": str(i)}], forever)) for i in range(40)]
    await asyncio.sleep(0.5)
    print(json.dumps([os.getpid(), *engine_processes()]), flush=True)
    begin = time.monotonic()
    if then == "wait":
        ends = await asyncio.gather(*calls, return_exceptions=True)
        late = await asyncio.gather(engine.chat([{"role": "user", "content": "y"}], Sampling(max_tokens=2)),
                                    return_exceptions=True)
        print(json.dumps([sorted({type(e).__name__ for e in ends + late}), time.monotonic() - begin]), flush=True)
    elif then == "close":
        await engine.close()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        print(json.dumps([sorted({type(e).__name__ for e in ends}), engine_processes()]), flush=True)

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


def start_owner(model: Path, then: str, tmp_path: Path) -> tuple[subprocess.Popen[str], int, list[list[float]]]:
    """Run an owner until its engine answers.

    Returns:
        What waits for it, its pid, and [pid, start time] of the engine's processes.
    """
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [interpreter(), str(script), str(model), then], stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout
    line = process.stdout.readline()
    assert line, (tmp_path / "log").read_text()[-3000:]
    pid, *processes = json.loads(line)
    assert len(processes) >= 3  # the core, the server that it was forked from, and the reaper
    return process, pid, processes


def alive(processes: list[list[float]]) -> list[psutil.Process]:
    found = []
    for pid, created in processes:
        try:
            process = psutil.Process(int(pid))
            if abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def assert_gone(processes: list[list[float]], seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = alive(processes)
    for process in left:
        process.kill()
    assert not left


def server_of(processes: list[list[float]]) -> psutil.Process:
    """The one that the core was forked from."""
    (found,) = [process for process in alive(processes) if process.children()]
    return found


def core_of(processes: list[list[float]]) -> int:
    """The engine core: the biggest of them."""
    return max(alive(processes), key=lambda process: process.memory_info().rss).pid


def test_a_killed_core_is_noticed_by_every_call(qwen3: Path, tmp_path: Path) -> None:
    owner, _, processes = start_owner(qwen3, "wait", tmp_path)
    assert owner.stdout
    os.kill(core_of(processes), signal.SIGKILL)
    kinds, seconds = json.loads(owner.stdout.readline())
    assert kinds == ["EngineDead"]
    assert seconds < SOON
    assert owner.wait(60) == 0  # and the owner can still end by itself
    assert_gone(processes)


def test_a_killed_server_takes_the_core_along(qwen3: Path, tmp_path: Path) -> None:
    """As Ray does it to the children of an actor that ends; their own children it leaves alone."""
    owner, _, processes = start_owner(qwen3, "wait", tmp_path)
    assert owner.stdout
    server_of(processes).kill()
    kinds, seconds = json.loads(owner.stdout.readline())
    assert kinds == ["EngineDead"] and seconds < SOON
    assert owner.wait(60) == 0
    assert_gone(processes)


@pytest.mark.parametrize("then", ["exit", "start again"])
def test_a_normal_end_leaves_nothing(qwen3: Path, tmp_path: Path, then: str) -> None:
    """Also when the first core was killed at its start, and the second ended just when vLLM was about to kill it."""
    owner, _, processes = start_owner(qwen3, then, tmp_path)
    if then != "exit":
        assert owner.stdout
        kinds, left = json.loads(owner.stdout.readline())
        assert kinds == ["EngineDead"]
        assert left == []
    assert owner.wait(60) == 0
    assert_gone(processes)


def test_a_killed_owner_leaves_nothing(qwen3: Path, tmp_path: Path) -> None:
    owner, pid, processes = start_owner(qwen3, "wait", tmp_path)
    os.kill(pid, signal.SIGKILL)
    owner.wait(10)
    assert_gone(processes)
