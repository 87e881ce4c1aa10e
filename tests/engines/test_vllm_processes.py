"""No engine process outlives its owner, and a dead engine is noticed at once. Processes are found by their ids."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

SOON = 20.0  # seconds; an idle machine needs three

OWNER = """
import asyncio, json, sys, threading, time
import psutil
from ray_pipeline.engines.base import Sampling
from ray_pipeline.engines.vllm import VllmEngine, VllmSpec

def engine_processes():
    # Everything below this process but Python's own helper, which ends with it.
    return [[p.pid, p.create_time()] for p in psutil.Process().children(recursive=True)
            if p.status() == psutil.STATUS_ZOMBIE or "resource_tracker" not in " ".join(p.cmdline())]

def kill_first_core():
    while True:
        for process in psutil.Process().children():
            command = " ".join(process.cmdline())
            if "EngineCore" in command or "spawn_main" in command:
                time.sleep(1.0)
                process.kill()
                return
        time.sleep(0.05)

async def main(model, then):
    engine = VllmEngine(VllmSpec(model, dtype="float32", canary=False))
    if then == "start again":
        killer = threading.Thread(target=kill_first_core)
        killer.start()
        await engine.start()
        assert not killer.is_alive(), "nothing was killed"
        then = "close"
    await engine.start()
    await engine.chat([{"role": "user", "content": "x"}], Sampling(max_tokens=2))
    forever = Sampling(max_tokens=1900, extra=(("ignore_eos", True),))
    calls = [asyncio.create_task(engine.chat([{"role": "user", "content": str(i)}], forever)) for i in range(40)]
    await asyncio.sleep(0.5)
    print(json.dumps(engine_processes()), flush=True)
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


def start_owner(model: Path, then: str, tmp_path: Path) -> tuple[subprocess.Popen[str], list[list[float]]]:
    """Run an owner until its engine answers; its process and [pid, start time] of the engine's."""
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(model), then],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    assert process.stdout
    line = process.stdout.readline()
    assert line, (tmp_path / "log").read_text()[-3000:]
    processes = json.loads(line)
    assert len(processes) >= 2  # the core and the reaper
    return process, processes


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


def core_of(processes: list[list[float]]) -> int:
    """The engine core: the biggest of them."""
    return max(alive(processes), key=lambda process: process.memory_info().rss).pid


def test_a_killed_core_is_noticed_by_every_call(qwen3: Path, tmp_path: Path) -> None:
    owner, processes = start_owner(qwen3, "wait", tmp_path)
    assert owner.stdout
    os.kill(core_of(processes), signal.SIGKILL)
    kinds, seconds = json.loads(owner.stdout.readline())
    assert kinds == ["EngineDead"]
    assert seconds < SOON
    assert owner.wait(60) == 0  # and the owner can still end by itself
    assert_gone(processes)


@pytest.mark.parametrize("then", ["close", "exit", "start again"])
def test_a_normal_end_leaves_nothing(qwen3: Path, tmp_path: Path, then: str) -> None:
    """Also when the first core was killed while it started: a second one took its place."""
    owner, processes = start_owner(qwen3, then, tmp_path)
    if then != "exit":
        assert owner.stdout
        kinds, left = json.loads(owner.stdout.readline())
        assert kinds == ["EngineDead"]
        assert left == []
    assert owner.wait(60) == 0
    assert_gone(processes)


def test_a_killed_owner_leaves_nothing(qwen3: Path, tmp_path: Path) -> None:
    owner, processes = start_owner(qwen3, "wait", tmp_path)
    owner.kill()
    owner.wait(10)
    assert_gone(processes)


DRIVER = """
import asyncio, json, os, signal, sys, time
from pathlib import Path
import psutil, ray
from ray_pipeline.engines.base import EngineDead, Sampling
from ray_pipeline.engines.vllm import VllmEngine, VllmSpec

class Worker:
    def __init__(self, model, notes, troubles):
        self.engine = VllmEngine(VllmSpec(model, dtype="float32", canary=False))
        self.notes, self.troubles = Path(notes), troubles

    def first_time(self, name):
        # A note on disk: the actor that takes over must not meet the same trouble again.
        try:
            (self.notes / name).touch(exist_ok=False)
            return True
        except FileExistsError:
            return False

    async def __call__(self, batch):
        shard = int(batch["item"][0])
        await self.engine.start()
        below = psutil.Process().children(recursive=True)
        processes = [[p.pid, p.create_time()] for p in [psutil.Process(), *below]]
        (self.notes / f"processes-{os.getpid()}").write_text(json.dumps(processes))
        (self.notes / "ready").touch()
        trouble = self.troubles.get(shard)
        if trouble and self.first_time(trouble):
            core = max(below, key=lambda p: p.memory_info().rss)
            os.kill(core.pid if trouble == "core" else os.getpid(), signal.SIGKILL)
        try:
            reply = await self.engine.chat([{"role": "user", "content": str(shard)}], Sampling(max_tokens=4))
        except EngineDead:
            os._exit(1)  # Ray Data starts another actor and repeats the shard
        if trouble == "hold":
            await asyncio.sleep(600)
        yield {"shard": [shard], "tokens": [reply.completion_tokens], "pid": [os.getpid()]}

if __name__ == "__main__":

    model, notes, troubles = sys.argv[1:]
    troubles = {int(k): v for k, v in json.loads(troubles).items()}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(list(range(6)), override_num_blocks=6).map_batches(
        Worker, fn_constructor_args=(model, notes, troubles), batch_size=1, num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4, max_concurrent_calls_per_actor=3))
    rows = dataset.take_all()
    rows = json.dumps([{k: int(v) for k, v in row.items()} for row in rows])
    Path(notes, "rows").write_text(rows)  # Ray itself writes on stdout
    Path(notes, "done").touch()
    time.sleep(600)
"""


def start_driver(model: Path, tmp_path: Path, troubles: dict[int, str]) -> tuple[subprocess.Popen[str], Path]:
    script, notes = tmp_path / "driver.py", tmp_path / "notes"
    script.write_text(DRIVER)
    notes.mkdir()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(model), str(notes), json.dumps(troubles)],
            stdout=log,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_AUTH_MODE": "disabled"},
        )
    return process, notes


def wait_for(note: Path, driver: subprocess.Popen[str], tmp_path: Path, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not note.exists() and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.2)
    assert note.exists(), (tmp_path / "log").read_text()[-3000:]


def noted(notes: Path) -> list[list[float]]:
    return [entry for file in notes.glob("processes-*") for entry in json.loads(file.read_text())]


def test_ray_data_replaces_actors_whose_engine_or_process_died(qwen3: Path, tmp_path: Path) -> None:
    driver, notes = start_driver(qwen3, tmp_path, {1: "core", 3: "actor"})
    try:
        wait_for(notes / "done", driver, tmp_path)
        rows: list[dict[str, Any]] = json.loads((notes / "rows").read_text())
        assert sorted(row["shard"] for row in rows) == list(range(6))
        assert all(row["tokens"] == 4 for row in rows)
        assert len(list(notes.glob("processes-*"))) == 3  # the first actor, the second, and the one that ended it
        assert (notes / "core").exists() and (notes / "actor").exists()
        assert_gone(noted(notes))  # the driver lives on: the data set's end alone frees them
    finally:
        driver.kill()
        driver.wait(10)


def test_a_killed_driver_leaves_no_engine(qwen3: Path, tmp_path: Path) -> None:
    driver, notes = start_driver(qwen3, tmp_path, {0: "hold", 1: "hold", 2: "hold"})
    try:
        wait_for(notes / "ready", driver, tmp_path)
        time.sleep(1.0)
    finally:
        driver.kill()
        driver.wait(10)
    assert_gone(noted(notes), 40.0)
