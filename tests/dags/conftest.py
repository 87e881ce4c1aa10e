"""Runs of the real command in processes of their own, and eyes on what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from ray_pipeline.engines.core_server import WARM_PYTHON
from tests.interpreter import interpreter

CONFIG = str(Path(__file__).parents[1] / "one_judge.yaml")
ROOT = Path(__file__).parents[2]
#: A small run: 32 prompts, a few of them held out.
COUNT = 32
SMALL = [f"prompts.sources.0.count={COUNT}", "prompts.num_shards=4"]


class Quorum:
    """`quorum` as a user types it, with the pids of every engine process that it ever had.

    Args:
        warm: its workers are forked from the tests' server, as from one of its own, which takes 8 s of CPU time.
        python: what runs it.
    """

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        prefix: Sequence[str] = (),
        warm: bool = False,
        python: str = sys.executable,
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if warm or name != WARM_PYTHON}
        self.process = subprocess.Popen(
            [*prefix, python, "-m", "ray_pipeline.cli", *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, **(env or {})},
            start_new_session=True,
        )
        self._begun = psutil.Process(self.process.pid).create_time()
        self.engines: dict[int, psutil.Process] = {}
        self.actors: dict[int, psutil.Process] = {}
        self._lines: list[str] = []
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._read, self._look)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    def _look(self) -> None:
        while self.process.poll() is None:
            # Below the tests' process are this one and the tests' warm server, which has processes of earlier ones.
            for child in descendants(os.getpid()):
                try:
                    if child.create_time() < self._begun:
                        continue
                    command = child.cmdline()
                except psutil.Error:
                    continue
                name = command[0] if command else ""
                # A core that has just been forked has not its name yet.
                if name.startswith("VLLM::") or any("multiprocessing.forkserver" in word for word in command):
                    self.engines[child.pid] = child
                elif "ShardActor" in name:
                    self.actors[child.pid] = child
            time.sleep(0.5)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait(self, timeout: float = 900) -> int:
        code = self.process.wait(timeout)
        for thread in self._threads:
            thread.join(timeout=10)
        return code

    def ends(self, expect: int, timeout: float = 900) -> str:
        """Wait until it ends with this exit code; everything that it said."""
        code = self.wait(timeout)
        assert code == expect, f"exit code {code}\n{self.output}"
        return self.output

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def living_engines(self, within: float = 20) -> list[int]:
        """Pids of engine processes that are still there after some seconds."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            alive = [pid for pid, p in self.engines.items() if _runs(p)]
            if not alive:
                return []
            time.sleep(0.3)
        return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def run(*arguments: str, expect: int = 0, warm: bool = True, **kwargs: Any) -> Quorum:
    """Run a command to its end. Where it is warm, so is the command itself."""
    quorum = Quorum(*arguments, warm=warm, python=interpreter() if warm else sys.executable, **kwargs)
    quorum.ends(expect)
    return quorum


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def engine_calls(folder: Path) -> dict[str, int]:
    """Calls that an engine answered, by stage; stages that called nobody are left out."""
    stages = manifest(folder)["stages"]
    calls = {name: int(entry.get("usage", {}).get("calls_engine", 0)) for name, entry in stages.items()}
    return {name: n for name, n in calls.items() if n}


def calls_by_role(calls: Path) -> dict[str, int]:
    """Distinct calls in a call log, by role."""
    keys: dict[str, set[str]] = {}
    for part in calls.rglob("*.parquet"):
        try:
            table = pq.read_table(part, columns=["call_key", "role"])
        except FileNotFoundError:  # Merged away while we look.
            continue
        for key, role in zip(table["call_key"].to_pylist(), table["role"].to_pylist(), strict=True):
            keys.setdefault(role, set()).add(key)
    return {role: len(found) for role, found in keys.items()}


def calls_of(calls: Path, roles: str) -> int:
    """Distinct calls in a call log of the roles that begin so."""
    return sum(n for role, n in calls_by_role(calls).items() if role.startswith(roles))


def contradictions(calls: Path) -> list[set[str]]:
    """Different replies to one call: each call must have been made once."""
    texts: dict[str, set[str]] = {}
    for part in calls.rglob("*.parquet"):
        for row in pq.read_table(part, columns=["call_key", "text"]).to_pylist():
            texts.setdefault(row["call_key"], set()).add(row["text"])
    return [found for found in texts.values() if len(found) > 1]


def tables(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of every Parquet file of the named stages."""
    stages = manifest(folder)["stages"]
    found = {}
    for name in names:
        base = folder / stages[name]["path"]
        for file in sorted(base.rglob("*.parquet")):
            found[f"{name}/{file.relative_to(base)}"] = file.read_bytes()
    return found


def wait_until(quorum: Quorum, ready: Callable[[], bool], seconds: float = 480) -> None:
    end = time.monotonic() + seconds
    while True:
        begun = time.monotonic()
        if ready():
            return
        assert quorum.process.poll() is None, f"ended before the moment came\n{quorum.output}"
        assert time.monotonic() < end, f"the moment never came\n{quorum.output}"
        time.sleep(max(0.05, 3 * (time.monotonic() - begun)))  # a look may read a whole call log


@pytest.fixture(scope="session", autouse=True)
def _engines_of_these_tests() -> Iterator[None]:
    yield
    if "tests.dags.in_process" in sys.modules:
        sys.modules["tests.dags.in_process"].close_engines()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run up to the datasets, whose call log other tests start from: made once for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "small" / "run"
    with FileLock(shared / "small.lock"):
        if not (folder / "datasets").exists():
            command = ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "datasets", *SMALL]
            quorum = run(*command, "--executor", "inprocess")
            assert quorum.living_engines() == []
    return folder
